"""What the DAG's tasks need: `pytest_plugins = ["tests.fixtures_dags"]`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests import ledger_jobs as jobs


@pytest.fixture
def tiny_model(ledger: Engine, settings_environment: Callable[..., None]) -> None:
    """The ledger has the model "tiny", and the settings point at it."""
    settings_environment(dtype="float32")
    with ledger.begin() as tx:
        jobs.add_model(tx)


@pytest.fixture
def inbox(tiny_model: None, tmp_path: Path) -> Path:
    """An empty inbox, to which the settings point, too."""
    return tmp_path / "inbox"
