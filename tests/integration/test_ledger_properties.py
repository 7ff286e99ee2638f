"""Whatever happens to a job, in whatever order: the ledger's promises hold, and the job can be finished."""

from __future__ import annotations

import threading
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, text

from tests import ledger_jobs as jobs
from virnucpro_core.errors import StaleLeaseError
from virnucpro_core.ledger import queries, suspects, transitions, workers
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.ledger.work import Claim, Registered

pytestmark = pytest.mark.integration

CHUNKS = 3


class LedgerMachine(RuleBasedStateMachine):
    """One job, two workers, and everything that people, crashes and clocks do to them."""

    def __init__(self, ledger: Engine) -> None:
        super().__init__()
        self.connection = ledger.connect()
        self.connection.begin()
        jobs.add_model(self.connection)
        self.job: Registered = jobs.register(self.connection, jobs.scan(CHUNKS))
        self.workers = {node: jobs.start_worker(self.connection, node) for node in ("one", "two")}
        self.held: list[Claim] = []

    def teardown(self) -> None:
        """However it went, the job can be brought to its end."""
        with closing(self.connection):
            for node in self.workers:
                self.workers[node] = jobs.start_worker(self.connection, node)
            # At last: by the deaths of those who are replaced, the job may fail.
            resume(self.connection, self.job.job_id)
            jobs.run_job(self.connection, self.job.job_id, self.workers["one"])
            job = self.job_row()
            assert job.state == "succeeded"
            assert job.embeddings + job.failed == job.records

    def job_row(self) -> Any:
        return queries.get_job(self.connection, self.job.job_id)

    @rule(node=st.sampled_from(["one", "two"]), pick=st.integers(0, CHUNKS))
    def claim(self, node: str, pick: int) -> None:
        pending = jobs.pending_chunks(self.connection, self.job.job_id)
        if not pending:
            return
        work = transitions.describe(self.connection, pending[pick % len(pending)])
        if isinstance(work, transitions.Declined):
            assert self.job_row().state != "running"
            return
        claimed = transitions.claim(
            self.connection, work, self.workers[node], execution_class="class one", execution={}
        )
        assert isinstance(claimed, Claim)
        self.held.append(claimed)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 9), failures=st.integers(0, 2), lost=st.booleans())
    def complete(self, pick: int, failures: int, lost: bool) -> None:
        """`lost`: the worker dies between the commit and the acknowledgement, and tries again later."""
        claimed = self.held[pick % len(self.held)]
        if not lost:
            self.held.remove(claimed)
        result = jobs.result_of(claimed, failures)
        if claimed.work.stage == "validate":
            published = [row.id for row in queries.submissions_of(self.connection, self.job.job_id)]
            result = replace(result, artifacts=[], published=published)
        done_before = self.chunk_row(claimed)
        try:
            transitions.complete(self.connection, claimed, result)
        except StaleLeaseError:
            assert self.chunk_row(claimed) == done_before
        else:
            assert done_before is not None
            assert done_before.lease_token == claimed.token

    def chunk_row(self, claimed: Claim) -> Any:
        return self.connection.execute(
            text("SELECT * FROM chunks WHERE id = :id"), {"id": claimed.work.chunk_id}
        ).one_or_none()

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 9), permanent=st.booleans())
    def fail(self, pick: int, permanent: bool) -> None:
        claimed = self.held.pop(pick % len(self.held))
        with suppress(StaleLeaseError):
            transitions.fail(self.connection, claimed, "bad luck", max_attempts=2, permanent=permanent)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 9))
    def process_breaks(self, pick: int) -> None:
        claimed = self.held.pop(pick % len(self.held))
        with suppress(StaleLeaseError):
            suspects.break_down(self.connection, claimed, "CUDA error", max_attempts=2)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 9))
    def chunk_is_halved(self, pick: int) -> None:
        claimed = self.held[pick % len(self.held)]
        if claimed.work.stage != "extract" or claimed.work.range.records == 1:
            return
        with suppress(StaleLeaseError):
            suspects.split(self.connection, claimed, jobs.halves_of(claimed))

    @rule(node=st.sampled_from(["one", "two"]))
    def worker_is_replaced(self, node: str) -> None:
        self.workers[node] = jobs.start_worker(self.connection, node)

    @rule(node=st.sampled_from(["one", "two"]), pick=st.integers(0, CHUNKS))
    def worker_falls_silent_and_another_takes_over(self, node: str, pick: int) -> None:
        self.connection.execute(
            text("UPDATE workers SET lease_expires_at = now() - interval '1 s' WHERE id = :id"),
            {"id": self.workers[node]},
        )
        for worker in workers.expire_workers(self.connection):
            workers.take_back(self.connection, worker, "its lease expired", max_attempts=2)
        self.workers[node] = jobs.start_worker(self.connection, node)
        self.claim(node, pick)

    @rule()
    def person_resumes(self) -> None:
        resume(self.connection, self.job.job_id)

    @precondition(lambda self: self.job_row().state == "running")
    @rule()
    def person_cancels(self) -> None:
        cancel(self.connection, self.job.job_id, by="a person")

    @rule(force=st.booleans(), stem=st.sampled_from(["a", "b"]))
    def dag_registers_again(self, force: bool, stem: str) -> None:
        wish = replace(jobs.SUBMISSION, path=f"/in/{stem}.fasta", stem=stem)
        assert not jobs.register(self.connection, jobs.scan(CHUNKS), wish, force=force).created

    @rule(pick=st.integers(0, 9))
    def disk_loses_a_file(self, pick: int) -> None:
        artifacts = queries.artifacts_of(self.connection, self.job.job_id)
        if artifacts:
            resume(self.connection, self.job.job_id, [artifacts[pick % len(artifacts)].id])

    @invariant()
    def counters_agree_with_the_chunks(self) -> None:
        job = self.job_row()
        counted = self.connection.execute(
            text("""
                SELECT coalesce(sum(embeddings) FILTER (WHERE stage = 'extract'), 0) AS embeddings,
                       coalesce(sum(failed) FILTER (WHERE stage = 'extract'), 0) AS failed,
                       count(*) FILTER (WHERE stage = :stage AND state <> 'done') AS unfinished
                  FROM chunks WHERE job_id = :job
            """),
            {"job": job.id, "stage": job.stage},
        ).one()
        assert (counted.embeddings, counted.failed, counted.unfinished) == (
            job.embeddings,
            job.failed,
            job.chunks_left,
        )
        assert len(list(queries.failures_of(self.connection, job.id))) == job.failed

    @invariant()
    def chunks_cover_the_input_once(self) -> None:
        chunks = queries.chunk_ranges(self.connection, self.job.job_id)
        assert [chunk.first_record for chunk in chunks] == [
            1,
            *(chunk.first_record + chunk.records for chunk in chunks[:-1]),
        ]
        assert sum(chunk.records for chunk in chunks) == self.job_row().records
        assert sorted(chunk.ordinal for chunk in chunks) == list(range(len(chunks)))
        if self.job_row().stage == "extract":
            assert self.job_row().chunks_total == len(chunks)

    @invariant()
    def every_waiting_chunk_has_a_message_and_no_other(self) -> None:
        job = self.job_row()
        messages = jobs.outbox_chunks(self.connection)
        waiting = jobs.pending_chunks(self.connection, job.id)
        assert messages == (waiting if job.state == "running" else [])

    @invariant()
    def done_chunks_have_their_artifacts(self) -> None:
        job = self.job_row()
        without = self.connection.execute(
            text("""
                SELECT c.id FROM chunks c
                 WHERE c.job_id = :job AND c.state = 'done' AND c.stage = 'extract'
                   AND NOT EXISTS (SELECT 1 FROM artifacts a WHERE a.job_id = c.job_id AND a.generation = :generation
                                      AND a.stage = c.stage AND a.ordinal = c.ordinal)
            """),
            {"job": job.id, "generation": job.generation},
        ).all()
        # losing the merged result alone leaves the chunks as they are
        assert not without


