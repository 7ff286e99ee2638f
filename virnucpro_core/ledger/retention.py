"""Retention: what finished jobs keep on disk for a while, so that doing one over is cheap, and then no longer."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, text

from virnucpro_core.ledger.transitions import EXTRACT
from virnucpro_core.roots import OUTPUT_ADVICE, resolve_below


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
    """Remove a succeeded job's chunk artifacts: the files, then their rows.

    In this order a crash leaves rows without files, which the next call removes; the job's lock keeps a
    person's Clear from seeing them in between.

    Returns:
        How many were removed; 0 if the job has been reopened meanwhile.

    Raises:
        OutsideError: a recorded path leads out of the output root.
    """
    still = tx.execute(
        text("SELECT 1 FROM jobs WHERE id = :job AND state = 'succeeded' FOR UPDATE"), {"job": job_id}
    ).first()
    if still is None:
        return 0
    paths = list(
        tx.execute(
            text("DELETE FROM artifacts WHERE job_id = :job AND stage = :extract RETURNING path"),
            {"job": job_id, "extract": EXTRACT},
        ).scalars()
    )
    for path in paths:
        resolve_below(output_root / path, [output_root], todo=OUTPUT_ADVICE).unlink(missing_ok=True)
    return len(paths)


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
