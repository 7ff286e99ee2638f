"""Runs that wait for a job. A job outlives its waiters unless the setting says otherwise."""

from __future__ import annotations

from sqlalchemy import Connection, text

from virnucpro_core.ledger.jobs import cancel
from virnucpro_core.ledger.transitions import lock_job


def add_waiter(tx: Connection, job_id: int, wait: str, attempt: int) -> None:
    """Enter a run, and strike off the attempts before this one.

    They are over, but may never have said so: Airflow tells a wait that it was killed only if that had begun to run
    in the triggerer.

    Args:
        wait: names a task instance.
        attempt: which attempt of it waits now; each has a row of its own, so that an old one strikes off itself alone.
    """
    token = name_waiter(wait, attempt)
    tx.execute(
        text("DELETE FROM waiters WHERE job_id = :job AND starts_with(token, :wait) AND token <> :token"),
        {"job": job_id, "wait": name_waiter(wait, ""), "token": token},
    )
    tx.execute(
        text("INSERT INTO waiters (job_id, token) VALUES (:job, :token) ON CONFLICT DO NOTHING"),
        {"job": job_id, "token": token},
    )


def name_waiter(wait: str, attempt: int | str) -> str:
    """The token of one attempt of one wait."""
    return f"{wait}, try {attempt}"


def list_waiters(tx: Connection, job_id: int) -> list[str]:
    """The tokens of those who wait for a job, whoever has waited longest first."""
    rows = tx.execute(
        text("SELECT token FROM waiters WHERE job_id = :job ORDER BY since, token"), {"job": job_id}
    )
    return list(rows.scalars())


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
