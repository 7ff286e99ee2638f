"""The fused forward pass: the same function as `Encoder`, in fewer and faster kernels. Needs Triton."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from triton.errors import TritonError

from virnucpro_core.embedding.attention import Segments
from virnucpro_core.embedding.checkpoint import HEAD_WIDTH, ROTARY_BASE
from virnucpro_core.embedding.kernels import attend, norm, norm_scaled, pool
from virnucpro_core.embedding.memory import is_full
from virnucpro_core.embedding.model import Encoder, Layer
from virnucpro_core.embedding.packing import LONGEST
from virnucpro_core.embedding.products import Scaled, linear_gelu, linear_rotary
from virnucpro_core.errors import ExecutionError
from virnucpro_core.recipe import EMBEDDING_WIDTH


class Norm:
    """A layer norm over hidden state and shift.

    Args:
        layer_norm: its weight and bias.
        shift: float32 (1280,).
    """

    def __init__(self, layer_norm: nn.LayerNorm, shift: Tensor) -> None:
        self._parameters = (shift, layer_norm.weight.float(), layer_norm.bias.float())

    def __call__(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return norm(hidden, *self._parameters, dtype)

    def scaled(self, hidden: Tensor) -> Scaled:
        """The same in FP8."""
        return norm_scaled(hidden, *self._parameters)


class FusedLayer(Protocol):
    """One transformer layer; it changes the hidden state in place."""

    def __init__(self, layer: Layer, shift: Tensor) -> None: ...

    def __call__(
        self, hidden: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor], tiles: Tensor
    ) -> None: ...


class HalfLayer:
    """A layer in half precision.

    The two products that add to the hidden state do so themselves, in place. Their biases are left out there:
    the hidden state lacks the sum of all biases so far, which each norm adds in float32.

    Args:
        layer: whose tensors it shares.
        shift: float32 (1280,), the biases of all layers before.
    """

    def __init__(self, layer: Layer, shift: Tensor) -> None:
        self._attention_norm = Norm(layer.attention_norm, shift)
        self._query_key_value = layer.query_key_value
        self._attention_out = layer.attention_out.weight.t()
        self._mlp_norm = Norm(layer.mlp_norm, shift + layer.attention_out.bias.float())
        self._mlp_in = layer.mlp_in
        self._mlp_out = layer.mlp_out.weight.t()

    def __call__(
        self, hidden: Tensor, positions: Tensor, rotation: tuple[Tensor, Tensor], tiles: Tensor
    ) -> None:
        joined = self._query_key_value
        projected = linear_rotary(
            self._attention_norm(hidden), joined.weight, joined.bias, positions, rotation
        )
        hidden.addmm_(attend(projected, tiles), self._attention_out)
        expanded = linear_gelu(self._mlp_norm(hidden), self._mlp_in.weight, self._mlp_in.bias)
        hidden.addmm_(expanded, self._mlp_out)


class FusedEncoder:
    """Tokens to embeddings by the kernels of `products` and `kernels`.

    Args:
        encoder: on a Hopper GPU, in half precision.
        layer_type: how to compute a layer.
    """

    def __init__(self, encoder: Encoder, layer_type: type[FusedLayer] = HalfLayer) -> None:
        words = encoder.words.weight
        self._words = words * encoder.scale
        self._rotation = rotation_tables(LONGEST, words.device)
        self._layers = []
        shift = torch.zeros(EMBEDDING_WIDTH, dtype=torch.float32, device=words.device)
        for layer in encoder.layers:
            assert isinstance(layer, Layer)
            self._layers.append(layer_type(layer, shift))
            shift = shift + layer.attention_out.bias.float() + layer.mlp_out.bias.float()
        self._final_norm = Norm(encoder.final_norm, shift)

    def __call__(
        self, tokens: Tensor, positions: Tensor, segments: Segments, tiles: Tensor, sequences: int
    ) -> Tensor:
        """Runs a pack.

        Args:
            tokens: int32 (rows,), at least 512 rows.
            positions: int32 (rows,), place within the own sequence.
            segments: where the sequences lie; they cover every row.
            tiles: int32 (t, 3), of `plan_tiles`.
            sequences: how many of them to pool; the rest is padding.

        Returns:
            Means over residues, float32 (sequences, 1280).
        """
        if segments.longest > len(self._rotation[0]):
            self._rotation = rotation_tables(segments.longest, tokens.device)
        # Triton launches on the current device, wherever the tensors lie.
        with torch.cuda.device(tokens.device):
            hidden = functional.embedding(tokens, self._words)
            for layer in self._layers:
                layer(hidden, positions, self._rotation, tiles)
            return pool(self._final_norm(hidden, torch.float32), segments.bounds, sequences)


@contextmanager
def explained_compilation(device: torch.device) -> Iterator[None]:
    """Says in words that the kernels do not compile, which they do when they first run.

    An error of the GPU, or of its memory, is raised as it is: another plan would fail, too.

    Raises:
        ExecutionError: they do not compile here.
    """
    try:
        yield
    except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        if is_full(error) or isinstance(error, torch.AcceleratorError):
            raise
        raise ExecutionError(
            f"the fused kernels do not compile: {type(error).__name__}: {error}",
            where=torch.cuda.get_device_name(device),
            todo="Check Triton, its cache folder (TRITON_CACHE_DIR) and the C compiler.",
        ) from error


def rotation_tables(positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles at positions 0, 1, ..., float32 (positions, 32) each."""
    exponents = torch.arange(0, HEAD_WIDTH, 2, dtype=torch.float32, device=device) / HEAD_WIDTH
    places = torch.arange(positions, dtype=torch.float32, device=device)
    angles = places[:, None] * (1.0 / ROTARY_BASE**exponents)
    return angles.cos(), angles.sin()
