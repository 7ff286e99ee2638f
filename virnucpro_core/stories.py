"""Stories: what became of one record, told from the ledger and from the files that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, Row, text

from virnucpro_core.errors import ArtifactError, InputError
from virnucpro_core.failures import Failure, FailureReason
from virnucpro_core.features.matrices import Matrix
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import (
    ArtifactRow,
    SubmissionRow,
    artifacts_of,
    get_job,
    submissions_of,
)
from virnucpro_core.ledger.setbacks import Attempt, attempts_on
from virnucpro_core.ledger.transitions import EXTRACT, MERGE
from virnucpro_core.ledger.work import EXPORT, MERGED, SUFFIXES, export_name, file_name
from virnucpro_core.records import find_result, read_records
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.sequences.residues import UNK
from virnucpro_core.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordInInput:
    """A good record as its input has it.

    Attributes:
        residues: before truncation.
        computed: residues that are left of them.
        unknown: how many of those left are letters outside the vocabulary.
    """

    id: str
    residues: int
    computed: int
    unknown: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an embedding was published: the file, below the output root, and the row in it, counted from 0."""

    path: str
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkToday:
    """The chunk that holds a record today; `number` of how many `chunks` counts from 1.

    Attributes:
        setback: why it waits, or how its newest attempt failed.
    """

    id: int
    number: int
    chunks: int
    first_record: int
    records: int
    state: str
    setback: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordStory:
    """All that is known of one record of a job, in its current generation.

    Attributes:
        record: its number in the input, counted from 1.
        id: None if neither the input nor the result can tell it.
        outcome: `embedded`, `failed`, `waiting`, or `stopped` if its job is not running and it was not reached.
        failure: why it has no embedding.
        row: its place in the whole result, counted from 0; `places` are the published files with it.
        in_input: None if the record is bad, or the input cannot be read any more.
        attempts: on the chunks that held it, oldest first.
        recipe: what was asked; `execution` is how it was run, None before the first claim.
        untold: what cannot be told, and why.
    """

    job: int
    stem: str
    job_state: str
    generation: int
    record: int
    id: str | None
    outcome: str
    failure: Failure | None
    row: int | None
    places: tuple[Place, ...]
    in_input: RecordInInput | None
    chunk: ChunkToday
    attempts: tuple[Attempt, ...]
    model: str
    recipe: dict[str, Any]
    execution: dict[str, Any] | None
    untold: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What the ledger says of a record, of one moment.

    Attributes:
        chunk: see `find_chunk`.
        failures_before: how many records before it failed.
        merged: the artifacts of the job's merge.
    """

    job: Row[Any]
    chunk: Row[Any]
    failure: Failure | None
    failures_before: int
    attempts: tuple[Attempt, ...]
    merged: Sequence[ArtifactRow]
    submissions: Sequence[SubmissionRow]


def tell_story(ledger: Engine, settings: Settings, job_id: int, record: int) -> RecordStory:
    """What became of a record, by its number.

    Raises:
        JobError: there is no such job.
    """
    # Files are read outside of the transaction, which must not wait for slow ones.
    account = in_transaction(ledger, read_account, job_id, record)
    job, chunk, failure = account.job, account.chunk, account.failure
    untold = []
    name, in_input = None, None
    try:
        name, in_input = look_up(settings, job, chunk, record)
    except InputError as error:
        untold.append(f"what the input says of it: {error}")
    outcome = tell_outcome(account)
    row = None
    if outcome == "embedded" and job.stage == EXTRACT and job.chunks_left:
        untold.append("its row in the result: there is none before all chunks are done")
    elif outcome == "embedded":
        row = record - 1 - account.failures_before
        try:
            name = read_id(find_result(settings, account.merged), row, record) or name
        except (ArtifactError, InputError) as error:
            untold.append(f"what the result says of it: {error}")
        untold += [
            f"its row in {submission.stem}{SUFFIXES[MERGED]}: {submission.error}"
            for submission in account.submissions
            if submission.error
        ]
    return RecordStory(
        job=job.id,
        stem=job.stem,
        job_state=job.state,
        generation=job.generation,
        record=record,
        id=failure.id if failure else name,
        outcome=outcome,
        failure=failure,
        row=row,
        places=() if row is None else tuple(find_places(account, row)),
        in_input=in_input,
        chunk=ChunkToday(
            id=chunk.id,
            number=chunk.ordinal + 1,
            chunks=chunk.chunks,
            first_record=chunk.first_record,
            records=chunk.records,
            state=chunk.state,
            setback=chunk.error,
        ),
        attempts=account.attempts,
        model=job.model,
        recipe=job.recipe,
        execution=job.execution,
        untold=tuple(untold),
    )


def tell_outcome(account: Account) -> str:
    if account.failure is not None:
        return "failed"
    if account.chunk.state == "done":
        return "embedded"
    # A worker that is still at it may finish it.
    return "waiting" if "running" in (account.job.state, account.chunk.state) else "stopped"


def read_account(tx: Connection, job_id: int, record: int) -> Account:
    job = get_job(tx, job_id)
    return Account(
        job=job,
        chunk=find_chunk(tx, job_id, record),
        failure=find_failure(tx, job, record),
        failures_before=count_failures_before(tx, job, record),
        attempts=tuple(attempts_on(tx, job_id, EXTRACT, record)),
        merged=artifacts_of(tx, job_id, stage=MERGE),
        submissions=submissions_of(tx, job_id),
    )


def find_chunk(tx: Connection, job_id: int, record: int) -> Row[Any]:
    """All columns of the extract chunk that holds a record, and how many `chunks` the job has of that stage."""
    return tx.execute(
        text("""
            SELECT c.*, (SELECT count(*) FROM chunks o WHERE o.job_id = :job AND o.stage = :stage) AS chunks
              FROM chunks c
             WHERE c.job_id = :job AND c.stage = :stage
               AND :record BETWEEN c.first_record AND c.first_record + c.records - 1
        """),
        {"job": job_id, "stage": EXTRACT, "record": record},
    ).one()


def find_failure(tx: Connection, job: Row[Any], record: int) -> Failure | None:
    row = tx.execute(
        text("""
            SELECT record, record_id, reason, detail FROM failures
             WHERE job_id = :job AND generation = :generation AND record = :record
        """),
        {"job": job.id, "generation": job.generation, "record": record},
    ).one_or_none()
    if row is None:
        return None
    return Failure(row.record, row.record_id, FailureReason(row.reason), row.detail)


def count_failures_before(tx: Connection, job: Row[Any], record: int) -> int:
    count: int = tx.execute(
        text(
            "SELECT count(*) FROM failures WHERE job_id = :job AND generation = :generation AND record < :record"
        ),
        {"job": job.id, "generation": job.generation, "record": record},
    ).scalar_one()
    return count


def look_up(
    settings: Settings, job: Row[Any], chunk: Row[Any], record: int
) -> tuple[str, RecordInInput | None]:
    """A record's id and, if it is a good one, what else the input says of it."""
    fields = ChunkRange.__dataclass_fields__
    batch = read_records(settings, job, ChunkRange(**{name: getattr(chunk, name) for name in fields}))
    place = record - chunk.first_record
    name = batch.ids[place]
    [good] = np.nonzero(batch.rows == place)
    if not len(good):
        return name, None
    start, stop = batch.offsets[good[0]], batch.offsets[good[0] + 1]
    tokens = batch.tokens[start:stop][: job.recipe["truncation"]]
    return name, RecordInInput(
        id=name,
        residues=int(stop - start),
        computed=len(tokens),
        unknown=int(np.count_nonzero(tokens == UNK)),
    )


