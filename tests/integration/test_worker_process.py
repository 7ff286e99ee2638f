"""One Celery child's life, in this process: what it does where it, or its surroundings, are not fit to work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import ledger_jobs
from virnucpro_core.ledger.database import in_transaction
from workers.process import WorkerProcess

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = [pytest.mark.integration, pytest.mark.faults]
pytest_plugins = ["tests.fixtures_pipeline"]


@pytest.fixture
def start(pipeline: Pipeline) -> Iterator[Callable[[], WorkerProcess]]:
    """Starts a child that takes extract chunks."""
    started: list[WorkerProcess] = []

    def start_process() -> WorkerProcess:
        started.append(WorkerProcess(pipeline.settings, node="extract@test", queue="extract"))
        return started[-1]

    yield start_process
    for process in started:
        process.close()


def submit(pipeline: Pipeline, fasta: Path) -> list[int]:
    """The extract chunks of a new job."""
    pipeline.submit(fasta)
    return [row.id for row in pipeline.rows("SELECT id FROM chunks ORDER BY id")]


def chunk_row(pipeline: Pipeline, chunk: int) -> Any:
    (row,) = pipeline.rows("SELECT state, attempts, error FROM chunks WHERE id = :chunk", chunk=chunk)
    return row


@pytest.fixture
def broken_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_writing(*_: object) -> None:
        raise RuntimeError("the library is broken")

    monkeypatch.setattr("workers.process.keep_extraction", break_writing)


def test_unknown_error_while_writing_ends_the_process(
    pipeline: Pipeline, small_fasta: Path, broken_writer: None, start: Callable[[], WorkerProcess]
) -> None:
    first, second, *_ = submit(pipeline, small_fasta)
    process = start()
    process.run("extract", first)
    with pytest.raises(SystemExit):
        process.run("extract", second)
    assert chunk_row(pipeline, first) == ("pending", 1, "RuntimeError: the library is broken")
    process.close()
    # no fault of this chunk's
    assert chunk_row(pipeline, second) == ("pending", 0, None)


def test_unknown_error_while_writing_is_told_at_the_end(
    pipeline: Pipeline, small_fasta: Path, broken_writer: None, start: Callable[[], WorkerProcess]
) -> None:
    first, *_ = submit(pipeline, small_fasta)
    process = start()
    process.run("extract", first)
    with pytest.raises(RuntimeError, match="the library is broken"):
        process.close()
    assert [row.state for row in pipeline.rows("SELECT state FROM workers")] == ["gone"]


@pytest.fixture
def unfit(pipeline: Pipeline, tmp_path: Path, start: Callable[[], WorkerProcess]) -> WorkerProcess:
    """A child on a host where the model is missing."""
    pipeline.configure(model_root=tmp_path / "models", max_attempts=2)
    return start()


def test_unfit_worker_leaves_chunks_to_a_busy_one(
    pipeline: Pipeline, small_fasta: Path, unfit: WorkerProcess
) -> None:
    first, second, *_ = submit(pipeline, small_fasta)
    other = in_transaction(pipeline.ledger, ledger_jobs.start_worker)
    in_transaction(pipeline.ledger, ledger_jobs.claim, second, other)
    for _ in range(5):
        unfit.run("extract", first)
    state, attempts, error = chunk_row(pipeline, first)
    assert (state, attempts) == ("pending", 0)
    assert "a worker said: there is no model" in error, "nobody would know why it waits"
    (message,) = pipeline.rows(
        "SELECT published_at, due_at > now() AS later FROM outbox WHERE chunk_id = :chunk", chunk=first
    )
    assert message == (None, True)


def test_chunk_that_no_worker_takes_fails(
    pipeline: Pipeline, small_fasta: Path, unfit: WorkerProcess
) -> None:
    first, *_ = submit(pipeline, small_fasta)
    in_transaction(pipeline.ledger, ledger_jobs.start_worker)
    in_transaction(pipeline.ledger, ledger_jobs.start_worker, "finish@test", "finish")
    for _ in range(2):
        unfit.run("extract", first)
        assert chunk_row(pipeline, first)[:2] == ("pending", 0)
    for attempts, state in ((1, "pending"), (2, "failed")):
        unfit.run("extract", first)
        assert chunk_row(pipeline, first)[:2] == (state, attempts)
    assert "there is no model" in chunk_row(pipeline, first).error


def test_input_that_cannot_be_read_for_a_while_is_tried_again(
    pipeline: Pipeline, small_fasta: Path, start: Callable[[], WorkerProcess]
) -> None:
    first, *_ = submit(pipeline, small_fasta)
    away = small_fasta.rename(small_fasta.with_suffix(".away"))
    process = start()
    process.run("extract", first)
    state, attempts, error = chunk_row(pipeline, first)
    assert (state, attempts) == ("pending", 1)
    assert f"the input cannot be read: No such file or directory [{small_fasta}" in error
    away.rename(small_fasta)
    process.run("extract", first)
    pipeline.wait_until(lambda: chunk_row(pipeline, first) == ("done", 2, None))
