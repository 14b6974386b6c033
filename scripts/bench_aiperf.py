#!/usr/bin/env python3
"""Measures one cluster with `perigee bench` and with AIPerf, in turns, and rewrites their table in docs/performance.md.

The two load generators send prompts of the same words and lengths at the same concurrency, so that their figures must agree. AIPerf comes
from PyPI into target/aiperf; its tokenizer is written from the model's own file, since nothing is fetched from elsewhere. Wants two
idle cores: the cluster has the first one to itself, and whoever loads it the others, for a load generator that takes the server's processor
measures itself. Takes less than four minutes with its defaults.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile

from pages import VECTORS, machine, replace_between, table

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
PERIGEE = TARGET / "release" / "perigee"
VENV = TARGET / "aiperf"
PACKAGES = ("aiperf==0.13.0", "gguf")
# Runs in AIPerf's environment, which has what it imports.
TOKENIZER = """
import json, pathlib, sys
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

model, folder = sys.argv[1], pathlib.Path(sys.argv[2])
fields = GGUFReader(model).fields
tokens = fields["tokenizer.ggml.tokens"].contents()
merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[int(fields["tokenizer.ggml.eos_token_id"].contents())]}
(folder / "tokenizer_config.json").write_text(json.dumps(config))
"""
# What is compared: the figure's name, and where each report has it.
FIGURES = (
    ("TTFT mean, ms", lambda ours: ours["ttft_ms"]["mean"], "time_to_first_token"),
    ("per output token mean, ms", lambda ours: ours["tpot_ms"]["mean"], "inter_token_latency"),
    ("whole answer mean, ms", lambda ours: ours["latency_ms"]["mean"], "request_latency"),
    ("requests/s", lambda ours: ours["requests_per_s"], "request_throughput"),
    ("output tokens/s", lambda ours: ours["output_tokens_per_s"], "output_token_throughput"),
    ("prompt tokens", lambda ours: ours["input_tokens_mean"], "usage_prompt_tokens"),
)


# Whose processors are whose.
CORES = sorted(os.sched_getaffinity(0))
SERVER, LOADER = (functools.partial(os.sched_setaffinity, 0, cores) for cores in ({CORES[0]}, set(CORES[1:]) or {CORES[0]}))


def install():
    if not (VENV / "bin" / "aiperf").exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([VENV / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)


def words():
    """Those that `perigee bench` makes prompts of."""
    source = (ROOT / "cli/src/bench/prompts.rs").read_text()
    return re.findall(r'"([a-z]+)"', re.search(r"const WORDS.*?\];", source, re.DOTALL).group(0))


@contextlib.contextmanager
def cluster(model):
    up = [PERIGEE, "up", "-o", "json", "--model", model, "--prefill", "0", "--decode", "1", "--threads", "1"]
    up += ["--http-port", "0", "--grpc-port", "0"]
    with subprocess.Popen(up, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=SERVER) as process:
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


def ours(ready, arguments, seed):
    command = [PERIGEE, "bench", "-o", "json", "--url", ready["http"], "--seed", seed, "--concurrency", arguments.concurrency]
    command += ["--requests", arguments.requests, "--input-tokens", arguments.input_tokens, "--output-tokens", arguments.output_tokens]
    return json.loads(subprocess.run(list(map(str, command)), check=True, text=True, stdout=subprocess.PIPE, preexec_fn=LOADER).stdout)


def aiperf(ready, arguments, seed, folder):
    """Each run has its own prompts, so that none finds another's in the cache."""
    draw = random.Random(f"aiperf {seed}")
    choices = words()
    prompts = folder / f"prompts-{seed}.jsonl"
    lines = (" ".join(draw.choices(choices, k=arguments.input_tokens)) for _ in range(arguments.requests))
    prompts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    out = folder / f"aiperf-{seed}"
    command = [VENV / "bin" / "aiperf", "profile", "-m", ready["models"][0], "--url", ready["http"], "--endpoint-type", "chat", "--streaming"]
    command += ["--input-file", prompts, "--custom-dataset-type", "single-turn", "--concurrency", arguments.concurrency]
    command += ["--request-count", arguments.requests, "--tokenizer", folder, "--use-server-token-count", "--use-legacy-max-tokens"]
    command += ["--extra-inputs", f"max_tokens:{arguments.output_tokens}", "ignore_eos:true", "temperature:0"]
    command += ["--artifact-dir", out, "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(list(map(str, command)), check=True, cwd=folder, timeout=180, preexec_fn=LOADER, **quiet)
    return json.loads((out / "profile_export_aiperf.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("PERIGEE_MODEL", ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    arguments = parser.parse_args()
    install()
    pairs, errors = [], 0
    with tempfile.TemporaryDirectory() as folder, cluster(arguments.model) as ready:
        folder = pathlib.Path(folder)
        subprocess.run([VENV / "bin" / "python", "-c", TOKENIZER, arguments.model, folder], check=True, stderr=subprocess.DEVNULL)
        ours(ready, arguments, 1000)
        for seed in range(arguments.rounds):
            # Whoever comes second in one round comes first in the next.
            if seed % 2:
                theirs = aiperf(ready, arguments, seed, folder)
                mine = ours(ready, arguments, seed)
            else:
                mine = ours(ready, arguments, seed)
                theirs = aiperf(ready, arguments, seed, folder)
            errors += mine["requests"]["sent"] - mine["requests"]["ok"]
            errors += arguments.requests - int(theirs["request_count"]["avg"])
            pairs.append((mine, theirs))
    rows = []
    for name, own, peer in FIGURES:
        mine = statistics.median(own(mine) for mine, _ in pairs)
        theirs = statistics.median(theirs[peer]["avg"] for _, theirs in pairs)
        rows.append([name, f"{mine:.2f}", f"{theirs:.2f}", f"{mine / theirs:.3f}"])
    section = f"""Measured by `scripts/bench_aiperf.py` on {machine(VECTORS)}: one decode node on a core of its own, {pathlib.Path(arguments.model).name}, chat over HTTP, {arguments.concurrency}
requests at a time, {arguments.requests} per run, {arguments.input_tokens} + {arguments.output_tokens} tokens; medians of {arguments.rounds} runs of each ({PACKAGES[0]}) in turns. {errors} errors.

{table(["", "perigee bench", "AIPerf", "ratio"], rows)}
"""
    replace_between(PAGE, "<!-- begin bench-aiperf -->", "<!-- end bench-aiperf -->", section)
    print(section)


if __name__ == "__main__":
    main()
