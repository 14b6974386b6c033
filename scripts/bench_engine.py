#!/usr/bin/env python3
"""Measures the engine beside llama.cpp and rewrites its section of docs/performance.md.

Both run in turns in one go, on the same file and the same threads, since on shared machines only figures taken side by
side can be compared. Every speed is the best of its runs: other work can only slow a run down. llama.cpp runs the model in
other formats, too, that it makes of the same file.

llama.cpp is built natively from its PyPI source distribution into target/peers (about ten minutes, once), or taken from
the folder in LLAMA_CPP_BIN. `--without-llama` leaves it out.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request

from pages import VECTORS, machine, replace_between, table

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
PEERS = TARGET / "peers"
PACKAGE, VERSION = "llama-cpp-bin", "11434.0.0"
CMAKE = """-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DBUILD_SHARED_LIBS=ON -DLLAMA_USE_PREBUILT_UI=OFF
    -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_CURL=OFF
    -DLLAMA_OPENSSL=OFF""".split()
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-perplexity")
PREFILL = (128, 512, 2048)
DECODE = (1, 4, 8, 16)
CONTEXTS = (128, 2048)
# What llama.cpp is asked to make of the file: the formats in which it prefills fastest.
OTHER_FORMATS = ("Q8_0", "F16")


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
    if all((build / "bin" / program).exists() for program in PROGRAMS):
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
    run("ninja", "-C", build, *PROGRAMS, stdout=sys.stderr)
    return build / "bin"


def keep_best(best, key, value):
    best[key] = max(best.get(key, 0.0), value)


def timed(*command):
    """Seconds by the clock, and the most memory, of a process of its own."""
    started = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"bench: {command[0]} ended with {process.returncode}")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def measure_ours(best, model, threads):
    bench = TARGET / "release/examples/bench"
    rows = map(json.loads, output(bench, "--model", model, "--threads", threads, "--json").splitlines())
    facts = next(rows)
    for row in rows:
        keep_best(best, (row["phase"], row["size"], row["context"]), row["tokens_per_second"])
    seconds, memory = timed(bench, "--model", model, "--threads", threads, "--first-token")
    keep_best(best, "first token", 1 / seconds)
    keep_best(best, "memory", 1 / memory)
    return facts


def measure_prefill(best, binaries, model, threads):
    sizes = ",".join(map(str, PREFILL))
    command = [binaries / "llama-bench", "-m", model, "-t", threads, "-p", sizes, "-n", 0, "-r", 2, "-ngl", 0, "-o", "json"]
    for row in json.loads(output(*command)):
        keep_best(best, ("prefill", row["n_prompt"], 0), max(row["samples_ts"]))


def measure_llama(best, binaries, model, threads):
    measure_prefill(best, binaries, model, threads)
    batches = ",".join(map(str, DECODE))
    for context in CONTEXTS:
        # The prompt is shared by the sequences, as ours is.
        command = [binaries / "llama-batched-bench", "-m", model, "-t", threads, "-tb", threads, "-c", 8192, "-b", 2048, "-ub", 512]
        command += ["-pps", "-kvu", "-npp", context, "-ntg", 32, "-npl", batches, "--output-format", "jsonl"]
        for line in output(*command).splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                keep_best(best, ("decode", row["pl"], context), row["speed_tg"])
    command = [binaries / "llama-bench", "-m", model, "-t", threads, "-p", 16, "-n", 0, "-r", 1, "--no-warmup", "-ngl", 0]
    seconds, memory = timed(*command)
    keep_best(best, "first token", 1 / seconds)
    keep_best(best, "memory", 1 / memory)


def other_formats(binaries, model):
    """The same model in the formats in which llama.cpp prefills fastest."""
    made = {}
    for name in OTHER_FORMATS:
        made[name] = PEERS / f"{pathlib.Path(model).stem}-as-{name}.gguf"
        if not made[name].exists():
            run(binaries / "llama-quantize", "--allow-requantize", model, made[name], name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return made


def measure_roofline(threads, weight_bytes):
    lines = output(TARGET / "release/examples/roofline", "--threads", threads, "--bytes", weight_bytes, "--json").splitlines()
    return {row["what"]: row["giga_per_second"] for row in map(json.loads, lines)}


def ratio(mine, peer):
    return f"{mine / peer:.2f}" if peer else "-"


def speeds(ours, theirs, formats):
    fastest = {size: max((best.get(("prefill", size, 0), 0.0), name) for name, best in formats.items()) for size in PREFILL} if formats else {}
    rows = []
    for size in PREFILL:
        mine, peer = ours[("prefill", size, 0)], theirs.get(("prefill", size, 0))
        speed, name = fastest.get(size, (None, "-"))
        other = f"{speed:.0f} ({name})" if speed else "-"
        rows.append([f"prefill of {size}", f"{mine:.0f}", f"{peer:.0f}" if peer else "-", ratio(mine, peer), other, ratio(mine, speed)])
    for context in CONTEXTS:
        for batch in DECODE:
            mine, peer = ours[("decode", batch, context)], theirs.get(("decode", batch, context))
            rows.append([f"decode, batch of {batch} at {context}", f"{mine:.0f}", f"{peer:.0f}" if peer else "-", ratio(mine, peer), "", ""])
    header = ["", "Perigee, tokens/s", "llama.cpp, tokens/s", "ratio", "llama.cpp's fastest format, tokens/s", "ratio"]
    return table(header, rows)


def starts(ours, theirs):
    rows = []
    for what, key, shown in (
        ("start to the first token of 16, ms", "first token", lambda value: f"{1000 / value:.0f}"),
        ("most memory by then, MiB", "memory", lambda value: f"{1 / value / 2**20:.0f}"),
    ):
        mine, peer = ours[key], theirs.get(key)
        rows.append([what, shown(mine), shown(peer) if peer else "-", f"{peer / mine:.2f}" if peer else "-"])
    return table(["", "Perigee", "llama.cpp", "Perigee over llama.cpp"], rows)


def shares(ours, roofline, facts):
    """What each phase reaches of what the machine could do."""
    rows = []
    for size in PREFILL:
        giga = ours[("prefill", size, 0)] * facts["operations_per_token"] / 1e9
        share = f"{100 * giga / roofline['f32']:.0f} %"
        rows.append([f"prefill of {size}", f"{giga:.0f} GFLOP/s", f"{roofline['f32']:.0f}", share, f"{100 * giga / roofline['int8']:.0f} % of {roofline['int8']:.0f} in bytes"])
    giga = ours[("decode", 1, 128)] * facts["step_weight_bytes"] / 1e9
    rows.append(["decode, batch of 1 at 128", f"{giga:.1f} GB/s", f"{roofline['read']:.1f}", f"{100 * giga / roofline['read']:.0f} %", ""])
    return table(["", "reached", "the machine's f32, or reading", "share", "beside"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("PERIGEE_MODEL", ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-llama", action="store_true")
    arguments = parser.parse_args()
    run("cargo", "build", "--release", "--locked", "-p", "engine", "--examples", cwd=ROOT)
    binaries = None if arguments.without_llama else llama_cpp()
    formats = {name: (path, {}) for name, path in other_formats(binaries, arguments.model).items()} if binaries else {}
    ours, theirs, roofline = {}, {}, {}
    for _ in range(arguments.rounds):
        facts = measure_ours(ours, arguments.model, arguments.threads)
        for what, rate in measure_roofline(arguments.threads, facts["step_weight_bytes"]).items():
            keep_best(roofline, what, rate)
        if binaries:
            measure_llama(theirs, binaries, arguments.model, arguments.threads)
        for path, best in formats.values():
            measure_prefill(best, binaries, path, arguments.threads)
    model = pathlib.Path(arguments.model).name
    section = f"""Measured by `make bench-engine` on {machine(VECTORS)}, {arguments.threads} threads, {model}, best of {arguments.rounds} rounds in turns.

{speeds(ours, theirs, {name: best for name, (_, best) in formats.items()})}

llama.cpp is {PACKAGE} {VERSION} of PyPI, built with `-DGGML_NATIVE=ON -DGGML_OPENMP=ON`. Decode figures are the sums over the batch, whose
sequences share their context but for its end. Its fastest format is the better of {" and ".join(OTHER_FORMATS)}, made of the same file.

{starts(ours, theirs)}

Whole processes, by the clock, with the file in the page cache; best of the rounds.

What the machine could do at most, and what is reached of it: multiplications and additions of the weights' products (attention, norms and
the rest are not counted, but take their time), and bytes of weights that each step reads.

{shares(ours, roofline, facts)}
"""
    replace_between(PAGE, "<!-- begin make bench-engine -->", "<!-- end make bench-engine -->", section)
    print(section)


if __name__ == "__main__":
    main()
