"""One Celery child's life, in this process: what it does where it, or its surroundings, are not fit to work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from sqlalchemy import Connection, text

from tests import ledger_jobs
from tests.worker_chunks import chunk_row, submit
from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import begin_generation, cancel
from virnucpro_core.ledger.queries import chunk_ranges
from virnucpro_core.ledger.tallies import read_tallies
from virnucpro_core.ledger.transitions import Declined, describe
from virnucpro_core.ledger.work import Work
from workers.reaper import reap
from workers.stages import keep_extraction

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline
    from tests.fixtures_worker import Start

pytestmark = [pytest.mark.integration, pytest.mark.faults]
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_worker"]


@pytest.fixture
def broken_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_writing(*_: object) -> None:
        raise RuntimeError("the library is broken")

    monkeypatch.setattr("workers.process.keep_extraction", break_writing)


def test_unknown_error_while_writing_ends_the_process(
    pipeline: Pipeline, small_fasta: Path, broken_writer: None, start: Start
) -> None:
    first, second, *_ = submit(pipeline, small_fasta)
    process = start()
    process.run("extract", first)
    with pytest.raises(SystemExit):
        process.run("extract", second)
    assert chunk_row(pipeline, first) == ("pending", 1, "RuntimeError: the library is broken")
    process.close()
    # no fault of this chunk's
    assert chunk_row(pipeline, second) == ("pending", 0, None)


def test_unknown_error_while_writing_is_told_at_the_end(
    pipeline: Pipeline, small_fasta: Path, broken_writer: None, start: Start
) -> None:
    first, *_ = submit(pipeline, small_fasta)
    process = start()
    process.run("extract", first)
    with pytest.raises(RuntimeError, match="the library is broken"):
        process.close()
    assert [row.state for row in pipeline.rows("SELECT state FROM workers")] == ["gone"]


def test_message_that_comes_while_the_ledger_is_away_is_kept(
    pipeline: Pipeline, small_fasta: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers would empty the queue meanwhile, and idle until the relay sends all of it again."""
    first, *_ = submit(pipeline, small_fasta)
    away = [ServiceError("the database is away")] * 2

    def describe_later(tx: Connection, chunk: int) -> Work | Declined:
        if away:
            raise away.pop()
        return describe(tx, chunk)

    monkeypatch.setattr("workers.process.describe", describe_later)
    process = start()
    process.run("extract", first)
    process.close()
    assert chunk_row(pipeline, first).state == "done"


def test_chunk_that_its_worker_knows_nothing_of_is_handed_back(
    pipeline: Pipeline, small_fasta: Path, start: Start
) -> None:
    """As after a failover to a standby that had not yet heard of its commit; the worker has gone on meanwhile."""
    pipeline.configure(lease_seconds=1, heartbeat_seconds=0.2)
    first, second, *_ = submit(pipeline, small_fasta)
    process = start()
    worker = process.heartbeat.wait_for_worker()
    process.persist.held.add(in_transaction(pipeline.ledger, ledger_jobs.claim, second, worker).token)
    process.busy = True
    in_transaction(pipeline.ledger, ledger_jobs.claim, first, worker)
    pipeline.wait_until(lambda: chunk_row(pipeline, first).state == "pending", seconds=30)
    assert chunk_row(pipeline, first).attempts == 0
    (kept,) = pipeline.rows("SELECT ended_at - claimed_at >= interval '1 s' AS kept FROM setbacks")
    assert kept.kept, "one that was claimed in this moment is its own"
    assert chunk_row(pipeline, second).state == "running"
    assert pipeline.rows("SELECT 1 FROM workers WHERE id = :id AND state = 'live'", id=worker)
    assert pipeline.rows("SELECT 1 FROM outbox WHERE chunk_id = :chunk", chunk=first)


def test_ended_attempts_are_not_held_any_more(pipeline: Pipeline, small_fasta: Path, start: Start) -> None:
    first, *_ = submit(pipeline, small_fasta)
    process = start()
    process.run("extract", first)
    process.close()
    assert chunk_row(pipeline, first).state == "done"
    assert not process.persist.held


