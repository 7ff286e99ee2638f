"""Registration: models, inputs, submissions and jobs enter the ledger, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from virnucpro_core.errors import WeightsError
from virnucpro_core.ledger.jobs import begin_generation, enter_chunks, resume, serve_late_submission
from virnucpro_core.ledger.transitions import EXTRACT, lock_job
from virnucpro_core.ledger.work import Registered, Submission
from virnucpro_core.recipe import Dtype, Recipe, ResiduePolicy
from virnucpro_core.sequences.scan import ScannedInput


def add_model(
    tx: Connection,
    *,
    name: str,
    path: str,
    weights_sha256: str,
    layers: int,
    token_dropout: bool,
    demonstration: bool,
    config: dict[str, Any],
) -> None:
    """Register weights under a name. A name stands for the same weights for ever.

    Raises:
        WeightsError: if the name stands for other weights already.
    """
    known = tx.execute(
        text("""
            INSERT INTO models (name, path, weights_sha256, layers, token_dropout, demonstration, config)
            VALUES (:name, :path, :sha256, :layers, :token_dropout, :demonstration, CAST(:config AS jsonb))
            ON CONFLICT (name) DO UPDATE SET path = excluded.path
            RETURNING weights_sha256, token_dropout
        """),
        {
            "name": name,
            "path": path,
            "sha256": weights_sha256,
            "layers": layers,
            "token_dropout": token_dropout,
            "demonstration": demonstration,
            "config": json.dumps(config),
        },
    ).one()
    if (known.weights_sha256, known.token_dropout) != (weights_sha256, token_dropout):
        raise WeightsError(
            f"the name {name!r} stands for other weights ({known.weights_sha256[:12]}…)",
            where=path,
            todo="Register these weights under another name.",
        )


def keep_selftest(tx: Connection, weights_sha256: str, verdict: dict[str, Any]) -> int:
    """Keep a selftest's verdict with every model of these weights; returns how many there are."""
    return tx.execute(
        text("UPDATE models SET selftest = CAST(:verdict AS jsonb) WHERE weights_sha256 = :sha256"),
        {"verdict": json.dumps(verdict), "sha256": weights_sha256},
    ).rowcount


def recipe_for(tx: Connection, model: str, *, dtype: Dtype, residues: ResiduePolicy) -> Recipe:
    """The recipe that a registered model and two choices make. Needs no torch and no weights.

    Raises:
        WeightsError: if no model has that name.
    """
    row = tx.execute(text("SELECT * FROM models WHERE name = :name"), {"name": model}).one_or_none()
    if row is None:
        raise WeightsError(
            f"no model is registered as {model!r}",
            where="models",
            todo="Register its weights with `virnucpro weights add NAME FOLDER`.",
        )
    return Recipe(
        weights_sha256=row.weights_sha256,
        token_dropout=row.token_dropout,
        dtype=dtype,
        residues=residues,
        demonstration=row.demonstration,
    )


def register(
    tx: Connection,
    *,
    scanned: ScannedInput,
    model: str,
    recipe: Recipe,
    submission: Submission,
    force: bool = False,
    forced_by: str | None = None,
) -> Registered:
    """Enter an input, its job and a submission for it. Doing it twice changes nothing.

    A job that failed or was cancelled goes on with what is missing. `force` begins a new generation:
    everything is computed again, and the published result stays until the new one replaces it.

    Args:
        forced_by: who forces, if that must count once only (a DAG run, whose tasks may be retried).
    """
    if not scanned.chunks:
        raise ValueError("a scanned input has at least one chunk")
    enter_input(tx, scanned)
    job_id = tx.execute(
        # A conflict uses up a job's number: people would look for the jobs between, so it is the exception.
        text("""
            INSERT INTO jobs (input_sha256, recipe_sha256, recipe, model, stage, chunks_total, chunks_left, records,
                              forced_by)
            SELECT :input, :recipe_sha256, CAST(:recipe AS jsonb), :model, :stage, :chunks, :chunks, :records,
                   :forced_by
             WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE input_sha256 = :input AND recipe_sha256 = :recipe_sha256)
            ON CONFLICT (input_sha256, recipe_sha256) DO NOTHING
            RETURNING id
        """),
        {
            "input": scanned.sha256,
            "recipe_sha256": recipe.sha256,
            "recipe": json.dumps(recipe.to_json()),
            "model": model,
            "stage": EXTRACT,
            "chunks": len(scanned.chunks),
            "records": scanned.records,
            "forced_by": forced_by if force else None,
        },
    ).scalar_one_or_none()
    created = job_id is not None
    if job_id is None:
        job_id = tx.execute(
            # the same weights under another name, which may be the one that is still there
            text("""
                UPDATE jobs SET model = :model WHERE input_sha256 = :input AND recipe_sha256 = :recipe
                RETURNING id
            """),
            {"input": scanned.sha256, "recipe": recipe.sha256, "model": model},
        ).scalar_one()
    job = lock_job(tx, job_id)
    is_news = enter_submission(tx, job_id, submission)
    if created:
        enter_chunks(tx, job_id, scanned.chunks)
    elif force and (forced_by is None or job.forced_by != forced_by):
        begin_generation(tx, job_id, scanned.chunks, forced_by=forced_by)
    else:
        if job.state in ("failed", "cancelled"):
            resume(tx, job_id)
        if is_news:
            serve_late_submission(tx, job_id)
    return Registered(job_id=job_id, generation=lock_job(tx, job_id).generation, created=created)


