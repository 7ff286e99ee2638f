"""A file system that is full, a real one: what is written there fails in words, leaves nothing, and is retried."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.files import new_file
from virnucpro_core.features.matrices import write_matrix
from virnucpro_core.recipe import EMBEDDING_WIDTH

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = [
    pytest.mark.faults,
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root"),
]
pytest_plugins = ["tests.fixtures_pipeline"]

BYTES = 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={BYTES}", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def write_rows(path: Path, rows: int) -> None:
    embeddings = np.ones((rows, EMBEDDING_WIDTH), np.float32)
    write_matrix(path, [f"r{row}" for row in range(rows)], np.arange(1, rows + 1), embeddings, {})


def test_matrix_that_does_not_fit_leaves_what_was_there(small_disk: Path) -> None:
    path = small_disk / "a.safetensors"
    write_rows(path, 10)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="No space left on device") as refused:
        write_rows(path, 1000)
    assert refused.value.where == str(path)
    assert "Free space" in refused.value.todo
    assert path.read_bytes() == before
    assert [file.name for file in small_disk.iterdir()] == [path.name]


def test_file_that_does_not_fit_leaves_nothing(small_disk: Path) -> None:
    def write(parts: int) -> None:
        with new_file(small_disk / "a") as file:
            for _ in range(parts):
                file.write(bytes(BYTES // 2))

    with pytest.raises(ArtifactError, match="No space left on device"):
        write(3)
    assert list(small_disk.iterdir()) == []
    write(1)


def test_chunk_is_retried_until_there_is_space(
    pipeline: Pipeline, small_disk: Path, small_fasta: Path
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(BYTES))
    pipeline.configure(output_root=small_disk, max_attempts=20)
    submitted = pipeline.submit(small_fasta)
    pipeline.start_relay()
    pipeline.start_workers()
    (failed,) = pipeline.wait_until(
        lambda: pipeline.rows("SELECT state, error FROM chunks WHERE error IS NOT NULL ORDER BY id LIMIT 1")
    )
    assert failed.state in ("pending", "running")
    assert "No space left on device" in failed.error
    filler.unlink()
    job = pipeline.wait_for(submitted.job_id)
    assert (job.state, job.embeddings, job.failed) == ("succeeded", 10, 2)
    assert max(row.attempts for row in pipeline.rows("SELECT attempts FROM chunks")) > 1
    assert list(small_disk.rglob("*.tmp")) == []
