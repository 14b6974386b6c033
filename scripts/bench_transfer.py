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
import math
import statistics
import sys

from pages import machine, replace_between, table
from transfer_subjects import KIB, MIB, MOONCAKE, MOONCAKE_BLOCKS, ROOT, run, subjects

PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "transfer.svg"


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """A batch of `slices` scattered slices; `in_flight` of them at the same time."""

    op: str
    slice_bytes: int
    slices: int
    in_flight: int
    # All slices at the same place, as ucx_perftest repeats one buffer.
    one_place: bool = False

    @property
    def batch_bytes(self):
        return self.slice_bytes * self.slices

    def __str__(self):
        place = " at one place" if self.one_place else ""
        return f"{self.op} {self.slices} × {size(self.slice_bytes)}{place}, {self.in_flight} in flight"


SIZES = (4 * KIB, 64 * KIB, 256 * KIB, MIB, 16 * MIB, 64 * MIB)
# As handoffs make them: a layer of blocks of a small model, and larger ones.
BATCHES = ((24 * KIB, 64), (64 * KIB, 16), (256 * KIB, 16))


def cases(quick):
    if quick:
        shapes = [(64 * KIB, 16, 1), (64 * KIB, 16, 4), (MIB, 1, 1), (MIB, 1, 4)]
    else:
        shapes = [(size, 1, flight) for size in SIZES for flight in (1, 4) if size < 64 * MIB] + [(64 * MIB, 1, 1)]
        shapes += [(size, slices, flight) for size, slices in BATCHES for flight in (1, 4)]
        shapes += [(size, 16, flight) for size in MOONCAKE_BLOCKS for flight in (1, 4)]
    # What a stream of puts or gets of one size is to ucx_perftest: enough of them to keep two processors busy, at places that
    # fit their caches, as its one buffer does.
    shapes += [(256 * KIB, 16, 4, True), (MIB, 8, 2, True)]
    return [Case(op, *shape) for op in ("write", "read") for shape in dict.fromkeys(shapes)]


def size(count):
    return f"{count // MIB} MiB" if count >= MIB else f"{count // KIB} KiB"


SPEED, COST = "gigabytes_per_second", "processor_seconds_per_gigabyte"


def best(samples):
    return max(sample[SPEED] for sample in samples)


def median(samples, field=SPEED):
    return statistics.median(sample[field] for sample in samples)


def cheapest(samples):
    return min(sample[COST] for sample in samples)


# Blocks of 1 MiB, as many as a prompt of 512 tokens has. Every batch of writes ends with a message and a grant.
VERIFIED = [Case(op, MIB, 16, 1) for op in ("write", "read")]
# Pools are larger than caches: both ends walk over 192 MiB, so that every block comes from memory.
VERIFIED_PLACES = 12


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
                # In pairs, and shorter: the difference is small beside what neighbours do.
                for verify in (False, True) * 5 if name in found else ():
                    measured = found[name].measure(case, seconds / 2, verify=verify, places=VERIFIED_PLACES)
                    samples.setdefault((name, case, verify), []).append(measured)
    return samples


@dataclasses.dataclass
class Criterion:
    """A claim, held by the worst of its cases."""

    claim: str
    # None: nothing is claimed, but a reader would ask.
    limit: float | None
    at_least: bool
    # (what, value)
    values: list

    def row(self):
        if not self.values:
            return [self.claim, "-", "-", "-", "not measured"]
        pick = min if self.at_least else max
        what, value = pick(self.values, key=lambda pair: pair[1])
        middle = statistics.median(value for _, value in self.values)
        verdict = ""
        if self.limit is not None:
            verdict = "holds" if (value >= self.limit if self.at_least else value <= self.limit) else "**fails**"
        return [self.claim, f"{middle:.2f}", f"{value:.2f}", what, verdict]


