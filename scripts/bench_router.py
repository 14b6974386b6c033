#!/usr/bin/env python3
"""Measures the router's parts and the router, and rewrites its section of docs/performance.md.

The prefix index beside those of dynamo-kv-router, one process per measurement; a decision; and the whole front door beside
sglang-router, in front of workers that answer at once: OpenAI workers over HTTP for sglang-router, decode nodes for ours. In turns within
seconds, round after round, with one load. sglang-router is its PyPI wheel, fetched into target/peers. Wants two idle cores.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
import urllib.request

from bench_transfer import Criterion, absences, claims_table, median
from pages import machine, replace_between, table
from transfer_subjects import PEERS, ROOT, TARGET, Unavailable, free_port, processor_seconds_of, run

PAGE = ROOT / "docs" / "performance.md"
EXAMPLES = TARGET / "release" / "examples"
INDEX_PEER = ROOT / "scripts" / "peers" / "dynamo_index"
SGLANG = ("sglang-router", "0.3.2")

OURS = "perigee"
DYNAMO = ("RadixTree", "ConcurrentRadixTreeCompressed", "PositionalIndexer")
WORKERS, BLOCKS, DEPTHS = (8, 64, 512), (100_000, 1_000_000), (16, 256, 2048)
FINDS = [(f"{holders}_{depth}_us", f"{holders}, depth {depth}") for holders in ("whole", "staggered") for depth in DEPTHS]
# What is held in how many blocks, on 100 nodes.
MEMORY = (("private", 1_000_000), ("shared", 1_000_000), ("private", 10_000_000))
NODES, LOCATIONS = 100, 10_000_000
# Of these, half is known: the index is at its bound.
FULL = 2_000_000

MODEL = "tiny"
NODE_COUNT = 4
CONNECTIONS = (1, 16, 64)
SECONDS = 1.0
OPEN_RATE, OPEN_SECONDS, OPEN_CONNECTIONS = 500, 4.0, 64
START_TIMEOUT = 60


def output(*command):
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def index(subject, load, workers, blocks):
    return json.loads(output(PEERS / "dynamo-index" / "release" / "dynamo-index", subject, load, workers, blocks))


class FrontDoors:
    """Workers, and the routers in front of them."""

    def __init__(self, model):
        self.processes = []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        cluster = self.start([EXAMPLES / "trivial_cluster", model, NODE_COUNT], **pipes)
        there = json.loads(cluster.stdout.readline())
        self.at = {"worker": (there["workers"][0].removeprefix("http://"), None)}
        self.missing = {}
        self.start_perigee(model, there["registry"])
        try:
            self.start_sglang(there["workers"])
        except Unavailable as reason:
            self.missing[SGLANG[0]] = reason

    def start(self, command, **options):
        process = subprocess.Popen([str(word) for word in command], **options)
        self.processes.append(process)
        return process

    def start_perigee(self, model, registry):
        http, grpc = free_port(), free_port()
        command = [TARGET / "release" / "perigee", "router", "--model", model, "--model-name", MODEL, "--registry", registry]
        command += ["--listen", "127.0.0.1", "--http-port", http, "--grpc-port", grpc]
        log = open(PEERS / "perigee_router.log", "w")
        self.wait(OURS, http, self.start(command, stdout=log, stderr=log))

    def start_sglang(self, workers):
        name, version = SGLANG
        folder = PEERS / name.replace("-", "_")
        if not folder.exists():
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, f"{name}=={version}"]
            try:
                run(*install, stdout=sys.stderr)
            except subprocess.CalledProcessError as error:
                raise Unavailable(f"cannot install {name} {version}") from error
        http, metrics = free_port(), free_port()
        command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", http]
        command += ["--worker-urls", *workers, "--policy", "cache_aware", "--log-level", "error"]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", metrics]
        log = open(PEERS / "sglang_router.log", "w")
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        self.wait(name, http, self.start(command, stdout=log, stderr=log, env=environment))

    def wait(self, name, port, process):
        """Until a completion comes."""
        body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 8}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"})
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Unavailable(f"{name} does not answer: {error}") from error
                time.sleep(0.2)
        self.at[name] = (f"127.0.0.1:{port}", process.pid)

    def measure(self, name, connections, stream, seconds, *rate):
        address, pid = self.at[name]
        before = processor_seconds_of(pid) if pid else 0
        load = output(EXAMPLES / "front_door_load", address, connections, seconds, str(stream).lower(), *rate)
        figures = json.loads(load)
        if pid:
            figures["processor_us"] = (processor_seconds_of(pid) - before) / figures["requests"] * 1e6
        return figures

    def close(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(timeout=20)


def collect_index(samples, rounds):
    for number in range(rounds):
        for workers in WORKERS:
            for blocks in BLOCKS:
                print(f"bench-router: round {number + 1} of {rounds}: {workers} workers, {blocks} blocks", file=sys.stderr)
                for subject in (OURS, *DYNAMO):
                    samples.setdefault((subject, workers, blocks), []).append(index(subject, "speed", workers, blocks))
        samples.setdefault("mixed", []).append(index(OURS, "mixed", NODES, LOCATIONS))
        samples.setdefault("full", []).append(index("perigee-full", "mixed", NODES, FULL))
    for load, blocks in MEMORY:
        for subject in (OURS, *DYNAMO) if blocks <= 1_000_000 else (OURS,):
            samples["memory", subject, load, blocks] = index(subject, load, NODES, blocks)["bytes_per_location"]


def decide(locations):
    """p50 and p99 in ms, of hashing and placing, and of placing."""
    figures = output(EXAMPLES / "decide", locations, NODES, 100_000)
    found = re.findall(r"p50 (\d+) µs, p99 (\d+) µs", figures)
    return [tuple(int(value) / 1e3 for value in pair) for pair in found]


def collect_front_doors(doors, samples, rounds):
    for number in range(rounds):
        for stream in (False, True):
            for connections in CONNECTIONS:
                print(f"bench-router: round {number + 1} of {rounds}: {connections} connections", file=sys.stderr)
                for name in doors.at:
                    figures = doors.measure(name, connections, stream, SECONDS)
                    samples.setdefault((name, connections, stream), []).append(figures)
        for name in doors.at:
            figures = doors.measure(name, OPEN_CONNECTIONS, False, OPEN_SECONDS, OPEN_RATE)
            samples.setdefault((name, "open"), []).append(figures)


def against_best(samples, fields, better):
    """Ours against the best of dynamo's in the same round, round by round: the median of each case. Above 1 ours is better."""
    found = []
    for workers in WORKERS:
        for blocks in BLOCKS:
            for field, what in fields:
                ours = [sample[field] for sample in samples[OURS, workers, blocks]]
                theirs = [[sample[field] for sample in samples[name, workers, blocks]] for name in DYNAMO]
                best = [better(values) for values in zip(*theirs)]
                ratio = (our / it if better is max else it / our for our, it in zip(ours, best))
                found.append((f"{what}, {workers} workers, {blocks // 1000}k blocks", statistics.median(ratio)))
    return found


