"""The ledger's transitions on a real PostgreSQL: what is promised holds, what must not be is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from tests import ledger_jobs as jobs
from virnucpro_core.errors import JobError, StaleLeaseError, WeightsError
from virnucpro_core.ledger import queries, registration, transitions, waiters, workers
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.ledger.outbox import send_again, take_due
from virnucpro_core.ledger.transitions import Declined
from virnucpro_core.ledger.work import Resumed
from virnucpro_core.stack.postgres import LedgerUrls

pytestmark = pytest.mark.integration


def state_of(tx: Connection, job_id: int) -> str:
    return str(queries.get_job(tx, job_id).state)


def outbox_chunks(tx: Connection) -> list[int]:
    return list(tx.execute(text("SELECT chunk_id FROM outbox ORDER BY chunk_id")).scalars())


def test_registering_twice_makes_one_job_and_one_submission(tx: Connection) -> None:
    first = jobs.register(tx, jobs.scan())
    second = jobs.register(tx, jobs.scan())
    assert first.created
    assert not second.created
    assert first.job_id == second.job_id
    assert len(queries.submissions_of(tx, first.job_id)) == 1
    assert outbox_chunks(tx) == jobs.pending_chunks(tx, first.job_id)


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
    assert outbox_chunks(tx) == []
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
    assert chunk not in outbox_chunks(tx)


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
    assert second in outbox_chunks(tx)
    assert queries.find_setback(tx, job_id) is None
    send_again(tx, second, delay=60, reason=other.reason)
    assert queries.find_setback(tx, job_id) == other.reason
    jobs.claim(tx, second, worker, "class one")
    assert queries.find_setback(tx, job_id) is None


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
    assert in_transaction(ledger, outbox_chunks) == []


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
    assert state_of(tx, job_id) == "succeeded"


def test_a_permanent_fault_fails_at_once(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    claimed = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], jobs.start_worker(tx))
    assert transitions.fail(tx, claimed, "the input has changed", max_attempts=9, permanent=True) == "failed"
    assert state_of(tx, job_id) == "failed"


def test_messages_of_a_failed_job_do_not_hold_up_others(tx: Connection) -> None:
    broken = jobs.register(tx, jobs.scan(chunks=5)).job_id
    worker = jobs.start_worker(tx)
    assert len(take_due(tx, "extract", 2)) == 2
    claimed = jobs.claim(tx, jobs.pending_chunks(tx, broken)[0], worker)
    held = jobs.claim(tx, jobs.pending_chunks(tx, broken)[0], worker)
    transitions.fail(tx, claimed, "the input has changed", max_attempts=9, permanent=True)
    assert outbox_chunks(tx) == []
    transitions.fail(tx, held, "bad luck", max_attempts=9)
    assert outbox_chunks(tx) == [], "a chunk of an ended job was sent"
    healthy = jobs.register(tx, jobs.scan(chunks=1, content="b")).job_id
    [message] = take_due(tx, "extract", 2)
    assert message.chunk_id == jobs.pending_chunks(tx, healthy)[0]
    assert resume(tx, broken).waiting == 5


def test_resume_redoes_only_what_storage_lost(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    worker = jobs.start_worker(tx)
    jobs.run_job(tx, job_id, worker, failures=1)
    assert resume(tx, job_id).lost == 0
    assert state_of(tx, job_id) == "succeeded"
    lost = [row.id for row in queries.artifacts_of(tx, job_id) if (row.stage, row.ordinal) == ("extract", 1)]
    resumed = resume(tx, job_id, lost)
    assert (resumed.chunks, resumed.lost, resumed.waiting) == (3, 1, 1)
    job = queries.get_job(tx, job_id)
    assert (job.state, job.stage, job.embeddings, job.failed) == ("running", "extract", 18, 2)
    another = jobs.start_worker(tx, "another")
    jobs.run_job(tx, job_id, another, failures=1)
    job = queries.get_job(tx, job_id)
    assert (job.state, job.embeddings, job.failed) == ("succeeded", 27, 3)
    ran = tx.execute(text("SELECT worker_id FROM chunks WHERE stage = 'extract' ORDER BY ordinal")).scalars()
    assert list(ran) == [worker, another, worker]


def test_losing_the_merged_result_redoes_the_merge_alone(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    jobs.run_job(tx, job_id, worker)
    lost = [row.id for row in queries.artifacts_of(tx, job_id, stage="merge")]
    assert lost
    resumed = resume(tx, job_id, lost)
    assert (resumed.lost, resumed.waiting) == (0, 1)
    assert queries.get_job(tx, job_id).stage == "merge"


def lose(tx: Connection, job_id: int, *kinds: str) -> Resumed:
    """Lose the merge stage's files of these kinds."""
    lost = [row.id for row in queries.artifacts_of(tx, job_id, stage="merge") if row.kind in kinds]
    assert len(lost) == len(kinds)
    return resume(tx, job_id, lost)


