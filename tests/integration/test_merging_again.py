"""A result is made again from what is still there, when the chunks have been removed long ago."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import resume
from virnucpro_core.ledger.queries import ArtifactRow, artifacts_of, submissions_of
from virnucpro_core.ledger.retention import remove_chunks
from virnucpro_core.verification import find_files, verify_job

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


def test_late_nucleotides_take_nothing_from_those_that_were_merged_before(
    pipeline: Pipeline,
    run_chunks: Callable[[str], None],
    old_job: int,
    small_fasta: Path,
    nucleotides: Path,
) -> None:
    pipeline.submit(small_fasta, nucleotides=nucleotides, label="viral")
    for stage in STAGES[1:]:
        run_chunks(stage)
    [first] = merged(pipeline, old_job, "merged")
    nucleotides.unlink()  # as they are not needed any more
    late = nucleotides.with_name("late_DNABERT_S.pt")
    torch.save({"nucleotide": ["x"], "data": [{"mean_representation": [0.0] * 768}]}, late)
    pipeline.submit(small_fasta, nucleotides=late)
    for stage in STAGES[1:]:
        run_chunks(stage)
    errors = [row.error for row in in_transaction(pipeline.ledger, submissions_of, old_job)]
    assert [error is None for error in errors] == [True, True, False]
    assert [row.sha256 for row in merged(pipeline, old_job, "merged")] == [first.sha256]
    files = in_transaction(pipeline.ledger, find_files, pipeline.settings.output_root, old_job)
    published = pipeline.published(old_job, 1) / "small_merged.pt"
    assert files.published[str(published.relative_to(pipeline.settings.output_root))] == {first.sha256}


def test_merged_file_of_an_older_generation_is_not_left_with_the_new_result(
    pipeline: Pipeline, run_chunks: Callable[[str], None], small_fasta: Path, nucleotides: Path
) -> None:
    job_id = pipeline.submit(small_fasta, nucleotides=nucleotides).job_id
    for stage in STAGES:
        run_chunks(stage)
    folder = pipeline.published(job_id)
    assert (folder / "small_merged.pt").exists()
    nucleotides.unlink()
    pipeline.submit(small_fasta, force=True)
    for stage in STAGES:
        run_chunks(stage)
    assert pipeline.job(job_id).generation == 2
    [error, _] = [row.error for row in in_transaction(pipeline.ledger, submissions_of, job_id)]
    assert "No such file" in str(error)
    assert (folder / "small_ESM.pt").exists()
    assert not (folder / "small_merged.pt").exists()


def test_merged_file_stays_where_one_of_two_equal_submissions_lost_its_nucleotides(
    pipeline: Pipeline, run_chunks: Callable[[str], None], small_fasta: Path, nucleotides: Path
) -> None:
    again = shutil.copytree(small_fasta.parent, small_fasta.parent / "again")
    job_id = pipeline.submit(small_fasta, nucleotides=nucleotides).job_id
    pipeline.submit(again / small_fasta.name, nucleotides=again / nucleotides.name)
    (again / nucleotides.name).unlink()
    for stage in STAGES:
        run_chunks(stage)
    errors = [row.error for row in in_transaction(pipeline.ledger, submissions_of, job_id)]
    assert [error is None for error in errors] == [True, False]
    assert pipeline.published(job_id) == pipeline.published(job_id, 1)
    assert (pipeline.published(job_id) / "small_merged.pt").exists()
    assert verify_job(pipeline.ledger, pipeline.settings.output_root, job_id).passed


def test_merged_file_that_is_not_ours_is_left(
    pipeline: Pipeline, run_chunks: Callable[[str], None], small_fasta: Path
) -> None:
    """Whoever merges by hand puts it beside the embeddings; another submission of the same content publishes there."""
    job_id = pipeline.submit(small_fasta).job_id
    for stage in STAGES:
        run_chunks(stage)
    merged = pipeline.published(job_id) / "small_merged.pt"
    merged.write_bytes(b"mine")
    again = shutil.copytree(small_fasta.parent, small_fasta.parent / "again")
    pipeline.submit(again / small_fasta.name)
    for stage in STAGES[1:]:
        run_chunks(stage)
    assert pipeline.published(job_id) == pipeline.published(job_id, 1)
    assert merged.read_bytes() == b"mine"
