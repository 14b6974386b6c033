#!/usr/bin/env python3
"""Writes what `transformers` makes of the tiny model of each family to libs/engine/tests/reference.

    python3 -m venv /tmp/reference && /tmp/reference/bin/pip install torch transformers safetensors
    /tmp/reference/bin/python scripts/reference_families.py [FAMILY...]

The models are made up by `engine::fixture` from nothing but a seed, so that the tests write the same ones again and compare; no weights
are committed. FP8 weights are decoded by torch here, since `transformers` multiplies them on GPUs alone.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import safetensors.torch
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "libs/engine/tests/reference"
FAMILIES = "llama mistral mixtral qwen2 qwen3 qwen3moe gemma2 gemma3 phi3 smollm3 olmo2".split()
# The directories beside the families: which family, and what is asked of the example that writes them.
CASES = {family: (family, []) for family in FAMILIES} | {"qwen3_fp8": ("qwen3", ["fp8"])}
# Longer than the window of 48 and several blocks; and longer than a segment of attention.
LENGTHS = [70, 300]
# Rows on both sides of the window's end, of a panel's and of a segment's.
ROWS = [0, 1, 2, 31, 32, 46, 47, 48, 49, 50, 63, 64, 65, 69, 95, 96, 150, 255, 256, 257, 299]
VOCABULARY_STEP = 8
SCALE_BLOCK = 128


def prompt(length):
    return [(i * i * 31 + 7 * i + length) % 320 for i in range(length)]


def decode_fp8(directory):
    """Replaces FP8 weights by their values, and what the configuration says of them by nothing."""
    file = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None:
            assert tensor.dtype == torch.float8_e4m3fn, (name, tensor.dtype)
            rows, columns = tensor.shape
            wide = scale.repeat_interleave(SCALE_BLOCK, 0)[:rows].repeat_interleave(SCALE_BLOCK, 1)[:, :columns]
            tensor = tensor.to(torch.float32) * wide
        plain[name] = tensor.to(torch.float32)
    safetensors.torch.save_file(plain, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))


def load(directory):
    config = transformers.AutoConfig.from_pretrained(directory)
    # Defaults of some classes are beyond our vocabulary; nothing is padded here.
    config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def reference(family, extra):
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        command = ["cargo", "run", "--release", "-q", "-p", "engine", "--example", "tiny_model", "--"]
        subprocess.run([*command, family, *extra, directory], cwd=ROOT, check=True)
        if extra:
            decode_fp8(directory)
        model = load(directory)
    prompts = []
    for length in LENGTHS:
        tokens = prompt(length)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        rows = [row for row in ROWS if row < length]
        chosen = [[round(float(x), 5) for x in logits[row, ::VOCABULARY_STEP]] for row in rows]
        print(f"{family}: {length} tokens, deviation {logits.std():.3f}, greatest {logits.abs().max():.3f}")
        prompts.append({"tokens": tokens, "rows": rows, "logits": chosen})
    return {"class": type(model).__name__, "vocabulary_step": VOCABULARY_STEP, "prompts": prompts}


def main():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    OUT.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[1:] or CASES:
        family, extra = CASES[case]
        result = {"transformers": transformers.__version__, **reference(family, extra)}
        lines = json.dumps(result).replace('{"tokens"', '\n{"tokens"').replace("[[", "[\n[").replace("], [", "],\n[")
        (OUT / f"{case}.json").write_text(lines + "\n")


if __name__ == "__main__":
    main()
