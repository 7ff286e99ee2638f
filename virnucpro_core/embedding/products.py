"""The matrix products of the fused forward pass that do more than multiply, in Triton.

Needs Triton to be imported: only `fused` does so, once the kernel plan is chosen.

Every launch has a fixed configuration and nothing is tuned when it runs; programs share nothing and use no
atomics. So a row of a result depends on the same row alone, whatever the number of rows. Sums are float32, of which
the tensor cores keep about 14 bits in FP8 products. That adds 1e-3 to an error of 3e-2 by the rounding to FP8;
sums that are exact take half as long again.

The configurations were measured on an H200 with torch 2.11 and Triton 3.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from virnucpro_core.embedding.checkpoint import HEAD_WIDTH, MLP_WIDTH
from virnucpro_core.recipe import EMBEDDING_WIDTH

FP8 = torch.float8_e4m3fn
FP8_PEAK = 448.0
"""The largest number of FP8 (e4m3); larger ones and infinite ones become it, NaN stays NaN."""

_WIDTH = tl.constexpr(EMBEDDING_WIDTH)
_HEAD = tl.constexpr(HEAD_WIDTH)
_HALF = tl.constexpr(HEAD_WIDTH // 2)

# Tiles of a product, and tiles of rows that are worked through together.
_TILE_ROWS = tl.constexpr(128)
_TILE_COLUMNS = tl.constexpr(256)
_TILE_BYTES = 128  # of a row of an operand: the widest that a bulk copy lays out for the tensor cores
_GROUP = tl.constexpr(16)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A matrix in FP8: row i stands for `scales[i] * values[i]`.

    Attributes:
        values: FP8 (n, k).
        scales: float32 (n,).
    """

    values: Tensor
    scales: Tensor


def linear_rotary(
    rows: Tensor | Scaled,
    weight: Tensor | Scaled,
    bias: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
) -> Tensor:
    """Queries, keys and values of all heads, queries and keys rotated.

    Args:
        rows: (n, 1280), half precision, or FP8 if the weight is.
        weight: (3840, 1280).
        bias: (3840,), half precision, as the result.
        positions: int32 (n,), below the table's length.
        rotation: cosines and sines, float32 (positions, 32) each, as `rotation_tables` makes them.

    Returns:
        (n, 3840): 20 queries, 20 keys, 20 values of 64 each.
    """
    projected = bias.new_empty(len(positions), 3 * EMBEDDING_WIDTH)
    _launch(_linear_rotary, rows, weight, projected, bias, positions, *rotation)
    return projected


def linear_gelu(
    rows: Tensor | Scaled, weight: Tensor | Scaled, bias: Tensor, peak: float | None = None
) -> Tensor:
    """GELU, by erf, of a linear map.

    Args:
        rows: (n, 1280), half precision, or FP8 if the weight is.
        weight: (5120, 1280).
        bias: (5120,), half precision.
        peak: no result is larger; given, if the result is to be FP8.

    Returns:
        (n, 5120), as the bias; with a peak FP8, where 448 stands for the peak.
    """
    count = len(rows.values if isinstance(rows, Scaled) else rows)
    expanded = bias.new_empty(count, MLP_WIDTH, dtype=None if peak is None else FP8)
    _launch(_linear_gelu, rows, weight, expanded, bias, None if peak is None else FP8_PEAK / peak)
    return expanded


def add_linear(hidden: Tensor, rows: Tensor, weight: Scaled) -> None:
    """Adds a linear map, without bias, to the hidden state, in place.

    Args:
        hidden: (n, 1280), half precision.
        rows: FP8 (n, k), k a multiple of 128.
        weight: (1280, k); its scales hold those of the rows, which are all alike.
    """
    _launch(_add_linear, rows, weight, hidden, parts=2)


