#!/usr/bin/env python3
"""Decoded random blocks of every weight format, as ggml's own Python package decodes them.

usage: make_dequantise.py > dequantise.json   (needs gguf and numpy from PyPI)
Scales are random halves of moderate size, everything else random bytes. Values are given as the bits of their f32.
"""

import json

import numpy
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

BLOCKS = 2
# Block bytes, and where the halves in a block lie.
FORMATS = {
    "F16": (Type.F16, 2 * 32, range(0, 64, 2)),
    "BF16": (Type.BF16, 2 * 32, ()),
    "Q8_0": (Type.Q8_0, 34, (0,)),
    "Q4_0": (Type.Q4_0, 18, (0,)),
    "Q4_1": (Type.Q4_1, 20, (0, 2)),
    "Q5_0": (Type.Q5_0, 22, (0,)),
    "Q5_1": (Type.Q5_1, 24, (0, 2)),
    "Q4_K": (Type.Q4_K, 144, (0, 2)),
    "Q5_K": (Type.Q5_K, 176, (0, 2)),
    "Q6_K": (Type.Q6_K, 210, (208,)),
}

random = numpy.random.default_rng(20261122)
golden = {}
for name, (kind, block_bytes, halves) in FORMATS.items():
    row = random.integers(0, 256, (BLOCKS, block_bytes), dtype=numpy.uint8)
    for at in halves:
        scales = random.normal(0, 1, BLOCKS).astype(numpy.float16)
        row[:, at : at + 2] = scales.view(numpy.uint8).reshape(BLOCKS, 2)
    if name == "BF16":
        values = random.normal(0, 1, BLOCKS * 32).astype(numpy.float32)
        row = (values.view(numpy.uint32) >> 16).astype(numpy.uint16).view(numpy.uint8)
    row = row.reshape(1, -1)
    values = dequantize(row, kind).astype(numpy.float32).reshape(-1)
    golden[name] = {"bytes": row.tobytes().hex(), "f32": values.view(numpy.uint32).tobytes().hex()}
print(json.dumps(golden, indent=1))
