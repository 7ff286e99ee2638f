"""What a finished chunk leaves in the ledger: failures, artifacts, publications."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, delete, select, text

from virnucpro_core.failures import Failure
from virnucpro_core.ledger import tables
from virnucpro_core.ledger.work import NewArtifact, Work


def replace_failures(tx: Connection, work: Work, failures: Sequence[Failure]) -> None:
    """Record the failures of a chunk, in place of those that an earlier run of it recorded."""
    tx.execute(
        text("""DELETE FROM failures WHERE job_id = :job AND generation = :generation
                   AND record BETWEEN :first AND :last"""),
        {
            "job": work.job_id,
            "generation": work.generation,
            "first": work.range.first_record,
            # Not added up in SQL: psycopg sends small numbers as smallint, and their sum may not fit one.
            "last": work.range.first_record + work.range.records - 1,
        },
    )
    if failures:
        tx.execute(
            text("""INSERT INTO failures (job_id, generation, record, record_id, reason, detail)
                    VALUES (:job, :generation, :record, :id, :reason, :detail)"""),
            [
                {
                    "job": work.job_id,
                    "generation": work.generation,
                    "record": failure.record,
                    "id": failure.id,
                    "reason": str(failure.reason),
                    "detail": failure.detail,
                }
                for failure in failures
            ],
        )


def replace_artifacts(
    tx: Connection, work: Work, artifacts: Sequence[NewArtifact], execution: dict[str, Any] | None
) -> None:
    """Record the files of a chunk, in place of those that an earlier run of it recorded."""
    place = {
        "job": work.job_id,
        "generation": work.generation,
        "stage": work.stage,
        "ordinal": work.range.ordinal,
    }
    tx.execute(
        text("""DELETE FROM artifacts WHERE job_id = :job AND generation = :generation
                   AND stage = :stage AND ordinal = :ordinal"""),
        place,
    )
    if artifacts:
        tx.execute(
            text("""
                INSERT INTO artifacts (job_id, generation, stage, ordinal, kind, path, sha256, bytes, rows,
                                       execution)
                VALUES (:job, :generation, :stage, :ordinal, :kind, :path, :sha256, :bytes, :rows,
                        CAST(:execution AS jsonb))
            """),
            [
                {
                    **place,
                    "kind": artifact.kind,
                    "path": artifact.path,
                    "sha256": artifact.sha256,
                    "bytes": artifact.bytes,
                    "rows": artifact.rows,
                    "execution": None if execution is None else json.dumps(execution),
                }
                for artifact in artifacts
            ],
        )


def note_unmerged(tx: Connection, job_id: int, unmerged: Mapping[int, str]) -> None:
    """Record which submissions' nucleotides could not be merged, and why; all others of the job are fine."""
    tx.execute(text("UPDATE submissions SET error = NULL WHERE job_id = :job"), {"job": job_id})
    for submission, error in unmerged.items():
        tx.execute(
            text("UPDATE submissions SET error = :error WHERE id = :id AND job_id = :job"),
            {"id": submission, "job": job_id, "error": error},
        )


def mark_published(tx: Connection, submissions: Sequence[int], generation: int) -> None:
    """Note that submissions have a published result of this generation."""
    if submissions:
        tx.execute(
            text("""UPDATE submissions SET published_generation = :generation, published_at = now()
                     WHERE id = ANY(:ids)"""),
            {"generation": generation, "ids": list(submissions)},
        )


def forget_older_generations(tx: Connection, job_id: int) -> None:
    """Delete what generations before the one that succeeded left in the ledger; their files go by a sweep."""
    for table in (tables.Artifact, tables.FailureRow, tables.Setback):
        older = select(tables.Job.generation).where(tables.Job.id == job_id).scalar_subquery()
        tx.execute(delete(table).where(table.job_id == job_id, table.generation < older))
