"""FASTA records in memory: where they lie in a block of bytes, and their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virnucpro_core.errors import InputError
from virnucpro_core.failures import Failure, FailureReason
from virnucpro_core.recipe import TRUNCATION, ResiduePolicy
from virnucpro_core.sequences.residues import ENCODE, INVALID, IS_WHITESPACE, UNK, WHITESPACE

_NEWLINE, _HEADER, _STAR, _SPACE = b"\n>* "


@dataclass(frozen=True, slots=True)
class Layout:
    """Where records lie in one block of bytes, which may begin and end anywhere in a file.

    Attributes:
        starts: int64[(k,)], offsets of the `>` of the records that begin in the block.
        header_ends: int64[(k,)], offsets of the line feeds that end their headers; the block's length where
            it ends first.
        residues: int64[(k+1,)], sequence bytes that are not whitespace. The first entry belongs to the record
            that the block begins in, the others to the records of `starts`.
        stars: bool[(k+1,)], whether the last byte counted in `residues` is a `*`.
        lines: line feeds in the block.
        in_header: whether the block ends inside a header.
    """

    starts: NDArray[np.int64]
    header_ends: NDArray[np.int64]
    residues: NDArray[np.int64]
    stars: NDArray[np.bool_]
    lines: int
    in_header: bool


def find_records(block: NDArray[np.uint8], *, line_start: bool, in_header: bool) -> Layout:
    """Finds the records of a block without a Python loop.

    Args:
        block: uint8[(n,)], at least one byte.
        line_start: whether the block begins at the start of a line.
        in_header: whether the block begins inside a header; excludes `line_start`.
    """
    size = len(block)
    whites = np.flatnonzero(block <= _SPACE)
    kinds = block[whites]
    is_white = IS_WHITESPACE[kinds]
    if not is_white.all():
        whites, kinds = whites[is_white], kinds[is_white]
    # `ranks` index into `whites`: the whitespace between two newlines is then counted by subtraction.
    ranks = np.flatnonzero(kinds == _NEWLINE)
    newlines = whites[ranks]
    lines = len(newlines)
    first = [-1] if line_start else []
    newlines = np.concatenate((first, newlines, [size])).astype(np.int64)
    ranks = np.concatenate((first, ranks, [len(whites)])).astype(np.int64)
    followed = newlines[newlines + 1 < size]
    before_header = np.flatnonzero(block[followed + 1] == _HEADER)
    starts = newlines[before_header] + 1
    header_ends = newlines[before_header + 1]

    open_end, open_rank = (newlines[0], ranks[0]) if in_header else (-1, -1)
    region_starts = np.concatenate(([open_end], header_ends))
    region_ends = np.concatenate((starts, [size]))
    start_ranks = np.concatenate(([open_rank], ranks[before_header + 1]))
    end_ranks = np.concatenate((ranks[before_header], [len(whites) - 1]))
    residues = (region_ends - region_starts - 1) - (end_ranks - start_ranks)
    return Layout(
        starts=starts,
        header_ends=header_ends,
        residues=residues,
        stars=_find_final_stars(block, whites, residues, region_ends, end_ranks),
        lines=lines,
        in_header=bool(header_ends[-1] == size) if len(starts) else in_header and lines == 0,
    )


def _find_final_stars(
    block: NDArray[np.uint8],
    whites: NDArray[np.int64],
    residues: NDArray[np.int64],
    region_ends: NDArray[np.int64],
    end_ranks: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Tells for each region whether its last byte that is not whitespace is a `*`; see `find_records`."""
    stars = np.zeros(len(residues), dtype=np.bool_)
    if not (block == _STAR).any():
        return stars
    rows = np.flatnonzero(residues > 0)
    last = region_ends[rows] - 1
    ends_white = IS_WHITESPACE[block[last]]
    # Offset minus rank is constant within a run of whitespace and never falls: a search finds a run's start.
    runs = whites - np.arange(len(whites))
    run_ranks = end_ranks[rows][ends_white]
    last[ends_white] = whites[np.searchsorted(runs, runs[run_ranks])] - 1
    stars[rows] = block[last] == _STAR
    return stars


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Consecutive records of one input, as tokens.

    Attributes:
        first_record: number of the first record in its input, counted from 1.
        ids: ids of all records, good or bad, in input order; what cannot be read of an id is escaped.
        tokens: uint8[(total,)], the good records' residues without BOS and EOS, truncated, one after another.
        offsets: int64[(m+1,)], good record i is `tokens[offsets[i]:offsets[i+1]]`.
        rows: int64[(m,)], index into `ids` of each good record.
        failures: the bad records, in input order.
        residues: residues of all records, good or bad, before truncation.
        truncated: good records that lost residues to truncation.
        unknown: residues in `tokens` that became `<unk>`.
    """

    first_record: int
    ids: list[str]
    tokens: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]
    failures: list[Failure]
    residues: int
    truncated: int
    unknown: int


def parse_records(
    buffer: bytes | memoryview,
    *,
    first_record: int,
    residues: ResiduePolicy = "unknown",
    truncation: int = TRUNCATION,
) -> RecordBatch:
    """Parses whole records into tokens; a bad record becomes a failure and stops nothing.

    Args:
        buffer: bytes of whole records, beginning with a header (blank lines may come first).
        first_record: number of the buffer's first record in its input, counted from 1.
        residues: `unknown` turns letters outside the vocabulary into `<unk>`; `strict` fails the record.
        truncation: residues kept of each record. The whole record is checked nevertheless.

    Raises:
        InputError: the buffer does not begin with a header.
    """
    text = bytes(buffer)
    layout = find_records(np.frombuffer(text + b"\n", dtype=np.uint8), line_start=True, in_header=False)
    if layout.residues[0]:
        raise InputError(
            "there is sequence data before the first header",
            where=f"record {first_record}",
            todo="Give whole records, each beginning with a line that starts with '>'.",
        )
    bounds = [*layout.starts.tolist(), len(text)]
    header_ends = layout.header_ends.tolist()
    sequences = [text[start:end] for start, end in zip(header_ends, bounds[1:], strict=True)]
    codes = np.frombuffer(b"".join(sequences).translate(ENCODE.tobytes(), WHITESPACE), dtype=np.uint8)
    # Where each record's residues lie in `codes`; a final `*` lies between two records and belongs to none.
    lengths = layout.residues[1:] - layout.stars[1:]
    begins = np.cumsum(layout.residues[1:]) - layout.residues[1:]

    ids: list[str] = []
    failures: dict[int, tuple[FailureReason, str]] = {}
    for row, (start, end) in enumerate(zip(bounds, header_ends, strict=False)):
        record_id, fault = _read_id(text[start + 1 : end])
        ids.append(record_id)
        if fault:
            failures[row] = fault
    for row in np.flatnonzero(lengths == 0).tolist():
        failures.setdefault(row, (FailureReason.EMPTY, "the record has no residues"))
    for row, position in _find_rejected(codes, begins, lengths, residues):
        letter = sequences[row].translate(None, WHITESPACE)[position : position + 1]
        swallowed = ": does a record begin there, on the line where this one ends?"
        said = swallowed if letter == b">" else " is not an amino acid"
        detail = f"{_show(letter)} at residue {position + 1}{said}"
        failures.setdefault(row, (FailureReason.INVALID_RESIDUE, detail))

    good = np.ones(len(ids), dtype=np.bool_)
    good[list(failures)] = False
    rows = np.flatnonzero(good)
    kept = np.minimum(lengths[rows], truncation)
    tokens, offsets = _gather(codes, begins[rows], kept)
    return RecordBatch(
        first_record=first_record,
        ids=ids,
        tokens=tokens,
        offsets=offsets,
        rows=rows,
        failures=[
            Failure(record=first_record + row, id=ids[row], reason=reason, detail=detail)
            for row, (reason, detail) in sorted(failures.items())
        ],
        residues=int(lengths.sum()),
        truncated=int(np.count_nonzero(lengths[rows] > truncation)),
        unknown=int(np.count_nonzero(tokens == UNK)),
    )


def _read_id(header: bytes) -> tuple[str, tuple[FailureReason, str] | None]:
    """Returns a header's id, and what is wrong with the header if anything is."""
    words = header.split(None, 1)
    if not words:
        return "", (FailureReason.NO_ID, "the header has no id")
    word = words[0]
    try:
        if not header.isascii():
            header.decode()
        record_id = word.decode()
    except UnicodeDecodeError as error:
        detail = f"the header is not UTF-8: byte 0x{error.object[error.start]:02x}"
        return _escape(word), (FailureReason.BAD_HEADER, detail)
    if b"\r" in header.rstrip():
        # Where some lines end in it alone, a header swallows its own sequence, and the records behind it.
        return _escape(word), (
            FailureReason.BAD_HEADER,
            "a carriage return within the header: is it a line end?",
        )
    if not record_id.isprintable():
        return _escape(word), (FailureReason.BAD_HEADER, f"the id is unprintable: {record_id!r}")
    return record_id, None


