"""What `bench_transfer.py` measures: each subject has `measure(case, seconds)`, which gives a figure, or `None` where the
case is none of its own. All of them are two processes on this machine.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
PEERS = TARGET / "peers"
BENCH = TARGET / "release" / "examples" / "transfer_bench"
MOONCAKE = ("mooncake-transfer-engine-non-cuda", "0.3.13.post1")
UCX_PYPI = ("libucx-cu12", "1.22.0")
KIB, MIB = 1 << 10, 1 << 20
# What Mooncake's bench is run with: a thread keeps one batch in flight.
MOONCAKE_BLOCKS = (4 * KIB, 64 * KIB, MIB)
# What it registers; it uses a few blocks of it.
MOONCAKE_BUFFER_BYTES = 512 * MIB
COMMAND_TIMEOUT = 60


def run(*command, **options):
    print("+", *command, file=sys.stderr)
    return subprocess.run([str(part) for part in command], check=True, text=True, **options)


class Unavailable(Exception):
    """Why something cannot be measured here."""


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
        one_size = case.slices == 1 and (case.in_flight > 1 or case.slice_bytes >= 64 * MIB)
        if not case.one_place and not one_size:
            return None
        key = (case.op, case.slice_bytes)
        rate = self.rates.get(key, 0.1e9 if self.lane == "tcp" else 1e9)
        iterations = max(4, int(rate * seconds / case.slice_bytes))
        warm_up = max(1, iterations // 10)
        test = {"write": "ucp_put_bw", "read": "ucp_get"}[case.op]
        port = free_port()
        options = {"env": self.environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        far = subprocess.Popen([self.ucx.perftest, "-p", str(port)], **options)
        wait_until_listening(port)
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
    """Of all its threads, also those that have ended, to the nanosecond: what /proc says of it comes in ticks of 10 ms."""
    # Linux's number of the processor clock of another process: clock_getcpuclockid(3).
    return time.clock_gettime(~pid << 3 | 2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_listening(port):
    """Looked up in the kernel's table: a connection would be taken for a peer."""
    deadline = time.monotonic() + 10
    entry = re.compile(rf":{port:04X} \S+ 0A ")
    while not any(entry.search(pathlib.Path(f"/proc/net/{table}").read_text()) for table in ("tcp", "tcp6")):
        if time.monotonic() > deadline:
            raise SystemExit(f"bench-transfer: nobody listens on port {port}")
        time.sleep(0.01)


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


def subjects(ucx_choice, with_mooncake):
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
        ucx = Ucx(ucx_choice)
    except Unavailable as reason:
        missing["UCX"] = str(reason)
        ucx = None
    if ucx:
        tcp_settings = ["--ucx-setting", "TLS=tcp,self", "--ucx-setting", "NET_DEVICES=lo"]
        add("UCX/shm", lambda: Ours("ucx", ["--choice", "auto", *ucx.arguments]))
        add("UCX/tcp", lambda: Ours("ucx", ["--choice", "ucx", *tcp_settings, *ucx.arguments]))
        for lane in ("posix", "sysv", "tcp"):
            add(f"perftest {lane}", lambda: Perftest(ucx, lane))
    if with_mooncake:
        add("Mooncake", Mooncake)
    return found, missing, ucx