def criteria(samples):
    wanted = sorted({key[1] for key in samples})

    def compare(mine, theirs, field, which):
        """Ours over the better of theirs, round by round, since only neighbours in time can be compared: the median."""
        rows = []
        for case in filter(which, wanted):
            # A stream has no direction, so it is measured beside the writes only.
            others = [samples.get((name, dataclasses.replace(case, op="write") if "stream" in name else case)) for name in theirs]
            others = [[sample[field] for sample in other] for other in others if other]
            if (mine, case) in samples and others:
                better = map(max if field == SPEED else min, zip(*others))
                pairs = zip((sample[field] for sample in samples[mine, case]), better)
                rows.append((str(case), statistics.median(our / other for our, other in pairs)))
        return rows

    def kept_busy(case):
        """A stream never waits for an answer: what it moves compares with what is asked for ahead of the answers."""
        return case.batch_bytes >= 256 * KIB and case.batch_bytes * case.in_flight >= MIB

    def many(case):
        return kept_busy(case) and case.in_flight == 4

    def alone(case):
        return case.batch_bytes == 256 * KIB and case.in_flight == 1

    def single(case):
        return case.batch_bytes >= 256 * KIB and case.slices == 1 and (case.in_flight == 4 or case.slice_bytes == SIZES[-1])

    def with_mooncake(case):
        return case.slice_bytes == MIB or (case.slice_bytes, case.slices) == (64 * KIB, 16) or case.in_flight == 4

    def streamed(case):
        return case.one_place or (single(case) and case.slice_bytes >= 16 * MIB)

    streams, shared = ("1 stream", "2 streams"), ("perftest posix", "perftest sysv")
    cost = []
    for case in VERIFIED:
        if ("UCX/shm", case, False) in samples:
            cost.append((str(case), lost(samples, "UCX/shm", case)))
    return [
        Criterion("TCP over one bare TCP stream, ≥ 1 MiB in flight: ≥ 0.80", 0.8, True, compare("TCP", streams[:1], SPEED, kept_busy)),
        Criterion("TCP, 4 in flight, over the better of one and two bare streams", None, True,
                  compare("TCP", streams, SPEED, many)),
        Criterion("TCP, one answered 256 KiB at a time, over one bare stream that waits for none", None, True,
                  compare("TCP", streams[:1], SPEED, alone)),
        Criterion("TCP's processor seconds per GB over one bare stream's: ≤ 1.5", 1.5, False,
                  compare("TCP", streams[:1], COST, kept_busy)),
        Criterion("TCP over Mooncake at 1 MiB, one thread: ≥ 1.3", 1.3, True,
                  compare("TCP", ["Mooncake"], SPEED, lambda case: case.slice_bytes == MIB and case.in_flight == 1)),
        Criterion("TCP over Mooncake at 64 KiB × 16: ≥ 2", 2, True,
                  compare("TCP", ["Mooncake"], SPEED, lambda case: (case.slice_bytes, case.slices) == (64 * KIB, 16))),
        Criterion("TCP over Mooncake with 4 threads: ≥ 2", 2, True,
                  compare("TCP", ["Mooncake"], SPEED, lambda case: case.in_flight == 4)),
        Criterion("TCP's processor seconds per GB over Mooncake's in these cases: ≤ 0.5", 0.5, False,
                  compare("TCP", ["Mooncake"], COST, with_mooncake)),
        Criterion("UCX/shm over Mooncake at 64 KiB × 16 and 1 MiB × 16: ≥ 8", 8, True,
                  compare("UCX/shm", ["Mooncake"], SPEED, lambda case: case.slice_bytes >= 64 * KIB and case.slices == 16)),
        Criterion("UCX/shm over Mooncake, one answered 1 MiB at a time", None, True,
                  compare("UCX/shm", ["Mooncake"], SPEED, lambda case: (case.slice_bytes, case.slices, case.in_flight) == (MIB, 1, 1))),
        Criterion("UCX/shm over ucx_perftest's better shared memory, ≥ 256 KiB, in batches: ≥ 0.85", 0.85, True,
                  compare("UCX/shm", shared, SPEED, streamed)),
        Criterion("UCX/shm, every slice answered, over ucx_perftest, which answers none", None, True,
                  compare("UCX/shm", shared, SPEED, single)),
        Criterion("UCX/tcp over ucx_perftest's tcp, ≥ 256 KiB, in batches: ≥ 0.85", 0.85, True,
                  compare("UCX/tcp", ["perftest tcp"], SPEED, streamed)),
        Criterion("bandwidth of UCX/shm that verification costs at 1 MiB: ≤ 0.10", 0.1, False, cost),
    ]  # fmt: skip


def lost(samples, name, case):
    """The share of bandwidth that verification costs: the median of its pairs."""
    pairs = zip(samples[name, case, False], samples[name, case, True])
    return 1 - statistics.median(on[SPEED] / off[SPEED] for off, on in pairs)


