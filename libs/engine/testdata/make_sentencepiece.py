#!/usr/bin/env python3
"""A small SentencePiece model and what the reference implementation makes of strings.

usage: make_sentencepiece.py TEXT > sentencepiece.json   (needs sentencepiece from PyPI)
Trained as Llama 2's was: byte-pair encoding with byte fallback, no normalisation, digits one by one.
"""

import io
import json
import random
import sys

import sentencepiece

text = open(sys.argv[1], encoding="utf-8").read()
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text.splitlines()),
    model_writer=model,
    model_type="bpe",
    vocab_size=700,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    character_coverage=0.9995,
    user_defined_symbols=["<|user|>"],
)
processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind(token):
    if processor.is_unknown(token):
        return 2
    if processor.is_control(token):
        return 3
    if processor.is_byte(token):
        return 6
    return 4 if processor.id_to_piece(token) == "<|user|>" else 1


tokens = range(processor.vocab_size())
generator = random.Random(7)
words = text.split()
strings = [
    "Hello, world!",
    "",
    " ",
    "  two  spaces  ",
    "naïve café 你好 🚀",
    "tab\tand\nnewline\n\n",
    "ababababab aaaaaaaaaaaaaaa",
    "1234567890 12 34,567.89",
    "<0x41> is not a byte",
    "\u2581 is the sign itself",
]
for _ in range(150):
    start = generator.randrange(len(text))
    strings.append(text[start : start + generator.randrange(1, 80)])
for _ in range(40):
    strings.append("".join(generator.choice("abthe  .,\n'éß你🚀") for _ in range(generator.randrange(1, 30))))
json.dump(
    {
        "pieces": [processor.id_to_piece(token) for token in tokens],
        "scores": [processor.get_score(token) for token in tokens],
        "types": [kind(token) for token in tokens],
        "strings": strings,
        "ids": [processor.encode(string) for string in strings],
    },
    sys.stdout,
    ensure_ascii=False,
)
