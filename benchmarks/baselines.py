"""What the GPU benchmarks compare with: `transformers.EsmModel`, in loops as others write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from virnucpro_core.embedding.checkpoint import SHAPE
from virnucpro_core.embedding.packing import EXTRA_TOKENS
from virnucpro_core.recipe import EMBEDDING_WIDTH
from virnucpro_core.sequences.fasta import RecordBatch
from virnucpro_core.sequences.residues import CLS, EOS, PAD


@dataclass(frozen=True, slots=True)
class Rows:
    """Embeddings of records that are all good: ids, record numbers int64 (n,), float32 (n, 1280)."""

    ids: list[str]
    records: NDArray[np.int64]
    embeddings: NDArray[np.float32]


def make_esm(device: torch.device, layers: int = 33, seed: int = 0) -> nn.Module:
    """An `EsmModel` in FastESM2's shape, float32, with random weights that are not as tame as fresh ones.

    Of its own initialisation, norms do nothing, biases are zero and all hidden states look alike. So norms and
    biases are moved, words spread, and products made larger, until every part shows in the embeddings.
    """
    from transformers import EsmConfig, EsmModel

    fields: dict[str, Any] = {
        **SHAPE,
        "num_hidden_layers": layers,
        "token_dropout": True,
        "mask_token_id": 32,
        "pad_token_id": PAD,
        "max_position_embeddings": 1026,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(seed)
    with torch.device(device):
        module: nn.Module = EsmModel(EsmConfig(**fields), add_pooling_layer=False)
    module.eval().requires_grad_(requires_grad=False)
    for name, parameter in module.named_parameters():
        if "norm" in name.lower() or name.endswith("bias"):
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(20.0 if "word_embeddings" in name else 1.5)
    return module


def embed_existing(module: nn.Module, batch: RecordBatch, *, tokens: int = 2048) -> Rows:
    """The existing loop: small padded batches; a mean over residues and a copy to the host for each sequence.

    With `tokens=1` each sequence is computed alone, without padding.
    """

    def pool(hidden: Tensor, lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        ends = (lengths + 1).tolist()
        means = [row[1:end].mean(dim=0).float().cpu() for row, end in zip(hidden, ends, strict=True)]
        return torch.stack(means).numpy()

    return _embed_padded(module, batch, tokens, pool)


def embed_padded(module: nn.Module, batch: RecordBatch, *, tokens: int = 16_384) -> Rows:
    """Large padded batches, pooled on the device; one copy to the host a batch."""

    def pool(hidden: Tensor, lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        counts = torch.from_numpy(lengths).to(hidden.device)[:, None]
        inside = torch.arange(hidden.shape[1] - EXTRA_TOKENS, device=hidden.device) < counts
        sums = (hidden[:, 1:-1] * inside[:, :, None]).sum(dim=1, dtype=torch.float32)
        return (sums / counts).cpu().numpy()

    return _embed_padded(module, batch, tokens, pool)


def plan_padded(lengths: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Batches of neighbours in length, longest first, of at most so many tokens with padding, or one sequence.

    Not `get_batch_indices`: it fills the rest of a batch with short sequences, which is good for packs, but
    here each would be padded to the longest.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    while len(order):
        count = max(tokens // int(lengths[order[0]] + EXTRA_TOKENS), 1)
        batches.append(order[:count])
        order = order[count:]
    return batches


@torch.inference_mode()
def _embed_padded(
    module: nn.Module,
    batch: RecordBatch,
    tokens: int,
    pool: Callable[[Tensor, NDArray[np.int64]], NDArray[np.float32]],
) -> Rows:
    device = next(module.parameters()).device
    lengths = np.diff(batch.offsets)
    embeddings = np.empty((len(lengths), EMBEDDING_WIDTH), dtype=np.float32)
    for members in plan_padded(lengths, tokens):
        padded = torch.from_numpy(_pad(batch, members)).to(device)
        hidden = module(padded, attention_mask=(padded != PAD).long()).last_hidden_state
        embeddings[members] = pool(hidden, lengths[members])
    return Rows([batch.ids[row] for row in batch.rows], batch.first_record + batch.rows, embeddings)


def _pad(batch: RecordBatch, members: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of some sequences, int64 (n, longest): BOS, residues, EOS, padding."""
    begins = batch.offsets[members]
    lengths = batch.offsets[members + 1] - begins
    places = np.arange(lengths.max())
    inside = places < lengths[:, None]
    padded = np.full((len(members), lengths.max() + EXTRA_TOKENS), PAD, dtype=np.int64)
    padded[:, 0] = CLS
    padded[:, 1:-1][inside] = batch.tokens[(begins[:, None] + places)[inside]]
    padded[np.arange(len(members)), lengths + 1] = EOS
    return padded
