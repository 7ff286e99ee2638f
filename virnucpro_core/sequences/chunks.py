"""Chunks: consecutive records of an input, cut by a token budget while the input streams by."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from virnucpro_core.sequences.fasta import find_records
from virnucpro_core.sequences.hashing import HashThread

CHUNK_BYTES = 64 << 20
"""Bytes of a chunk at most, so that long records and headers cannot fill a worker's memory; a record that has
more is a chunk alone."""

_SPECIAL_TOKENS = 2
"""BOS and EOS."""


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """A run of consecutive records of an input.

    Attributes:
        ordinal: the chunk's number in its input, counted from 0.
        byte_start: offset of the first record's `>` in the uncompressed input.
        byte_end: offset behind the last record.
        virtual_start: bgzip's virtual offset of `byte_start`; None for other compressions.
        first_record: number of the first record in the input, counted from 1.
        records: records in the range, good or bad.
        residues: their residues before truncation.
        sha256: of the uncompressed range.
    """

    ordinal: int
    byte_start: int
    byte_end: int
    virtual_start: int | None
    first_record: int
    records: int
    residues: int
    sha256: str


class RecordCounter:
    """Counts the residues of each record of an input that comes block by block.

    Attributes:
        position: offset behind the last block in the uncompressed input.
        line: number of the line that the last block ended in, counted from 1.
    """

    def __init__(self) -> None:
        self.position = 0
        self.line = 1
        self._residues = 0
        self._star = False
        self._line_start = True
        self._in_header = False

    def feed(self, block: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Takes the next bytes, at least one.

        Returns:
            The offsets at which records ended in these bytes, and those records' residues; int64[(k,)] both.
            What comes before the first header counts as a record.
        """
        layout = find_records(
            np.frombuffer(block, dtype=np.uint8), line_start=self._line_start, in_header=self._in_header
        )
        residues, stars = layout.residues, layout.stars
        if not residues[0]:
            stars[0] = self._star
        residues[0] += self._residues
        self._residues, self._star = int(residues[-1]), bool(stars[-1])
        ends = layout.starts + self.position
        self.position += len(block)
        self.line += layout.lines
        self._line_start = block.endswith(b"\n")
        self._in_header = layout.in_header
        return ends, (residues - stars)[:-1]

    def finish(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns what `feed` returns, for the last record."""
        return np.array([self.position]), np.array([self._residues - self._star])


class ChunkCutter:
    """Cuts an input that comes block by block into chunks.

    Where it cuts depends on the records alone, not on the blocks. It holds at most `CHUNK_BYTES` and a block:
    the record that the last block ended in, while it is open whose chunk that will be.

    Args:
        chunk_tokens: tokens of a chunk at most (residues of each record up to `truncation`, BOS and EOS); a
            record that has more is a chunk alone.
        truncation: residues of a record that count as tokens.
        hashes: the thread that computes the chunks' checksums.
        find_virtual_offset: gives bgzip's virtual offset of a position; None for other compressions.
    """

    def __init__(
        self,
        *,
        chunk_tokens: int,
        truncation: int,
        hashes: HashThread,
        find_virtual_offset: Callable[[int], int] | None,
    ) -> None:
        self._counter = RecordCounter()
        self._chunk_tokens = chunk_tokens
        self._truncation = truncation
        self._hashes = hashes
        self._find_virtual_offset = find_virtual_offset
        self._chunks: list[tuple[ChunkRange, Future[str]]] = []
        self._window: deque[memoryview] = deque()
        self._hashed_to = 0
        self._in_preamble = True
        self._start = self._end = 0
        self._first_record = 1
        self._records = self._residues = self._tokens = 0
        self._digest = hashlib.sha256()

    @property
    def line(self) -> int:
        """Number of the line that the last block ended in, counted from 1."""
        return self._counter.line

    def feed(self, block: bytes) -> None:
        """Takes the next bytes of the input, at least one. First come blank lines, if any, and a header."""
        self._window.append(memoryview(block))
        ends, residues = self._counter.feed(block)
        if self._in_preamble:
            self._hash_to(int(ends[0]))
            self._begin_chunk(int(ends[0]))
            self._in_preamble = False
            ends, residues = ends[1:], residues[1:]
        self._add_records(ends, residues)
        if self._records and self._counter.position - self._start > CHUNK_BYTES:
            self._cut()
        self._hash_to(self._end if self._records else self._counter.position)

    def finish(self) -> tuple[ChunkRange, ...]:
        """Ends the input; returns its chunks."""
        self._add_records(*self._counter.finish())
        self._cut()
        return tuple(replace(chunk, sha256=sha256.result()) for chunk, sha256 in self._chunks)

    def _add_records(self, ends: NDArray[np.int64], residues: NDArray[np.int64]) -> None:
        tokens = np.cumsum(np.minimum(residues, self._truncation) + _SPECIAL_TOKENS)
        added = added_tokens = 0
        while added < len(ends):
            room = self._chunk_tokens - self._tokens
            fitting = min(
                int(np.searchsorted(tokens, added_tokens + room, side="right")),
                int(np.searchsorted(ends, self._start + CHUNK_BYTES, side="right")),
            )
            if self._records == 0:
                fitting = max(fitting, added + 1)
            if fitting <= added:
                self._cut()
                continue
            self._tokens += int(tokens[fitting - 1]) - added_tokens
            self._residues += int(residues[added:fitting].sum())
            self._records += fitting - added
            self._end = int(ends[fitting - 1])
            added, added_tokens = fitting, int(tokens[fitting - 1])

    def _cut(self) -> None:
        self._hash_to(self._end)
        chunk = ChunkRange(
            ordinal=len(self._chunks),
            byte_start=self._start,
            byte_end=self._end,
            virtual_start=self._find_virtual_offset(self._start) if self._find_virtual_offset else None,
            first_record=self._first_record,
            records=self._records,
            residues=self._residues,
            sha256="",
        )
        self._chunks.append((chunk, self._hashes.hexdigest(self._digest)))
        self._begin_chunk(self._end)

    def _begin_chunk(self, position: int) -> None:
        self._start = self._end = position
        self._first_record += self._records
        self._records = self._residues = self._tokens = 0
        self._digest = hashlib.sha256()

    def _hash_to(self, position: int) -> None:
        while self._hashed_to < position:
            view = self._window.popleft()
            count = min(len(view), position - self._hashed_to)
            self._hashes.update(self._digest, view[:count])
            self._hashed_to += count
            if count < len(view):
                self._window.appendleft(view[count:])
