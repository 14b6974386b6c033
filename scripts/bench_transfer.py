#!/usr/bin/env python3
"""Measures Perigee's transfers beside their peers and rewrites the table of docs/performance.md.

For every case, all take their turn within a second or so, round after round, since on shared machines only figures
taken side by side can be compared: our built-in TCP, our UCX over shared memory and over TCP, bare TCP streams,
ucx_perftest, and Mooncake's transfer_engine_bench over TCP. Ours are two processes; so are all the others.

UCX is the system's (Debian: libucx0, ucx-utils), or the PyPI package libucx-cu12 with `--ucx pypi`, or the one in a
folder with bin/ and lib/. Mooncake is its PyPI wheel, fetched into target/peers. What cannot be had is left out, and
the table says why.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "transfer.svg"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
PEERS = TARGET / "peers"
BENCH = TARGET / "release" / "examples" / "transfer_bench"
MOONCAKE = ("mooncake-transfer-engine-non-cuda", "0.3.13.post1")
UCX_PYPI = ("libucx-cu12", "1.22.0")
KIB, MIB = 1 << 10, 1 << 20
# What Mooncake registers; it uses a few blocks of it.
MOONCAKE_BUFFER_BYTES = 512 * MIB
COMMAND_TIMEOUT = 60


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """A batch of `slices` scattered slices; `in_flight` of them at the same time."""

    op: str
    slice_bytes: int
    slices: int
    in_flight: int

    @property
    def batch_bytes(self):
        return self.slice_bytes * self.slices

    def __str__(self):
        return f"{self.op} {self.slices} × {size(self.slice_bytes)}, {self.in_flight} in flight"


SIZES = (4 * KIB, 64 * KIB, 256 * KIB, MIB, 16 * MIB, 64 * MIB)
# As handoffs make them: a layer of blocks of a small model, and larger ones.
BATCHES = ((24 * KIB, 64), (64 * KIB, 16), (256 * KIB, 16))
# What Mooncake's bench is run with: a thread keeps one batch in flight.
MOONCAKE_BLOCKS = (4 * KIB, 64 * KIB, MIB)


def cases(quick):
    if quick:
        shapes = [(64 * KIB, 16, 1), (64 * KIB, 16, 4), (MIB, 1, 1), (MIB, 1, 4)]
    else:
        shapes = [(size, 1, flight) for size in SIZES for flight in (1, 4) if size < 64 * MIB] + [(64 * MIB, 1, 1)]
        shapes += [(size, slices, flight) for size, slices in BATCHES for flight in (1, 4)]
        shapes += [(size, 16, flight) for size in MOONCAKE_BLOCKS for flight in (1, 4)]
    return [Case(op, *shape) for op in ("write", "read") for shape in dict.fromkeys(shapes)]


def run(*command, **options):
    print("+", *command, file=sys.stderr)
    return subprocess.run([str(part) for part in command], check=True, text=True, **options)


class Unavailable(Exception):
    """Why something cannot be measured here."""


# --- What is measured: each has `measure(case)`, which gives a figure, or None where the case is none of its own.


class Ours:
    """A serving and a driving process of ours."""

    def __init__(self, mover, arguments):
        command = [str(BENCH), "serve", *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.far = subprocess.Popen(command, stderr=subprocess.PIPE, **pipes)
        ready = self.far.stdout.readline().strip()
        if not ready:
            raise Unavailable(self.far.communicate()[1].strip().splitlines()[-1])
        self.movers = json.loads(ready)["movers"]
        self.near = subprocess.Popen([str(BENCH), "drive", "--peer", ready, *arguments], **pipes)
        # The first bytes go over TCP while the two find out what else they have.
        deadline = time.monotonic() + 5
        while (moved := self.ask({"op": "write", "seconds": 0.05})["mover"]) != mover and time.monotonic() < deadline:
            pass
        if moved != mover:
            self.close()
            found = "; ".join(f"{entry['name']}: {entry['detail']}" for entry in self.movers)
            raise Unavailable(f"{moved} moves the bytes ({found or 'nothing else was looked for'})")

    def ask(self, case):
        self.near.stdin.write(json.dumps(case) + "\n")
        self.near.stdin.flush()
        answer = self.near.stdout.readline()
        if not answer:
            raise SystemExit(f"bench-transfer: the driving process ended during {case}")
        return json.loads(answer)

    def measure(self, case, seconds, **options):
        return self.ask({**dataclasses.asdict(case), "seconds": seconds, **options})

    def close(self):
        for process in (self.near, self.far):
            process.stdin.close()
            process.wait(timeout=COMMAND_TIMEOUT)


class Streams:
    """Bare blocking TCP streams between the same two processes, 1 MiB per system call, over as much memory as the case."""

    def __init__(self, ours, count):
        self.ours, self.count = ours, count

    def measure(self, case, seconds):
        if case.op != "write" or case.batch_bytes < 256 * KIB:
            return None
        calls = max(1, case.batch_bytes * case.in_flight // self.count // MIB)
        request = {"op": "stream", "slice_bytes": MIB, "slices": calls, "in_flight": self.count, "seconds": seconds}
        return self.ours.ask(request)


class Perftest:
    """ucx_perftest, a put or a get of one size again and again."""

    def __init__(self, ucx, lane):
        self.ucx, self.lane = ucx, lane
        self.environment = {**os.environ, **ucx.environment, "UCX_TLS": f"{lane},self", "UCX_LOG_LEVEL": "error"}
        if lane == "tcp":
            # UCX leaves the loopback out unless told.
            self.environment["UCX_NET_DEVICES"] = "lo"
        # Bytes that take about the wanted time; corrected by what was seen.
        self.rates = {}

    def measure(self, case, seconds):
        if case.slices != 1 or (case.in_flight == 1 and case.slice_bytes < 64 * MIB):
            return None
        key = (case.op, case.slice_bytes)
        rate = self.rates.get(key, 0.1e9 if self.lane == "tcp" else 1e9)
        iterations = max(4, int(rate * seconds / case.slice_bytes))
        warm_up = max(1, iterations // 10)
        test = {"write": "ucp_put_bw", "read": "ucp_get"}[case.op]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        options = {"env": self.environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        far = subprocess.Popen([self.ucx.perftest, "-p", port], **options)
        wait_until_listening(int(port))
        command = [self.ucx.perftest, "127.0.0.1", "-p", port, "-t", test, "-s", case.slice_bytes, "-n", iterations]
        command += ["-w", warm_up, "-f", "-v"]
        near = subprocess.Popen([str(part) for part in command], **options)
        text, processor_seconds = wait_for(near)
        processor_seconds += wait_for(far)[1]
        row = re.search(rf"^\s*{iterations},(.*)$", text, re.MULTILINE)
        if not row:
            raise SystemExit(f"bench-transfer: ucx_perftest printed no figures: {text}")
        rate = float(row.group(1).split(",")[4]) * MIB
        self.rates[key] = rate
        moved = (iterations + warm_up) * case.slice_bytes
        return figure(rate, processor_seconds / moved * 1e9)


class Mooncake:
    """Mooncake's transfer_engine_bench over TCP."""

    def __init__(self):
        folder = PEERS / "mooncake"
        binary = folder / "mooncake" / "transfer_engine_bench"
        if not binary.exists():
            fetch_wheel(MOONCAKE, folder)
            binary.chmod(0o755)
        self.environment = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent), "MC_LOG_LEVEL": "INFO"}
        linked = subprocess.run(["ldd", binary], env=self.environment, capture_output=True, text=True).stdout
        if missing := re.findall(r"(\S+) => not found", linked):
            raise Unavailable(
                f"{', '.join(missing)} missing: apt-get install libibverbs1 librdmacm1 libnuma1 libcurl4 liburing2"
            )
        self.common = [binary, "-metadata_server=P2PHANDSHAKE", "-local_server_name=127.0.0.1", "-protocol=tcp"]
        self.common += [f"-buffer_size={MOONCAKE_BUFFER_BYTES}"]
        log_path = PEERS / "mooncake.log"
        with open(log_path, "w") as log:
            self.far = subprocess.Popen([*self.common, "-mode=target"], env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not (ports := re.findall(r"P2P handshake, listening on \S*?:(\d+)", log_path.read_text())):
            if time.monotonic() > deadline or self.far.poll() is not None:
                raise Unavailable(f"its target did not start, see {log_path}")
            time.sleep(0.05)
        self.segment = f"127.0.0.1:{ports[-1]}"
        wait_until_listening(int(ports[-1]))

    def measure(self, case, _seconds):
        if case.slice_bytes not in MOONCAKE_BLOCKS or case.slices not in (1, 16):
            return None
        before = processor_seconds_of(self.far.pid)
        command = [*self.common, "-mode=initiator", f"-segment_id={self.segment}", f"-operation={case.op}"]
        command += [f"-block_size={case.slice_bytes}", f"-threads={case.in_flight}", f"-batch_size={case.slices}"]
        command += ["-duration=1", "-report_unit=MB"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        text, processor_seconds = wait_for(subprocess.Popen(command, env=self.environment, **pipes))
        done = re.search(r"duration ([\d.]+), batch count (\d+), throughput ([\d.]+) MB/s", text)
        if not done:
            raise SystemExit(f"bench-transfer: transfer_engine_bench printed no figures: {text[-500:]}")
        moved = int(done.group(2)) * case.batch_bytes
        processor_seconds += processor_seconds_of(self.far.pid) - before
        latency = case.in_flight * float(done.group(1)) / int(done.group(2)) * 1e6
        return figure(float(done.group(3)) * 1e6, processor_seconds / moved * 1e9, latency)

    def close(self):
        self.far.terminate()
        self.far.wait(timeout=COMMAND_TIMEOUT)


def figure(bytes_per_second, processor_seconds_per_gigabyte, mean_us=None):
    return {
        "gigabytes_per_second": bytes_per_second / 1e9,
        "processor_seconds_per_gigabyte": processor_seconds_per_gigabyte,
        "mean_us": mean_us,
    }


def wait_for(process):
    """The output of a process that ends by itself, and the processor seconds it took."""
    deadline = time.monotonic() + COMMAND_TIMEOUT
    text = process.stdout.read()
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return text, usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"bench-transfer: {process.args} did not end: {text[-500:]}")
        time.sleep(0.005)


def processor_seconds_of(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_listening(port):
    """Looked up in the kernel's table: a connection would be taken for a peer."""
    deadline = time.monotonic() + 10
    entry = re.compile(rf":{port:04X} \S+ 0A ")
    while not any(entry.search(pathlib.Path(f"/proc/net/{table}").read_text()) for table in ("tcp", "tcp6")):
        if time.monotonic() > deadline:
            raise SystemExit(f"bench-transfer: nobody listens on port {port}")
        time.sleep(0.01)


# --- What has to be there.


def fetch_wheel(package, folder):
    name, version = package
    PEERS.mkdir(parents=True, exist_ok=True)
    try:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", PEERS,
            f"{name}=={version}", stdout=sys.stderr)  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"cannot download {name} {version}") from error
    wheel = next(PEERS.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


class Ucx:
    """A UCX library and its ucx_perftest."""

    def __init__(self, choice):
        if choice == "system":
            self.perftest, self.arguments, self.environment = shutil.which("ucx_perftest"), [], {}
            if not self.perftest:
                raise Unavailable("ucx_perftest missing: apt-get install libucx0 ucx-utils, or use --ucx pypi")
        else:
            folder = PEERS / "ucx" / "libucx" if choice == "pypi" else pathlib.Path(choice)
            if choice == "pypi" and not folder.exists():
                fetch_wheel(UCX_PYPI, PEERS / "ucx")
                for binary in (folder / "bin").iterdir():
                    binary.chmod(0o755)
            self.perftest = str(folder / "bin" / "ucx_perftest")
            self.arguments = ["--ucx-library", str(folder / "lib" / "libucp.so.0")]
            self.environment = {"LD_LIBRARY_PATH": str(folder / "lib")}
        info = pathlib.Path(self.perftest).with_name("ucx_info")
        asked = subprocess.run([info, "-v"], env={**os.environ, **self.environment}, capture_output=True, text=True)
        version = re.search(r"\d+\.\d+\.\d+", asked.stdout)
        if not version:
            raise Unavailable(f"{info} -v tells no version: {asked.stderr.strip()}")
        self.version = version[0]


def subjects(arguments):
    """What can be measured here, by name, and why the rest cannot."""
    found, missing = {}, {}

    def add(name, make):
        try:
            found[name] = make()
        except Unavailable as reason:
            missing[name] = str(reason)
            print(f"bench-transfer: without {name}: {reason}", file=sys.stderr)

    add("TCP", lambda: Ours("tcp", ["--choice", "tcp"]))
    add("1 stream", lambda: Streams(found["TCP"], 1))
    add("2 streams", lambda: Streams(found["TCP"], 2))
    try:
        ucx = Ucx(arguments.ucx)
    except Unavailable as reason:
        missing["UCX"] = str(reason)
        ucx = None
    if ucx:
        tcp_settings = ["--ucx-setting", "TLS=tcp,self", "--ucx-setting", "NET_DEVICES=lo"]
        add("UCX/shm", lambda: Ours("ucx", ["--choice", "auto", *ucx.arguments]))
        add("UCX/tcp", lambda: Ours("ucx", ["--choice", "ucx", *tcp_settings, *ucx.arguments]))
        for lane in ("posix", "sysv", "tcp"):
            add(f"perftest {lane}", lambda: Perftest(ucx, lane))
    if arguments.without_mooncake:
        missing["Mooncake"] = "left out by --without-mooncake"
    else:
        add("Mooncake", Mooncake)
    return found, missing, ucx


# --- Figures.


def size(count):
    return f"{count // MIB} MiB" if count >= MIB else f"{count // KIB} KiB"


def best(samples):
    return max(sample["gigabytes_per_second"] for sample in samples)


def median(samples, field="gigabytes_per_second"):
    return statistics.median(sample[field] for sample in samples)


def cheapest(samples):
    return min(sample["processor_seconds_per_gigabyte"] for sample in samples)


# Blocks of 1 MiB, a few at a time, as a layer group of a prompt has them.
VERIFIED = [Case(op, MIB, 4, 1) for op in ("write", "read")]
# One place is written while the one before is hashed, and a wake-up may come late.
VERIFIED_PLACES = 3


def collect(found, wanted, rounds, seconds):
    """Samples by (name, case), and by (name, case, verified or not) for the checksum."""
    samples = {}
    for number in range(rounds):
        print(f"bench-transfer: round {number + 1} of {rounds}", file=sys.stderr)
        for case in wanted:
            for name, subject in found.items():
                measured = subject.measure(case, seconds)
                if measured:
                    samples.setdefault((name, case), []).append(measured)
        for case in VERIFIED:
            for name in ("TCP", "UCX/shm"):
                # Twice, and shorter: the difference is small beside what neighbours do.
                for verify in (False, True) * 2 if name in found else ():
                    measured = found[name].measure(case, seconds / 2, verify=verify, places=VERIFIED_PLACES)
                    samples.setdefault((name, case, verify), []).append(measured)
    return samples


@dataclasses.dataclass
class Criterion:
    """A claim, held by the worst of its comparisons."""

    claim: str
    limit: float
    at_least: bool
    # (what, value)
    values: list

    def row(self):
        if not self.values:
            return [self.claim, "-", "-", "not measured"]
        pick = min if self.at_least else max
        what, value = pick(self.values, key=lambda pair: pair[1])
        holds = value >= self.limit if self.at_least else value <= self.limit
        return [self.claim, f"{value:.2f}", what, "holds" if holds else "**fails**"]


def criteria(samples):
    wanted = sorted({key[1] for key in samples})

    def compare(mine, theirs, measure, which):
        """Ours over the best of theirs."""
        rows = []
        for case in filter(which, wanted):
            # A stream has no direction, so it is measured beside the writes only.
            others = [samples.get((name, dataclasses.replace(case, op="write") if "stream" in name else case)) for name in theirs]
            others = [measure(other) for other in others if other]
            if (mine, case) in samples and others:
                other = max(others) if measure is best else min(others)
                rows.append((str(case), measure(samples[mine, case]) / other))
        return rows

    def large(case):
        return case.batch_bytes >= 256 * KIB

    def many(case):
        return large(case) and case.in_flight == 4

    def alone(case):
        return case.batch_bytes >= 256 * KIB and case.in_flight == 1

    def single(case):
        return large(case) and case.slices == 1 and (case.in_flight == 4 or case.slice_bytes == 64 * MIB)

    streams, shared = ("1 stream", "2 streams"), ("perftest posix", "perftest sysv")
    cost = []
    for case in VERIFIED:
        off, on = samples.get(("UCX/shm", case, False)), samples.get(("UCX/shm", case, True))
        if off and on:
            cost.append((str(case), 1 - best(on) / best(off)))
    return [
        Criterion("TCP over bare TCP, one batch at a time against one stream, ≥ 256 KiB: ≥ 0.80", 0.8, True,
                  compare("TCP", streams[:1], best, alone)),
        Criterion("TCP over bare TCP, 4 in flight against the better of one and two streams, ≥ 256 KiB: ≥ 0.80", 0.8, True,
                  compare("TCP", streams, best, many)),
        Criterion("its processor seconds per GB over the cheaper stream's: ≤ 1.5", 1.5, False,
                  compare("TCP", streams, cheapest, large)),
        Criterion("TCP over Mooncake at 1 MiB, one thread: ≥ 1.3", 1.3, True,
                  compare("TCP", ["Mooncake"], best, lambda case: case.slice_bytes == MIB and case.in_flight == 1)),
        Criterion("TCP over Mooncake at 64 KiB × 16: ≥ 2", 2, True,
                  compare("TCP", ["Mooncake"], best, lambda case: (case.slice_bytes, case.slices) == (64 * KIB, 16))),
        Criterion("TCP over Mooncake with 4 threads: ≥ 2", 2, True,
                  compare("TCP", ["Mooncake"], best, lambda case: case.in_flight == 4)),
        Criterion("TCP's processor seconds per GB over Mooncake's: ≤ 0.5", 0.5, False,
                  compare("TCP", ["Mooncake"], cheapest, lambda case: True)),
        Criterion("UCX/shm over Mooncake at 1 MiB: ≥ 8", 8, True,
                  compare("UCX/shm", ["Mooncake"], best, lambda case: case.slice_bytes == MIB)),
        Criterion("UCX/shm over ucx_perftest's better shared memory, ≥ 256 KiB: ≥ 0.85", 0.85, True,
                  compare("UCX/shm", shared, best, single)),
        Criterion("UCX/tcp over ucx_perftest's tcp, ≥ 256 KiB: ≥ 0.85", 0.85, True,
                  compare("UCX/tcp", ["perftest tcp"], best, single)),
        Criterion("bandwidth of UCX/shm that verification costs at 1 MiB: ≤ 0.10", 0.1, False, cost),
    ]  # fmt: skip


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def throughput_table(samples, names, wanted):
    def cell(name, case):
        taken = samples.get((name, case))
        return f"{best(taken):.2f} ({median(taken):.2f})" if taken else "-"

    return table(["GB/s", *names], [[case, *(cell(name, case) for name in names)] for case in wanted])


def processor_table(samples, names, wanted):
    def cell(name, case):
        taken = samples.get((name, case))
        return f"{cheapest(taken):.2f} ({median(taken, 'processor_seconds_per_gigabyte'):.2f})" if taken else "-"

    return table(["processor s/GB", *names], [[case, *(cell(name, case) for name in names)] for case in wanted])


def latency_table(samples, names, wanted):
    def cell(name, case):
        taken = samples.get((name, case))
        if not taken:
            return "-"
        if "p50_us" in taken[0]:
            return " / ".join(f"{min(sample[field] for sample in taken):.0f}" for field in ("p50_us", "p99_us"))
        return f"mean {min(sample['mean_us'] for sample in taken):.0f}"

    alone = [case for case in wanted if case.in_flight == 1]
    return table(["batch latency p50 / p99, µs", *names], [[case, *(cell(name, case) for name in names)] for case in alone])


def verification_table(samples):
    rows = []
    for name, case in ((name, case) for name in ("TCP", "UCX/shm") for case in VERIFIED):
        off, on = samples.get((name, case, False)), samples.get((name, case, True))
        if off and on:
            lost = f"{100 * (1 - best(on) / best(off)):.0f} %"
            rows.append([f"{name}, {case}", f"{best(off):.2f} ({median(off):.2f})", f"{best(on):.2f} ({median(on):.2f})", lost])
    return table(["GB/s", "unverified", "verified", "lost"], rows)


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info).group(1)
    return f"{os.cpu_count()} cores of {name}, {platform.system()} {platform.release()}"


