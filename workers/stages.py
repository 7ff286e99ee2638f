"""The stages: what is done with a chunk that was claimed. Nothing here claims, commits or knows Celery."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from sqlalchemy import Connection, Engine

from virnucpro_core.errors import MismatchError
from virnucpro_core.failures import FailureReason
from virnucpro_core.features.files import Written, new_file
from virnucpro_core.features.manifests import Counts, Manifest, ResultFile, installed_versions, write_manifest
from virnucpro_core.features.matrices import open_matrix, write_matrix
from virnucpro_core.features.validation import validate_export, validate_merged, validate_result
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
from virnucpro_core.ledger.transitions import EXTRACT, MATRIX, MERGE, VALIDATE
from virnucpro_core.ledger.work import (
    EXPORT,
    FAILURES,
    MANIFEST,
    MERGED,
    REPORT,
    Result,
    Work,
    export_name,
    file_name,
)
from virnucpro_core.sequences.fasta import parse_records
from virnucpro_core.sequences.scan import read_range
from virnucpro_core.settings import Settings
from workers.artifacts import as_written, describe_file, find_unsound, locate, published_folder, stage_folder
from workers.publication import Publication
from workers.reporting import Reporter

if TYPE_CHECKING:
    from virnucpro_core.embedding.extraction import Extraction

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage made, and what is to be published when it is committed."""

    result: Result
    publications: Sequence[Publication] = ()


Stage = Callable[[Engine, Work, Settings], Outcome]


def keep_extraction(work: Work, extraction: Extraction, settings: Settings) -> Outcome:
    """Write a chunk's embeddings.

    Raises:
        ArtifactError: the file cannot be written.
    """
    execution = extraction.execution.to_json()
    # Whoever still computes what is in other hands by now must not write over what they made: where a chunk was
    # halved, its first half has its ordinal; where nothing else of the job was begun, another execution class may
    # compute it.
    name = f"{work.range.ordinal:08d}-{work.range.records}-{extraction.execution.sha256[:8]}.safetensors"
    written = write_matrix(
        stage_folder(work, settings) / name,
        extraction.ids,
        extraction.records,
        extraction.embeddings,
        {
            "input_sha256": work.input_sha256,
            "recipe": json.dumps(work.recipe.to_json(), sort_keys=True),
            "execution": json.dumps(execution, sort_keys=True),
        },
    )
    counts = extraction.counts
    return Outcome(
        Result(
            artifacts=[describe_file(written, MATRIX, settings)],
            embeddings=counts.embeddings,
            failures=extraction.failures,
            truncated=counts.truncated,
            unknown=counts.unknown,
            tokens=counts.tokens,
            positions=extraction.positions,
            seconds=extraction.seconds,
            execution=execution,
        )
    )


def validate(ledger: Engine, work: Work, settings: Settings) -> Outcome:
    """Reopen a job's result from disk, compare it with its input, and prepare its publication.

    Raises:
        MismatchError: the result is not what it should be; it says how.
        InputChangedError: the input is no longer what was registered.
        ArtifactError: a file cannot be written.
    """
    started = time.perf_counter()
    folder = stage_folder(work, settings)
    made = in_transaction(ledger, artifacts_of, work.job_id, stage=MERGE)
    failures, failed = in_transaction(ledger, write_failures, work.job_id, folder / "failures.jsonl")
    check_result(ledger, work, settings, made, failed)

    artifacts = [] if failures is None else [describe_file(failures, FAILURES, settings)]
    merged_paths = {Path(row.path).name: locate(row, settings) for row in made if row.kind == MERGED}
    exports = [as_written(row, settings) for row in made if row.kind == EXPORT]
    publications: list[Publication] = []
    reporter = Reporter(ledger, work, settings)
    submissions = in_transaction(ledger, submissions_of, work.job_id)
    # Submissions may share a folder, and what is merged there.
    merged_to = {
        published_folder(work, one, settings)
        for one in submissions
        if file_name(MERGED, one.id) in merged_paths
    }
    for submission in submissions:
        readers_folder = published_folder(work, submission, settings)
        manifest = write_manifest(
            folder / file_name(MANIFEST, submission.id),
            in_transaction(ledger, describe_result, work, submission, exports),
        )
        artifacts.append(describe_file(manifest, MANIFEST, settings))
        report = reporter.try_report(submission, artifacts)
        if report is not None:
            artifacts.append(describe_file(report, REPORT, settings))
        publications.append(
            Publication(
                folder=readers_folder,
                stem=submission.stem,
                exports=[export.path for export in exports],
                merged=merged_paths.get(file_name(MERGED, submission.id)),
                merged_is_stale=bool(submission.nucleotide_path) and readers_folder not in merged_to,
                failures=None if failures is None else failures.path,
                report=None if report is None else report.path,
                manifest=manifest.path,
            )
        )
    result = Result(
        artifacts=artifacts,
        seconds=time.perf_counter() - started,
        published=[submission.id for submission in submissions],
    )
    return Outcome(result, publications)


