"""The recipe: the mathematics asked for, known before anything runs and without torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

Dtype = Literal["float16", "bfloat16", "float32", "fp8"]
ResiduePolicy = Literal["unknown", "strict"]

EMBEDDING_WIDTH = 1280
"""Numbers per protein: FastESM2_650's hidden size."""

TRUNCATION = 1024
"""Residues kept of a record (contract), so at most 1026 tokens with BOS and EOS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What was asked of the model. Two runs with equal recipes on equal input are the same work.

    Attributes:
        weights_sha256: sha256 of the checkpoint's model.safetensors.
        token_dropout: whether embeddings are scaled by 0.88, as the checkpoint's config says.
        dtype: precision of the forward pass, where fp8 means the operands of its matrix products; pooling and
            storage are always float32.
        truncation: residues kept of each record.
        residues: `unknown` turns letters outside the vocabulary into <unk>; `strict` fails the record.
        pooling: mean over residue positions 1..L, without BOS, EOS and padding.
        demonstration: whether the weights are random ones made by `virnucpro weights demo`.
    """

    weights_sha256: str
    token_dropout: bool
    dtype: Dtype
    truncation: int = TRUNCATION
    residues: ResiduePolicy = "unknown"
    pooling: Literal["mean_residues"] = "mean_residues"
    demonstration: bool = False

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @property
    def sha256(self) -> str:
        """The recipe's name: sha256 of its canonical JSON."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
