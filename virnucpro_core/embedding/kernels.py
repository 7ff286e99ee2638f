"""The kernels of the fused forward pass, in Triton: what lies between the matrix products, or ends one.

Needs Triton to be imported: only `fused` does so, once the kernel plan is chosen.

Every launch has a fixed configuration and nothing is tuned when it runs; programs share nothing and use no
atomics. So a row depends on its own sequence and the execution class alone. Statistics, rotary angles, softmax
and sums are float32.

The configurations were measured on an H200 with torch 2.11 and Triton 3.6.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from virnucpro_core.embedding.checkpoint import HEAD_WIDTH, HEADS, MLP_WIDTH, NORM_EPSILON
from virnucpro_core.embedding.packing import TILE_QUERIES
from virnucpro_core.recipe import EMBEDDING_WIDTH

_WIDTH = tl.constexpr(EMBEDDING_WIDTH)
_HEAD = tl.constexpr(HEAD_WIDTH)
_HALF = tl.constexpr(HEAD_WIDTH // 2)
# A tile's sides are powers of two, which 1280 is not.
_LEFT = tl.constexpr(1024)
_RIGHT = tl.constexpr(EMBEDDING_WIDTH - 1024)
_EPSILON = tl.constexpr(NORM_EPSILON)
# 64^-0.5 * log2(e): the softmax is taken in powers of two.
_SCORE_SCALE = tl.constexpr(HEAD_WIDTH**-0.5 * 1.4426950408889634)

# Tiles of a product, and tiles of rows that are worked through together.
_TILE_ROWS = tl.constexpr(128)
_TILE_COLUMNS = tl.constexpr(256)
_TILE_DEPTH = tl.constexpr(64)
_GROUP = tl.constexpr(16)

_QUERIES = tl.constexpr(TILE_QUERIES)
_KEYS = tl.constexpr(64)
_NORM_ROWS = tl.constexpr(2)
_POOL_ROWS = tl.constexpr(32)
_POOL_COLUMNS = tl.constexpr(128)


def linear_rotary(
    rows: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """Queries, keys and values of all heads, queries and keys rotated.

    Args:
        rows: (n, 1280), half precision, as the result.
        weight: (3840, 1280).
        bias: (3840,).
        positions: int32 (n,), below the table's length.
        rotation: cosines and sines, float32 (positions, 32) each, as `rotation_tables` makes them.

    Returns:
        (n, 3840): 20 queries, 20 keys, 20 values of 64 each.
    """
    projected = rows.new_empty(len(rows), 3 * EMBEDDING_WIDTH)
    _launch_product(_linear_rotary, rows, weight, projected, bias, positions, *rotation)
    return projected


def linear_gelu(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, by erf, of a linear map.

    Args:
        rows: (n, 1280), half precision, as the result.
        weight: (5120, 1280).
        bias: (5120,).

    Returns:
        (n, 5120).
    """
    expanded = rows.new_empty(len(rows), MLP_WIDTH)
    _launch_product(_linear_gelu, rows, weight, expanded, bias)
    return expanded


def attend(projected: Tensor, tiles: Tensor) -> Tensor:
    """Attention within each sequence.

    Args:
        projected: (n, 3840) of `linear_rotary`, half precision, as the result.
        tiles: int32 (t, 3) of `plan_tiles`; they cover every row.

    Returns:
        (n, 1280), the heads side by side.
    """
    attended = projected.new_empty(len(projected), EMBEDDING_WIDTH)
    _attend[(HEADS, len(tiles))](projected, tiles, attended, num_warps=4)
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
    _norm[(triton.cdiv(len(hidden), _NORM_ROWS.value),)](
        hidden, shift, weight, bias, normed, len(hidden), num_warps=1
    )
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


def _launch_product(
    kernel: triton.JITFunction, rows: Tensor, weight: Tensor, out: Tensor, *extra: Tensor
) -> None:
    """Starts one program per multiprocessor; each goes from tile to tile, loading the next one meanwhile."""
    programs = _multiprocessors(rows.device)
    kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [_TILE_ROWS.value, _TILE_DEPTH.value]),
        TensorDescriptor.from_tensor(weight, [_TILE_COLUMNS.value, _TILE_DEPTH.value]),
        TensorDescriptor.from_tensor(out, [_TILE_ROWS.value, _TILE_COLUMNS.value]),
        *extra,
        len(rows),
        columns=len(weight),
        programs=programs,
        num_warps=8,
        num_stages=3,
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _place(tile, tiles_down, tiles_across: tl.constexpr):
    """The tile's place: column by column within groups of rows, so that neighbours in time share operands."""
    group = tile // (_GROUP * tiles_across)
    height = min(tiles_down - group * _GROUP, _GROUP)
    within = tile % (_GROUP * tiles_across)
    return group * _GROUP + within % height, within // height


@triton.jit
def _multiply(rows, weight, row, column):
    """One tile of `rows` times `weight` transposed, summed in float32."""
    total = tl.zeros((_TILE_ROWS, _TILE_COLUMNS), tl.float32)
    for depth in range(0, _WIDTH, _TILE_DEPTH):
        total = tl.dot(rows.load([row, depth]), weight.load([column, depth]).T, total)
    return total


