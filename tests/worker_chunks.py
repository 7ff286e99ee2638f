"""The chunks of a job that a Celery child is tried on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline


def submit(pipeline: Pipeline, fasta: Path) -> list[int]:
    """The extract chunks of a new job."""
    pipeline.submit(fasta)
    return [row.id for row in pipeline.rows("SELECT id FROM chunks ORDER BY id")]


def chunk_row(pipeline: Pipeline, chunk: int) -> Any:
    (row,) = pipeline.rows("SELECT state, attempts, error FROM chunks WHERE id = :chunk", chunk=chunk)
    return row
