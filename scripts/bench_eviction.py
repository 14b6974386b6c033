#!/usr/bin/env python3
"""Replays traces and made-up workloads on the real block table, and writes the tables of docs/eviction.md and their plot.

The conversation trace is Mooncake's, published with its FAST'25 paper (FAST25-release/traces/conversation_trace.jsonl in
kvcache-ai/Mooncake). Name it, or other traces of that format, as arguments or in PERIGEE_TRACES (separated by
colons); without any, ../shared/traces is looked at. Every figure is a function of the trace: no clock is involved.
"""

import json
import os
import pathlib
import subprocess
import sys

from pages import replace_between

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "eviction.md"
PLOT = ROOT / "docs" / "eviction.svg"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
POLICIES = ("lru", "lfu", "s3fifo", "returns", "belady")
COLOURS = {"lru": "#777", "lfu": "#bb9", "s3fifo": "#48c", "returns": "#c33", "belady": "#2a2"}


def traces():
    named = sys.argv[1:] or [path for path in os.environ.get("PERIGEE_TRACES", "").split(":") if path]
    found = named or sorted(str(path) for path in (ROOT.parent / "shared" / "traces").glob("*.jsonl"))
    if not found:
        print("bench-eviction: no trace is given, only made-up workloads are replayed.\n" + __doc__, file=sys.stderr)
    return found


def markdown(table):
    lines = [f"### {pathlib.Path(table['name']).stem.replace('_', ' ')} ({table['requests']} requests)", ""]
    lines += ["| Mtokens | " + " | ".join(POLICIES) + " | returns / lru |", "|---" * (len(POLICIES) + 2) + "|"]
    for row in table["rows"]:
        ratios = " | ".join(f"{row[policy]:.3f}" for policy in POLICIES)
        lines.append(f"| {row['ktokens'] / 1000:g} | {ratios} | {row['returns'] / max(row['lru'], 1e-9):.2f} |")
    return "\n".join(lines)


def plot(table):
    """The table as curves; the capacities are evenly spaced."""
    width, height, left, bottom = 640, 360, 50, 40
    rows = table["rows"]
    top = max(row["belady"] for row in rows) * 1.1
    x = lambda i: left + i * (width - left - 110) / (len(rows) - 1)
    y = lambda ratio: height - bottom - ratio / top * (height - bottom - 20)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">']
    parts.append(f'<rect width="{width}" height="{height}" fill="#fff"/>')
    for step in range(6):
        ratio = top * step / 5
        parts.append(f'<line x1="{left}" x2="{width - 110}" y1="{y(ratio):.1f}" y2="{y(ratio):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(ratio) + 4:.1f}" text-anchor="end">{ratio:.2f}</text>')
    for i, row in enumerate(rows):
        parts.append(f'<text x="{x(i):.1f}" y="{height - bottom + 16}" text-anchor="middle">{row["ktokens"] / 1000:g}</text>')
    parts.append(f'<text x="{(width - 60) / 2}" y="{height - 8}" text-anchor="middle">pool, million tokens</text>')
    for line, policy in enumerate(POLICIES):
        points = " ".join(f"{x(i):.1f},{y(row[policy]):.1f}" for i, row in enumerate(rows))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[policy]}" stroke-width="2"/>')
        parts.append(f'<text x="{width - 100}" y="{40 + 16 * line}" fill="{COLOURS[policy]}">{policy}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main():
    # Built together with everything else: alone, the dependencies would have other features, and be built twice.
    subprocess.run(["cargo", "build", "--release", "--workspace", "--examples", "--quiet"], cwd=ROOT, check=True)
    program = TARGET / "release" / "examples" / "eviction"
    done = subprocess.run([program, *traces()], check=True, text=True, stdout=subprocess.PIPE)
    tables = json.loads(done.stdout)
    figures = "\n\n".join(markdown(table) for table in tables)
    print(figures)
    replace_between(PAGE, "<!-- figures -->", "<!-- end of figures -->", figures + "\n")
    PLOT.write_text(plot(tables[0]))


if __name__ == "__main__":
    main()