def claims(samples, decisions, doors):
    peer = SGLANG[0]
    more, streamed, added = [], [], []
    for (name, *case), taken in doors.items():
        if name == OURS and (peer, *case) in doors and case != ["open"]:
            ratio = [our["requests_per_second"] / its["requests_per_second"] for our, its in zip(taken, doors[peer, *case])]
            connections, stream = case
            (streamed if stream else more).append((f"{connections} connections", statistics.median(ratio)))
        elif name == OURS and case == ["open"]:
            pairs = zip(taken, doors["worker", "open"])
            added.append(("p99", statistics.median(our["p99_us"] - its["p99_us"] for our, its in pairs) / 1e3))
    updates = [(what, median(samples[what], "update_per_s") / 1e6) for what in ("mixed", "full")]
    memory = [(f"{key[2]}, {key[3] // 1_000_000}M", value) for key, value in samples.items() if key[0] == "memory" and key[1] == OURS]
    finds = against_best(samples, FINDS + [("one_holder_us", "one holder")], min)
    return [
        Criterion("find over dynamo-kv-router's best: ≥ 1", 1, True, finds),
        Criterion("the same: ≥ 2", 2, True, finds),
        Criterion("store over dynamo-kv-router's best: ≥ 1", 1, True, against_best(samples, [("store_per_s", "store")], max)),
        Criterion("updates of a filled index, and of one at its bound, M/s on one core: ≥ 2", 2, True, updates),
        Criterion("bytes per location: ≤ 64", 64, False, memory),
        Criterion("placing 100,000 tokens on 100 nodes, p99 ms: ≤ 1", 1, False,
                  [(f"{locations // 1_000_000}M locations", placed[1]) for locations, (_, placed) in decisions.items()]),
        Criterion("the same with hashing the prompt: ≤ 1", 1, False,
                  [(f"{locations // 1_000_000}M locations", hashed[1]) for locations, (hashed, _) in decisions.items()]),
        Criterion(f"added to a request at {OPEN_RATE} requests/s, p99 ms: ≤ 1", 1, False, added),
        Criterion(f"requests/s over {peer}'s: ≥ 2", 2, True, more),
        Criterion("the same, streamed: ≥ 2", 2, True, streamed),
    ]  # fmt: skip