def finish_with_export(tx: Connection) -> int:
    """A job that succeeded, whose chunk artifacts have been removed."""
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    jobs.run_job(tx, job_id, jobs.start_worker(tx))
    tx.execute(
        text("""INSERT INTO artifacts (job_id, generation, stage, ordinal, kind, path, sha256, bytes, rows)
                SELECT job_id, generation, stage, ordinal, 'export', 'result.pt', sha256, bytes, rows
                  FROM artifacts WHERE stage = 'merge'""")
    )
    tx.execute(text("DELETE FROM artifacts WHERE stage = 'extract'"))
    return job_id


def test_an_export_is_made_again_from_the_matrix_without_the_chunks(tx: Connection) -> None:
    job_id = finish_with_export(tx)
    resumed = lose(tx, job_id, "export")
    assert (resumed.lost, queries.get_job(tx, job_id).stage) == (0, "merge")
    assert [row.kind for row in queries.artifacts_of(tx, job_id, stage="merge")] == ["matrix"]


def test_losing_the_matrix_after_chunks_were_removed_computes_them_again(tx: Connection) -> None:
    assert lose(tx, finish_with_export(tx), "matrix").lost == 3


def test_losing_what_validate_made_repeats_validate_alone(tx: Connection) -> None:
    job_id = finish_with_export(tx)
    tx.execute(
        text("""INSERT INTO artifacts (job_id, generation, stage, ordinal, kind, path, sha256, bytes, rows)
                SELECT job_id, generation, 'validate', 0, 'manifest', 'manifest.json', sha256, bytes, 1
                  FROM artifacts WHERE kind = 'export'""")
    )
    lost = [row.id for row in queries.artifacts_of(tx, job_id, stage="validate")]
    assert resume(tx, job_id, lost).lost == 0
    assert queries.get_job(tx, job_id).stage == "validate"


def test_resume_during_a_later_stage_fences_off_whoever_runs_it(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=2)).job_id
    worker = jobs.start_worker(tx)
    for chunk in jobs.pending_chunks(tx, job_id):
        claimed = jobs.claim(tx, chunk, worker)
        transitions.complete(tx, claimed, jobs.result_of(claimed))
    merge = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    assert merge.work.stage == "merge"
    resume(tx, job_id, [queries.artifacts_of(tx, job_id)[0].id])
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, merge, jobs.result_of(merge))


def test_force_begins_a_generation_and_fences_off_the_old_one(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    old = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    forced = jobs.register(tx, jobs.scan(chunks=2, records_each=15), force=True)
    assert (forced.job_id, forced.generation, forced.created) == (job_id, 2, False)
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, old, jobs.result_of(old))
    jobs.run_job(tx, job_id, worker)
    assert state_of(tx, job_id) == "succeeded"
    assert {row.path.split("/")[2] for row in queries.artifacts_of(tx, job_id)} == {"g2"}


