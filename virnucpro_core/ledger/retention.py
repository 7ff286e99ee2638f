"""Retention: what finished jobs keep on disk for a while, so that doing one over is cheap, and then no longer."""

from __future__ import annotations

import secrets
from pathlib import Path

from sqlalchemy import Connection, text

from virnucpro_core.ledger.transitions import EXTRACT
from virnucpro_core.ledger.work import JOBS, artifact_folder
from virnucpro_core.roots import OUTPUT_ADVICE, resolve_below

REMOVED = "removed"


def expired_jobs(tx: Connection, *, keep_days: float) -> list[int]:
    """Jobs that succeeded more than `keep_days` ago and still have their chunk artifacts."""
    return list(
        tx.execute(
            text("""
                SELECT DISTINCT j.id FROM jobs j JOIN artifacts a ON a.job_id = j.id AND a.stage = :extract
                 WHERE j.state = 'succeeded' AND j.finished_at < now() - make_interval(secs => :keep)
            """),
            {"extract": EXTRACT, "keep": keep_days * 86_400},
        ).scalars()
    )


def remove_chunks(tx: Connection, job_id: int, output_root: Path) -> int:
    """Remove a succeeded job's chunk artifacts: their rows, and their folders go to `removed_folder`.

    Renaming takes no time, so nobody gets the job's lock while some files are there and others are not; they are
    deleted from there without the lock. Whoever dies between renaming and committing leaves rows without any
    file: the next call removes them, and `resume` until then computes nothing for them.

    Returns:
        How many were removed; 0 if the job has been reopened meanwhile.

    Raises:
        OutsideError: a folder leads out of the output root.
    """
    still = tx.execute(
        text("SELECT 1 FROM jobs WHERE id = :job AND state = 'succeeded' FOR UPDATE"), {"job": job_id}
    ).first()
    if still is None:
        return 0
    generations = list(
        tx.execute(
            text("DELETE FROM artifacts WHERE job_id = :job AND stage = :extract RETURNING generation"),
            {"job": job_id, "extract": EXTRACT},
        ).scalars()
    )
    removed = removed_folder(output_root)
    for generation in set(generations):
        folder = output_root / artifact_folder(job_id, generation, EXTRACT)
        if resolve_below(folder, [output_root], todo=OUTPUT_ADVICE).is_dir():
            removed.mkdir(exist_ok=True)
            folder.rename(removed / f"{job_id:08d}-g{generation}-{secrets.token_hex(8)}")
    return len(generations)


def removed_folder(output_root: Path) -> Path:
    """Where folders are that wait to be deleted.

    Raises:
        OutsideError: it leads out of the output root.
    """
    return resolve_below(output_root / JOBS / REMOVED, [output_root], todo=OUTPUT_ADVICE)


def needed_spools(tx: Connection, *, keep_days: float) -> set[str]:
    """The sha256 of each input whose spooled copy must stay: a job runs on it, or ended less than `keep_days` ago."""
    return set(
        tx.execute(
            text("""
                SELECT DISTINCT input_sha256 FROM jobs
                 WHERE finished_at IS NULL OR finished_at > now() - make_interval(secs => :keep)
            """),
            {"keep": keep_days * 86_400},
        ).scalars()
    )
