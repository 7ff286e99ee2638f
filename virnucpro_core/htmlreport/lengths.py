"""Lengths: how many residues the records of an input have, in one pass and in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from virnucpro_core.sequences.chunks import ChunkRange, RecordCounter

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long records are, good and bad ones, before truncation.

    Attributes:
        counts: int64 (limit + 2,), how many have 0, 1, … limit residues; the last entry counts those with more.
        longest: residues of the longest.
        sampled: int64 (k,), of the records that were asked for.
    """

    counts: Counts
    longest: int
    sampled: Counts

    @property
    def limit(self) -> int:
        return len(self.counts) - 2

    def quantile(self, share: float) -> int | None:
        """The length that a share of the records does not exceed; None if it is beyond the limit."""
        total = int(self.counts.sum())
        place = int(np.searchsorted(np.cumsum(self.counts), max(share * total, 1)))
        return None if place > self.limit else place


def survey_lengths(
    chunks: Sequence[ChunkRange],
    read: Callable[[ChunkRange], bytes],
    *,
    limit: int,
    sampled: Counts,
    on_progress: Callable[[int, int], None] | None = None,
) -> Lengths:
    """Counts the residues of all records.

    Args:
        chunks: the input's, in the order of their records.
        read: gives the bytes of one.
        limit: residues up to which lengths are told apart.
        sampled: int64 (k,), records whose lengths are wanted one by one, rising, counted from 1.
        on_progress: called with the records counted so far, and with all there are.
    """
    counts = np.zeros(limit + 2, dtype=np.int64)
    longest = 0
    wanted = np.zeros(len(sampled), dtype=np.int64)
    total = sum(chunk.records for chunk in chunks)
    for chunk in chunks:
        lengths = count_residues(read(chunk))
        counts += np.bincount(np.minimum(lengths, limit + 1), minlength=limit + 2)
        longest = max(longest, int(lengths.max(initial=0)))
        first, last = np.searchsorted(sampled, [chunk.first_record, chunk.first_record + chunk.records])
        wanted[first:last] = lengths[sampled[first:last] - chunk.first_record]
        if on_progress is not None:
            on_progress(chunk.first_record + chunk.records - 1, total)
    return Lengths(counts, longest, wanted)


def count_residues(data: bytes) -> Counts:
    """Residues of each record of a chunk, int64 (records,); a final `*` is none."""
    counter = RecordCounter()
    _, before_last = counter.feed(data)
    _, last = counter.finish()
    # What comes before the first header counts as a record there, and is none.
    return np.concatenate((before_last, last))[1:]
