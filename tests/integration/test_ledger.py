"""The ledger's transitions on a real PostgreSQL: what is promised holds, what must not be is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError

from tests import ledger_jobs as jobs
from virnucpro_core.errors import StaleLeaseError, WeightsError
from virnucpro_core.ledger import queries, registration, transitions, waiters, workers
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.ledger.outbox import send_again, take_due
from virnucpro_core.ledger.transitions import Declined

pytestmark = pytest.mark.integration


def test_registering_twice_makes_one_job_and_one_submission(tx: Connection) -> None:
    first = jobs.register(tx, jobs.scan())
    second = jobs.register(tx, jobs.scan())
    assert first.created
    assert not second.created
    assert first.job_id == second.job_id
    assert len(queries.submissions_of(tx, first.job_id)) == 1
    assert jobs.outbox_chunks(tx) == jobs.pending_chunks(tx, first.job_id)


def test_the_numbers_of_jobs_have_no_gaps(tx: Connection) -> None:
    """A nightly run submits what it has submitted before; people look for the jobs between two numbers."""
    first = jobs.register(tx, jobs.scan())
    jobs.register(tx, jobs.scan())
    second = jobs.register(tx, jobs.scan(content="b"))
    assert second.job_id == first.job_id + 1


def test_another_recipe_is_another_job(tx: Connection) -> None:
    first = jobs.register(tx, jobs.scan())
    strict = replace(jobs.RECIPE, residues="strict")
    second = registration.register(
        tx, scanned=jobs.scan(), model="tiny", recipe=strict, submission=jobs.SUBMISSION
    )
    assert second.created
    assert second.job_id != first.job_id


def test_a_job_runs_through_its_stages_and_conserves_records(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=3, records_each=10)).job_id
    worker = jobs.start_worker(tx)
    jobs.run_job(tx, job_id, worker, failures=2)
    job = queries.get_job(tx, job_id)
    assert (job.state, job.embeddings, job.failed, job.records) == ("succeeded", 24, 6, 30)
    assert [failure.record for failure in queries.failures_of(tx, job_id)] == [1, 2, 11, 12, 21, 22]
    assert queries.failure_counts(tx, job_id) == {"empty": 6}
    assert jobs.outbox_chunks(tx) == []
    assert queries.submissions_of(tx, job_id)[0].published_generation == 1


@pytest.mark.parametrize("records_each", [1_000, 30_000, 2**31])
def test_records_beyond_small_integers_are_committed(tx: Connection, records_each: int) -> None:
    scanned = jobs.scan(chunks=40 if records_each == 1_000 else 2, records_each=records_each)
    job_id = jobs.register(tx, scanned).job_id
    jobs.run_job(tx, job_id, jobs.start_worker(tx), failures=1)
    job = queries.get_job(tx, job_id)
    assert (job.state, job.embeddings + job.failed) == ("succeeded", job.records)


def test_a_chunk_is_claimed_once(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    first, second = jobs.start_worker(tx, "one"), jobs.start_worker(tx, "two")
    chunk = jobs.pending_chunks(tx, job_id)[0]
    work = transitions.describe(tx, chunk)
    assert not isinstance(work, Declined)
    jobs.claim(tx, chunk, first)
    late = transitions.claim(tx, work, second, execution_class="class one", execution={})
    assert late == Declined(chunk, "it is running", job_id)
    assert chunk not in jobs.outbox_chunks(tx)


def test_a_worker_of_another_execution_class_is_declined(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    first, second, _ = jobs.pending_chunks(tx, job_id)
    jobs.claim(tx, first, worker, "class one")
    work = transitions.describe(tx, second)
    assert not isinstance(work, Declined)
    other = transitions.claim(tx, work, worker, execution_class="class two", execution={})
    assert isinstance(other, Declined)
    assert "execution class" in other.reason
    assert second in jobs.outbox_chunks(tx)
    assert queries.find_setback(tx, job_id) is None
    send_again(tx, second, delay=60, reason=other.reason)
    assert queries.find_setback(tx, job_id) == other.reason
    jobs.claim(tx, second, worker, "class one")
    assert queries.find_setback(tx, job_id) is None


def test_a_job_of_which_nothing_is_computed_is_pinned_anew(tx: Connection) -> None:
    """Its first worker was stopped, say, to come back with another torch: no other class would ever be accepted."""
    job_id = jobs.register(tx, jobs.scan()).job_id
    first, second, _ = jobs.pending_chunks(tx, job_id)
    old = jobs.start_worker(tx, "old")
    jobs.claim(tx, first, old, "class one")
    workers.retire_worker(tx, old)
    new = jobs.start_worker(tx, "new")
    done = jobs.claim(tx, first, new, "class two")
    assert queries.get_job(tx, job_id).execution == {"name": "class two"}
    transitions.complete(tx, done, jobs.result_of(done))
    work = transitions.describe(tx, second)
    assert not isinstance(work, Declined)
    assert isinstance(
        transitions.claim(tx, work, new, execution_class="class one", execution={}), Declined
    ), "what is done would be mixed with it"


def test_a_job_that_lost_all_it_had_is_pinned_anew(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    jobs.run_job(tx, job_id, worker)
    resume(tx, job_id, [artifact.id for artifact in queries.artifacts_of(tx, job_id)])
    jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker, "class two")


def test_a_job_that_no_worker_may_run_holds_up_no_other(tx: Connection) -> None:
    pinned = jobs.register(tx, jobs.scan(chunks=9)).job_id
    jobs.claim(tx, jobs.pending_chunks(tx, pinned)[0], jobs.start_worker(tx), "class one")
    other = jobs.register(tx, jobs.scan(content="b")).job_id
    worker = jobs.start_worker(tx, "other@test")
    ran = set()
    for _ in range(8):
        for message in take_due(tx, "extract", 2):
            if message.job_id == pinned:
                send_again(tx, message.chunk_id, delay=0, reason="its job is pinned")
            else:
                jobs.claim(tx, message.chunk_id, worker, "class two")
                ran.add(message.chunk_id)
    assert len(ran) == 3
    assert jobs.pending_chunks(tx, other) == []
    assert len(take_due(tx, "extract", 99)) == 8, "put off, not lost"


def test_what_no_worker_may_run_is_not_read_ahead(tx: Connection) -> None:
    pinned = jobs.register(tx, jobs.scan(chunks=9)).job_id
    for chunk in jobs.pending_chunks(tx, pinned):
        send_again(tx, chunk, delay=0, reason="its job is pinned")
    other = jobs.register(tx, jobs.scan(content="b")).job_id
    for message in take_due(tx, "extract", 3):
        assert message.job_id == other
    assert queries.next_published(tx, "extract", 2) == jobs.pending_chunks(tx, other)[:2]


def test_a_chunk_that_was_only_declined_does_not_hide_one_that_failed(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    first, second, _ = jobs.pending_chunks(tx, job_id)
    send_again(tx, first, delay=2, reason="its job is pinned to another execution class")
    claimed = jobs.claim(tx, second, jobs.start_worker(tx))
    transitions.fail(tx, claimed, "no space left on device", max_attempts=5)
    assert queries.find_setback(tx, job_id) == "no space left on device"


def test_a_declined_claim_pins_nothing(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    gone, live = jobs.start_worker(tx, "gone"), jobs.start_worker(tx, "live")
    workers.retire_worker(tx, gone)
    chunk = jobs.pending_chunks(tx, job_id)[0]
    work = transitions.describe(tx, chunk)
    assert not isinstance(work, Declined)
    declined = transitions.claim(tx, work, gone, execution_class="class of the gone", execution={})
    assert declined == Declined(chunk, "this worker is no longer live")
    jobs.claim(tx, chunk, live, "class one")


def test_cancel_waits_for_a_claim_in_flight_and_fences_it_off(ledger: Engine) -> None:
    in_transaction(ledger, jobs.add_model)
    job_id = in_transaction(ledger, jobs.register, jobs.scan()).job_id
    worker = in_transaction(ledger, jobs.start_worker)
    chunk = in_transaction(ledger, jobs.pending_chunks, job_id)[0]
    with ThreadPoolExecutor(1) as other, ledger.begin() as tx:
        claimed = jobs.claim(tx, chunk, worker)
        cancelled = other.submit(in_transaction, ledger, cancel, job_id, by="a person")
        wait_for_lock(ledger)
        tx.commit()
        cancelled.result()
    with pytest.raises(StaleLeaseError):
        in_transaction(ledger, transitions.complete, claimed, jobs.result_of(claimed))
    assert in_transaction(ledger, jobs.outbox_chunks) == []


def wait_for_lock(ledger: Engine) -> None:
    """Return when some transaction waits for another."""
    with ledger.connect() as tx:
        while not tx.execute(text("SELECT 1 FROM pg_locks WHERE NOT granted")).first():
            pass


def test_a_sleeper_cannot_commit_after_its_lease_expired(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    sleeper = jobs.start_worker(tx, "sleeper", lease_seconds=-1)
    chunk = jobs.pending_chunks(tx, job_id)[0]
    stale = jobs.claim(tx, chunk, sleeper)
    assert workers.expire_workers(tx) == [sleeper]
    recovered = workers.take_back(tx, sleeper, "its lease expired", max_attempts=4)
    assert [(r.chunk_id, r.state) for r in recovered] == [(chunk, "pending")]
    assert not workers.beat(tx, sleeper, progress=1, lease_seconds=60)
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, stale, jobs.result_of(stale))
    fresh = jobs.claim(tx, chunk, jobs.start_worker(tx, "fresh"))
    assert fresh.attempt == 2
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, stale, jobs.result_of(stale))
    transitions.complete(tx, fresh, jobs.result_of(fresh))
    assert queries.get_job(tx, job_id).embeddings == 10


def test_a_heartbeat_keeps_the_lease(tx: Connection) -> None:
    worker = jobs.start_worker(tx, lease_seconds=-1)
    assert workers.beat(tx, worker, progress=1, lease_seconds=60)
    assert workers.expire_workers(tx) == []


def test_a_worker_without_progress_is_stuck_though_its_heart_beats(tx: Connection) -> None:
    """Whether it holds a chunk or not: it may hang behind a commit."""
    worker = jobs.start_worker(tx)
    tx.execute(text("UPDATE workers SET progress_at = now() - interval '1 h'"))
    workers.beat(tx, worker, progress=0, lease_seconds=60)
    assert workers.expire_stuck_workers(tx, stuck_seconds=7200) == []
    assert workers.expire_stuck_workers(tx, stuck_seconds=600) == [worker]


def test_an_idle_worker_is_not_stuck(tx: Connection) -> None:
    worker = jobs.start_worker(tx)
    tx.execute(text("UPDATE workers SET progress_at = now() - interval '1 h'"))
    workers.beat(tx, worker, progress=None, lease_seconds=60)
    assert workers.expire_stuck_workers(tx, stuck_seconds=600) == []


def test_a_worker_that_shuts_down_hands_its_chunk_back_without_an_attempt(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    chunk = jobs.pending_chunks(tx, job_id)[0]
    jobs.claim(tx, chunk, worker)
    workers.retire_worker(tx, worker)
    assert jobs.claim(tx, chunk, jobs.start_worker(tx)).attempt == 1


def test_a_chunk_out_of_attempts_fails_its_job_and_resume_brings_it_back(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    chunk = jobs.pending_chunks(tx, job_id)[0]
    for attempt in (1, 2):
        claimed = jobs.claim(tx, chunk, worker)
        assert claimed.attempt == attempt
        transitions.fail(tx, claimed, "no space left", max_attempts=2)
    job = queries.get_job(tx, job_id)
    assert job.state == "failed"
    assert "no space left" in job.error
    resumed = resume(tx, job_id)
    assert (resumed.lost, resumed.waiting) == (0, 3)
    jobs.run_job(tx, job_id, worker)
    assert jobs.state_of(tx, job_id) == "succeeded"


def test_a_permanent_fault_fails_at_once(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    claimed = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], jobs.start_worker(tx))
    assert transitions.fail(tx, claimed, "the input has changed", max_attempts=9, permanent=True) == "failed"
    assert jobs.state_of(tx, job_id) == "failed"


def test_messages_of_a_failed_job_do_not_hold_up_others(tx: Connection) -> None:
    broken = jobs.register(tx, jobs.scan(chunks=5)).job_id
    worker = jobs.start_worker(tx)
    assert len(take_due(tx, "extract", 2)) == 2
    claimed = jobs.claim(tx, jobs.pending_chunks(tx, broken)[0], worker)
    held = jobs.claim(tx, jobs.pending_chunks(tx, broken)[0], worker)
    transitions.fail(tx, claimed, "the input has changed", max_attempts=9, permanent=True)
    assert jobs.outbox_chunks(tx) == []
    transitions.fail(tx, held, "bad luck", max_attempts=9)
    assert jobs.outbox_chunks(tx) == [], "a chunk of an ended job was sent"
    healthy = jobs.register(tx, jobs.scan(chunks=1, content="b")).job_id
    [message] = take_due(tx, "extract", 2)
    assert message.chunk_id == jobs.pending_chunks(tx, healthy)[0]
    assert resume(tx, broken).waiting == 5


@pytest.mark.parametrize("cancel_unwatched", [False, True])
def test_the_last_waiter_cancels_only_if_the_setting_says_so(tx: Connection, cancel_unwatched: bool) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    waiters.add_waiter(tx, job_id, "run 1", 1)
    waiters.add_waiter(tx, job_id, "run 2", 1)
    first, last = (waiters.name_waiter(wait, 1) for wait in ("run 1", "run 2"))
    assert not waiters.remove_waiter(tx, job_id, first, cancel_unwatched=cancel_unwatched)
    assert waiters.remove_waiter(tx, job_id, last, cancel_unwatched=cancel_unwatched) is cancel_unwatched
    assert not waiters.remove_waiter(tx, job_id, last, cancel_unwatched=cancel_unwatched)


def test_an_attempt_that_waits_strikes_off_those_before_it(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    for wait, attempt in (("run 1", 1), ("run 11", 1), ("run 1", 2), ("run 1", 2)):
        waiters.add_waiter(tx, job_id, wait, attempt)
    tokens = tx.execute(text("SELECT token FROM waiters ORDER BY token")).scalars().all()
    assert tokens == ["run 1, try 2", "run 11, try 1"]
    # what an old trigger says late is about itself
    waiters.remove_waiter(tx, job_id, waiters.name_waiter("run 1", 1))
    assert tx.execute(text("SELECT count(*) FROM waiters")).scalar_one() == 2


def test_a_name_stands_for_the_same_weights_for_ever(tx: Connection) -> None:
    with pytest.raises(WeightsError, match="other weights"):
        registration.add_model(
            tx,
            name="tiny",
            path="tiny",
            weights_sha256="f" * 64,
            layers=1,
            token_dropout=True,
            demonstration=True,
            config={},
        )


IMPOSSIBLE = [
    "UPDATE jobs SET state = 'succeeded', finished_at = now()",
    "UPDATE jobs SET embeddings = records + 1",
    "UPDATE jobs SET chunks_left = chunks_total + 1",
    "UPDATE jobs SET state = 'failed', finished_at = now()",
    "UPDATE jobs SET state = 'asleep'",
    "UPDATE chunks SET state = 'running'",
    "UPDATE chunks SET state = 'done', embeddings = 1, failed = 0",
    "UPDATE chunks SET embeddings = records, failed = 0",
    "UPDATE chunks SET lease_token = 1",
    "UPDATE chunks SET state = 'failed'",
    "INSERT INTO failures VALUES ({job}, 1, 1, 'x', 'bad luck', '')",
    "INSERT INTO outbox (chunk_id, queue) SELECT id, 'extract' FROM chunks",
    """INSERT INTO jobs (input_sha256, recipe_sha256, recipe, model, stage, chunks_total, chunks_left, records)
       SELECT input_sha256, recipe_sha256, recipe, model, stage, 1, 1, 1 FROM jobs""",
]


@pytest.mark.parametrize("statement", IMPOSSIBLE)
def test_the_database_refuses_impossible_states(tx: Connection, statement: str) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    with pytest.raises(IntegrityError):
        tx.execute(text(statement.format(job=job_id)))
