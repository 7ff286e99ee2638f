"""The kernels of the fused forward pass between its matrix products, in Triton: attention, norms, pooling.

Needs Triton to be imported: only `fused` does so, once the kernel plan is chosen.

Every launch has a fixed configuration and nothing is tuned when it runs; programs share nothing and use no
atomics. So a row depends on its own sequence and the execution class alone. Statistics, rotary angles, softmax
and sums are float32.

The configurations were measured on an H200 with torch 2.11 and Triton 3.6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from virnucpro_core.embedding.checkpoint import HEAD_WIDTH, HEADS, NORM_EPSILON
from virnucpro_core.embedding.packing import TILE_QUERIES
from virnucpro_core.embedding.products import FP8, FP8_PEAK, Scaled
from virnucpro_core.recipe import EMBEDDING_WIDTH

_WIDTH = tl.constexpr(EMBEDDING_WIDTH)
_HEAD = tl.constexpr(HEAD_WIDTH)
_HEADS = tl.constexpr(HEADS)
# A tile's sides are powers of two, which 1280 is not.
_LEFT = tl.constexpr(1024)
_RIGHT = tl.constexpr(EMBEDDING_WIDTH - 1024)
_EPSILON = tl.constexpr(NORM_EPSILON)
_FP8_PEAK = tl.constexpr(FP8_PEAK)
# 64^-0.5 * log2(e): the softmax is taken in powers of two.
_SCORE_SCALE = tl.constexpr(HEAD_WIDTH**-0.5 * 1.4426950408889634)

_QUERIES = tl.constexpr(TILE_QUERIES)
_KEYS = tl.constexpr(64)
_NORM_ROWS = tl.constexpr(2)
_POOL_ROWS = tl.constexpr(32)
_POOL_COLUMNS = tl.constexpr(128)


def attend(projected: Tensor, tiles: Tensor, peak: float | None = None) -> Tensor:
    """Attention within each sequence.

    Args:
        projected: (n, 3840) of `linear_rotary`, half precision.
        tiles: int32 (t, 3) of `plan_tiles`; they cover every row.
        peak: no value is larger; given, if the result is to be FP8.

    Returns:
        (n, 1280), the heads side by side, as `projected`; with a peak FP8, where 448 stands for the peak.
    """
    attended = projected.new_empty(len(projected), EMBEDDING_WIDTH, dtype=None if peak is None else FP8)
    factor = None if peak is None else FP8_PEAK / peak
    _attend[(HEADS * len(tiles),)](projected, tiles, attended, factor, num_warps=4)
    return attended


def norm(
    hidden: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Layer norm of `hidden + shift`.

    Args:
        hidden: (n, 1280), half precision.
        shift: float32 (1280,), as weight and bias.
        weight: the norm's.
        bias: the norm's.
        dtype: of the result; that of `hidden` if none is given.

    Returns:
        (n, 1280); mean and variance are taken in float32, the variance after the mean was subtracted.
    """
    normed = torch.empty_like(hidden, dtype=dtype)
    _launch_norm(hidden, shift, weight, bias, normed, None)
    return normed