def read_id(result: Matrix | None, row: int, record: int) -> str | None:
    """The id of a row of a result, if there is one.

    Raises:
        ArtifactError: the row holds another record.
    """
    if result is None:
        return None
    if row >= len(result) or result.records[row] != record:
        found = f"record {result.records[row]}" if row < len(result) else "nothing"
        raise ArtifactError(
            f"row {row} holds {found} where the ledger has record {record}",
            where=str(result.path),
            todo="Run `virnucpro verify` on the job.",
        )
    return result.ids(row, row + 1)[0]


def find_places(account: Account, row: int) -> Iterator[Place]:
    """The published files that hold a row of a job's result."""
    job = account.job
    made = {Path(artifact.path).name for artifact in account.merged}
    for submission in account.submissions:
        if submission.published_generation != job.generation:
            continue
        folder = submission.folder(job.input_sha256, job.recipe_sha256)
        within = row
        for export in (one for one in account.merged if one.kind == EXPORT):
            if within < export.rows:
                name = export_name(submission.stem, Path(export.path).name)
                yield Place(path=f"{folder}/{name}", row=within)
                break
            within -= export.rows
        if file_name(MERGED, submission.id) in made:
            yield Place(path=f"{folder}/{submission.stem}{SUFFIXES[MERGED]}", row=row)
