"""FastESM2's forward pass, written once for every device, and the loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from virnucpro_core.embedding.attention import Attention, Segments, attend_packed, attend_single
from virnucpro_core.embedding.checkpoint import (
    HEAD_WIDTH,
    HEADS,
    MLP_WIDTH,
    NORM_EPSILON,
    ROTARY_BASE,
    VOCABULARY_SIZE,
    Checkpoint,
)
from virnucpro_core.embedding.execution import ExecutionClass, KernelPlan, describe_execution
from virnucpro_core.embedding.packing import PACK_TOKENS, Pack, plan_tiles
from virnucpro_core.recipe import EMBEDDING_WIDTH, TRUNCATION, Dtype, Recipe, ResiduePolicy

if TYPE_CHECKING:
    # It needs Triton, which only the plan that uses it may ask for.
    from virnucpro_core.embedding.fused import FusedEncoder

TOKEN_DROPOUT_SCALE = 0.88
"""1 - 0.15 * 0.8: in training 15% of tokens were chosen and 80% of those zeroed; in use nothing is."""

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8": torch.float16,
}
"""What holds the hidden state; with fp8 only the operands of matrix products are FP8."""

_ATTENTION: dict[KernelPlan, Attention] = {
    KernelPlan.PACKED_VARLEN: attend_packed,
    KernelPlan.SINGLE_SDPA: attend_single,
}


class Layer(nn.Module):
    """One transformer layer; norms come before attention and before the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(EMBEDDING_WIDTH, eps=NORM_EPSILON)
        self.query_key_value = nn.Linear(EMBEDDING_WIDTH, 3 * EMBEDDING_WIDTH)
        self.attention_out = nn.Linear(EMBEDDING_WIDTH, EMBEDDING_WIDTH)
        self.mlp_norm = nn.LayerNorm(EMBEDDING_WIDTH, eps=NORM_EPSILON)
        self.mlp_in = nn.Linear(EMBEDDING_WIDTH, MLP_WIDTH)
        self.mlp_out = nn.Linear(MLP_WIDTH, EMBEDDING_WIDTH)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, segments: Segments, attend: Attention
    ) -> Tensor:
        projected = self.query_key_value(self.attention_norm(hidden)).view(-1, 3, HEADS, HEAD_WIDTH)
        query, key = rotate(projected[:, :2], cos, sin).unbind(1)
        attended = attend(query, key, projected[:, 2], segments)
        hidden = hidden + self.attention_out(attended.reshape(-1, EMBEDDING_WIDTH))
        # The exact GELU, by erf; the tanh form is another function.
        expanded = functional.gelu(self.mlp_in(self.mlp_norm(hidden)))
        added: Tensor = hidden + self.mlp_out(expanded)
        return added


class Encoder(nn.Module):
    """Tokens to hidden states.

    Args:
        layers: transformer layers.
        token_dropout: whether embeddings are scaled by 0.88.
    """

    def __init__(self, layers: int, token_dropout: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY_SIZE, EMBEDDING_WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.final_norm = nn.LayerNorm(EMBEDDING_WIDTH, eps=NORM_EPSILON)
        self.scale = TOKEN_DROPOUT_SCALE if token_dropout else 1.0

    def forward(self, tokens: Tensor, positions: Tensor, segments: Segments, attend: Attention) -> Tensor:
        """Runs a pack.

        Args:
            tokens: int64 or int32 (rows,).
            positions: int32 (rows,), place within the own sequence.
            segments: where the sequences lie.
            attend: the attention kernel.

        Returns:
            The last hidden state after the final norm, (rows, 1280).
        """
        cos, sin = rotation(positions)
        hidden = self.words(tokens) * self.scale
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, segments, attend)
        normed: Tensor = self.final_norm(hidden)
        return normed


def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, float32 (rows, 1, 1, 64), whatever the model's dtype.

    In half precision the angle at position 1024 would be off by 0.16 (float16) or 0.45 (bfloat16) radians.
    """
    exponents = torch.arange(0, HEAD_WIDTH, 2, dtype=torch.float32, device=positions.device) / HEAD_WIDTH
    angles = positions.float()[:, None] * (1.0 / ROTARY_BASE**exponents)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None]
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of queries and keys (rows, 2, heads, 64), in float32; halves rotate, not pairs."""
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


