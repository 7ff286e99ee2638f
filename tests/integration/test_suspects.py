"""Chunks that their workers do not survive: what is run again, what is halved, what fails."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Connection, text

from tests import ledger_jobs as jobs
from virnucpro_core.errors import StaleLeaseError
from virnucpro_core.ledger import queries, suspects, transitions, workers
from virnucpro_core.ledger.database import open_ledger
from virnucpro_core.ledger.jobs import resume
from virnucpro_core.ledger.outbox import take_due
from virnucpro_core.ledger.work import Claim

pytestmark = [pytest.mark.integration, pytest.mark.faults]


@pytest.fixture
def tx(ledger_url: str) -> Iterator[Connection]:
    engine = open_ledger(ledger_url)
    with engine.connect() as connection:
        connection.begin()
        jobs.add_model(connection)
        yield connection
        connection.rollback()
    engine.dispose()


def die(tx: Connection, chunk: int, *, max_attempts: int = 2) -> str:
    """A worker claims the chunk and is not heard of again; returns the chunk's state."""
    worker = jobs.start_worker(tx)
    jobs.claim(tx, chunk, worker)
    (recovered,) = workers.take_back(tx, worker, "its worker fell silent", max_attempts=max_attempts)
    return recovered.state


def claim_again(tx: Connection, chunk: int) -> Claim:
    return jobs.claim(tx, chunk, jobs.start_worker(tx))


def ranges(tx: Connection, job_id: int) -> list[tuple[int, int]]:
    """First record and count of each extract chunk, in input order."""
    return [(chunk.first_record, chunk.records) for chunk in queries.chunk_ranges(tx, job_id)]


