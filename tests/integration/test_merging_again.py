"""A result is made again from what is still there, when the chunks have been removed long ago."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import resume
from virnucpro_core.ledger.queries import ArtifactRow, artifacts_of
from virnucpro_core.ledger.retention import remove_chunks

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytest_plugins = ["tests.fixtures_pipeline"]
pytestmark = pytest.mark.integration

STAGES = ("extract", "merge", "validate")


@pytest.fixture
def old_job(pipeline: Pipeline, small_fasta: Path, run_chunks: Callable[[str], None]) -> int:
    """A job that has succeeded, with three exports, and whose chunks are gone."""
    pipeline.configure(export_rows=4)
    job_id = pipeline.submit(small_fasta).job_id
    for stage in STAGES:
        run_chunks(stage)
    assert pipeline.job(job_id).state == "succeeded"
    assert in_transaction(pipeline.ledger, remove_chunks, job_id, pipeline.settings.output_root) > 3
    return job_id


def merged(pipeline: Pipeline, job_id: int, kind: str) -> list[ArtifactRow]:
    rows = in_transaction(pipeline.ledger, artifacts_of, job_id, stage="merge")
    return [row for row in rows if row.kind == kind]


def claims(pipeline: Pipeline) -> list[object]:
    return [
        row.claimed_at
        for row in pipeline.rows("SELECT claimed_at FROM chunks WHERE stage = 'extract' ORDER BY id")
    ]


def damage(path: Path) -> None:
    """Flip the last byte in place: all links of the file change."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize("lost", [[0], [2], [0, 1, 2]])
def test_exports_are_made_again_from_the_matrix(
    pipeline: Pipeline, run_chunks: Callable[[str], None], old_job: int, lost: list[int]
) -> None:
    before, exports = claims(pipeline), merged(pipeline, old_job, "export")
    assert len(exports) == 3
    files = [pipeline.settings.output_root / row.path for row in exports]
    contents = [file.read_bytes() for file in files]
    for k in lost:
        damage(files[k])
    in_transaction(pipeline.ledger, resume, old_job, [exports[k].id for k in lost])
    for stage in ("merge", "validate"):
        run_chunks(stage)
    job = pipeline.job(old_job)
    assert (job.state, job.error) == ("succeeded", None)
    assert [file.read_bytes() for file in files] == contents
    assert [row.sha256 for row in merged(pipeline, old_job, "export")] == [row.sha256 for row in exports]
    assert claims(pipeline) == before, "a chunk was computed again"


def test_rotten_matrix_is_noticed_when_nucleotides_come_late(
    pipeline: Pipeline,
    run_chunks: Callable[[str], None],
    old_job: int,
    small_fasta: Path,
    nucleotides: Path,
) -> None:
    [matrix] = merged(pipeline, old_job, "matrix")
    before = claims(pipeline)
    damage(pipeline.settings.output_root / matrix.path)
    pipeline.submit(small_fasta, nucleotides=nucleotides)
    assert pipeline.job(old_job).stage == "merge"
    run_chunks("merge")
    assert pipeline.job(old_job).stage == "extract"
    for stage in STAGES:
        run_chunks(stage)
    assert pipeline.job(old_job).state == "succeeded"
    assert [row.sha256 for row in merged(pipeline, old_job, "matrix")] == [matrix.sha256]
    assert all(now != then for now, then in zip(claims(pipeline), before, strict=True))
