"""The residue alphabet: one lookup table from a byte of FASTA to a token of ESM2."""

from __future__ import annotations

import string

import numpy as np
from numpy.typing import NDArray

VOCABULARY = (
    "<cls>", "<pad>", "<eos>", "<unk>",
    "L", "A", "G", "V", "S", "E", "R", "T", "I", "D", "P", "K", "Q", "N", "F", "Y", "M", "H", "W", "C",
    "X", "B", "U", "Z", "O", ".", "-",
    "<null_1>", "<mask>",
)  # fmt: skip
"""ESM2's 33 tokens in the order of their ids (vocab.txt of every ESM2 checkpoint)."""

CLS, PAD, EOS, UNK = range(4)

INVALID = 255
"""What `ENCODE` gives for a byte that is no residue under any policy."""

WHITESPACE = b" \t\n\v\f\r"
"""Bytes dropped from sequence lines: ASCII whitespace."""


def _encode_table() -> NDArray[np.uint8]:
    table = np.full(256, INVALID, dtype=np.uint8)
    for letter in string.ascii_letters + "*":
        table[ord(letter)] = UNK
    for token, symbol in enumerate(VOCABULARY):
        if len(symbol) == 1:
            table[ord(symbol)] = table[ord(symbol.lower())] = token
    table.setflags(write=False)
    return table


ENCODE = _encode_table()
"""uint8[256]: the token of each byte, case folded. Letters outside the vocabulary (J) and `*` are `UNK`;
digits, control bytes, bytes above 127 and other punctuation are `INVALID`."""

IS_WHITESPACE = np.isin(np.arange(256), np.frombuffer(WHITESPACE, dtype=np.uint8))
"""bool[256]: whether a byte is in `WHITESPACE`."""
