"""Attention over sequences that lie one behind another; the kernel is chosen once, by the kernel plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the sequences of a pack lie.

    Attributes:
        bounds: int32 (s+1,) on the device: sequence i is rows bounds[i] to bounds[i+1].
        longest: rows of the longest sequence, or more.
    """

    bounds: Tensor
    longest: int


Attention = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
"""From query, key and value, each (rows, heads, 64), to the attended values (rows, heads, 64). Scores are
scaled by 64^-0.5 inside, which is exact in binary: scaling the query before, as ESM2 does, gives the same."""


def attend_single(query: Tensor, key: Tensor, value: Tensor, _: Segments) -> Tensor:
    """Attention of a pack that is one sequence, without padding."""
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).squeeze(0).transpose(0, 1)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Attention within each sequence of a pack (FlashAttention; softmax in float32). CUDA, half precision."""
    # Imported here: torch has it from 2.10 on, and the kernel plan asked for it before this runs.
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query, key, value, segments.bounds, segments.bounds, segments.longest, segments.longest
    )
    assert isinstance(attended, Tensor)
    return attended


def has_packed_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend_packed` runs here: torch 2.10, CUDA, Ampere or later, half precision."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