def _launch(
    kernel: triton.JITFunction,
    rows: Tensor | Scaled,
    weight: Tensor | Scaled,
    out: Tensor,
    *extra: Tensor | float | None,
    parts: int = 1,
) -> None:
    """Starts one program per multiprocessor; each goes from tile to tile, loading the next one meanwhile.

    A tile of the result is written in so many parts.
    """
    row_scales = rows.scales if isinstance(rows, Scaled) else None
    column_scales = weight.scales if isinstance(weight, Scaled) else None
    left = rows.values if isinstance(rows, Scaled) else rows
    right = weight.values if isinstance(weight, Scaled) else weight
    programs = _multiprocessors(out.device)
    step = _TILE_BYTES // left.element_size()
    kernel[(programs,)](
        TensorDescriptor.from_tensor(left, [_TILE_ROWS.value, step]),
        TensorDescriptor.from_tensor(right, [_TILE_COLUMNS.value, step]),
        TensorDescriptor.from_tensor(out, [_TILE_ROWS.value, _TILE_COLUMNS.value // parts]),
        row_scales,
        column_scales,
        *extra,
        len(left),
        columns=len(right),
        depth=left.shape[1],
        step=step,
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
def _multiply(
    rows, weight, row_scales, column_scales, row, column, count, depth: tl.constexpr, step: tl.constexpr
):
    """One tile of `rows` times `weight` transposed, scaled where there are scales; float32."""
    total = tl.zeros((_TILE_ROWS, _TILE_COLUMNS), tl.float32)
    for place in range(0, depth, step):
        total = tl.dot(rows.load([row, place]), weight.load([column, place]).T, total)
    if row_scales is not None:
        within = row + tl.arange(0, _TILE_ROWS)
        total *= tl.load(row_scales + within, mask=within < count, other=0.0)[:, None]
    if column_scales is not None:
        total *= tl.load(column_scales + column + tl.arange(0, _TILE_COLUMNS))[None, :]
    return total


@triton.jit(do_not_specialize=["count"])
def _linear_gelu(
    rows,
    weight,
    out,
    row_scales,
    column_scales,
    bias,
    factor,
    count,
    columns: tl.constexpr,
    depth: tl.constexpr,
    step: tl.constexpr,
    programs: tl.constexpr,
):
    down = tl.cdiv(count, _TILE_ROWS)
    across: tl.constexpr = columns // _TILE_COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        place, column = _place(tile, down, across)
        # From the last rows to the first: the next product starts with what the cache still holds.
        row = (down - 1 - place) * _TILE_ROWS
        column *= _TILE_COLUMNS
        total = _multiply(rows, weight, row_scales, column_scales, row, column, count, depth, step)
        total += tl.load(bias + column + tl.arange(0, _TILE_COLUMNS)).to(tl.float32)[None, :]
        total = _gelu(total)
        if factor is not None:
            total *= factor
        out.store([row, column], total.to(out.dtype))


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
    row_scales,
    column_scales,
    bias,
    positions,
    cosines,
    sines,
    count,
    columns: tl.constexpr,
    depth: tl.constexpr,
    step: tl.constexpr,
    programs: tl.constexpr,
):
    down = tl.cdiv(count, _TILE_ROWS)
    across: tl.constexpr = columns // _TILE_COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        place, column = _place(tile, down, across)
        row = place * _TILE_ROWS
        column *= _TILE_COLUMNS
        total = _multiply(rows, weight, row_scales, column_scales, row, column, count, depth, step)
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


@triton.jit(do_not_specialize=["count"])
def _add_linear(
    rows,
    weight,
    out,
    row_scales,
    column_scales,
    count,
    columns: tl.constexpr,
    depth: tl.constexpr,
    step: tl.constexpr,
    programs: tl.constexpr,
):
    down = tl.cdiv(count, _TILE_ROWS)
    across: tl.constexpr = columns // _TILE_COLUMNS
    half: tl.constexpr = _TILE_COLUMNS // 2
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        place, column = _place(tile, down, across)
        row = place * _TILE_ROWS
        column *= _TILE_COLUMNS
        total = _multiply(rows, weight, row_scales, column_scales, row, column, count, depth, step)
        # In halves, for which shared memory has room beside the operands of the next tile.
        left, right = tl.split(tl.permute(tl.reshape(total, (_TILE_ROWS, 2, half)), (0, 2, 1)))
        out.store([row, column], (out.load([row, column]).to(tl.float32) + left).to(out.dtype))
        column += half
        out.store([row, column], (out.load([row, column]).to(tl.float32) + right).to(out.dtype))
