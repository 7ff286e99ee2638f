"""Runs that wait for a job. A job outlives its waiters unless the setting says otherwise."""

from __future__ import annotations

from sqlalchemy import Connection, text

from virnucpro_core.ledger.jobs import cancel
from virnucpro_core.ledger.transitions import lock_job


def add_waiter(tx: Connection, job_id: int, token: str) -> None:
    """Enter a run; `token` names its task instance and attempt, so that a later attempt has a row of its own."""
    tx.execute(
        text("INSERT INTO waiters (job_id, token) VALUES (:job, :token) ON CONFLICT DO NOTHING"),
        {"job": job_id, "token": token},
    )


def remove_waiter(tx: Connection, job_id: int, token: str, *, cancel_unwatched: bool = False) -> bool:
    """Strike off a run.

    Args:
        cancel_unwatched: cancel a running job if this was its last waiter.

    Returns:
        Whether the job was cancelled.
    """
    job = lock_job(tx, job_id)
    removed = tx.execute(
        text("DELETE FROM waiters WHERE job_id = :job AND token = :token"), {"job": job_id, "token": token}
    ).rowcount
    watched = tx.execute(text("SELECT 1 FROM waiters WHERE job_id = :job LIMIT 1"), {"job": job_id}).first()
    if not (cancel_unwatched and removed and watched is None and job.state == "running"):
        return False
    cancel(tx, job_id, by=f"its last waiter, {token}")
    return True