def test_execution_classes_write_under_names_of_their_own(
    pipeline: Pipeline, small_fasta: Path, start: Start
) -> None:
    """A worker that was given up goes on; the job, of which nothing was done, may be another class's by then."""
    first, *_ = submit(pipeline, small_fasta)
    process = start()
    process.run("extract", first)
    process.close()
    (artifact,) = pipeline.rows("SELECT path FROM artifacts")
    assert Path(artifact.path).stem.endswith(f"-{pipeline.job(1).execution_class[:8]}")


def test_input_that_cannot_be_read_for_a_while_is_tried_again(
    pipeline: Pipeline, small_fasta: Path, start: Start
) -> None:
    first, *_ = submit(pipeline, small_fasta)
    away = small_fasta.rename(small_fasta.with_suffix(".away"))
    process = start()
    process.run("extract", first)
    state, attempts, error = chunk_row(pipeline, first)
    assert (state, attempts) == ("pending", 1)
    assert f"the input cannot be read: No such file or directory [{small_fasta}" in error
    away.rename(small_fasta)
    process.run("extract", first)
    pipeline.wait_until(lambda: chunk_row(pipeline, first) == ("done", 2, None))


def test_new_child_and_the_reaper_wait_for_no_lock(
    pipeline: Pipeline, small_fasta: Path, start: Start
) -> None:
    """A process that hangs inside a transaction holds its job, and no worker shall wait behind it unseen."""
    first, *_ = submit(pipeline, small_fasta)
    before = in_transaction(pipeline.ledger, ledger_jobs.start_worker, "extract@test")
    in_transaction(pipeline.ledger, ledger_jobs.claim, first, before)
    silent = in_transaction(pipeline.ledger, ledger_jobs.start_worker, "silent@test", lease_seconds=-1)
    with pipeline.ledger.begin() as hanging:
        hanging.execute(text("SELECT 1 FROM jobs FOR UPDATE"))
        process = start()
        process.heartbeat.wait_for_worker()
        assert reap(pipeline.ledger, pipeline.settings) == []
        states = {row.id: row.state for row in pipeline.rows("SELECT id, state FROM workers")}
        assert (states[before], states[silent]) == ("gone", "silent")
    pipeline.wait_until(
        lambda: reap(pipeline.ledger, pipeline.settings) or chunk_row(pipeline, first).state == "pending"
    )
    assert chunk_row(pipeline, first)[:2] == ("pending", 1)


def suspect(pipeline: Pipeline, chunk: int, deaths: int) -> None:
    """So many workers are said to have died of a chunk."""
    change = text("UPDATE chunks SET attempts = :deaths, deaths = :deaths WHERE id = :chunk")
    in_transaction(pipeline.ledger, lambda tx: tx.execute(change, {"chunk": chunk, "deaths": deaths}))


