"""A file that cannot be read at the moment may be intact: the attempt fails in words, nothing is made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from virnucpro_core.ledger.queries import UNREADABLE_ADVICE
from workers.process import WorkerProcess

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytest_plugins = ["tests.fixtures_pipeline"]
pytestmark = [pytest.mark.integration, pytest.mark.faults]


@pytest.fixture
def finisher(pipeline: Pipeline) -> Iterator[WorkerProcess]:
    """A worker for what follows extraction."""
    process = WorkerProcess(pipeline.settings, node="finish@unreadable", queue="finish")
    yield process
    process.close()


def run_once(pipeline: Pipeline, worker: WorkerProcess, stage: str) -> tuple[str, str | None]:
    """The state and the error of a stage's one chunk after an attempt."""
    [chunk] = pipeline.rows("SELECT id FROM chunks WHERE stage = :stage", stage=stage)
    worker.run(stage, chunk.id)
    [after] = pipeline.rows("SELECT state, error FROM chunks WHERE id = :id", id=chunk.id)
    return after.state, after.error


def claims(pipeline: Pipeline) -> list[object]:
    return [
        (row.stage, row.claimed_at)
        for row in pipeline.rows("SELECT stage, claimed_at FROM chunks WHERE state = 'done' ORDER BY id")
    ]


@pytest.mark.parametrize(
    ("stage", "taken"), [("merge", "extract/00000001-%"), ("validate", "merge/result.pt")]
)
def test_an_artifact_that_cannot_be_read_is_waited_for(
    pipeline: Pipeline,
    small_fasta: Path,
    run_chunks: Callable[[str], None],
    finisher: WorkerProcess,
    stage: str,
    taken: str,
) -> None:
    job_id = pipeline.submit(small_fasta).job_id
    for earlier in ("extract", "merge")[: 1 if stage == "merge" else 2]:
        run_chunks(earlier)
    before = claims(pipeline)
    [artifact] = pipeline.rows("SELECT path FROM artifacts WHERE path LIKE :end", end=f"%/{taken}")
    path = pipeline.settings.output_root / artifact.path
    aside = path.rename(path.with_name("aside"))
    path.symlink_to(path)  # as with EIO or no right, nobody knows what is behind it

    state, error = run_once(pipeline, finisher, stage)
    assert state == "pending"
    assert f"a file cannot be read: Too many levels of symbolic links [{path}]" in str(error)
    assert UNREADABLE_ADVICE in str(error)
    assert (pipeline.job(job_id).state, pipeline.job(job_id).stage) == ("running", stage)

    aside.replace(path)
    assert run_once(pipeline, finisher, stage) == ("done", None)
    assert claims(pipeline)[: len(before)] == before, "something was made again"