def claims_table(claims):
    return table(["claim", "median of the cases", "worst case", "which", ""], [claim.row() for claim in claims])


def absences(missing):
    """Lines that say what could not be measured, and why."""
    return "".join(f"\n- {name} is missing: {reason}" for name, reason in missing.items())


def throughput_table(samples, names, wanted):
    def cell(name, case):
        taken = samples.get((name, case))
        return f"{best(taken):.2f} ({median(taken):.2f})" if taken else "-"

    return table(["GB/s", *names], [[case, *(cell(name, case) for name in names)] for case in wanted])


def processor_table(samples, names, wanted):
    def cell(name, case):
        taken = samples.get((name, case))
        return f"{cheapest(taken):.2f} ({median(taken, COST):.2f})" if taken else "-"

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
            share = f"{100 * lost(samples, name, case):.0f} %"
            rows.append([f"{name}, {case}", f"{best(off):.2f} ({median(off):.2f})", f"{best(on):.2f} ({median(on):.2f})", share])
    return table(["GB/s", "unverified", "verified", "lost (median of the pairs)"], rows)


COLOURS = ("#c0392b", "#999999", "#555555", "#2471a3", "#76b4dd", "#1e8449", "#7dcea0", "#a9dfbf", "#8e44ad")


def plot(samples, names, wanted):
    """Writes of one slice, as many in flight as there are, against the slice's size; both axes logarithmic."""
    left, top, width, height, low, high = 50, 20, 560, 340, 0.05, 50.0
    first, last = math.log2(SIZES[0]), math.log2(SIZES[-1])

    def x(count):
        return left + width * (math.log2(count) - first) / (last - first)

    def y(value):
        return top + height * (1 - math.log(max(value, low) / low) / math.log(high / low))

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="{top + height + 40}" font-family="sans-serif" font-size="11">',
             '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for value in (0.1, 0.3, 1, 3, 10, 30):
        parts.append(f'<path d="M{left} {y(value):.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>')
    for count in SIZES:
        parts.append(f'<text x="{x(count):.1f}" y="{top + height + 18}" text-anchor="middle">{size(count)}</text>')
    parts.append(f'<text x="{left}" y="{top - 6}">GB/s, best of the rounds: writes of one slice, 4 in flight (64 MiB: 1)</text>')
    for row, (name, colour) in enumerate(zip(names, COLOURS)):
        shown = [case for case in wanted if case.op == "write" and case.slices == 1]
        shown = [case for case in shown if case.in_flight == 4 or case.slice_bytes == SIZES[-1]]
        points = [(x(case.slice_bytes), y(best(samples[name, case]))) for case in shown if (name, case) in samples]
        line = " ".join(f"{at:.1f},{value:.1f}" for at, value in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{at:.1f}" cy="{value:.1f}" r="3" fill="{colour}"/>' for at, value in points]
        parts.append(f'<text x="{left + width + 20}" y="{top + 14 + 18 * row}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def section(samples, found, missing, ucx, arguments, wanted):
    names = list(found)
    lasting = [name for name in names if hasattr(found[name], "ask") or name == "Mooncake"]
    origin = arguments.ucx if arguments.ucx in ("system", "pypi") else "a build"
    version = f"UCX {ucx.version} ({origin}), " if ucx else ""
    return f"""Measured by `make bench-transfer` on {machine()}; {version}Mooncake's {MOONCAKE[0]} {MOONCAKE[1]}; best and, in brackets,
median of {arguments.rounds} rounds in turns, {arguments.seconds} s each. Every row is two processes; processor seconds are of both.
Claims compare within a round: a case counts with the median of its rounds.{absences(missing)}

{claims_table(criteria(samples))}

![GB/s by size]({PLOT.name})

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
    found, missing, ucx = subjects(arguments.ucx, not arguments.without_mooncake)
    wanted = cases(arguments.quick)
    try:
        samples = collect(found, wanted, arguments.rounds, arguments.seconds)
    finally:
        for subject in found.values():
            if hasattr(subject, "close"):
                subject.close()
    text = section(samples, found, missing, ucx, arguments, wanted)
    if not arguments.quick:
        replace_between(PAGE, "<!-- begin make bench-transfer -->", "<!-- end make bench-transfer -->", text)
        PLOT.write_text(plot(samples, list(found), wanted))
    print(text)


if __name__ == "__main__":
    main()
