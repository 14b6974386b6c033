#!/usr/bin/env python3
"""Measures lookups in a full block table of a million blocks, with and without eviction, and for how long the longest
operations hold its lock: writes the tables at the end of docs/eviction.md. Wants two idle cores.
"""

import os
import pathlib
import subprocess

from pages import replace_between

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "eviction.md"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def main():
    # Built together with everything else: alone, the dependencies would have other features, and be built twice.
    subprocess.run(["cargo", "build", "--release", "--workspace", "--examples", "--quiet"], cwd=ROOT, check=True)
    program = TARGET / "release" / "examples" / "table_bench"
    figures = subprocess.run([program], check=True, text=True, stdout=subprocess.PIPE).stdout
    print(figures)
    replace_between(PAGE, "<!-- table -->", "<!-- end of table -->", figures)


if __name__ == "__main__":
    main()
