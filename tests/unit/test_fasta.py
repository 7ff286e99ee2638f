"""Records out of bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fasta_files import messy_fasta, read_naively, valid_records, write_records
from virnucpro_core.errors import InputError
from virnucpro_core.failures import Failure, FailureReason
from virnucpro_core.recipe import ResiduePolicy
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.residues import ENCODE, INVALID, UNK

pytestmark = pytest.mark.unit


def tokens_of(batch: RecordBatch) -> list[bytes]:
    return [batch.tokens[a:b].tobytes() for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]


def encode(residues: bytes) -> bytes:
    return residues.translate(ENCODE.tobytes())


def parse_one(data: bytes, residues: ResiduePolicy = "unknown") -> Failure | bytes:
    """Returns the tokens of a single record, or its failure."""
    batch = parse_records(data, first_record=1, residues=residues)
    assert len(batch.ids) == 1
    return batch.failures[0] if batch.failures else batch.tokens.tobytes()


def test_ids_order_and_duplicates_are_kept() -> None:
    batch = parse_records(b">b x\nMK\n>a\nLL\n>b\nVV\n", first_record=11)
    assert batch.ids == ["b", "a", "b"]
    assert tokens_of(batch) == [encode(b"MK"), encode(b"LL"), encode(b"VV")]
    assert batch.rows.tolist() == [0, 1, 2]
    assert (batch.first_record, batch.residues, batch.truncated, batch.unknown) == (11, 6, 0, 0)
    assert (batch.tokens.dtype, batch.offsets.dtype, batch.rows.dtype) == (np.uint8, np.int64, np.int64)


@pytest.mark.parametrize(
    ("body", "residues"),
    [
        pytest.param(b"MKLV", b"MKLV", id="no line end"),
        pytest.param(b"MK\r\nLV\r\n", b"MKLV", id="CRLF"),
        pytest.param(b"M K\tL\x0b\x0cV\n", b"MKLV", id="whitespace in lines"),
        pytest.param(b"\n\nMK\n\nLV\n\n\n", b"MKLV", id="blank lines"),
        pytest.param(b"mkLv\n", b"MKLV", id="lower case"),
        pytest.param(b"MKLV*\n", b"MKLV", id="final star"),
        pytest.param(b"MKLV\n*\r\n \n", b"MKLV", id="final star on a line of its own"),
        pytest.param(b"MK.-V\n", b"MK.-V", id="gaps"),
    ],
)
def test_sequence_lines(body: bytes, residues: bytes) -> None:
    assert parse_one(b">a\n" + body) == encode(residues)


def test_inner_stars_and_letters_outside_the_vocabulary_become_unknown_one_for_one() -> None:
    batch = parse_records(b">a\nM**KJJj**\n>b\nVV*\n", first_record=1)
    m, k = encode(b"MK")
    assert tokens_of(batch) == [bytes([m, UNK, UNK, k, UNK, UNK, UNK, UNK]), encode(b"VV")]
    assert (batch.unknown, batch.residues, batch.failures) == (6, 10, [])


def test_strict_policy_names_letter_and_position() -> None:
    data = b">a\nMK*\n>b desc\nMK\nVJ*L\n>c\nVV\n"
    batch = parse_records(data, first_record=1, residues="strict")
    assert batch.failures == [
        Failure(2, "b", FailureReason.INVALID_RESIDUE, "'J' at residue 4 is not an amino acid")
    ]
    assert tokens_of(batch) == [encode(b"MK"), encode(b"VV")]
    assert batch.rows.tolist() == [0, 2]


@pytest.mark.parametrize("policy", ["unknown", "strict"])
@pytest.mark.parametrize("byte", [0, 1, 0x1F, ord("1"), ord("@"), 0x7F, 0x80, 0xFF])
def test_bytes_that_are_no_letters_fail_the_record(byte: int, policy: ResiduePolicy) -> None:
    failure = parse_one(b">a\nMK\nL" + bytes([byte]) + b"V\n", policy)
    assert isinstance(failure, Failure)
    assert failure.reason is FailureReason.INVALID_RESIDUE
    shown = f"'{chr(byte)}'" if 32 < byte < 127 else f"byte 0x{byte:02x}"
    assert failure.detail == f"{shown} at residue 4 is not an amino acid"


def test_record_that_swallowed_the_next_one_says_so() -> None:
    """As when files are put together of which one does not end in a line feed."""
    [failure] = parse_records(b">a\nMK\nLV>b\nMK\n>c\nMK\n", first_record=1).failures
    assert (failure.id, failure.reason) == ("a", FailureReason.INVALID_RESIDUE)
    assert failure.detail == "'>' at residue 5: does a record begin there, on the line where this one ends?"


@pytest.mark.parametrize(
    ("data", "record_id", "reason"),
    [
        pytest.param(b">\nMK\n", "", FailureReason.NO_ID, id="no id"),
        pytest.param(b"> \t\r\nMK\n", "", FailureReason.NO_ID, id="blank header"),
        pytest.param(b">caf\xe9 x\nMK\n", "caf\\xe9", FailureReason.BAD_HEADER, id="latin-1 id"),
        pytest.param(b">a M\xfcller\nMK\n", "a", FailureReason.BAD_HEADER, id="latin-1 description"),
        pytest.param(b">a\0b\nMK\n", "a\\x00b", FailureReason.BAD_HEADER, id="NUL in the id"),
        pytest.param(b">a\x1b[2J\nMK\n", "a\\x1b[2J", FailureReason.BAD_HEADER, id="escape sequence"),
        pytest.param(b">a x\rMK\r>b\rLV\r>c\nMK\n", "a", FailureReason.BAD_HEADER, id="mixed line ends"),
        pytest.param(b">a\n>", "a", FailureReason.EMPTY, id="empty, then an empty header"),
        pytest.param(b">a x\n", "a", FailureReason.EMPTY, id="no sequence"),
        pytest.param(b">a", "a", FailureReason.EMPTY, id="header alone"),
        pytest.param(b">a\n \n\r\n", "a", FailureReason.EMPTY, id="blank sequence"),
        pytest.param(b">a\n*\n", "a", FailureReason.EMPTY, id="a stop alone"),
    ],
)
def test_bad_records_are_failures(data: bytes, record_id: str, reason: FailureReason) -> None:
    batch = parse_records(data + b"\n>good\nMK\n", first_record=5)
    assert batch.failures[0].record == 5
    assert (batch.failures[0].id, batch.failures[0].reason) == (record_id, reason)
    assert batch.ids[0] == record_id
    assert batch.ids[-1] == "good"
    assert tokens_of(batch) == [encode(b"MK")]


def test_a_header_may_end_in_carriage_returns() -> None:
    batch = parse_records(b">a x\r\r\nMK\r\r\n", first_record=1)
    assert (batch.ids, batch.failures, tokens_of(batch)) == (["a"], [], [encode(b"MK")])


def test_ids_are_the_first_word_in_utf8() -> None:
    batch = parse_records(">  é|1\tdescription ü\nMK\n".encode(), first_record=1)
    assert (batch.ids, batch.failures) == (["é|1"], [])


def test_truncation_counts_and_still_checks_the_whole_record() -> None:
    data = b">a\n" + b"M" * 9 + b"J\n>b\n" + b"K" * 8 + b"\n>c\n" + b"L" * 9 + b"1\n"
    batch = parse_records(data, first_record=1, truncation=8)
    assert tokens_of(batch) == [encode(b"M" * 8), encode(b"K" * 8)]
    assert (batch.residues, batch.truncated, batch.unknown) == (10 + 8 + 10, 1, 0)
    assert batch.failures == [
        Failure(3, "c", FailureReason.INVALID_RESIDUE, "'1' at residue 10 is not an amino acid")
    ]


def test_a_line_of_five_megabytes_is_one_record() -> None:
    batch = parse_records(b">a\n" + b"MKLVA" * 1_000_000 + b"\n>b\nMK", first_record=1)
    assert (batch.residues, batch.truncated, len(batch.tokens)) == (5_000_002, 1, 1026)


def test_no_records() -> None:
    batch = parse_records(b"", first_record=1)
    assert (batch.ids, batch.failures, len(batch.tokens), batch.offsets.tolist()) == ([], [], 0, [0])


def test_text_before_the_first_header_is_an_error() -> None:
    with pytest.raises(InputError, match="before the first header"):
        parse_records(b"MK\n>a\nMK\n", first_record=1)


def test_tokens_may_be_written_to() -> None:
    assert parse_records(b">a\nMK\n", first_record=1).tokens.flags.writeable


@given(valid_records, st.sampled_from([1, 7, 60, 1000]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_valid_records_come_back(
    records: list[tuple[str, str, str]], width: int, line_end: str, final: bool
) -> None:
    batch = parse_records(write_records(records, width=width, line_end=line_end, final=final), first_record=1)
    assert batch.ids == [record_id for record_id, _, _ in records]
    assert tokens_of(batch) == [encode(residues.encode()) for _, _, residues in records]
    assert batch.failures == []


def expect_failure(header: bytes, residues: bytes, policy: ResiduePolicy) -> FailureReason | None:
    words = header.split()
    if not words:
        return FailureReason.NO_ID
    is_utf8 = header.decode(errors="ignore").encode() == header
    if not is_utf8 or not words[0].decode().isprintable() or b"\r" in header.rstrip():
        return FailureReason.BAD_HEADER
    if not residues:
        return FailureReason.EMPTY
    codes = encode(residues)
    rejected = INVALID in codes or (policy == "strict" and UNK in codes)
    return FailureReason.INVALID_RESIDUE if rejected else None


@given(messy_fasta, st.sampled_from(["unknown", "strict"]), st.integers(1, 9))
def test_anything_equals_the_naive_reader(data: bytes, policy: ResiduePolicy, truncation: int) -> None:
    data = b">first " + data
    expected = read_naively(data)
    batch = parse_records(memoryview(data), first_record=3, residues=policy, truncation=truncation)
    reasons = {failure.record - 3: failure.reason for failure in batch.failures}
    tokens = dict(zip(batch.rows.tolist(), tokens_of(batch), strict=True))
    assert len(batch.ids) == len(expected)
    for row, (header, residues) in enumerate(expected):
        reason = expect_failure(header, residues, policy)
        assert reasons.get(row) is reason
        assert tokens.get(row) == (encode(residues)[:truncation] if reason is None else None)
    assert all(record_id.isprintable() for record_id in batch.ids)
