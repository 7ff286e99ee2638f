"""Contents of a report to try the page on: every text from outside is hostile."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from virnucpro_core.failures import Failure, FailureReason
from virnucpro_core.features.manifests import ResultFile
from virnucpro_core.features.matrices import Matrix
from virnucpro_core.htmlreport.contents import Contents
from virnucpro_core.htmlreport.lengths import Lengths
from virnucpro_core.htmlreport.sampling import Sample, take_sample
from virnucpro_core.htmlreport.speed import measure_speed
from virnucpro_core.ledger.queries import SubmissionRow
from virnucpro_core.ledger.runs import ChunkRun

BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTILE = "<script>alert(1)</script>\"'&$x_1$\u202e\x1b"


def matrix_of(rows: int, width: int = 8) -> Matrix:
    """A matrix in memory; every other record of its input failed."""
    embeddings = np.random.default_rng(1).standard_normal((rows, width)).astype(np.float32)
    return cast("Matrix", FakeMatrix(np.arange(1, 2 * rows, 2, dtype=np.int64), embeddings))


class FakeMatrix(SimpleNamespace):
    def __init__(self, records: Any, embeddings: Any) -> None:
        super().__init__(records=records, embeddings=embeddings)

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: Any) -> Any:
        return self.embeddings[rows]


def run_of(node: str, begin: float, seconds: float, tokens: int) -> ChunkRun:
    started_at = BEGIN + timedelta(seconds=begin)
    return ChunkRun(
        node=node,
        host="host",
        device="cpu",
        tokens=tokens,
        seconds=seconds,
        started_at=started_at,
        finished_at=started_at + timedelta(seconds=seconds),
    )


def lengths_of(sample: Sample) -> Lengths:
    return Lengths(np.arange(1026), 5000, np.arange(len(sample.records)))


def contents_of(rows: int = 10, **changes: Any) -> Contents:
    """Contents in which every text from outside is hostile."""
    job = SimpleNamespace(
        id=7,
        generation=2,
        state="succeeded",
        error=None,
        records=2 * rows,
        embeddings=rows,
        failed=rows,
        truncated=1,
        unknown=2,
        tokens=3000,
        input_residues=4000,
        input_bytes=5000,
        input_sha256="a" * 64,
        recipe_sha256="b" * 64,
        recipe={"truncation": 1024, "demonstration": False, "dtype": "float32"},
        model=HOSTILE,
        execution={"plan": {"name": HOSTILE}},
    )
    submission = SubmissionRow(
        id=3,
        path=f"/in/{HOSTILE.replace('/', '')}.fasta",
        stem=HOSTILE,
        label="",
        nucleotide_path="",
        nucleotide_sha256="",
        requested_by=HOSTILE,
        max_failed_share=0.05,
        submitted_at=BEGIN,
        published_generation=2,
        error=HOSTILE,
    )
    sample = take_sample(matrix_of(rows))
    contents = Contents(
        job=cast("Any", job),
        submission=submission,
        failures={FailureReason.POISON: rows},
        first_failures=[Failure(2, HOSTILE, FailureReason.POISON, HOSTILE)],
        lengths=lengths_of(sample),
        speed=measure_speed([run_of(HOSTILE, k, 5, 100) for k in range(5)]),
        sample=sample,
        files=[ResultFile(f"{HOSTILE}_ESM.pt", "c" * 64, 100, rows)],
        missing=[HOSTILE],
    )
    return replace(contents, **changes)
