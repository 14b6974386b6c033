#!/usr/bin/env python3
"""Measures a store node beside Mooncake Store and rewrites the table of docs/performance.md.

The same sizes, batches and clients for all, in turns within a second or so, round after round: a client process puts
blocks into a store process and gets them back, over loopback TCP, and, for ours, through shared memory too. Mooncake is its
PyPI wheel, fetched into target/peers: its master, one process that lends memory, and one client process with
registered memory (put_from and get_into).
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import types

from bench_transfer import Criterion, absences, claims_table, median, size
from pages import machine, replace_between, table
from transfer_subjects import KIB, MIB, MOONCAKE, PEERS, ROOT, TARGET, Ours, Streams, Unavailable, fetch_wheel, run
from transfer_subjects import processor_seconds_of, wait_until_listening

PAGE = ROOT / "docs" / "performance.md"
BENCH = TARGET / "release" / "examples" / "store_bench"
POOL_BYTES = 512 * MIB
# Of one phase: small beside the pool, so that what was put is still there to be got.
PHASE_BYTES = 192 * MIB
# Of all clients' batches together.
BATCH_BYTES_MAX = 64 * MIB
BATCHES_MAX = 400
SIZES = (4 * KIB, 64 * KIB, 512 * KIB, MIB, 4 * MIB, 16 * MIB)
MASTER_PORT = 50061


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """Batches of `blocks` blocks, put or got by `clients` clients at the same time."""

    block_bytes: int
    blocks: int
    clients: int

    @property
    def batches(self):
        """Of each client."""
        return max(2, min(BATCHES_MAX, PHASE_BYTES // (self.block_bytes * self.blocks * self.clients)))

    def __str__(self):
        clients = "" if self.clients == 1 else f", {self.clients} clients"
        return f"{self.blocks} × {size(self.block_bytes)}{clients}"


def cases(quick):
    sizes = (64 * KIB, MIB) if quick else SIZES
    shapes = [(bytes, blocks, clients) for bytes in sizes for blocks in (1, 16) for clients in (1, 2, 4)]
    return [Case(*shape) for shape in shapes if shape[0] * shape[1] * shape[2] <= BATCH_BYTES_MAX]


class Lines:
    """A process that answers lines of JSON with lines of JSON."""

    def __init__(self, command, **options):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([str(word) for word in command], **pipes, **options)

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench-store: {self.process.args[:3]} ended with {self.process.wait()}")
        return line

    def ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=20)


class Perigee:
    """A store node and a client of it, for blocks of one size."""

    def __init__(self, transport):
        self.transport = transport
        self.block_bytes = None

    def prepare(self, block_bytes):
        if self.block_bytes == block_bytes:
            return
        self.close()
        self.block_bytes = block_bytes
        which = ["--transport", self.transport]
        self.far = Lines([BENCH, "serve", "--block-bytes", block_bytes, "--pool-bytes", POOL_BYTES, *which])
        self.near = Lines([BENCH, "drive", "--record", self.far.line().strip(), *which])
        # Until the whole pool was written and read once: pages that nobody has touched are the system's, not the store's.
        one_by_one = {"blocks": 1, "clients": 1}
        self.near.ask({"op": "prepare", "batches": 1, "first": 0, **one_by_one})
        self.next = POOL_BYTES // block_bytes * 11 // 10
        self.near.ask({"op": "put", "batches": self.next, "first": 0, **one_by_one})
        held = POOL_BYTES // block_bytes * 19 // 20
        self.near.ask({"op": "get", "batches": held, "first": self.next - held, **one_by_one})

    def take(self, batches, op):
        """The number of the first batch: puts bring new ones, gets find those."""
        if op == "put":
            self.first, self.next = self.next, self.next + batches
        return self.first

    def measure(self, case, op):
        self.prepare(case.block_bytes)
        phase = {"op": op, "blocks": case.blocks, "clients": case.clients, "batches": case.batches}
        phase["first"] = self.take(case.batches, op)
        self.near.ask({**phase, "op": "prepare"})
        return measured(self.near, phase, [self.far.process.pid, self.near.process.pid])

    def close(self):
        if self.block_bytes:
            self.near.close()
            self.far.close()
            self.block_bytes = None


class MooncakeStore:
    def __init__(self):
        folder = PEERS / "mooncake"
        if not folder.exists():
            fetch_wheel(MOONCAKE, folder)
        package = folder / "mooncake"
        paths = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(package)}
        self.environment = {**os.environ, **paths, "MC_LOG_LEVEL": "ERROR"}
        look = [sys.executable, "-c", "import mooncake.store"]
        looked = subprocess.run(look, env=self.environment, capture_output=True, text=True)
        if looked.returncode:
            raise Unavailable(looked.stderr.strip().splitlines()[-1])
        binary = package / "mooncake_master"
        binary.chmod(0o755)
        self.log = open(PEERS / "mooncake_store.log", "w")
        command = [binary, "-rpc_address=127.0.0.1", f"-rpc_port={MASTER_PORT}", "-metrics_host=127.0.0.1"]
        command += ["-metrics_port=9013", "-enable_metric_reporting=false", "-rpc_thread_num=4", "-logtostderr=true"]
        output = {"stdout": self.log, "stderr": self.log}
        self.master = subprocess.Popen(command, env=self.environment, **output)
        wait_until_listening(MASTER_PORT)
        self.at = f"127.0.0.1:{MASTER_PORT}"
        self.far = self.start("provide", 2 * POOL_BYTES)
        self.far.line()
        # As for ours: the measured pages have been touched before.
        warm = self.start("drive", MIB, 1)
        warm.ask({"op": "put", "blocks": 1, "clients": 1, "batches": 3 * POOL_BYTES // MIB // 2, "first": 0})
        warm.ask({"op": "clear"})
        warm.close()
        self.near = None
        self.block_bytes = None

    def start(self, role, *arguments):
        worker = [sys.executable, ROOT / "scripts" / "mooncake_store.py", role, self.at, *arguments]
        return Lines(worker, env=self.environment, stderr=self.log)

    def measure(self, case, op):
        if self.block_bytes != case.block_bytes:
            if self.near:
                self.near.close()
            self.near = self.start("drive", case.block_bytes, 64)
            self.block_bytes, self.first = case.block_bytes, 0
            self.near.ask({"op": "put", "blocks": 1, "clients": 1, "batches": 2, "first": 1_000_000})
        phase = {"op": op, "blocks": case.blocks, "clients": case.clients, "batches": case.batches, "first": self.first}
        # Where it is slow it would take minutes.
        phase["batches"] = max(2, phase["batches"] // 2)
        figures = measured(self.near, phase, [self.master.pid, self.far.process.pid, self.near.process.pid])
        if op == "exists":
            self.near.ask({"op": "clear"})
        return figures

    def close(self):
        for process in (self.near, self.far):
            if process:
                process.close()
        self.master.terminate()
        self.master.wait(timeout=20)


def measured(process, phase, pids):
    before = sum(map(processor_seconds_of, pids))
    figures = process.ask(phase)
    spent = sum(map(processor_seconds_of, pids)) - before
    figures["megabytes_per_second"] = figures["bytes"] / figures["seconds"] / 1e6
    figures["processor_seconds_per_gigabyte"] = spent / figures["bytes"] * 1e9
    figures["keys_per_second"] = phase["blocks"] * phase["clients"] * phase["batches"] / figures["seconds"]
    return figures


SPEED, COST, KEYS = "megabytes_per_second", "processor_seconds_per_gigabyte", "keys_per_second"
OPS = ("put", "get", "exists")


def collect(found, streams, wanted, rounds):
    samples = {}
    for number in range(rounds):
        for case in wanted:
            print(f"bench-store: round {number + 1} of {rounds}: {case}", file=sys.stderr)
            for name, subject in found.items():
                for op in OPS:
                    samples.setdefault((name, case, op), []).append(subject.measure(case, op))
            if streams and case.clients == 1:
                batch = types.SimpleNamespace(
                    op="write", slice_bytes=case.block_bytes, slices=case.blocks, in_flight=1, one_place=False,
                    batch_bytes=case.block_bytes * case.blocks,
                )  # fmt: skip
                taken = streams.measure(batch, 0.3)
                if not taken:
                    continue
                figures = {SPEED: taken["gigabytes_per_second"] * 1e3, COST: taken[COST]}
                samples.setdefault(("stream", case, "put"), []).append(figures)
                samples.setdefault(("stream", case, "get"), []).append(figures)
    return samples


def ratios(samples, mine, theirs, which, ops=("put", "get"), field=SPEED):
    """Of ours to theirs, round by round: the median of each case."""
    found = []
    for (name, case, op), taken in samples.items():
        if name == mine and op in ops and which(case) and (theirs, case, op) in samples:
            pairs = zip(taken, samples[theirs, case, op])
            found.append((f"{op} {case}", statistics.median(our[field] / max(their[field], 1e-9) for our, their in pairs)))
    return found


def claims(samples):
    def shape(bytes, blocks, clients=1):
        return lambda case: case == Case(bytes, blocks, clients)

    def against(which, **options):
        return ratios(samples, "TCP", "Mooncake Store", which, **options)

    p = [
        (f"get 64 KiB {which}", statistics.median(taken[which] for taken in samples["TCP", Case(64 * KIB, 1, 1), "get"]))
        for which in ("p50_us", "p99_us")
    ]
    twice = [(64 * KIB, 16), (512 * KIB, 1), (512 * KIB, 16), (MIB, 1)]
    return [
        Criterion("TCP over Mooncake Store, 1 × 64 KiB: ≥ 3", 3, True,
                  against(shape(64 * KIB, 1))),
        Criterion("16 × 64 KiB, 512 KiB and 1 × 1 MiB: ≥ 2", 2, True,
                  [pair for one in twice for pair in against(shape(*one))]),
        Criterion("16 × 4 MiB: ≥ 1.25", 1.25, True,
                  against(shape(4 * MIB, 16))),
        Criterion("with 4 clients: ≥ 4", 4, True,
                  against(lambda case: case.clients == 4)),
        Criterion("processor seconds per GB over Mooncake Store's, ≥ 64 KiB: ≤ 0.5", 0.5, False,
                  against(lambda case: case.block_bytes >= 64 * KIB, field=COST)),
        Criterion("TCP over one bare stream, 16 × 4 MiB: ≥ 0.8", 0.8, True,
                  ratios(samples, "TCP", "stream", shape(4 * MIB, 16))),
        Criterion("shared memory over Mooncake Store, ≥ 64 KiB: ≥ 4", 4, True,
                  ratios(samples, "shared memory", "Mooncake Store", lambda case: case.block_bytes >= 64 * KIB)),
        Criterion("exists over Mooncake Store: keys per second", 1, True,
                  against(lambda case: True, ops=("exists",), field=KEYS)),
        Criterion("TCP, 1 × 64 KiB: p50 of a get ≤ 150 µs", 150, False,
                  p[:1]),
        Criterion("its p99 ≤ 375 µs", 375, False,
                  p[1:]),
    ]  # fmt: skip


def figures_table(title, samples, names, wanted, cell):
    def cells(name, case, op):
        taken = samples.get((name, case, op))
        return cell(taken) if taken else "-"

    header = [title, *(f"{op} {name}" for op in ("put", "get") for name in names)]
    rows = [[case, *(cells(name, case, op) for op in ("put", "get") for name in names)] for case in wanted]
    return table(header, rows)


def section(samples, found, missing, wanted, rounds):
    names = list(found)
    throughput = figures_table("MB/s", samples, [*names, "stream"], wanted, lambda taken: f"{median(taken, SPEED):.0f}")
    cost = figures_table("processor s/GB", samples, [*names, "stream"], wanted, lambda taken: f"{median(taken, COST):.2f}")
    latency = figures_table(
        "p50 / p99 of a batch, µs", samples, names, [case for case in wanted if case.clients == 1],
        lambda taken: f"{median(taken, 'p50_us'):.0f} / {median(taken, 'p99_us'):.0f}",
    )  # fmt: skip
    exists = table(
        ["exists, thousand keys/s", *names],
        [[case, *(f"{median(samples[name, case, 'exists'], KEYS) / 1e3:.0f}" for name in names)]
         for case in wanted if case.block_bytes == 64 * KIB],
    )  # fmt: skip
    return f"""Measured by `make bench-store` on {machine()}; {MOONCAKE[0]} {MOONCAKE[1]}; medians of {rounds} rounds in turns.
A client process and a store process; Mooncake Store has a master besides. Processor seconds are of all of them.
Claims compare within a round: a case counts with the median of its rounds.{absences(missing)}

{claims_table(claims(samples))}

{throughput}

{cost}

{latency}

{exists}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few cases, one round, nothing written to docs/")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    examples = ["--example", "store_bench", "--example", "transfer_bench"]
    run("cargo", "build", "--release", "--locked", "--workspace", *examples, cwd=ROOT)
    found, missing = {"TCP": Perigee("tcp"), "shared memory": Perigee("ucx")}, {}
    try:
        found["Mooncake Store"] = MooncakeStore()
    except Unavailable as reason:
        missing["Mooncake Store"] = reason
    bare = Ours("tcp", ["--choice", "tcp"])
    streams = Streams(bare, 1)
    wanted = cases(arguments.quick)
    try:
        samples = collect(found, streams, wanted, rounds)
    finally:
        for subject in [*found.values(), bare]:
            subject.close()
    text = section(samples, found, missing, wanted, rounds)
    if not arguments.quick:
        replace_between(PAGE, "<!-- begin make bench-store -->", "<!-- end make bench-store -->", text)
    print(text)


if __name__ == "__main__":
    main()