def _escape(word: bytes) -> str:
    """Returns the word as text that any database, terminal and CSV takes."""
    text = word.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show(letter: bytes) -> str:
    return f"'{letter.decode()}'" if 32 < letter[0] < 127 else f"byte 0x{letter[0]:02x}"


def _find_rejected(
    codes: NDArray[np.uint8],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    policy: ResiduePolicy,
) -> Iterator[tuple[int, int]]:
    """Yields the row and the 0-based position of the first residue that its record is rejected for."""
    rejected = codes == INVALID
    if policy == "strict":
        rejected |= codes == UNK
    positions = np.flatnonzero(rejected)
    if not len(positions):
        return
    rows = np.searchsorted(begins, positions, side="right") - 1
    within = positions - begins[rows]
    inside = within < lengths[rows]
    rows, firsts = np.unique(rows[inside], return_index=True)
    yield from zip(rows.tolist(), within[inside][firsts].tolist(), strict=True)


def _gather(
    codes: NDArray[np.uint8], begins: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Copies the pieces `codes[begin:begin+length]` behind one another; returns them and their offsets."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    if offsets[-1] == len(codes):
        return codes.copy(), offsets
    pieces = [codes[b : b + n] for b, n in zip(begins.tolist(), lengths.tolist(), strict=True)]
    return np.concatenate(pieces) if pieces else codes[:0].copy(), offsets
