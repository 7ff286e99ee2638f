"""A layer of the fused forward pass in FP8 (e4m3): half the size of half precision, 1.5 times as fast.

The operands of the matrix products are FP8; attention, norms and the hidden state are as in half precision. A
checkpoint must pass the selftest in FP8 before it is used so: see `verdicts`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from virnucpro_core.embedding.fused import Norm
from virnucpro_core.embedding.kernels import attend
from virnucpro_core.embedding.model import Layer
from virnucpro_core.embedding.products import FP8, FP8_PEAK, Scaled, add_linear, linear_gelu, linear_rotary
from virnucpro_core.errors import ExecutionError
from virnucpro_core.recipe import EMBEDDING_WIDTH

LEAST_PEAK = 1e-6
"""The peak of a linear map that is zero whatever goes in."""


class Fp8Layer:
    """A layer with its four weights in FP8, each row of a weight under a scale of its own.

    A row that comes from a norm has its own scale, too. What comes from attention and from GELU shares one scale,
    which follows from the weights alone: no input can make it larger than `bound_linear` says, so no pass over the
    numbers is needed to find their largest. With random weights the bound is 10 to 40 times what is usual, and
    FP8 is as exact there as at its peak; it loses bits below 1/28,672 of the peak.

    Args:
        layer: whose weights are rounded; on a Hopper GPU, in half precision.
        shift: float32 (1280,), the biases of all layers before.

    Raises:
        ExecutionError: the weights allow numbers that half precision cannot hold. FP8 would hide them: an
            infinite number becomes the largest one.
    """

    def __init__(self, layer: Layer, shift: Tensor) -> None:
        joined, mlp_in = layer.query_key_value, layer.mlp_in
        self._attention_norm = Norm(layer.attention_norm, shift)
        self._query_key_value = quantise(joined.weight)
        self._joined_bias = joined.bias
        values = slice(2 * EMBEDDING_WIDTH, None)
        self._value_peak = bound_linear(layer.attention_norm, joined.weight[values], joined.bias[values])
        self._attention_out = quantise(layer.attention_out.weight, self._value_peak / FP8_PEAK)
        self._mlp_norm = Norm(layer.mlp_norm, shift + layer.attention_out.bias.float())
        self._mlp_in = quantise(mlp_in.weight)
        self._mlp_bias = mlp_in.bias
        self._mlp_peak = bound_linear(layer.mlp_norm, mlp_in.weight, mlp_in.bias)
        self._mlp_out = quantise(layer.mlp_out.weight, self._mlp_peak / FP8_PEAK)
        if not (self._value_peak <= torch.finfo(torch.float16).max and math.isfinite(self._mlp_peak)):
            raise ExecutionError(
                f"a layer's values may reach {self._value_peak:.0f}, and its MLP {self._mlp_peak:.0f}",
                todo="Compute these weights in bfloat16 or float32.",
            )

    def __call__(
        self, hidden: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor], tiles: Tensor
    ) -> None:
        normed = self._attention_norm.scaled(hidden)
        projected = linear_rotary(normed, self._query_key_value, self._joined_bias, positions, rotation)
        add_linear(hidden, attend(projected, tiles, self._value_peak), self._attention_out)
        normed = self._mlp_norm.scaled(hidden)
        expanded = linear_gelu(normed, self._mlp_in, self._mlp_bias, self._mlp_peak)
        add_linear(hidden, expanded, self._mlp_out)


def quantise(weight: Tensor, factor: float = 1.0) -> Scaled:
    """Rounds a weight to FP8; the largest number of each row becomes 448.

    Args:
        weight: (n, k).
        factor: what its products are to be multiplied by on top.
    """
    wide = weight.float()
    scales = (wide.abs().amax(dim=1) / FP8_PEAK).clamp(min=torch.finfo(torch.float32).tiny)
    return Scaled((wide / scales[:, None]).to(FP8), scales * factor)


def bound_linear(layer_norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> float:
    """What no number of a linear map exceeds, whatever goes into the norm before it.

    A row of 1280 numbers with mean 0 and variance 1 is sqrt(1280) long, so by Cauchy and Schwarz its product with
    a row of the weight is at most that times the row's length; the norm's weight belongs to the row, its bias
    to the bias. Rounding to FP8 may exceed the bound by a few percent; the largest FP8 number stands for that.
    """
    wide, gain = weight.float(), layer_norm.weight.float()
    lengths = torch.linalg.vector_norm(wide * gain, dim=1)
    offsets = (wide @ layer_norm.bias.float() + bias.float()).abs()
    return max(float((EMBEDDING_WIDTH**0.5 * lengths + offsets).max()), LEAST_PEAK)
