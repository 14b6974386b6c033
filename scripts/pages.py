"""Sections of documentation that benches write."""

import os
import pathlib
import platform
import re

# What a processor may have that engines make use of.
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16")


def replace_between(page, begin, end, text):
    """Puts `text` between the lines `begin` and `end` of a page, each of which it has once."""
    head, rest = page.read_text().split(f"{begin}\n")
    page.write_text(f"{head}{begin}\n{text}{end}{rest.split(end)[1]}")


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine(features=()):
    """Where something was measured, with those of the processor's features that it has."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info).group(1)
    flags = set(re.search(r"flags\s*: (.*)", info).group(1).split()) if features else ()
    named = f" ({', '.join(feature for feature in features if feature in flags)})" if features else ""
    return f"{os.cpu_count()} cores of {name}{named}, {platform.system()} {platform.release()}"
