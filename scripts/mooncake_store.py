#!/usr/bin/env python3
"""One process of Mooncake Store, for bench_store.py: `provide` lends memory to the store, `drive` is a client of it that
takes phases as lines of JSON and answers each with a line of JSON, as libs/client/examples/store_bench.rs does.

Zero copy on the client's side: put_from and get_into, with registered memory. Needs mooncake on PYTHONPATH.
"""

import ctypes
import json
import mmap
import sys
import threading
import time

from mooncake.store import MooncakeDistributedStore

MIB = 1 << 20


def connect(master, segment_bytes, buffer_bytes):
    store = MooncakeDistributedStore()
    status = store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, buffer_bytes, "tcp", "", master)
    if status != 0:
        raise SystemExit(f"mooncake_store: setup failed with {status}")
    return store


def provide(master, segment_bytes):
    _store = connect(master, segment_bytes, 16 * MIB)
    print("ready", flush=True)
    sys.stdin.read()


class Client:
    def __init__(self, master, value_bytes, values):
        self.store = connect(master, 0, 512 * MIB)
        self.value_bytes = value_bytes
        memory = mmap.mmap(-1, value_bytes * values)
        memory.write(b"\7" * (value_bytes * values))
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.memory = memory
        if self.store.register_buffer(self.base, value_bytes * values) != 0:
            raise SystemExit("mooncake_store: the buffer cannot be registered")

    def measure(self, phase):
        latencies = [[] for _ in range(phase["clients"])]
        failures = []
        start = threading.Barrier(phase["clients"] + 1)

        def work(client):
            try:
                start.wait()
                for batch in range(phase["first"], phase["first"] + phase["batches"]):
                    begun = time.perf_counter()
                    self.one(phase["op"], client, batch, phase["blocks"])
                    latencies[client].append(time.perf_counter() - begun)
            except Exception as failure:
                failures.append(repr(failure))

        threads = [threading.Thread(target=work, args=(client,)) for client in range(phase["clients"])]
        for thread in threads:
            thread.start()
        start.wait()
        begun = time.perf_counter()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
        if failures:
            raise SystemExit(f"mooncake_store: {failures[0]}")
        taken = sorted(second for of_client in latencies for second in of_client)
        return {
            "seconds": seconds,
            "bytes": phase["clients"] * phase["batches"] * phase["blocks"] * self.value_bytes,
            "p50_us": taken[len(taken) // 2] * 1e6,
            "p99_us": taken[min(len(taken) * 99 // 100, len(taken) - 1)] * 1e6,
        }

    def one(self, op, client, batch, blocks):
        keys = [f"{client}/{batch}/{block}" for block in range(blocks)]
        # Each thread has its part of the memory.
        first = client * blocks
        places = [self.base + (first + block) * self.value_bytes for block in range(blocks)]
        size = self.value_bytes
        if blocks == 1:
            done = {
                "put": lambda: self.store.put_from(keys[0], places[0], size) == 0,
                "get": lambda: self.store.get_into(keys[0], places[0], size) == size,
                "exists": lambda: self.store.is_exist(keys[0]) == 1,
            }[op]()
        else:
            sizes = [size] * blocks
            done = {
                "put": lambda: not any(self.store.batch_put_from(keys, places, sizes)),
                "get": lambda: self.store.batch_get_into(keys, places, sizes) == sizes,
                "exists": lambda: self.store.batch_is_exist(keys) == [1] * blocks,
            }[op]()
        if not done:
            raise RuntimeError(f"{op} of {keys[0]} failed")


def main():
    role, master, *rest = sys.argv[1:]
    if role == "provide":
        return provide(master, int(rest[0]))
    client = Client(master, int(rest[0]), int(rest[1]))
    for line in sys.stdin:
        phase = json.loads(line)
        if phase["op"] == "clear":
            client.store.remove_all(True)
            print("{}", flush=True)
        else:
            print(json.dumps(client.measure({"first": 0, **phase})), flush=True)


if __name__ == "__main__":
    main()