def enter_input(tx: Connection, scanned: ScannedInput) -> None:
    """Enter an input, or where it lies now: a job that runs goes on reading where it began, if it still can."""
    known = tx.execute(
        text("""
            SELECT location FROM inputs
             WHERE sha256 = :sha256
               AND EXISTS (SELECT 1 FROM jobs WHERE input_sha256 = :sha256 AND state = 'running')
        """),
        {"sha256": scanned.sha256},
    ).scalar_one_or_none()
    if known is not None and Path(known).is_file():
        return
    tx.execute(
        text("""
            INSERT INTO inputs (sha256, size, compression, location, records, residues)
            VALUES (:sha256, :size, :compression, :location, :records, :residues)
            ON CONFLICT (sha256) DO UPDATE SET location = excluded.location
        """),
        {
            "sha256": scanned.sha256,
            "size": scanned.size,
            "compression": str(scanned.compression),
            "location": scanned.location,
            "records": scanned.records,
            "residues": scanned.residues,
        },
    )


def enter_submission(tx: Connection, job_id: int, submission: Submission) -> bool:
    """Returns whether the submission asks for something that it has not been given or promised yet."""
    row = {
        "job": job_id,
        "path": submission.path,
        "stem": submission.stem,
        "label": submission.label,
        "nucleotide_path": submission.nucleotide_path,
        "nucleotide_sha256": submission.nucleotide_sha256,
        "requested_by": submission.requested_by,
        "share": submission.max_failed_share,
    }
    known = tx.execute(
        text("""
            SELECT nucleotide_sha256, error FROM submissions
             WHERE job_id = :job AND path = :path AND label = :label AND nucleotide_path = :nucleotide_path
        """),
        row,
    ).one_or_none()
    # Nucleotides that were not merged may have been away, or not readable, when they were to be merged.
    is_unmerged = known is not None and submission.nucleotide_path and known.error is not None
    if known is not None and known.nucleotide_sha256 == submission.nucleotide_sha256 and not is_unmerged:
        tx.execute(
            text("""
                UPDATE submissions SET requested_by = :requested_by, max_failed_share = :share, submitted_at = now()
                 WHERE job_id = :job AND path = :path AND label = :label AND nucleotide_path = :nucleotide_path
            """),
            row,
        )
        return False
    tx.execute(
        text("""
            INSERT INTO submissions (job_id, path, stem, label, nucleotide_path, nucleotide_sha256, requested_by,
                                     max_failed_share)
            VALUES (:job, :path, :stem, :label, :nucleotide_path, :nucleotide_sha256, :requested_by, :share)
            ON CONFLICT (job_id, path, label, nucleotide_path) DO UPDATE
               SET nucleotide_sha256 = excluded.nucleotide_sha256, requested_by = excluded.requested_by,
                   max_failed_share = excluded.max_failed_share, submitted_at = now(), error = NULL,
                   published_at = NULL, published_generation = NULL
        """),
        row,
    )
    return True