def test_a_late_name_is_published_without_computing_or_merging_again(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    jobs.run_job(tx, job_id, worker)
    jobs.register(tx, jobs.scan(), replace(jobs.SUBMISSION, path="/elsewhere/b.fasta", stem="b"))
    job = queries.get_job(tx, job_id)
    assert (job.state, job.stage, job.chunks_left) == ("running", "validate", 1)
    jobs.run_job(tx, job_id, worker)
    assert [row.published_generation for row in queries.submissions_of(tx, job_id)] == [1, 1]


def test_late_nucleotides_bring_the_merge_back(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    jobs.run_job(tx, job_id, jobs.start_worker(tx))
    nucleotides = replace(jobs.SUBMISSION, nucleotide_path="/in/a_DNABERT_S.pt", nucleotide_sha256="c" * 64)
    jobs.register(tx, jobs.scan(), nucleotides)
    assert queries.get_job(tx, job_id).stage == "merge"


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_nucleotides_for_a_job_that_ended_at_validate_are_merged(tx: Connection, end: str) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    worker = jobs.start_worker(tx)
    for _ in ("extract", "merge"):
        claimed = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
        transitions.complete(tx, claimed, jobs.result_of(claimed))
    claimed = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    if end == "failed":
        transitions.fail(tx, claimed, "bad luck", max_attempts=1)
    else:
        cancel(tx, job_id, by="a person")
    nucleotides = replace(jobs.SUBMISSION, nucleotide_path="/in/a_DNABERT_S.pt", nucleotide_sha256="c" * 64)
    jobs.register(tx, jobs.scan(chunks=1), nucleotides)
    assert queries.get_job(tx, job_id).stage == "merge"


def test_rejected_nucleotides_are_noted_with_their_submission_alone(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    bad = replace(jobs.SUBMISSION, nucleotide_path="/in/bad.pt", nucleotide_sha256="c" * 64)
    jobs.register(tx, jobs.scan(chunks=1), bad)
    worker = jobs.start_worker(tx)
    extract = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    transitions.complete(tx, extract, jobs.result_of(extract))
    merge = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    rejected = queries.submissions_of(tx, job_id)[1].id
    transitions.complete(tx, merge, replace(jobs.result_of(merge), rejected={rejected: "ids do not match"}))
    assert [row.error for row in queries.submissions_of(tx, job_id)] == [None, "ids do not match"]
    jobs.run_job(tx, job_id, worker)
    assert state_of(tx, job_id) == "succeeded"
    jobs.register(tx, jobs.scan(chunks=1), replace(bad, nucleotide_sha256="d" * 64))
    assert [row.error for row in queries.submissions_of(tx, job_id)] == [None, None]
    assert queries.get_job(tx, job_id).stage == "merge"


def test_one_run_forces_once_however_often_it_registers(tx: Connection) -> None:
    jobs.register(tx, jobs.scan())
    assert jobs.register(tx, jobs.scan(), force=True, forced_by="run 1").generation == 2
    assert jobs.register(tx, jobs.scan(), force=True, forced_by="run 1").generation == 2
    assert jobs.register(tx, jobs.scan(), force=True, forced_by="run 2").generation == 3
    assert jobs.register(tx, jobs.scan(), force=True).generation == 4


def test_a_running_job_goes_on_reading_where_it_began(tx: Connection, tmp_path: Path) -> None:
    original, copy = tmp_path / "a.fasta", tmp_path / "copy.fasta"
    for path in (original, copy):
        path.write_bytes(b">a\nM\n")
    job_id = jobs.register(tx, replace(jobs.scan(), location=str(original))).job_id
    jobs.register(tx, replace(jobs.scan(), location=str(copy)))
    assert queries.get_job(tx, job_id).location == str(original)
    original.unlink()
    jobs.register(tx, replace(jobs.scan(), location=str(copy)))
    assert queries.get_job(tx, job_id).location == str(copy)


def test_a_job_takes_its_weights_from_the_name_that_was_given_last(tx: Connection) -> None:
    jobs.add_model(tx, "other")
    job_id = jobs.register(tx, jobs.scan()).job_id
    jobs.register(tx, jobs.scan(), model="other")
    assert queries.get_job(tx, job_id).model == "other"


def test_a_submission_during_extract_changes_nothing_of_the_run(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    waiting = jobs.pending_chunks(tx, job_id)
    jobs.register(tx, jobs.scan(), replace(jobs.SUBMISSION, path="/elsewhere/b.fasta", stem="b"))
    assert jobs.pending_chunks(tx, job_id) == waiting


def test_cancel_keeps_what_is_done_and_resume_goes_on(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    worker = jobs.start_worker(tx)
    first, second, _ = jobs.pending_chunks(tx, job_id)
    done = jobs.claim(tx, first, worker)
    transitions.complete(tx, done, jobs.result_of(done))
    running = jobs.claim(tx, second, worker)
    cancel(tx, job_id, by="a person")
    assert outbox_chunks(tx) == []
    assert transitions.describe(tx, second) == Declined(second, "its job is cancelled", job_id)
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, running, jobs.result_of(running))
    with pytest.raises(JobError):
        cancel(tx, job_id, by="a person")
    assert resume(tx, job_id).waiting == 2
    jobs.run_job(tx, job_id, worker)
    assert state_of(tx, job_id) == "succeeded"


def test_a_job_whose_last_chunk_ended_while_cancelled_advances_on_resume(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    worker = jobs.start_worker(tx)
    claimed = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    tx.execute(text("UPDATE jobs SET state = 'cancelled', finished_at = now()"))
    assert transitions.complete(tx, claimed, jobs.result_of(claimed)) == "cancelled"
    resume(tx, job_id)
    assert queries.get_job(tx, job_id).stage == "merge"


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


def test_each_role_can_do_its_work_and_no_more(ledger_urls: LedgerUrls) -> None:
    owner, dag, worker = (open_ledger(ledger_urls[role]) for role in ("owner", "dag", "worker"))
    in_transaction(owner, jobs.add_model)
    registered = in_transaction(dag, jobs.register, jobs.scan())
    worker_id = in_transaction(worker, jobs.start_worker)
    in_transaction(worker, jobs.run_job, registered.job_id, worker_id, 1)
    artifacts = in_transaction(dag, queries.artifacts_of, registered.job_id)
    assert in_transaction(dag, resume, registered.job_id, [artifacts[0].id]).lost == 1
    in_transaction(worker, jobs.run_job, registered.job_id, worker_id, 1)
    in_transaction(dag, jobs.register, jobs.scan(), force=True)
    in_transaction(dag, cancel, registered.job_id, by="a person")
    for engine, forbidden in [
        (dag, "SELECT nextval('lease_tokens')"),
        (dag, "UPDATE workers SET state = 'gone'"),
        (dag, "UPDATE models SET path = '/elsewhere'"),
        (dag, "DROP TABLE outbox"),
        (worker, "INSERT INTO jobs (records) VALUES (1)"),
        (worker, "UPDATE models SET path = '/elsewhere'"),
        (worker, "UPDATE inputs SET location = '/elsewhere'"),
        (worker, "CREATE TABLE mine (x int)"),
    ]:
        with engine.connect() as connection, pytest.raises(ProgrammingError, match=r"denied|owner"):
            connection.execute(text(forbidden))
    for engine in (owner, dag, worker):
        engine.dispose()
