"""Waiting for a stage: the operator and its trigger on a real ledger, with the role that Airflow has."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.bases.operator import ExecutorSafeguard
from airflow.sdk.exceptions import TaskDeferred
from airflow.sdk.module_loading import import_string
from sqlalchemy import Engine, text
from structlog.testing import capture_logs

from dags import waiting
from dags.connections import close_async_ledger, open_dag_ledger, share_async_ledger
from dags.waiting import StageTrigger, SubmittedFile, WaitForStage
from tests import ledger_jobs as jobs
from virnucpro_core.errors import JobError, ServiceError
from virnucpro_core.ledger import queries, transitions
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.jobs import cancel
from virnucpro_core.settings import load_settings

pytestmark = pytest.mark.integration

RETRIES = 5
SECONDS = 60.0  # that a trigger may take to see what has happened

CONNECTIONS = """SELECT pid FROM pg_stat_activity
                  WHERE application_name = 'virnucpro trigger' AND datname = current_database()"""


@pytest.fixture(autouse=True)
def quick_looks(settings_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is set up as Airflow's are; triggers look often, operators run without a task runner."""
    monkeypatch.setattr(waiting, "PAUSE", 0.05)
    monkeypatch.setattr(ExecutorSafeguard, "test_mode", True)


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Engine]:
    """The ledger as its owner sees it, to play the workers and to look at what became of it."""
    engine = open_ledger(ledger_url)
    with engine.begin() as tx:
        jobs.add_model(tx)
    yield engine
    engine.dispose()


def enter_job(ledger: Engine, content: str = "a") -> int:
    return in_transaction(ledger, jobs.register, jobs.scan(content=content)).job_id


def run_job(ledger: Engine, job: int) -> None:
    """Play the workers until the job is done, and leave the files that the ledger tells of."""
    with ledger.begin() as tx:
        jobs.run_job(tx, job, jobs.start_worker(tx))
        for artifact in queries.artifacts_of(tx, job):
            path = load_settings().output_root / artifact.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(artifact.bytes))


def run_stage(ledger: Engine, job: int) -> None:
    """Play the workers for the job's current stage."""
    with ledger.begin() as tx:
        worker = jobs.start_worker(tx)
        for chunk in jobs.pending_chunks(tx, job):
            claimed = jobs.claim(tx, chunk, worker)
            transitions.complete(tx, claimed, jobs.result_of(claimed))


def fail_job(ledger: Engine, job: int) -> None:
    with ledger.begin() as tx:
        claimed = jobs.claim(tx, jobs.pending_chunks(tx, job)[0], jobs.start_worker(tx))
        transitions.fail(tx, claimed, "the input changed", max_attempts=1, permanent=True)


def files_of(*job_ids: int) -> list[SubmittedFile]:
    return [{"path": f"/in/{job}.fasta", "job": job, "refused": ""} for job in job_ids]


def make_wait(*job_ids: int, stage: str = "extract") -> WaitForStage:
    return WaitForStage(task_id=stage, stage=stage, files=files_of(*job_ids), retries=RETRIES)


def attempt(number: int = 1, run: str = "nightly", *, cleared: bool = True) -> Any:
    """What Airflow hands to an attempt of a task: the first, or one more, after a Clear or by itself."""
    ti = SimpleNamespace(
        dag_id="virnucpro_ingest",
        run_id=run,
        task_id="extract",
        map_index=0,
        try_number=number,
        max_tries=RETRIES + (number - 1 if cleared else 0),
    )
    return {"ti": ti}


def defer(wait: WaitForStage, context: Any) -> StageTrigger:
    """Run an attempt that must defer; returns the trigger as the triggerer rebuilds it."""
    with pytest.raises(TaskDeferred) as deferred:
        wait.execute(context)
    assert deferred.value.method_name == "resume_waiting"
    path, arguments = deferred.value.trigger.serialize()
    rebuilt = import_string(path)(**json.loads(json.dumps(arguments)))
    assert isinstance(rebuilt, StageTrigger)
    return rebuilt


def waiters(ledger: Engine) -> list[tuple[int, str]]:
    with ledger.connect() as tx:
        return [
            tuple(row) for row in tx.execute(text("SELECT job_id, token FROM waiters ORDER BY since, job_id"))
        ]


def chunks(ledger: Engine, job: int) -> list[tuple[Any, ...]]:
    """All that a recomputation would change."""
    with ledger.connect() as tx:
        rows = tx.execute(
            text("""
                SELECT id, stage, ordinal, state, attempts, claimed_at
                  FROM chunks WHERE job_id = :job ORDER BY id
            """),
            {"job": job},
        )
        return [tuple(row) for row in rows]


async def fire(trigger: StageTrigger) -> None:
    """Run a trigger until it fires."""
    async for _ in trigger.run():
        return


