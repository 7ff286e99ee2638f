"""The residue alphabet."""

from __future__ import annotations

import string

import numpy as np
import pytest

from virnucpro_core.sequences.residues import (
    CLS,
    ENCODE,
    EOS,
    INVALID,
    IS_WHITESPACE,
    PAD,
    UNK,
    VOCABULARY,
    WHITESPACE,
)

pytestmark = pytest.mark.unit

# The order of vocab.txt of facebook/esm2_t33_650M_UR50D, written out as ids.
ESM2_IDS = dict(zip("LAGVSERTIDPKQNFYMHWCXBUZO.-", range(4, 31), strict=True))


def test_tokens_are_those_of_esm2() -> None:
    assert len(VOCABULARY) == 33
    assert [VOCABULARY[token] for token in (CLS, PAD, EOS, UNK)] == ["<cls>", "<pad>", "<eos>", "<unk>"]
    assert VOCABULARY[31:] == ("<null_1>", "<mask>")
    assert {letter: int(ENCODE[ord(letter)]) for letter in ESM2_IDS} == ESM2_IDS


@pytest.mark.parametrize("letter", string.ascii_lowercase)
def test_case_is_folded(letter: str) -> None:
    assert ENCODE[ord(letter)] == ENCODE[ord(letter.upper())] != INVALID


def test_letters_outside_the_vocabulary_and_stars_are_unknown() -> None:
    unknown = {chr(byte) for byte in np.flatnonzero(ENCODE == UNK)}
    assert unknown == {"J", "j", "*"}


def test_every_other_byte_is_invalid() -> None:
    valid = {chr(byte) for byte in np.flatnonzero(ENCODE != INVALID)}
    assert valid == {*string.ascii_letters, "*", ".", "-"}


def test_whitespace_is_what_bytes_split_at() -> None:
    assert {byte for byte in range(256) if not bytes([byte]).split()} == set(WHITESPACE)
    assert set(np.flatnonzero(IS_WHITESPACE)) == set(WHITESPACE)
