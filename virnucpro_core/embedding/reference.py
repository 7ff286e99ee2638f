"""What embeddings are held against: `transformers.EsmModel` in float32, and proteins to compare them on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from virnucpro_core.embedding.checkpoint import Checkpoint, expected_tensors
from virnucpro_core.embedding.loading import open_weights
from virnucpro_core.embedding.model import exact_products
from virnucpro_core.errors import WeightsError
from virnucpro_core.recipe import TRUNCATION
from virnucpro_core.sequences.residues import CLS, EOS, VOCABULARY

_COUNTS = "A21 R14 N10 D14 C4 Q10 E17 G18 H6 I15 L25 K15 M6 F10 P12 S17 T14 W3 Y7 V18"
NATURAL_LETTERS = "".join(word[0] * int(word[1:]) for word in _COUNTS.split())
"""256 amino acids, each as often as in Swiss-Prot (release statistics, amino acid composition)."""

FAMILIES = 48
CHANGED = (0.0, 0.05, 0.15, 0.3)
"""Share of residues in which each relative of a family differs from the ancestor, so that one is nearest."""


class Reference:
    """`transformers.EsmModel` with a checkpoint's weights, in float32.

    Args:
        checkpoint: whose weights.
        device: where to compute.

    Raises:
        WeightsError: this version of transformers does not take them.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        from transformers import EsmConfig, EsmModel

        # Not by `from_pretrained`: it reports on the head's tensors at length, which embeddings do not need.
        module: nn.Module = EsmModel(EsmConfig.from_dict(checkpoint.config), add_pooling_layer=False)
        weights = open_weights(checkpoint)
        tensors = {name: weights.read_tensor(name) for name in expected_tensors(checkpoint.layers)}
        faults = module.load_state_dict(tensors, strict=False)
        if faults.unexpected_keys:
            raise WeightsError(
                f"transformers does not know {', '.join(faults.unexpected_keys[:5])}",
                where=str(checkpoint.folder),
                todo="Install a version of transformers that this project names.",
            )
        self._module = module.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def embed(self, sequences: Sequence[str]) -> Tensor:
        """Means over the residues of each sequence, one at a time: float32 (n, 1280) on the CPU."""
        rows = []
        for sequence in sequences:
            residues = [VOCABULARY.index(letter) for letter in sequence[:TRUNCATION]]
            tokens = torch.tensor([[CLS, *residues, EOS]], device=self._device)
            with exact_products():
                hidden = self._module(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
            rows.append(hidden[0, 1:-1].mean(dim=0).cpu())
        return torch.stack(rows)


def draw_families(seed: int = 1) -> list[str]:
    """Proteins of 30 to 1024 residues: in each family an ancestor, then relatives ever further from it."""
    random = np.random.default_rng(seed)
    letters = np.array(list(NATURAL_LETTERS))
    proteins = []
    for _ in range(FAMILIES):
        ancestor = random.choice(letters, random.integers(30, TRUNCATION + 1))
        for share in CHANGED:
            changed = random.random(len(ancestor)) < share
            proteins.append("".join(np.where(changed, random.choice(letters, len(ancestor)), ancestor)))
    return proteins


def find_nearest(embeddings: Tensor) -> Tensor:
    """The nearest other row of each, by Euclidean distance: (n, 1280) to int64 (n,)."""
    distances = torch.cdist(embeddings.double(), embeddings.double())
    return distances.fill_diagonal_(torch.inf).argmin(dim=1)


def relative_l2(ours: Tensor, theirs: Tensor) -> Tensor:
    """Distance of each row from the other's, as a share of the other's length: (n, 1280) twice to (n,)."""
    relative: Tensor = torch.linalg.vector_norm(ours - theirs, dim=1) / torch.linalg.vector_norm(
        theirs, dim=1
    )
    return relative