def test_suspect_is_embedded_when_nothing_else_can_die_with_it(
    pipeline: Pipeline, small_fasta: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = submit(pipeline, small_fasta)
    suspect(pipeline, second, deaths=1)
    process = start()
    taken, take = Event(), process.look_ahead.take
    states = []

    def wait_for_the_second(*arguments: Any) -> Any:
        taken.wait(1.0)
        return keep_extraction(*arguments)

    def note_first(work: Work) -> Any:
        if work.chunk_id == second:
            taken.set()
            states.append(chunk_row(pipeline, first).state)
        return take(work)

    monkeypatch.setattr("workers.process.keep_extraction", wait_for_the_second)
    monkeypatch.setattr(process.look_ahead, "take", note_first)
    process.run("extract", first)
    process.run("extract", second)
    assert states == ["done"]
    assert chunk_row(pipeline, second).state == "done", "it has to be written before the next is taken"


def test_chunk_that_killed_twice_is_halved_and_not_embedded(
    pipeline: Pipeline, small_fasta: Path, start: Start
) -> None:
    first, *others = submit(pipeline, small_fasta)
    (whole,) = pipeline.rows("SELECT records FROM chunks WHERE id = :chunk", chunk=first)
    suspect(pipeline, first, deaths=2)
    process = start()
    process.run("extract", first)
    halves = pipeline.rows(
        "SELECT id, state, records, ordinal FROM chunks WHERE NOT id = ANY(:known) ORDER BY id",
        known=[first, *others],
    )
    assert [half.state for half in halves] == ["pending", "pending"]
    assert sum(half.records for half in halves) == whole.records
    assert [half.ordinal for half in halves] == [0, len(others) + 1]
    for half in halves:
        process.run("extract", half.id)
        assert chunk_row(pipeline, half.id).state == "done"


def test_record_that_killed_alone_is_a_failure(pipeline: Pipeline, tmp_path: Path, start: Start) -> None:
    path = tmp_path / "inbox" / "one.fasta"
    path.write_text(">one of one\nMKVLAG\n")
    (chunk,) = submit(pipeline, path)
    suspect(pipeline, chunk, deaths=4)
    start().run("extract", chunk)
    assert chunk_row(pipeline, chunk).state == "done"
    assert pipeline.rows("SELECT record, record_id, reason, detail FROM failures") == [
        (1, "one", "poison", "4 processes ended while they embedded it")
    ]
    (artifact,) = pipeline.rows("SELECT rows FROM artifacts")
    assert artifact.rows == 0


def steal(tx: Connection, work: Work) -> None:
    """As if the lease had run out and another worker had claimed the chunk."""
    thief = ledger_jobs.start_worker(tx, "thief@test")
    tx.execute(
        text("UPDATE chunks SET worker_id = :thief, lease_token = nextval('lease_tokens') WHERE id = :chunk"),
        {"thief": thief, "chunk": work.chunk_id},
    )


def cancel_job(tx: Connection, work: Work) -> None:
    cancel(tx, work.job_id, by="a person")


def force_job(tx: Connection, work: Work) -> None:
    begin_generation(tx, work.job_id, chunk_ranges(tx, work.job_id))


@pytest.mark.parametrize(("lose", "counted"), [(steal, 1.0), (cancel_job, 0.0), (force_job, 0.0)])
def test_result_that_comes_too_late_is_dropped_and_counted_if_another_has_its_chunk(
    lose: Callable[[Connection, Work], None],
    counted: float,
    pipeline: Pipeline,
    small_fasta: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *_ = submit(pipeline, small_fasta)

    def lose_the_lease(work: Work, *arguments: Any) -> Any:
        in_transaction(pipeline.ledger, lose, work)
        return keep_extraction(work, *arguments)

    monkeypatch.setattr("workers.process.keep_extraction", lose_the_lease)
    process = start()
    with structlog.testing.capture_logs() as logs:
        process.run("extract", first)
        process.close()
    (dropped,) = (line for line in logs if line["event"] == "result_dropped")
    assert dropped["duplicate"] is bool(counted)
    tallies = in_transaction(pipeline.ledger, read_tallies)
    assert (tallies.total("duplicates"), tallies.total("sequences")) == (counted, 0)


def test_work_is_tallied_as_it_was_done(pipeline: Pipeline, small_fasta: Path, start: Start) -> None:
    """A CPU computes each sequence alone: no padding."""
    process = start()
    for chunk in submit(pipeline, small_fasta):
        process.run("extract", chunk)
    process.close()
    rows = pipeline.rows("SELECT name, label, sum(value) FROM tallies GROUP BY name, label")
    told = {(name, label): value for name, label, value in rows}
    (job,) = pipeline.rows("SELECT embeddings, failed, tokens FROM jobs")
    (given,) = pipeline.rows("SELECT residues FROM inputs")
    assert told["sequences", "embedded"] == job.embeddings == 10
    assert {label: value for (name, label), value in told.items() if name == "sequences"} == {
        "embedded": 10,
        "empty": 1,
        "invalid_residue": 1,
    }
    assert told["tokens", ""] == told["positions", ""] == job.tokens
    assert told["residues", ""] == given.residues