async def watch(trigger: StageTrigger, *steps: Callable[[], object]) -> list[bool]:
    """Run a trigger while other things happen, the last of which makes it fire; whether it has after each."""
    task = asyncio.ensure_future(fire(trigger))
    fired = []
    for step in steps:
        await asyncio.to_thread(step)
        await asyncio.wait([task], timeout=SECONDS if step is steps[-1] else 0.5)
        fired.append(task.done())
    try:
        await asyncio.wait_for(task, SECONDS)
    finally:
        await close_async_ledger()
    return fired


def test_trigger_survives_serialisation(ledger: Engine) -> None:
    trigger = StageTrigger([3, 4], 1, "a token")
    path, arguments = trigger.serialize()
    assert path == "dags.waiting.StageTrigger"
    assert import_string(path)(**json.loads(json.dumps(arguments))).serialize() == trigger.serialize()


@pytest.mark.parametrize("stage", ["extract", "merge", "validate"])
def test_there_is_nothing_to_wait_for_when_the_stage_is_done(ledger: Engine, stage: str) -> None:
    job = enter_job(ledger)
    run_job(ledger, job)
    make_wait(job, stage=stage).execute(attempt())
    assert waiters(ledger) == []


def test_wait_ends_when_every_job_has_passed_the_stage(ledger: Engine) -> None:
    first, second = enter_job(ledger, "a"), enter_job(ledger, "b")
    wait = make_wait(first, second)
    trigger = defer(wait, attempt())
    assert [job for job, _ in waiters(ledger)] == [first, second]
    fired = asyncio.run(watch(trigger, lambda: run_stage(ledger, first), lambda: run_stage(ledger, second)))
    assert fired == [False, True]
    wait.resume_waiting(attempt(), None)
    assert waiters(ledger) == []


def test_a_wait_that_is_woken_too_early_waits_again(ledger: Engine) -> None:
    job = enter_job(ledger)
    wait = make_wait(job)
    defer(wait, attempt())
    with pytest.raises(TaskDeferred):
        wait.resume_waiting(attempt(), None)
    assert len(waiters(ledger)) == 1


def test_trigger_outlives_cut_connections(ledger: Engine) -> None:
    job = enter_job(ledger)
    trigger = defer(make_wait(job), attempt())

    def cut_connections() -> None:
        deadline = time.monotonic() + SECONDS
        cut = 0
        with open_dag_ledger() as same_role:
            while not cut:  # until the trigger has looked for the first time
                assert time.monotonic() < deadline, "the trigger has no connection"
                with same_role.begin() as tx:
                    cut = tx.execute(
                        text(f"SELECT pg_terminate_backend(pid) FROM ({CONNECTIONS}) open")
                    ).rowcount

    fired = asyncio.run(watch(trigger, lambda: None, cut_connections, lambda: run_stage(ledger, job)))
    assert fired == [False, False, True]


