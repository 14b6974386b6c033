#!/usr/bin/env python3
"""Measures the handoff between a prefill and a decode process, and rewrites its section of docs/performance.md."""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess

from bench_engine import PAGE, ROOT, TARGET, output, run
from pages import VECTORS, machine, replace_between, table

# About 170, 470, 1,000 and 2,000 tokens.
HANDOFF_WORDS = (80, 350, 730, 1400)


@contextlib.contextmanager
def cluster(model, *nodes):
    """A cluster of processes; gives the address of its router."""
    up = [TARGET / "release/perigee", "up", "-o", "json", "--model", model, *nodes, "--http-port", "0", "--grpc-port", "0"]
    up += ["--set", "router.local_prefill_tokens_max=0", "--set", "router.policy=round_robin"]
    with subprocess.Popen([str(part) for part in up], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield json.loads(process.stdout.readline())["grpc"].removeprefix("http://")
        finally:
            process.terminate()


def measure_handoff(model, rounds):
    """Long prompts through separate prefill and decode processes, in turns with one process that does both."""
    text = (ROOT / "tests/golden/eighty_days.txt").read_text().split()
    rows = []
    with cluster(model, "--prefill", "1", "--decode", "1") as apart, cluster(model, "--prefill", "0", "--decode", "1") as alone:
        for words in HANDOFF_WORDS:
            pairs = []
            # The first round lets the pair introduce itself, and finds out how fast its nodes are.
            for number in range(rounds + 1):
                # Each prompt begins elsewhere in the text, so that none finds the cache of another.
                prompt = " ".join(text[len(rows) * 9000 + number * 997 :][:words])
                answers = []
                for router in (apart, alone) if number % 2 else (alone, apart):
                    command = [TARGET / "release/perigee", "generate", "-o", "json", "--router", router]
                    answers.append(json.loads(output(*command, "--max-tokens", "2", prompt)))
                pairs.append(answers if number % 2 else answers[::-1])
            rows.append(pairs[1:])
    return rows


def handoff_table(rows):
    def cells(pairs):
        reports = [apart["report"] for apart, _ in pairs]
        middle = lambda values: statistics.median(list(values))
        hidden = middle(report["handoff_hidden_ms"] for report in reports)
        exposed = middle(report["handoff_exposed_ms"] for report in reports)
        # What a first token waits for beside the prefill itself, whose noise is larger than all of it.
        waits = [[answer["report"]["ttft_ms"] - answer["report"]["prefill_ms"] for answer in pair] for pair in pairs]
        fastest = [min(pair[side]["report"]["ttft_ms"] for pair in pairs) for side in (0, 1)]
        tokens = middle(apart["usage"]["prompt_tokens"] for apart, _ in pairs)
        return [
            f"{tokens:.0f}",
            f"{reports[0]['handoff_bytes'] / 2**20:.1f} MiB by {reports[-1]['transport']}",
            f"{hidden:.1f}",
            f"{exposed:.1f}",
            f"{100 * hidden / (hidden + exposed):.0f} %" if hidden + exposed else "-",
            f"{fastest[0]:.0f}",
            f"{fastest[1]:.0f}",
            f"{middle(wait[0] for wait in waits) - middle(wait[1] for wait in waits):.1f}",
        ]

    header = ["prompt tokens", "KV moved", "transfer hidden, ms", "exposed, ms", "hidden", "best TTFT apart, ms"]
    header += ["best TTFT in one process, ms", "added outside of prefill, ms"]
    return table(header, map(cells, rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=os.environ.get("PERIGEE_MODEL", ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    run("cargo", "build", "--release", "--locked", "-p", "perigee", cwd=ROOT)
    handoff = measure_handoff(arguments.model, arguments.rounds)
    section = f"""Measured by `make bench-handoff` on {machine(VECTORS)}, {pathlib.Path(arguments.model).name}.

One prefill and one decode process on this machine, in turns with one process that does both; one request at a time, medians of
{arguments.rounds} prompts. Transfers are written layer by layer while the next layer is computed. "Added outside of prefill" is
how much longer a first token takes apart, without the prefill itself: RPCs, transfer that is not hidden, verification.

{handoff_table(handoff)}
"""
    replace_between(PAGE, "<!-- begin make bench-handoff -->", "<!-- end make bench-handoff -->", section)
    print(section)


if __name__ == "__main__":
    main()
