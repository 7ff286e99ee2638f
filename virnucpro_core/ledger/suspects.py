"""Suspects: chunks that their worker did not survive.

A process can die of anything: a deploy, the kernel short of memory, another chunk that it held. So a death
proves nothing; a suspect is run again, and alone. What dies again is halved, and its halves after one death
more, until the record that kills is alone in its chunk. That record becomes a failure; all others are embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, text

from virnucpro_core.ledger.jobs import insert_chunks
from virnucpro_core.ledger.outbox import enqueue
from virnucpro_core.ledger.setbacks import SetbackKind, note_setbacks
from virnucpro_core.ledger.transitions import EXTRACT, fail_job, lock_job, stale
from virnucpro_core.ledger.work import Claim
from virnucpro_core.sequences.chunks import ChunkRange

DEATHS_TO_HALVE = 2
DEATHS_TO_CONDEMN = 4  # of a record alone in its chunk
HOPELESS_DEATHS = 8  # of a chunk that kills even those who only halve or condemn it
MOST_SUSPECTS = 64
"""Suspects of a job at one time: more are not a record's fault but the workers' (a driver, a broken build), and
halving every chunk would not end it. A record that kills makes three suspects at most; the rest are for workers that
are all killed at once."""


def must_be_halved(claim: Claim) -> bool:
    return claim.deaths >= DEATHS_TO_HALVE and claim.work.range.records > 1


def must_be_condemned(claim: Claim) -> bool:
    return claim.deaths >= DEATHS_TO_CONDEMN and claim.work.range.records == 1


def break_down(tx: Connection, claim: Claim, error: str, *, max_attempts: int) -> str:
    """End an attempt with an error that the process does not survive; a death that had time to say why.

    Returns:
        The chunk's state afterwards.

    Raises:
        StaleLeaseError: if the lease has passed to somebody else.
    """
    lock_job(tx, claim.work.job_id)
    chunk = tx.execute(
        text("SELECT * FROM chunks WHERE id = :chunk AND lease_token = :token FOR UPDATE"),
        {"chunk": claim.work.chunk_id, "token": claim.token},
    ).one_or_none()
    if chunk is None:
        raise stale(claim)
    return note_death(tx, chunk, error, max_attempts=max_attempts)


def note_death(tx: Connection, chunk: Row[Any], reason: str, *, max_attempts: int) -> str:
    """Free a running chunk whose worker is dead; its job, that the caller has locked, fails if nothing else helps.

    Args:
        chunk: the chunk's row; it names the lease that ended.
        max_attempts: claims of a chunk that covers the whole input, which cannot be halved.

    Returns:
        The chunk's state afterwards.
    """
    hopeless = ""
    if chunk.stage != EXTRACT:
        if chunk.attempts >= max_attempts:
            hopeless = "no attempt is left"
    elif chunk.deaths + 1 >= HOPELESS_DEATHS:
        hopeless = f"{HOPELESS_DEATHS} workers died of it"
    elif count_suspects(tx, chunk.job_id) >= MOST_SUSPECTS:
        hopeless = f"{MOST_SUSPECTS} other chunks wait that were the last of a worker: look at the workers"
    state = "failed" if hopeless else "pending"
    note_setbacks(tx, [chunk.id], SetbackKind.DIED, reason, token=chunk.lease_token)
    tx.execute(
        text("""
            UPDATE chunks
               SET state = :state, deaths = deaths + 1, lease_token = NULL, error = :reason,
                   finished_at = CASE WHEN :state = 'failed' THEN now() END
             WHERE id = :chunk AND lease_token = :token
        """),
        {"chunk": chunk.id, "token": chunk.lease_token, "state": state, "reason": reason},
    )
    if hopeless:
        fail_job(tx, chunk.job_id, f"{chunk.stage} chunk {chunk.ordinal + 1}: {reason}; {hopeless}")
    else:
        enqueue(tx, chunk.id)
    return state


def count_suspects(tx: Connection, job_id: int) -> int:
    """Chunks of a job that killed a worker and are not done."""
    count: int = tx.execute(
        text(
            "SELECT count(*) FROM chunks WHERE job_id = :job AND deaths > 0 AND state IN ('pending', 'running')"
        ),
        {"job": job_id},
    ).scalar_one()
    return count


def split(tx: Connection, claim: Claim, halves: Sequence[ChunkRange]) -> None:
    """Put two chunks in the place of a claimed one, each suspected as it was.

    They are new rows: what anybody knows of the old one, by its id, is void.

    Raises:
        StaleLeaseError: if the lease has passed to somebody else; nothing is changed.
    """
    job = lock_job(tx, claim.work.job_id)
    why = f"{claim.deaths} workers died of it: its halves are computed in its place"
    note_setbacks(tx, [claim.work.chunk_id], SetbackKind.HALVED, why, token=claim.token)
    gone = tx.execute(
        text("DELETE FROM chunks WHERE id = :chunk AND lease_token = :token"),
        {"chunk": claim.work.chunk_id, "token": claim.token},
    )
    if gone.rowcount == 0:
        raise stale(claim)
    first, second = halves
    new = [first, replace(second, ordinal=job.chunks_total)]
    insert_chunks(tx, job.id, new, deaths=DEATHS_TO_HALVE - 1)
    halved = tx.execute(
        text("SELECT id FROM chunks WHERE job_id = :job AND stage = :stage AND ordinal = ANY(:ordinals)"),
        {"job": job.id, "stage": EXTRACT, "ordinals": [half.ordinal for half in new]},
    )
    for chunk_id in halved.scalars().all():
        enqueue(tx, chunk_id)
    tx.execute(
        text(
            "UPDATE jobs SET chunks_total = chunks_total + 1, chunks_left = chunks_left + 1 WHERE id = :job"
        ),
        {"job": job.id},
    )