def test_trigger_gives_up_on_a_ledger_that_stays_silent(
    ledger: Engine, settings_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = enter_job(ledger, "a"), enter_job(ledger, "b")
    wait = make_wait(first, second)
    trigger = defer(wait, attempt())
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    settings_environment(dag_database_url="postgresql://nobody:x@127.0.0.1:9/nothing")
    with capture_logs() as lines:
        asyncio.run(watch(trigger))
    assert {line["job"] for line in lines} == {first, second}, "each is found by its number"
    with pytest.raises(ServiceError, match="PostgreSQL cannot be used"):
        wait.resume_waiting(attempt(), None)


def test_many_triggers_share_two_connections(ledger: Engine) -> None:
    job = enter_job(ledger)
    trigger = defer(make_wait(job), attempt())
    seen: list[int] = []

    async def wait_many_times() -> None:
        tasks = [asyncio.ensure_future(fire(StageTrigger(**trigger.serialize()[1]))) for _ in range(50)]
        deadline = time.monotonic() + SECONDS
        while len(seen) < 2 and time.monotonic() < deadline:
            await asyncio.wait(tasks, timeout=1)
            async with share_async_ledger().connect() as connection:
                seen[:] = (await connection.execute(text(CONNECTIONS))).scalars()
        await asyncio.to_thread(run_stage, ledger, job)
        await asyncio.wait_for(asyncio.gather(*tasks), SECONDS)
        await close_async_ledger()

    asyncio.run(wait_many_times())
    assert len(seen) == 2


@pytest.mark.parametrize("cancel_unwatched", [False, True])
def test_clear_while_waiting_kills_only_the_attempt_before(
    ledger: Engine, settings_environment: Callable[..., None], cancel_unwatched: bool
) -> None:
    settings_environment(cancel_unwatched=cancel_unwatched)
    job = enter_job(ledger)
    before = defer(make_wait(job), attempt(1))
    after = defer(make_wait(job), attempt(2))
    asyncio.run(before.on_kill())  # Airflow calls it only now, when the second attempt waits already
    assert waiters(ledger) == [(job, after.token)]
    assert in_transaction(ledger, queries.get_job, job).state == "running"
    asyncio.run(after.on_kill())
    assert waiters(ledger) == []
    expected = "cancelled" if cancel_unwatched else "running"
    assert in_transaction(ledger, queries.get_job, job).state == expected


def test_mark_failed_leaves_the_wait_of_another_run(
    ledger: Engine, settings_environment: Callable[..., None]
) -> None:
    settings_environment(cancel_unwatched=True)
    job = enter_job(ledger)
    killed = defer(make_wait(job), attempt(run="first"))
    other = defer(make_wait(job), attempt(run="second"))
    asyncio.run(killed.on_kill())
    assert waiters(ledger) == [(job, other.token)]
    assert in_transaction(ledger, queries.get_job, job).state == "running"


def test_a_wait_that_is_killed_again_while_many_are_is_struck_off_all_the_same(ledger: Engine) -> None:
    """Airflow cancels a trigger once more in each second that it takes to end, and there are few threads."""
    job = enter_job(ledger)
    trigger = defer(make_wait(job), attempt())

    async def kill_twice() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        others_are_done = Event()
        others = loop.run_in_executor(None, others_are_done.wait)
        killed = asyncio.create_task(trigger.on_kill())
        await asyncio.sleep(0)  # it has begun
        killed.cancel()
        await asyncio.wait([killed])
        others_are_done.set()
        await others
        await loop.run_in_executor(None, lambda: None)  # comes after all that the one thread has to do

    asyncio.run(kill_twice())
    assert waiters(ledger) == []


def test_clearing_a_finished_stage_recomputes_nothing(ledger: Engine) -> None:
    job = enter_job(ledger)
    run_job(ledger, job)
    before = chunks(ledger, job)
    make_wait(job).execute(attempt(2))
    assert chunks(ledger, job) == before


def test_clearing_recomputes_the_chunk_whose_file_is_gone_and_no_other(ledger: Engine) -> None:
    job = enter_job(ledger)
    run_job(ledger, job)
    before = {row[2]: row for row in chunks(ledger, job) if row[1] == "extract"}
    lost = in_transaction(ledger, queries.artifacts_of, job, stage="extract")[1]
    (load_settings().output_root / lost.path).unlink()
    with capture_logs() as logs:
        defer(make_wait(job), attempt(2))
    told = [line["event"] for line in logs]
    assert "1 of 3 chunks were missing; 2 kept" in told
    assert "2 of 3 chunks are done: waiting" in told
    after = {row[2]: row for row in chunks(ledger, job) if row[1] == "extract"}
    assert after[1][3] == "pending"
    assert {k: row for k, row in after.items() if k != 1} == {k: row for k, row in before.items() if k != 1}


def test_a_file_cut_short_counts_as_lost(ledger: Engine) -> None:
    job = enter_job(ledger)
    run_job(ledger, job)
    cut = in_transaction(ledger, queries.artifacts_of, job, stage="extract")[0]
    path: Path = load_settings().output_root / cut.path
    path.write_bytes(path.read_bytes()[:-1])
    defer(make_wait(job), attempt())


def test_first_attempt_reports_a_failed_job_and_clear_resumes_it(ledger: Engine) -> None:
    job = enter_job(ledger)
    fail_job(ledger, job)
    wait = make_wait(job)
    with pytest.raises(JobError, match="the input changed"):
        wait.execute(attempt(1))
    defer(wait, attempt(2))
    assert in_transaction(ledger, queries.get_job, job).state == "running"


def test_a_retry_after_a_lost_service_leaves_alone_what_a_person_cancelled(ledger: Engine) -> None:
    job = enter_job(ledger)
    in_transaction(ledger, cancel, job, by="a person")
    wait = make_wait(job)
    with pytest.raises(JobError, match="cancelled"):
        wait.execute(attempt(2, cleared=False))
    assert in_transaction(ledger, queries.get_job, job).state == "cancelled"
    defer(wait, attempt(3))


def test_a_failed_job_does_not_stop_the_others_of_its_batch(ledger: Engine) -> None:
    failed, good = enter_job(ledger, "a"), enter_job(ledger, "b")
    fail_job(ledger, failed)
    run_job(ledger, good)
    make_wait(failed, good, stage="validate").execute(attempt())


def test_a_job_that_the_ledger_lost_is_an_error(ledger: Engine) -> None:
    with pytest.raises(JobError, match=r"\[77\]"):
        make_wait(77).execute(attempt())