def test_one_death_halves_nothing(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    (chunk,) = jobs.pending_chunks(tx, job_id)
    assert die(tx, chunk) == "pending"
    claimed = claim_again(tx, chunk)
    assert (claimed.attempt, claimed.deaths, claimed.setback) == (2, 1, "its worker fell silent")
    assert claimed.is_suspect
    assert not suspects.must_be_halved(claimed)


def test_halves_take_the_place_of_a_chunk_that_killed_twice(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    chunk = jobs.pending_chunks(tx, job_id)[1]
    for _ in range(2):
        assert die(tx, chunk) == "pending", "max_attempts is for errors in words"
    claimed = claim_again(tx, chunk)
    assert suspects.must_be_halved(claimed)
    suspects.split(tx, claimed, jobs.halves_of(claimed))
    assert ranges(tx, job_id) == [(1, 10), (11, 5), (16, 5), (21, 10)]
    assert [chunk.ordinal for chunk in queries.chunk_ranges(tx, job_id)] == [0, 1, 3, 2]
    job = queries.get_job(tx, job_id)
    assert (job.chunks_total, job.chunks_left) == (4, 4)
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, claimed, jobs.result_of(claimed))
    for half in jobs.pending_chunks(tx, job_id)[-2:]:
        assert die(tx, half) == "pending"
        assert suspects.must_be_halved(claim_again(tx, half)), "a half needs one death more"


def test_artifacts_of_halves_are_in_input_order(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    claimed = claim_again(tx, jobs.pending_chunks(tx, job_id)[0])
    suspects.split(tx, claimed, jobs.halves_of(claimed))
    jobs.run_job(tx, job_id, jobs.start_worker(tx), failures=1)
    artifacts = queries.artifacts_of(tx, job_id, stage="extract")
    assert [artifact.ordinal for artifact in artifacts] == [0, 3, 1, 2]
    job = queries.get_job(tx, job_id)
    assert (job.state, job.embeddings, job.failed) == ("succeeded", 26, 4)


def test_halving_looks_at_no_other_message(tx: Connection) -> None:
    """The job is locked meanwhile, and may have a million chunks that wait."""
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    first, *others = jobs.pending_chunks(tx, job_id)
    claimed = claim_again(tx, first)
    tx.execute(text("DELETE FROM outbox"))
    suspects.split(tx, claimed, jobs.halves_of(claimed))
    assert jobs.outbox_chunks(tx) == [
        chunk for chunk in jobs.pending_chunks(tx, job_id) if chunk not in others
    ]


def test_stale_claim_halves_nothing(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    (chunk,) = jobs.pending_chunks(tx, job_id)
    sleeper = claim_again(tx, chunk)
    workers.take_back(tx, sleeper.worker_id, "its worker fell silent", max_attempts=2)
    claim_again(tx, chunk)
    with pytest.raises(StaleLeaseError):
        suspects.split(tx, sleeper, jobs.halves_of(sleeper))
    assert ranges(tx, job_id) == [(1, 10)]


def test_record_alone_is_condemned_only_after_it_killed_time_and_again(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1, records_each=1)).job_id
    (chunk,) = jobs.pending_chunks(tx, job_id)
    for deaths in range(suspects.DEATHS_TO_CONDEMN):
        claimed = claim_again(tx, chunk)
        assert claimed.deaths == deaths
        assert not suspects.must_be_condemned(claimed)
        assert not suspects.must_be_halved(claimed)
        workers.take_back(tx, claimed.worker_id, "its worker fell silent", max_attempts=2)
    assert suspects.must_be_condemned(claim_again(tx, chunk))


def test_chunk_that_kills_even_those_who_condemn_it_fails(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1, records_each=1)).job_id
    (chunk,) = jobs.pending_chunks(tx, job_id)
    states = [die(tx, chunk) for _ in range(suspects.HOPELESS_DEATHS)]
    assert states == ["pending"] * (suspects.HOPELESS_DEATHS - 1) + ["failed"]
    assert "8 workers died of it" in queries.get_job(tx, job_id).error
    resume(tx, job_id)
    assert claim_again(tx, chunk).deaths == 0


def test_workers_that_survive_nothing_fail_the_job(tx: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken driver kills with every chunk: halving all of them would never end."""
    monkeypatch.setattr(suspects, "MOST_SUSPECTS", 3)
    job_id = jobs.register(tx, jobs.scan(chunks=6)).job_id
    first, *others = jobs.pending_chunks(tx, job_id)
    die(tx, first)
    claimed = claim_again(tx, first)
    transitions.complete(tx, claimed, jobs.result_of(claimed))  # no suspect any more
    assert [die(tx, chunk) for chunk in others[:4]] == ["pending"] * 3 + ["failed"]
    assert "look at the workers" in queries.get_job(tx, job_id).error
    resume(tx, job_id)
    assert suspects.count_suspects(tx, job_id) == 0
    jobs.run_job(tx, job_id, jobs.start_worker(tx))
    assert queries.get_job(tx, job_id).state == "succeeded"


def test_stage_that_covers_the_whole_input_fails_when_no_attempt_is_left(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    claimed = claim_again(tx, jobs.pending_chunks(tx, job_id)[0])
    transitions.complete(tx, claimed, jobs.result_of(claimed))
    (merge,) = jobs.pending_chunks(tx, job_id)
    assert [die(tx, merge, max_attempts=2) for _ in range(2)] == ["pending", "failed"]
    assert "no attempt is left" in queries.get_job(tx, job_id).error


def test_error_that_ends_the_process_counts_as_its_death(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    (chunk,) = jobs.pending_chunks(tx, job_id)
    for _ in range(2):
        claimed = claim_again(tx, chunk)
        suspects.break_down(tx, claimed, "CUDA error: an illegal memory access", max_attempts=2)
        with pytest.raises(StaleLeaseError):
            suspects.break_down(tx, claimed, "CUDA error: an illegal memory access", max_attempts=2)
    claimed = claim_again(tx, chunk)
    assert suspects.must_be_halved(claimed)
    assert claimed.setback == "CUDA error: an illegal memory access"


def test_deaths_leave_the_attempts_for_errors_in_words_alone(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1, records_each=1)).job_id
    (chunk,) = jobs.pending_chunks(tx, job_id)
    for _ in range(3):
        die(tx, chunk)
    states = [transitions.fail(tx, claim_again(tx, chunk), "no space left", max_attempts=2) for _ in range(2)]
    assert states == ["pending", "failed"]


def test_chunk_taken_back_goes_before_what_has_never_run(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=100)).job_id
    first, *_ = jobs.pending_chunks(tx, job_id)
    die(tx, first)
    assert [message.chunk_id for message in take_due(tx, "extract", 1)] == [first]


def tiles(chunks: list[Any]) -> bool:
    """Whether ranges follow each other without a gap."""
    return all(
        (one.byte_end, one.first_record + one.records) == (next_one.byte_start, next_one.first_record)
        for one, next_one in pairwise(chunks)
    )


def test_halving_down_to_single_records_loses_none(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=2, records_each=7)).job_id
    while wide := [row for row in pending_rows(tx, job_id) if row.records > 1]:
        claimed = claim_again(tx, wide[0].id)
        suspects.split(tx, claimed, jobs.halves_of(claimed))
    chunks = queries.chunk_ranges(tx, job_id)
    assert [chunk.first_record for chunk in chunks] == list(range(1, 15))
    assert tiles(chunks)
    assert sorted(chunk.ordinal for chunk in chunks) == list(range(14))


def pending_rows(tx: Connection, job_id: int) -> list[Any]:
    return list(
        tx.execute(
            text("SELECT id, records FROM chunks WHERE job_id = :job AND state = 'pending' ORDER BY id"),
            {"job": job_id},
        )
    )
