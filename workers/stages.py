"""The stages: what is done with a chunk that was claimed. Nothing here claims, commits or knows Celery."""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import structlog
from sqlalchemy import Connection, Engine

from virnucpro_core.errors import ArtifactError, InputChangedError, InputError, MismatchError
from virnucpro_core.failures import FailureReason
from virnucpro_core.features.exports import write_export
from virnucpro_core.features.files import Written, hash_file, new_file
from virnucpro_core.features.manifests import Counts, Manifest, ResultFile, installed_versions, write_manifest
from virnucpro_core.features.matrices import open_matrix, write_matrix
from virnucpro_core.features.merging import Nucleotides, merge_chunks, merge_features, read_nucleotides
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
    NewArtifact,
    Result,
    Work,
    export_name,
    file_name,
)
from virnucpro_core.roots import open_below
from virnucpro_core.sequences.fasta import parse_records
from virnucpro_core.sequences.scan import read_range
from virnucpro_core.settings import Settings
from workers.artifacts import as_new, as_written, describe_file, locate, published_folder, stage_folder
from workers.publication import Publication
from workers.reporting import Reporter

if TYPE_CHECKING:
    from virnucpro_core.embedding.extraction import Extraction

log = structlog.get_logger()

RESULT_NAME = "result.safetensors"


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
    written = write_matrix(
        # A chunk that was halved leaves its ordinal to its first half: whoever still computes the whole of it must
        # not write over that.
        stage_folder(work, settings) / f"{work.range.ordinal:08d}-{work.range.records}.safetensors",
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


def merge(ledger: Engine, work: Work, settings: Settings) -> Outcome:
    """Join a job's chunk artifacts, export them, and join them with the nucleotides that were submitted.

    What an earlier run made and is still sound is kept, so that nucleotides may come when the chunks are gone.

    Raises:
        ArtifactError: a chunk artifact is missing or damaged, or a file cannot be written.
        MismatchError: chunks do not belong together.
    """
    started = time.perf_counter()
    folder = stage_folder(work, settings)
    made = in_transaction(ledger, artifacts_of, work.job_id, stage=MERGE)
    whole = [row for row in made if row.kind in (MATRIX, EXPORT)]
    sound = {row.kind for row in whole} == {MATRIX, EXPORT} and not find_unsound(whole, settings)
    artifacts = [as_new(row) for row in whole] if sound else merge_rows(ledger, work, settings)
    matrix = open_matrix(folder / RESULT_NAME)
    rejected: dict[int, str] = {}
    for submission in in_transaction(ledger, submissions_of, work.job_id):
        if not submission.nucleotide_path:
            continue
        try:
            nucleotides = read_submitted(submission, settings)
            merged = merge_features(
                nucleotides,
                matrix,
                folder / file_name(MERGED, submission.id),
                records=work.range.records,
                data_type=cast("Literal['host', 'viral'] | None", submission.label or None),
            )
        except (InputChangedError, MismatchError) as error:
            # one submission's mistake; the others, and the proteins alone, are fine
            log.error("nucleotides_rejected", submission=submission.id, reason=str(error))  # noqa: TRY400
            rejected[submission.id] = str(error)
        else:
            artifacts.append(describe_file(merged, MERGED, settings))
    return Outcome(Result(artifacts=artifacts, seconds=time.perf_counter() - started, rejected=rejected))


def merge_rows(ledger: Engine, work: Work, settings: Settings) -> list[NewArtifact]:
    """Join a job's chunk artifacts into one matrix, and export it."""
    folder = stage_folder(work, settings)
    chunks = in_transaction(ledger, artifacts_of, work.job_id, stage=EXTRACT)
    sources = [(locate(chunk, settings), chunk.sha256) for chunk in chunks]
    written = merge_chunks(sources, folder / RESULT_NAME)
    exports = write_export(
        folder / "result.pt", open_matrix(written.path), rows_per_file=settings.export_rows
    )
    return [
        describe_file(written, MATRIX, settings),
        *(describe_file(export, EXPORT, settings) for export in exports),
    ]


def read_submitted(submission: SubmissionRow, settings: Settings) -> Nucleotides:
    """The nucleotides that came with a submission.

    Raises:
        InputChangedError: the file is gone, unreadable, not the one that was submitted, or outside the folders
            that inputs are read from.
    """
    path = Path(submission.nucleotide_path)
    try:
        with open_below(path, settings.input_folders) as file:
            changed = hashlib.file_digest(file, "sha256").hexdigest() != submission.nucleotide_sha256
            if not changed:
                file.seek(0)
                return read_nucleotides(path, file)
    except (ArtifactError, InputError, OSError) as error:
        raise InputChangedError(
            f"the nucleotide embeddings cannot be used: {error}",
            where=str(path),
            todo="Submit a sound file.",
        ) from error
    raise InputChangedError(
        "the nucleotide embeddings were changed after registration",
        where=str(path),
        todo="Submit the file again.",
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
    publications = []
    reporter = Reporter(ledger, work, settings)
    submissions = in_transaction(ledger, submissions_of, work.job_id)
    for submission in submissions:
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
                folder=published_folder(work, submission, settings),
                stem=submission.stem,
                exports=[export.path for export in exports],
                merged=merged_paths.get(file_name(MERGED, submission.id)),
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
    verdict = validate_result(path, sha256=result.sha256, ids=read_ids(ledger, work, settings), failed=failed)
    errors = list(verdict.errors)
    if (verdict.rows, len(failed), verdict.records) != (job.embeddings, job.failed, job.records):
        errors.append(
            f"{verdict.rows} embeddings and {len(failed)} failures of {verdict.records} records, "
            f"where the ledger counts {job.embeddings}, {job.failed} and {job.records}"
        )
    if verdict.passed:
        matrix = open_matrix(path)
        errors += validate_export([as_written(row, settings) for row in made if row.kind == EXPORT], matrix)
        for row in made:
            if row.kind == MERGED:
                errors += validate_merged(as_written(row, settings), matrix)
    log.info("validated", passed=not errors, errors=errors, rows=verdict.rows, failures=len(failed))
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
    taken = {MERGE: EXTRACT, VALIDATE: MERGE}.get(work.stage)
    return (
        find_unsound(in_transaction(ledger, artifacts_of, work.job_id, stage=taken), settings)
        if taken
        else []
    )


def find_unsound(artifacts: Sequence[ArtifactRow], settings: Settings) -> list[int]:
    """Ids of the artifacts whose bytes are gone or are not those that were recorded."""
    unsound = []
    for row in artifacts:
        try:
            sound = hash_file(locate(row, settings)) == row.sha256
        except ArtifactError as error:
            log.warning("artifact_unreadable", reason=str(error))
            sound = False
        if not sound:
            log.warning("artifact_damaged", artifact=row.id, path=row.path)
            unsound.append(row.id)
    return unsound