def index_tables(samples):
    names = (OURS, *DYNAMO)
    cases = [(workers, blocks) for workers in WORKERS for blocks in BLOCKS]
    fields = [*FINDS, ("one_holder_us", "one holder"), ("remove_us", "remove a worker")]

    def cell(name, field):
        return " / ".join(f"{median(samples[name, 64, blocks], field):.2f}" for blocks in BLOCKS)

    def by_workers(name, field):
        return " / ".join(f"{median(samples[name, workers, BLOCKS[-1]], field):.2f}" for workers in WORKERS)

    store = table(
        ["store, M blocks/s", *names],
        [[f"{workers} workers, {blocks // 1000}k blocks",
          *(f"{median(samples[name, workers, blocks], 'store_per_s') / 1e6:.2f}" for name in names)] for workers, blocks in cases],
    )  # fmt: skip
    find = table(
        [f"µs, {' / '.join(map(str, WORKERS))} workers, 1M blocks", *names],
        [[what, *(by_workers(name, field) for name in names)] for field, what in fields],
    )
    memory = table(
        [f"bytes per location, {NODES} nodes", *names],
        [[f"{load}, {blocks // 1_000_000}M", *(f"{samples[key]:.0f}" if (key := ("memory", name, load, blocks)) in samples else "-"
                                              for name in names)] for load, blocks in MEMORY],
    )  # fmt: skip
    return "\n\n".join([store, find, memory])


def front_door_tables(doors):
    names = [name for name in ("worker", OURS, SGLANG[0]) if (name, "open") in doors]

    def figures(taken):
        cost = f", {median(taken, 'processor_us'):.0f}" if "processor_us" in taken[0] else ""
        return f"{median(taken, 'requests_per_second'):.0f}{cost}"

    rates = [[f"{connections}{', streamed' if stream else ''}", *(figures(doors[name, connections, stream]) for name in names)]
             for stream in (False, True) for connections in CONNECTIONS]  # fmt: skip
    times = [["p50 / p99, ms", *(" / ".join(f"{median(doors[name, 'open'], field) / 1e3:.2f}" for field in ("p50_us", "p99_us"))
                                 for name in names)]]  # fmt: skip
    return "\n\n".join([
        table(["connections: requests/s, router's processor µs each", *names], rates),
        table([f"{OPEN_RATE} requests/s", *names], times),
    ])  # fmt: skip


def section(samples, decisions, doors, missing, rounds):
    decided = table(
        ["a decision: locations", "to place, p50 / p99 ms", "with hashing the prompt"],
        [[f"{locations // 1_000_000} million", *(f"{pair[0]:.2f} / {pair[1]:.2f}" for pair in reversed(pairs))]
         for locations, pairs in decisions.items()],
    )  # fmt: skip
    return f"""Measured by `make bench-router` on {machine()}; dynamo-kv-router 1.6.1, {SGLANG[0]} {SGLANG[1]}; medians of {rounds} rounds in turns.
Claims compare within a round: a case counts with the median of its rounds.{absences(missing)}

{claims_table(claims(samples, decisions, doors))}

Index: events of 16 blocks, chains of 256, one thread that applies. A find of a chain that all workers hold: the whole of it, or each a
different part. "One holder" asks for chains of 256 blocks that one worker holds. What a removed worker held leaves our index bit by bit with
the updates that follow; theirs is gone at once.

{index_tables(samples)}

{decided}

Front door: {NODE_COUNT} workers that answer at once with two pieces; completions of 24 words; load, router and workers on the same cores. Our
router tokenises, and speaks gRPC with its nodes; {SGLANG[0]} (`cache_aware`) passes the text on over HTTP; its streams take 44 ms on an
idle connection, which is what a delayed acknowledgement takes, while the same workers asked directly take 0.1. "worker": no router.

{front_door_tables(doors)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, nothing written to docs/")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    PEERS.mkdir(parents=True, exist_ok=True)
    # Built by one command: apart, their dependencies would have other features, and be built again.
    programs = ["--bin", "perigee"]
    programs += [word for name in ("decide", "front_door_load", "trivial_cluster") for word in ("--example", name)]
    run("cargo", "build", "--release", "--locked", "--workspace", *programs, cwd=ROOT)
    peer = {**os.environ, "CARGO_TARGET_DIR": str(PEERS / "dynamo-index")}
    run("cargo", "build", "--release", "--locked", "--manifest-path", INDEX_PEER / "Cargo.toml", cwd=ROOT, env=peer)
    samples, door_samples = {}, {}
    collect_index(samples, rounds)
    decisions = {locations: decide(locations) for locations in (1_000_000, LOCATIONS)}
    doors = FrontDoors(pathlib.Path(os.environ.get("PERIGEE_MODEL", ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")))
    try:
        collect_front_doors(doors, door_samples, rounds)
    finally:
        doors.close()
    text = section(samples, decisions, door_samples, doors.missing, rounds)
    if not arguments.quick:
        replace_between(PAGE, "<!-- begin make bench-router -->", "<!-- end make bench-router -->", text)
    print(text)


if __name__ == "__main__":
    main()