def norm_scaled(hidden: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Scaled:
    """Like `norm`, in FP8: the largest number of each row becomes 448."""
    normed = Scaled(torch.empty_like(hidden, dtype=FP8), shift.new_empty(len(hidden)))
    _launch_norm(hidden, shift, weight, bias, normed.values, normed.scales)
    return normed


def pool(normed: Tensor, bounds: Tensor, sequences: int) -> Tensor:
    """Means over the residues of the first sequences, float32 (sequences, 1280).

    Args:
        normed: float32 (n, 1280).
        bounds: int32 (s+1,), as in `Pack`; BOS and EOS do not count.
        sequences: how many to pool, s or less.
    """
    pooled = torch.empty(sequences, EMBEDDING_WIDTH, dtype=torch.float32, device=normed.device)
    _pool[(sequences, EMBEDDING_WIDTH // _POOL_COLUMNS.value)](normed, bounds, pooled, num_warps=4)
    return pooled


def _launch_norm(
    hidden: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, normed: Tensor, scales: Tensor | None
) -> None:
    programs = triton.cdiv(len(hidden), _NORM_ROWS.value)
    _norm[(programs,)](hidden, shift, weight, bias, normed, scales, len(hidden), num_warps=1)


@triton.jit
def _attend(projected, tiles, attended, factor):
    # One dimension, as the others of a grid end at 65,535. From the last tile to the first: the product before
    # wrote the last rows last, so the cache holds them.
    head = tl.program_id(0) % _HEADS
    tile = tl.num_programs(0) // _HEADS - 1 - tl.program_id(0) // _HEADS
    begin = tl.load(tiles + 3 * tile).to(tl.int64)
    length = tl.load(tiles + 3 * tile + 1)
    first = tl.load(tiles + 3 * tile + 2)
    query = tl.arange(0, _QUERIES)[:, None]
    column = head * _HEAD + tl.arange(0, _HEAD)[None, :]
    inside = first + query < length
    queries = tl.load(
        projected + (begin + first) * (3 * _WIDTH) + query * (3 * _WIDTH) + column, mask=inside, other=0.0
    )

    highest = tl.full((_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((_QUERIES,), tl.float32)
    weighted = tl.zeros((_QUERIES, _HEAD), tl.float32)
    for start in tl.range(0, length, _KEYS, num_stages=2):
        key = tl.arange(0, _KEYS)[:, None]
        # Masked, not only weighted by zero: a neighbour's NaN times zero would still be NaN.
        known = start + key < length
        here = projected + (begin + start) * (3 * _WIDTH) + key * (3 * _WIDTH) + column
        keys = tl.load(here + _WIDTH, mask=known, other=0.0)
        values = tl.load(here + 2 * _WIDTH, mask=known, other=0.0)
        scores = tl.dot(queries, tl.trans(keys))
        scores = tl.where(start + tl.arange(0, _KEYS)[None, :] < length, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores * _SCORE_SCALE - (higher * _SCORE_SCALE)[:, None])
        shrink = tl.exp2((highest - higher) * _SCORE_SCALE)
        total = total * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(values.dtype), values, weighted * shrink[:, None])
        highest = higher
    at = attended + (begin + first) * _WIDTH + query * _WIDTH + column
    mean = weighted / total[:, None]
    if factor is not None:
        mean *= factor
    tl.store(at, mean.to(attended.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _norm(hidden, shift, weight, bias, normed, scales, count):
    row = tl.program_id(0) * _NORM_ROWS + tl.arange(0, _NORM_ROWS)[:, None]
    there = row < count
    left = tl.arange(0, _LEFT)[None, :]
    right = _LEFT + tl.arange(0, _RIGHT)[None, :]
    start = row.to(tl.int64) * _WIDTH
    x = tl.load(hidden + start + left, mask=there, other=0.0).to(tl.float32) + tl.load(shift + left)
    y = tl.load(hidden + start + right, mask=there, other=0.0).to(tl.float32) + tl.load(shift + right)
    mean = (tl.sum(x, 1) + tl.sum(y, 1))[:, None] / _WIDTH
    x -= mean
    y -= mean
    variance = (tl.sum(x * x, 1) + tl.sum(y * y, 1))[:, None] / _WIDTH
    scale = tl.rsqrt(variance + _EPSILON)
    x = x * scale * tl.load(weight + left) + tl.load(bias + left)
    y = y * scale * tl.load(weight + right) + tl.load(bias + right)
    if scales is not None:
        largest = tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1))[:, None]
        # A row of zeros has no scale of its own; the smallest normal number does.
        largest = tl.maximum(largest, 1.1754944e-38 * _FP8_PEAK)
        tl.store(scales + row, largest / _FP8_PEAK, mask=there)
        x *= _FP8_PEAK / largest
        y *= _FP8_PEAK / largest
    tl.store(normed + start + left, x.to(normed.dtype.element_ty), mask=there)
    tl.store(normed + start + right, y.to(normed.dtype.element_ty), mask=there)


@triton.jit
def _pool(normed, bounds, pooled):
    sequence = tl.program_id(0)
    column = tl.program_id(1) * _POOL_COLUMNS + tl.arange(0, _POOL_COLUMNS)[None, :]
    begin = tl.load(bounds + sequence) + 1
    end = tl.load(bounds + sequence + 1) - 1
    total = tl.zeros((_POOL_ROWS, _POOL_COLUMNS), tl.float32)
    for start in tl.range(begin, end, _POOL_ROWS):
        row = start + tl.arange(0, _POOL_ROWS)[:, None]
        total += tl.load(normed + row.to(tl.int64) * _WIDTH + column, mask=row < end, other=0.0)
    mean = tl.sum(total, 0)[None, :] / (end - begin).to(tl.float32)
    tl.store(pooled + sequence.to(tl.int64) * _WIDTH + column, mean)