def section(samples, found, missing, ucx, arguments, wanted):
    names = list(found)
    lasting = [name for name in names if hasattr(found[name], "ask") or name == "Mooncake"]
    absent = "".join(f"\n- {name} is missing: {reason}" for name, reason in missing.items())
    origin = arguments.ucx if arguments.ucx in ("system", "pypi") else "a build"
    version = f"UCX {ucx.version} ({origin}), " if ucx else ""
    return f"""Measured by `make bench-transfer` on {machine()}; {version}Mooncake's {MOONCAKE[0]} {MOONCAKE[1]}; best and, in brackets,
median of {arguments.rounds} rounds in turns, {arguments.seconds} s each. Every row is two processes; processor seconds are of both.{absent}

{table(["claim", "worst ratio", "where", ""], [criterion.row() for criterion in criteria(samples)])}

{throughput_table(samples, names, wanted)}

{processor_table(samples, names, wanted)}

{latency_table(samples, lasting, wanted)}

{verification_table(samples)}

Streams write 1 MiB per system call and never wait for an answer. Mooncake's threads each keep one batch in flight. ucx_perftest keeps as
many puts in flight as fit, moves one buffer again and again, and polls, so it always takes two processors.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each of our figures")
    parser.add_argument("--ucx", default="system", help="system, pypi, or a folder with bin/ and lib/")
    parser.add_argument("--without-mooncake", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few cases, one round, nothing written to docs/")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 1
    run("cargo", "build", "--release", "--locked", "--workspace", "--example", "transfer_bench", cwd=ROOT)
    found, missing, ucx = subjects(arguments)
    wanted = cases(arguments.quick)
    try:
        samples = collect(found, wanted, arguments.rounds, arguments.seconds)
    finally:
        for subject in found.values():
            if hasattr(subject, "close"):
                subject.close()
    text = section(samples, found, missing, ucx, arguments, wanted)
    if not arguments.quick:
        page = PAGE.read_text()
        begin, end = "<!-- begin make bench-transfer -->\n", "<!-- end make bench-transfer -->"
        head, rest = page.split(begin)
        PAGE.write_text(head + begin + text + end + rest.split(end)[1])
    print(text)


if __name__ == "__main__":
    main()
