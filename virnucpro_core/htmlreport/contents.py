"""Contents: what a report tells, gathered from the ledger, the input and the matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, Row

from virnucpro_core.errors import ArtifactError, InputError, JobError
from virnucpro_core.failures import Failure
from virnucpro_core.features.manifests import ResultFile
from virnucpro_core.features.matrices import open_matrix
from virnucpro_core.htmlreport.lengths import Lengths, survey_lengths
from virnucpro_core.htmlreport.sampling import Sample, take_sample
from virnucpro_core.htmlreport.speed import Speed, measure_speed
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import (
    ArtifactRow,
    SubmissionRow,
    artifacts_of,
    chunk_ranges,
    failure_counts,
    failures_of,
    get_job,
    submissions_of,
)
from virnucpro_core.ledger.runs import ChunkRun, chunk_runs
from virnucpro_core.ledger.transitions import MATRIX, MERGE
from virnucpro_core.ledger.work import (
    EXPORT,
    FAILURES,
    MANIFEST,
    MERGED,
    SUFFIXES,
    NewArtifact,
    export_name,
    file_name,
)
from virnucpro_core.roots import OUTPUT_ADVICE, resolve_below
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.scan import read_range
from virnucpro_core.settings import Settings

SHOWN_FAILURES = 100
"""Failures that a report lists; the file of failures has all."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a report tells.

    Attributes:
        job: as `get_job` returns it.
        submission: whose readers it is for.
        failures: records without an embedding, by reason.
        first_failures: the first of them, in input order.
        lengths: None if the input cannot be read any more.
        speed: None before the first chunk.
        sample: None if there is no matrix (yet).
        files: the result's, under the names that they are published as.
        missing: sentences that say what the report lacks, and why.
    """

    job: Row[Any]
    submission: SubmissionRow
    failures: dict[str, int]
    first_failures: list[Failure]
    lengths: Lengths | None
    speed: Speed | None
    sample: Sample | None
    files: list[ResultFile]
    missing: list[str]


@dataclass(frozen=True, slots=True)
class Told:
    """What the ledger tells of a job."""

    job: Row[Any]
    submissions: list[SubmissionRow]
    artifacts: list[ArtifactRow]
    chunks: list[ChunkRange]
    runs: list[ChunkRun]
    failures: dict[str, int]
    first_failures: list[Failure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What the reports of a job's submissions have in common, and what takes long to gather.

    Attributes:
        lengths, speed, sample, missing: as in `Contents`.
    """

    told: Told
    lengths: Lengths | None
    speed: Speed | None
    sample: Sample | None
    missing: list[str]

    def contents_for(
        self, submission_id: int | None = None, artifacts: Iterable[NewArtifact] = ()
    ) -> Contents:
        """What one submission's report tells.

        Args:
            submission_id: whose report it is; by default the first one's.
            artifacts: files that the ledger does not know yet.

        Raises:
            JobError: the job has no such submission.
        """
        submission = choose_submission(self.told, submission_id)
        return Contents(
            job=self.told.job,
            submission=submission,
            failures=self.told.failures,
            first_failures=self.told.first_failures,
            lengths=self.lengths,
            speed=self.speed,
            sample=self.sample,
            files=name_files([*self.told.artifacts, *artifacts], submission),
            missing=self.missing,
        )


def gather(
    ledger: Engine, settings: Settings, job_id: int, *, on_progress: OnProgress | None = None
) -> Gathered:
    """Reads a job's input, once, and samples its matrix.

    Args:
        on_progress: called with the records of the input read so far, and with all there are.

    Raises:
        JobError: there is no such job.
    """
    told = in_transaction(ledger, ask_ledger, job_id)
    missing: list[str] = []
    sample = sample_rows(told, settings, missing)
    lengths = measure_lengths(told, sample, settings, missing, on_progress)
    return Gathered(
        told=told, lengths=lengths, speed=measure_speed(told.runs), sample=sample, missing=missing
    )


def ask_ledger(tx: Connection, job_id: int) -> Told:
    return Told(
        job=get_job(tx, job_id),
        submissions=submissions_of(tx, job_id),
        artifacts=artifacts_of(tx, job_id),
        chunks=chunk_ranges(tx, job_id),
        runs=chunk_runs(tx, job_id),
        failures=failure_counts(tx, job_id),
        first_failures=list(failures_of(tx, job_id, limit=SHOWN_FAILURES)),
    )


def choose_submission(told: Told, submission_id: int | None) -> SubmissionRow:
    """The submission asked for, or the first.

    Raises:
        JobError: there is none.
    """
    for submission in told.submissions:
        if submission_id in (None, submission.id):
            return submission
    raise JobError(f"job {told.job.id} has no such submission", todo="Submit the file again.")


def sample_rows(told: Told, settings: Settings, missing: list[str]) -> Sample | None:
    """A sample of the job's matrix; None, with the reason in `missing`, where there is none."""
    row = next((row for row in told.artifacts if (row.stage, row.kind) == (MERGE, MATRIX)), None)
    if row is None:
        missing.append("The embeddings are not merged yet: nothing is said of them.")
        return None
    root = settings.output_root.resolve()
    try:
        return take_sample(open_matrix(resolve_below(root / row.path, [root], todo=OUTPUT_ADVICE)))
    except (ArtifactError, InputError) as error:
        missing.append(f"The embeddings cannot be read ({error.what}): nothing is said of them.")
        return None


def measure_lengths(
    told: Told,
    sample: Sample | None,
    settings: Settings,
    missing: list[str],
    on_progress: OnProgress | None,
) -> Lengths | None:
    """The lengths of the input's records; None, with the reason in `missing`, where it cannot be read."""
    compression = Compression(told.job.compression)

    def read(chunk: ChunkRange) -> bytes:
        return read_range(told.job.location, compression, chunk, roots=settings.input_folders)

    try:
        return survey_lengths(
            told.chunks,
            read,
            limit=told.job.recipe["truncation"],
            sampled=np.zeros(0, dtype=np.int64) if sample is None else sample.records,
            on_progress=on_progress,
        )
    except InputError as error:
        missing.append(f"The input cannot be read ({error.what}): nothing is said of lengths.")
        return None


def name_files(artifacts: Iterable[ArtifactRow | NewArtifact], submission: SubmissionRow) -> list[ResultFile]:
    """The files of a result, under the names that a submission's readers find them by."""
    files: dict[str, ResultFile] = {}
    for artifact in artifacts:
        own = Path(artifact.path).name
        if artifact.kind == EXPORT:
            name = export_name(submission.stem, own)
        elif artifact.kind == FAILURES or own in (
            file_name(MERGED, submission.id),
            file_name(MANIFEST, submission.id),
        ):
            name = submission.stem + SUFFIXES[artifact.kind]
        else:
            continue
        files[name] = ResultFile(name, artifact.sha256, artifact.bytes, artifact.rows)
    return list(files.values())