@triton.jit(do_not_specialize=["count"])
def _linear_gelu(
    rows,
    weight,
    out,
    bias,
    count,
    columns: tl.constexpr,
    programs: tl.constexpr,
):
    down = tl.cdiv(count, _TILE_ROWS)
    across: tl.constexpr = columns // _TILE_COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        place, column = _place(tile, down, across)
        # From the last rows to the first: the next product starts with what the cache still holds.
        row = (down - 1 - place) * _TILE_ROWS
        column *= _TILE_COLUMNS
        total = _multiply(rows, weight, row, column)
        total += tl.load(bias + column + tl.arange(0, _TILE_COLUMNS)).to(tl.float32)[None, :]
        out.store([row, column], _gelu(total).to(out.dtype))


@triton.jit
def _gelu(x):
    """GELU by erf: relu(x) - |x| P(Z > |x|), with log2 of that tail as its minimax polynomial on [0, 5.75].

    The tail's relative error is 6e-6 at most, GELU's absolute error 6e-7. Beyond 5.75 the polynomial falls on.
    """
    size = tl.abs(x)
    power = -1.8254787e-6 * size + 6.143982e-5
    power = power * size - 9.2948751e-4
    power = power * size + 8.5045988e-3
    power = power * size - 5.3954849e-2
    power = power * size - 4.5846821e-1
    power = power * size - 1.15125
    power = power * size - 0.99999534
    return tl.maximum(x, 0.0) - size * tl.exp2(power)


@triton.jit(do_not_specialize=["count"])
def _linear_rotary(
    rows,
    weight,
    out,
    bias,
    positions,
    cosines,
    sines,
    count,
    columns: tl.constexpr,
    programs: tl.constexpr,
):
    down = tl.cdiv(count, _TILE_ROWS)
    across: tl.constexpr = columns // _TILE_COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        place, column = _place(tile, down, across)
        row = place * _TILE_ROWS
        column *= _TILE_COLUMNS
        total = _multiply(rows, weight, row, column)
        total += tl.load(bias + column + tl.arange(0, _TILE_COLUMNS)).to(tl.float32)[None, :]
        if column < 2 * _WIDTH:
            within = row + tl.arange(0, _TILE_ROWS)
            position = tl.load(positions + within, mask=within < count, other=0)
            angle = position[:, None] * _HALF + tl.arange(0, _HALF)[None, :]
            cos = tl.load(cosines + angle)[:, None, :]
            sin = tl.load(sines + angle)[:, None, :]
            # (rows, heads, 2, 32): the halves of a head turn together.
            halves = tl.reshape(total, (_TILE_ROWS, _TILE_COLUMNS // _HEAD, 2, _HALF))
            first, second = tl.split(tl.permute(halves, (0, 1, 3, 2)))
            halves = tl.join(first * cos - second * sin, second * cos + first * sin)
            total = tl.reshape(tl.permute(halves, (0, 1, 3, 2)), (_TILE_ROWS, _TILE_COLUMNS))
        out.store([row, column], total.to(out.dtype))


@triton.jit
def _attend(projected, tiles, attended):
    head = tl.program_id(0)
    # From the last tile to the first: the product before wrote the last rows last, so the cache holds them.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    begin = tl.load(tiles + 3 * tile).to(tl.int64)
    length = tl.load(tiles + 3 * tile + 1)
    query = tl.load(tiles + 3 * tile + 2) + tl.arange(0, _QUERIES)[:, None]
    column = head * _HEAD + tl.arange(0, _HEAD)[None, :]
    base = projected + begin * (3 * _WIDTH) + column
    inside = query < length
    queries = tl.load(base + query * (3 * _WIDTH), mask=inside, other=0.0)

    highest = tl.full((_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((_QUERIES,), tl.float32)
    weighted = tl.zeros((_QUERIES, _HEAD), tl.float32)
    for start in tl.range(0, length, _KEYS, num_stages=2):
        key = start + tl.arange(0, _KEYS)[:, None]
        # Masked, not only weighted by zero: a neighbour's NaN times zero would still be NaN.
        known = key < length
        keys = tl.load(base + key * (3 * _WIDTH) + _WIDTH, mask=known, other=0.0)
        values = tl.load(base + key * (3 * _WIDTH) + 2 * _WIDTH, mask=known, other=0.0)
        scores = tl.dot(queries, tl.trans(keys))
        scores = tl.where(start + tl.arange(0, _KEYS)[None, :] < length, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores * _SCORE_SCALE - (higher * _SCORE_SCALE)[:, None])
        shrink = tl.exp2((highest - higher) * _SCORE_SCALE)
        total = total * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(values.dtype), values, weighted * shrink[:, None])
        highest = higher
    at = attended + (begin + query) * _WIDTH + column
    tl.store(at, (weighted / total[:, None]).to(attended.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _norm(hidden, shift, weight, bias, normed, count):
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
