"""Batches: which sequences go through the model together, and their tokens laid out. No torch here.

On a GPU the sequences of a batch lie one behind another in a pack of fixed size, padded at its end, so that
every matrix product has the same shape whatever is in the pack. On a CPU a batch is one sequence without any
padding, which cannot depend on its batch mates. Fixed groups with dummy rows instead were measured (2 layers,
2 cores, tokens/s): 1375 against 980 at 22 tokens, 1625 against 1460 at 52, 1480 against 1720 at 100, and no
difference at 500: not worth a second way.
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

PACK_TOKENS = 16_384
"""Tokens in a pack: where an H200's matrix products are fastest (measured in float16 and bfloat16)."""

LEAST_PACK_TOKENS = 256
"""Packs never get smaller: on an H200 a row of a matrix product depends on the number of rows below 130."""

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

    Longest first, so that what a pack has no room for is short, and too little memory shows at once.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order] + EXTRA_TOKENS)
    batches = []
    first = 0
    while first < len(order):
        used = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, used + budget, side="right")), first + 1)
        batches.append(order[first:last])
        first = last
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
