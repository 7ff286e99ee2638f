"""The fused forward pass: the same function as `Encoder`, in fewer and faster kernels. Needs Triton."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from triton.errors import TritonError

from virnucpro_core.embedding.attention import Segments
from virnucpro_core.embedding.checkpoint import HEAD_WIDTH, ROTARY_BASE
from virnucpro_core.embedding.kernels import attend, linear_gelu, linear_rotary, norm, pool
from virnucpro_core.embedding.model import Encoder, Layer
from virnucpro_core.embedding.packing import LEAST_PACK_TOKENS, LONGEST, plan_tiles
from virnucpro_core.errors import ExecutionError
from virnucpro_core.recipe import EMBEDDING_WIDTH


@dataclass(frozen=True, slots=True)
class _Norm:
    """A layer norm over hidden state and shift; all float32 (1280,)."""

    shift: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return norm(hidden, self.shift, self.weight, self.bias, dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The parts of a `Layer`; of the two products that add in place only the transposed weights."""

    attention_norm: _Norm
    query_key_value: nn.Linear
    attention_out: Tensor
    mlp_norm: _Norm
    mlp_in: nn.Linear
    mlp_out: Tensor


class FusedEncoder:
    """Tokens to embeddings by the kernels of `kernels`; it shares the tensors of an `Encoder`.

    The two products that add to the hidden state do so themselves, in place. Their biases are left out there:
    the hidden state lacks the sum of all biases so far, which each norm adds in float32.

    Args:
        encoder: on a Hopper GPU, in half precision.
    """

    def __init__(self, encoder: Encoder) -> None:
        words = encoder.words.weight
        self._words = words * encoder.scale
        self._rotation = rotation_tables(LONGEST, words.device)
        self._layers = []
        shift = torch.zeros(EMBEDDING_WIDTH, dtype=torch.float32, device=words.device)
        for layer in encoder.layers:
            assert isinstance(layer, Layer)
            attention_norm = _adopt_norm(layer.attention_norm, shift)
            shift = shift + layer.attention_out.bias.float()
            mlp_norm = _adopt_norm(layer.mlp_norm, shift)
            shift = shift + layer.mlp_out.bias.float()
            self._layers.append(
                _Layer(
                    attention_norm,
                    layer.query_key_value,
                    layer.attention_out.weight.t(),
                    mlp_norm,
                    layer.mlp_in,
                    layer.mlp_out.weight.t(),
                )
            )
        self._final_norm = _adopt_norm(encoder.final_norm, shift)

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
                projected = linear_rotary(
                    layer.attention_norm(hidden),
                    layer.query_key_value.weight,
                    layer.query_key_value.bias,
                    positions,
                    self._rotation,
                )
                hidden.addmm_(attend(projected, tiles), layer.attention_out)
                expanded = linear_gelu(layer.mlp_norm(hidden), layer.mlp_in.weight, layer.mlp_in.bias)
                hidden.addmm_(expanded, layer.mlp_out)
            return pool(self._final_norm(hidden, torch.float32), segments.bounds, sequences)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs one small pack, so that the kernels are compiled (5 s), or read from Triton's cache (0.6 s).

        Raises:
            ExecutionError: they do not compile here.
        """
        device = self._words.device
        bounds = np.array([0, LEAST_PACK_TOKENS], dtype=np.int32)
        positions = torch.arange(LEAST_PACK_TOKENS, dtype=torch.int32, device=device)
        tiles = torch.from_numpy(plan_tiles(bounds)).to(device)
        segments = Segments(torch.from_numpy(bounds).to(device), LEAST_PACK_TOKENS)
        try:
            self(positions % 20 + 4, positions, segments, tiles, sequences=1)
            torch.cuda.synchronize(device)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            # Not the compiler's fault, and another plan would fail, too.
            raise
        except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
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


def _adopt_norm(layer_norm: nn.LayerNorm, shift: Tensor) -> _Norm:
    return _Norm(shift, layer_norm.weight.float(), layer_norm.bias.float())
