"""Models: the one that a worker keeps loaded."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from virnucpro_core.errors import WeightsError
from virnucpro_core.gpus import MASK
from virnucpro_core.ledger.work import Work

if TYPE_CHECKING:
    from virnucpro_core.embedding.model import FastEsm

log = structlog.get_logger()


class ModelKeeper:
    """Keeps one model, until a chunk needs another."""

    def __init__(self, model_root: Path) -> None:
        self.model_root = model_root
        self.model: FastEsm | None = None

    def load(self, work: Work) -> FastEsm:
        """The model for a recipe: the one that is loaded, or another in its place.

        Raises:
            WeightsError: the model is missing here, or is not the one that was registered.
            ExecutionError: this device cannot compute in the recipe's dtype, or has no memory left for the model.
        """
        from virnucpro_core.embedding.loading import load_fast_esm

        if self.model is None or not fits(self.model, work):
            self.forget()
            # A worker whose GPU has vanished must not compute on the CPU instead, and pin a whole job to that.
            device = "cuda" if os.environ.get(MASK) else None
            self.model = load_fast_esm(
                self.model_root / work.model_path, device=device, dtype=work.recipe.dtype
            )
            log.info("model_loaded", model=work.model, execution=str(self.model.execution()))
        if not fits(self.model, work):
            self.forget()
            raise WeightsError(
                f"the model {work.model!r} is not the one that was registered",
                where=work.model_path,
                todo="Put the registered weights there again, or register these under another name.",
            )
        return self.model

    def forget(self) -> None:
        """Gives the model's memory back, to whoever needs it; the next chunk loads a model again."""
        import torch

        self.model = None
        gc.collect()  # torch leaves the frames of a first load in a circle
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use


def fits(model: FastEsm, work: Work) -> bool:
    """Whether a model computes what a chunk's recipe asks for."""
    recipe = work.recipe
    return model.recipe(truncation=recipe.truncation, residues=recipe.residues) == recipe