def pool_residues(hidden: Tensor, pieces: Tensor, rows: int) -> Tensor:
    """Means over the residues of each sequence, float32 (n, 1280).

    Every sum runs over one sequence in order: no atomics, so the same bytes every time, whatever lies beside.

    Args:
        hidden: (rows or more, 1280).
        pieces: int64 (2n,), see `Pack`.
        rows: sum of the pieces.
    """
    return torch.segment_reduce(hidden[:rows].float(), "mean", lengths=pieces, unsafe=True)[1::2]


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32 inside, not in TF32, whatever the process has chosen elsewhere."""
    products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    each = [product.fp32_precision for product in products]
    try:
        chosen = torch.get_float32_matmul_precision()
    except RuntimeError:
        chosen = "highest"  # it was chosen by torch's newer settings, of which this one does not tell
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
        for product, precision in zip(products, each, strict=True):
            product.fp32_precision = precision


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a model's tensors come from, so that they can be read again in another precision.

    Attributes:
        sha256: of model.safetensors; of the adopted tensors' names and bytes where no file is known.
        layers: transformer layers.
        token_dropout: whether embeddings are scaled by 0.88.
        demonstration: whether the weights are random.
        read_tensor: from a name as in the checkpoint, without `esm.`, to the tensor.
    """

    sha256: str
    layers: int
    token_dropout: bool
    demonstration: bool
    read_tensor: Callable[[str], Tensor]


def make_recipe(
    weights: Weights | Checkpoint,
    dtype: Dtype,
    truncation: int = TRUNCATION,
    residues: ResiduePolicy = "unknown",
) -> Recipe:
    """The recipe of what these weights compute, loaded or not."""
    return Recipe(
        weights_sha256=weights.sha256,
        token_dropout=weights.token_dropout,
        dtype=dtype,
        truncation=truncation,
        residues=residues,
        demonstration=weights.demonstration,
    )


@dataclass(slots=True, eq=False)
class FastEsm:
    """A loaded model. `load_fast_esm` makes it.

    Attributes:
        weights: where the tensors came from.
        encoder: the weights on `device` in `dtype`, and the forward pass of the kernel plan.
        device: where it computes.
        dtype: precision of the forward pass.
        plan: the kernel plan.
        fitting_tokens: pack size that memory has room for, once it was found to lack room for more.
    """

    weights: Weights
    encoder: Encoder | FusedEncoder
    device: torch.device
    dtype: Dtype
    plan: KernelPlan
    fitting_tokens: int | None = None

    def recipe(self, *, truncation: int = TRUNCATION, residues: ResiduePolicy = "unknown") -> Recipe:
        """The recipe of what this model computes."""
        return make_recipe(self.weights, self.dtype, truncation, residues)

    def execution(self, pack_tokens: int = PACK_TOKENS) -> ExecutionClass:
        """The execution class of what this model computes in packs of so many tokens."""
        return describe_execution(self.device, self.dtype, self.plan, pack_tokens)

    @torch.inference_mode()
    def embed_pack(self, pack: Pack) -> Tensor:
        """Embeds the sequences of a pack.

        Returns:
            float32 (n, 1280) on the device, in the pack's order. On CUDA it is still being computed.
        """
        tokens, positions = self._send(pack.tokens).int(), self._send(pack.positions)
        segments = Segments(self._send(pack.bounds), pack.longest)
        if isinstance(self.encoder, Encoder):
            # A caller's autocast would have other numbers recorded as those of this dtype.
            with exact_products(), torch.autocast(self.device.type, enabled=False):
                hidden = self.encoder(tokens, positions, segments, _ATTENTION[self.plan])
            return pool_residues(hidden, self._send(pack.pieces), int(pack.pieces.sum()))
        tiles = self._send(plan_tiles(pack.bounds))
        return self.encoder(tokens, positions, segments, tiles, sequences=len(pack.pieces) // 2)

    def _send(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor
        # torch's cache of pinned memory waits for the copy before it hands the block out again.
        return tensor.pin_memory().to(self.device, non_blocking=True)
