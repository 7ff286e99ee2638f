"""A Celery child without Celery, as a plugin (`pytest_plugins`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from workers.process import WorkerProcess

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

Start = Callable[[], WorkerProcess]


@pytest.fixture
def start(pipeline: Pipeline) -> Iterator[Start]:
    """Starts a child that takes extract chunks."""
    started: list[WorkerProcess] = []

    def start_process() -> WorkerProcess:
        started.append(WorkerProcess(pipeline.settings, node="extract@test", queue="extract"))
        return started[-1]

    yield start_process
    for process in started:
        process.close()
