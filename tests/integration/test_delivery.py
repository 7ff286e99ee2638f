"""A Celery node that brings its idle child no messages is ended; any other is left alone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction
from workers import tasks
from workers.delivery import watch_delivery
from workers.process import WorkerProcess

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = [pytest.mark.integration, pytest.mark.faults]
pytest_plugins = ["tests.fixtures_pipeline"]

PATIENCE = 1.0
LOOK = 0.1


@pytest.fixture
def process(pipeline: Pipeline, small_fasta: Path) -> Iterator[WorkerProcess]:
    """An idle child; messages wait for it."""
    pipeline.configure(heartbeat_seconds=LOOK)
    pipeline.submit(small_fasta)
    process = WorkerProcess(pipeline.settings, node="extract@test", queue="extract,finish")
    yield process
    process.close()


@pytest.fixture
def node() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as program:
        yield program
        program.kill()


def send(pipeline: Pipeline, seconds_ago: float) -> None:
    sent = text("UPDATE outbox SET published_at = now() - make_interval(secs => :ago)")
    in_transaction(pipeline.ledger, lambda tx: tx.execute(sent, {"ago": seconds_ago}))


def test_node_that_leaves_messages_waiting_is_ended_though_others_take_them(
    pipeline: Pipeline, process: WorkerProcess, node: subprocess.Popen[bytes]
) -> None:
    watch_delivery(process, node.pid, lambda: None, PATIENCE)
    deadline = time.monotonic() + 60
    while node.poll() is None and time.monotonic() < deadline:
        send(pipeline, 3 * LOOK)  # none of them is old: others have taken the older ones
    assert node.poll() == -SIGKILL


def test_node_whose_child_is_busy_lives(
    pipeline: Pipeline, process: WorkerProcess, node: subprocess.Popen[bytes]
) -> None:
    send(pipeline, 3600)
    process.busy = True
    looks = count_looks(process)
    watch_delivery(process, node.pid, lambda: None, PATIENCE)
    pipeline.wait_until(lambda: looks() > 2 * PATIENCE / LOOK)
    assert node.poll() is None
    process.busy = False
    assert node.wait(60) == -SIGKILL


def test_node_lives_while_nothing_waits(
    pipeline: Pipeline, process: WorkerProcess, node: subprocess.Popen[bytes]
) -> None:
    looks = count_looks(process)
    watch_delivery(process, node.pid, lambda: None, PATIENCE)
    pipeline.wait_until(lambda: looks() > 2 * PATIENCE / LOOK)
    assert node.poll() is None


def test_node_lives_while_the_broker_is_away(
    pipeline: Pipeline, process: WorkerProcess, node: subprocess.Popen[bytes]
) -> None:
    send(pipeline, 3600)
    asked = count()
    away = ServiceError("the broker cannot be reached")

    def check_broker() -> None:
        if next(asked) < 2 * PATIENCE / LOOK:
            assert node.poll() is None
            raise away

    watch_delivery(process, node.pid, check_broker, PATIENCE)
    assert node.wait(60) == -SIGKILL
    assert next(asked) >= 3 * PATIENCE / LOOK, "its patience begins when the broker is back"


def count_looks(process: WorkerProcess) -> Callable[[], int]:
    """How often a child was asked whether it is idle."""
    is_idle, looks = process.is_idle, count()
    seen = [0]

    def look() -> bool:
        seen[0] = next(looks)
        return is_idle()

    process.is_idle = look
    return lambda: seen[0]


def test_a_child_watches_the_process_that_forked_it(
    process: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tasks, "process_of", lambda _: process)
    monkeypatch.setattr(tasks, "die_with_parent", lambda: None)
    monkeypatch.setattr(tasks.os, "getppid", lambda: 4711)
    monkeypatch.setattr(tasks, "watch_delivery", lambda *given: watched.append(given))
    tasks.begin("extract@test")
    ((child, forked_by, _, patience),) = watched
    assert (child, forked_by) == (process, 4711)
    assert patience >= process.settings.stuck_seconds
