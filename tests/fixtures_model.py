"""A small checkpoint in FastESM2's shape, as a plugin (`-p tests.fixtures_model` without a conftest)."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from virnucpro_core.embedding.demonstration import write_demo_weights
from virnucpro_core.embedding.loading import load_fast_esm
from virnucpro_core.embedding.model import FastEsm


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demonstration checkpoint with two layers; read only."""
    # On a host that is busy with other tests, threads that wait for each other after every operation are
    # slower than one.
    torch.set_num_threads(1)
    return write_demo_weights(tmp_path_factory.mktemp("checkpoints") / "demo", layers=2).folder


@pytest.fixture(scope="session")
def demo_model(demo_checkpoint: Path) -> FastEsm:
    """The demonstration checkpoint, loaded on the CPU; not to be changed."""
    return load_fast_esm(demo_checkpoint, device="cpu")


@pytest.fixture
def make_proteins() -> Callable[..., list[str]]:
    """Random proteins of the given lengths; the same ones for the same lengths and seed."""

    def make(*lengths: int, seed: int = 0) -> list[str]:
        letters = random.Random(seed)
        return ["".join(letters.choices("ACDEFGHIKLMNPQRSTVWY", k=length)) for length in lengths]

    return make