def test_the_ledgers_promises_hold_in_any_order_of_events(ledger: Engine) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: LedgerMachine(ledger),
        settings=settings(max_examples=40, stateful_step_count=25, suppress_health_check=list(HealthCheck)),
    )


def test_simultaneous_finishers_begin_the_next_stage_once(ledger: Engine) -> None:
    count = 8
    in_transaction(ledger, jobs.add_model)
    job_id = in_transaction(ledger, jobs.register, jobs.scan(chunks=count)).job_id
    worker = in_transaction(ledger, jobs.start_worker)
    pending = in_transaction(ledger, jobs.pending_chunks, job_id)
    claims = [in_transaction(ledger, jobs.claim, chunk, worker) for chunk in pending]
    together = threading.Barrier(count)
    errors: list[Exception] = []

    def finish(claimed: Claim) -> None:
        engine = open_ledger(ledger.url.render_as_string(hide_password=False))
        try:
            together.wait()
            in_transaction(engine, transitions.complete, claimed, jobs.result_of(claimed))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test reports it
            errors.append(error)
        finally:
            engine.dispose()

    threads = [threading.Thread(target=finish, args=(claimed,)) for claimed in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with ledger.connect() as tx:
        assert queries.get_job(tx, job_id).stage == "merge"
        assert tx.execute(text("SELECT count(*) FROM chunks WHERE stage = 'merge'")).scalar_one() == 1
        assert tx.execute(text("SELECT count(*) FROM outbox")).scalar_one() == 1
