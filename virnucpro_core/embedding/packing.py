"""Batches: which sequences go through the model together, and their tokens laid out. No torch here.

On a GPU the sequences of a batch lie one behind another in a pack of fixed size, padded at its end, so that
every matrix product has the same shape whatever is in the pack. On a CPU a batch is one sequence without any
padding, which cannot depend on its batch mates. Groups of equal shape, filled up with dummy rows, would help
short sequences only: from about 100 tokens on a sequence keeps two cores busy by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virnucpro_core.recipe import TRUNCATION
from virnucpro_core.sequences.residues import CLS, EOS, PAD

EXTRA_TOKENS = 2
"""BOS and EOS, around every sequence."""

PACK_TOKENS = 16_896
"""Tokens in a pack: 128 rows for each of an H200's 132 multiprocessors, so that no matrix product ends in a
wave that is half empty. Near 16 k tokens the products are fastest (measured in float16 and bfloat16)."""

LEAST_PACK_TOKENS = 512
"""Packs never get smaller: on an H200 a row of a matrix product depends on the number of rows below 130, and
on whether it is above 256 where the product adds in place. From 257 to 33,792 rows it did not, at 33 sizes."""

TILE_QUERIES = 64
"""Queries that one program of the fused attention works on: the rows of one warpgroup's matrix instruction."""

LONGEST = TRUNCATION + EXTRA_TOKENS
"""Tokens of the longest sequence under the contract's truncation; padding is cut into such pieces."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Sequences one behind another, as the device gets them.

    Attributes:
        tokens: uint8[(rows,)], BOS, residues and EOS of each sequence, then padding.
        positions: int32[(rows,)], place within the own sequence; BOS is 0.
        bounds: int32[(s+1,)], sequence i is `tokens[bounds[i]:bounds[i+1]]`; the last ones are padding.
        longest: tokens of the longest sequence, or the contract's longest if that is more.
        pieces: int64[(2n,)], lengths that cut the tokens up to the last residue, in turn, into what is not
            pooled (BOS; EOS and the next BOS) and the residues of each of the n sequences.
    """

    tokens: NDArray[np.uint8]
    positions: NDArray[np.int32]
    bounds: NDArray[np.int32]
    longest: int
    pieces: NDArray[np.int64]


def get_batch_indices(sequence_lengths: Sequence[int], toks_per_batch: int = 2048) -> list[list[int]]:
    """Groups sequences into batches within a token budget.

    Args:
        sequence_lengths: residues of each sequence; BOS and EOS are counted on top.
        toks_per_batch: tokens in a batch at most; a sequence with more is alone in its batch.

    Returns:
        For each batch the indices of its sequences. Every index occurs exactly once, longest sequences first.
    """
    lengths = np.asarray(sequence_lengths, dtype=np.int64)
    return [batch.tolist() for batch in plan_batches(lengths, toks_per_batch)]


def plan_batches(lengths: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Like `get_batch_indices`, with arrays.

    Longest first, so that too little memory shows at once. What a batch has no room for is replaced by the
    longest that fits: of 10,000 sequences of 20 to 1024 residues, packs are 99.7% full instead of 98.2%.
    """
    order = np.argsort(-lengths, kind="stable")
    # Sequences of one size lie together in `order`, from heads[kind] (what is left of them) to ends[kind].
    negated, begins = np.unique(-(lengths[order] + EXTRA_TOKENS), return_index=True)
    heads, ends = begins.copy(), np.append(begins[1:], len(order))
    batches = []
    first = 0
    while first < len(negated):
        room = budget
        parts: list[NDArray[np.int64]] = []
        kind = first
        while kind < len(negated):
            size = -int(negated[kind])
            # The first sequence is taken whether it fits or not; all others do fit.
            count = min(int(ends[kind] - heads[kind]), max(room // size, 1))
            if count:
                parts.append(order[heads[kind] : heads[kind] + count])
                heads[kind] += count
                room -= count * size
            # The next smaller size that fits into the room that is left.
            kind = max(kind + 1, int(np.searchsorted(negated, -room)))
        batches.append(np.concatenate(parts))
        while first < len(negated) and heads[first] == ends[first]:
            first += 1
    return batches


def build_pack(
    tokens: NDArray[np.uint8], offsets: NDArray[np.int64], members: NDArray[np.int64], rows: int | None = None
) -> Pack:
    """Lays sequences out for the device.

    Args:
        tokens: residue tokens of all sequences, as in `RecordBatch`.
        offsets: int64[(m+1,)], where each sequence begins in `tokens`.
        members: int64[(n,)], the sequences to pack, n ≥ 1.
        rows: tokens to pad the pack to; a pack that is larger, or that gets no number, is not padded.
    """
    lengths = offsets[members + 1] - offsets[members]
    sizes = lengths + EXTRA_TOKENS
    used = int(sizes.sum())
    padding = max(rows - used, 0) if rows is not None else 0
    fill = [LONGEST] * (padding // LONGEST) + ([padding % LONGEST] if padding % LONGEST else [])
    bounds = np.concatenate(([0], np.cumsum(np.concatenate((sizes, np.array(fill, dtype=np.int64))))))
    begins = bounds[: len(members)]

    packed = np.full(used + padding, PAD, dtype=np.uint8)
    packed[begins] = CLS
    packed[begins + lengths + 1] = EOS
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    packed[np.repeat(begins + 1, lengths) + within] = tokens[np.repeat(offsets[members], lengths) + within]

    pieces = np.full(2 * len(members), EXTRA_TOKENS, dtype=np.int64)
    pieces[0] = 1
    pieces[1::2] = lengths
    return Pack(
        tokens=packed,
        positions=(np.arange(len(packed)) - np.repeat(bounds[:-1], np.diff(bounds))).astype(np.int32),
        bounds=bounds.astype(np.int32),
        longest=max(LONGEST, int(sizes.max())),
        pieces=pieces,
    )


def plan_tiles(bounds: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cuts the sequences of a pack into tiles of at most `TILE_QUERIES` queries, for the fused attention.

    Args:
        bounds: int32[(s+1,)], as in `Pack`.

    Returns:
        int32[(t, 3)]: the sequence's first row, its length, and the tile's first query within it.
    """
    lengths = np.diff(bounds)
    counts = -(-lengths // TILE_QUERIES)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack(
        (np.repeat(bounds[:-1], counts), np.repeat(lengths, counts), within * TILE_QUERIES), axis=1
    ).astype(np.int32)