def check_result(
    ledger: Engine, work: Work, settings: Settings, made: Sequence[ArtifactRow], failed: Sequence[int]
) -> None:
    """Compare what merge made with the input and the ledger.

    Raises:
        MismatchError: with all that is wrong.
    """
    job = in_transaction(ledger, get_job, work.job_id)
    result = next((row for row in made if row.kind == MATRIX), None)
    if result is None:
        raise MismatchError("there is no merged result to validate", where=work.title, todo="Retry the job.")
    path = locate(result, settings)
    findings = validate_result(
        path, sha256=result.sha256, ids=read_ids(ledger, work, settings), failed=failed
    )
    errors = list(findings.errors)
    if (findings.rows, len(failed), findings.records) != (job.embeddings, job.failed, job.records):
        errors.append(
            f"{findings.rows} embeddings and {len(failed)} failures of {findings.records} records, "
            f"where the ledger counts {job.embeddings}, {job.failed} and {job.records}"
        )
    if findings.passed:
        matrix = open_matrix(path)
        errors += validate_export([as_written(row, settings) for row in made if row.kind == EXPORT], matrix)
        for row in made:
            if row.kind == MERGED:
                errors += validate_merged(as_written(row, settings), matrix)
    log.info("validated", passed=not errors, errors=errors, rows=findings.rows, failures=len(failed))
    if errors:
        raise MismatchError(
            f"the result is not valid: {'; '.join(errors)}",
            where=str(path),
            todo="Force the job anew if a retry does not help.",
        )


def read_ids(ledger: Engine, work: Work, settings: Settings) -> Iterator[str]:
    """The id of every record of a job's input, in input order, read chunk by chunk."""
    for chunk in in_transaction(ledger, chunk_ranges, work.job_id):
        data = read_range(work.location, work.compression, chunk, roots=settings.input_folders)
        yield from parse_records(data, first_record=chunk.first_record, truncation=1).ids


def write_failures(tx: Connection, job_id: int, path: Path) -> tuple[Written | None, array[int]]:
    """List a job's failures, one JSON object a line; no file without failures.

    Returns:
        The file, and the failed records' numbers in input order.
    """
    records = array("q")
    if not failure_counts(tx, job_id):
        return None, records
    with new_file(path) as file:
        for failure in failures_of(tx, job_id):
            file.write(json.dumps(asdict(failure), ensure_ascii=False).encode() + b"\n")
            records.append(failure.record)
    return Written(path, file.sha256, file.bytes, len(records)), records


def describe_result(
    tx: Connection, work: Work, submission: SubmissionRow, exports: Sequence[Written]
) -> Manifest:
    """The manifest of a job's result as one submission's readers will see it."""
    job = get_job(tx, work.job_id)
    counts = Counts(
        records=job.records,
        embeddings=job.embeddings,
        failures={FailureReason(reason): count for reason, count in failure_counts(tx, work.job_id).items()},
        residues=job.input_residues,
        tokens=job.tokens,
        truncated=job.truncated,
        unknown=job.unknown,
    )
    names = [export_name(submission.stem, export.path.name) for export in exports]
    return Manifest(
        input_name=Path(submission.path).name,
        input_sha256=work.input_sha256,
        recipe=work.recipe,
        execution=job.execution or {},
        counts=counts,
        files=tuple(ResultFile.of(export, name) for export, name in zip(exports, names, strict=True)),
        versions=installed_versions(),
    )


def find_damaged(ledger: Engine, work: Work, settings: Settings) -> list[int]:
    """Ids of the artifacts that a stage takes in and whose bytes are not those that were recorded."""
    if work.stage == VALIDATE:
        return find_unsound(in_transaction(ledger, artifacts_of, work.job_id, stage=MERGE), settings)
    # Merge goes on from the matrix that it made before when the chunks are gone.
    taken = in_transaction(ledger, artifacts_of, work.job_id, stage=EXTRACT) or [
        row for row in in_transaction(ledger, artifacts_of, work.job_id, stage=MERGE) if row.kind == MATRIX
    ]
    return find_unsound(taken, settings)
