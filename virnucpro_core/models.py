"""Models: names in the ledger for checkpoints on disk."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection

from virnucpro_core.embedding.checkpoint import Checkpoint
from virnucpro_core.ledger.registration import add_model


def register_checkpoint(tx: Connection, name: str, checkpoint: Checkpoint, model_root: Path) -> None:
    """Give a checkpoint a name. Below `model_root` it is kept relative to it, so that hosts may differ.

    Raises:
        WeightsError: if the name stands for other weights already.
    """
    folder, root = checkpoint.folder.resolve(), model_root.resolve()
    add_model(
        tx,
        name=name,
        path=str(folder.relative_to(root) if folder.is_relative_to(root) else folder),
        weights_sha256=checkpoint.sha256,
        layers=checkpoint.layers,
        token_dropout=checkpoint.token_dropout,
        demonstration=checkpoint.demonstration,
        config=checkpoint.config,
    )
