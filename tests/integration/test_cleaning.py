"""What finished jobs leave on disk is removed when its time has come, and not before."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from tests import ledger_jobs as jobs
from virnucpro_core.ledger import queries, retention, tallies
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.jobs import resume
from virnucpro_core.ledger.retention import remove_chunks
from virnucpro_core.settings import load_settings
from virnucpro_core.stack.postgres import LedgerUrls
from virnucpro_core.verification import look_at_job
from workers import cleaning
from workers.cleaning import remove_expired

pytestmark = pytest.mark.integration


@pytest.fixture
def owner(settings_environment: Callable[..., None], ledger_urls: LedgerUrls) -> Iterator[Engine]:
    engine = open_ledger(ledger_urls["owner"])
    yield engine
    engine.dispose()


@pytest.fixture
def worker(settings_environment: Callable[..., None], ledger_urls: LedgerUrls) -> Iterator[Engine]:
    engine = open_ledger(ledger_urls["worker"])
    yield engine
    engine.dispose()


@pytest.fixture
def job_id(owner: Engine) -> int:
    """A job that has succeeded, and its files."""
    in_transaction(owner, jobs.add_model)
    registered = in_transaction(owner, jobs.register, jobs.scan())
    in_transaction(owner, jobs.run_job, registered.job_id, in_transaction(owner, jobs.start_worker))
    for path in files_of(owner, registered.job_id):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
    return registered.job_id


def files_of(ledger: Engine, job_id: int, stage: str | None = None) -> list[Path]:
    artifacts = in_transaction(ledger, queries.artifacts_of, job_id, stage=stage)
    return [load_settings().output_root / artifact.path for artifact in artifacts]


def finish_earlier(owner: Engine, days: int) -> None:
    with owner.begin() as tx:
        tx.execute(
            text("UPDATE jobs SET finished_at = finished_at - make_interval(days => :days)"), {"days": days}
        )


def test_chunks_stay_for_the_days_that_the_setting_says(owner: Engine, worker: Engine, job_id: int) -> None:
    chunks = files_of(owner, job_id, "extract")
    finish_earlier(owner, days=6)
    remove_expired(worker, load_settings())
    assert all(path.exists() for path in chunks)
    finish_earlier(owner, days=2)
    remove_expired(worker, load_settings())
    assert not any(path.exists() for path in chunks)
    assert files_of(owner, job_id, "extract") == []
    assert all(path.exists() for path in files_of(owner, job_id))
    lost = queries.find_lost(in_transaction(owner, queries.artifacts_of, job_id), load_settings().output_root)
    assert lost == [], "what was removed on purpose is not lost"


def test_cleaning_that_died_before_its_commit_has_nothing_computed_again(
    owner: Engine, worker: Engine, job_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_earlier(owner, days=8)
    removed = retention.removed_folder(load_settings().output_root)

    def remove_and_die(tx: Connection, *args: Any) -> None:
        remove_chunks(tx, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(cleaning, "remove_chunks", remove_and_die)
        with pytest.raises(KeyboardInterrupt):
            remove_expired(worker, load_settings())
    found = look_at_job(owner, load_settings().output_root, job_id)
    assert len(found.lost) == len(files_of(owner, job_id, "extract")) > 0
    resumed = in_transaction(owner, resume, job_id, found.lost)
    assert (resumed.lost, resumed.waiting) == (0, 0)
    assert in_transaction(owner, queries.get_job, job_id).state == "succeeded"
    assert files_of(owner, job_id, "extract") == []
    assert len(list(removed.iterdir())) == 1
    remove_expired(worker, load_settings())
    assert list(removed.iterdir()) == []


def test_cleaning_that_died_after_its_commit_is_ended_by_the_next(
    owner: Engine, worker: Engine, job_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_earlier(owner, days=8)
    removed = retention.removed_folder(load_settings().output_root)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            remove_expired(worker, load_settings())
    assert files_of(owner, job_id, "extract") == []
    assert len(list(removed.iterdir())) == 1
    remove_expired(worker, load_settings())
    assert list(removed.iterdir()) == []


def test_chunks_of_a_job_that_runs_again_stay(owner: Engine, worker: Engine, job_id: int) -> None:
    merged = in_transaction(owner, queries.artifacts_of, job_id, stage="merge")
    chunks = files_of(owner, job_id, "extract")
    finish_earlier(owner, days=30)
    in_transaction(owner, resume, job_id, [merged[0].id])
    remove_expired(worker, load_settings())
    assert [path.exists() for path in chunks] == [True] * 3
    assert files_of(owner, job_id, "extract") == chunks


def test_spooled_copies_go_when_no_job_needs_them(owner: Engine, worker: Engine, job_id: int) -> None:
    spool = load_settings().spool_root
    spool.mkdir(parents=True)
    needed, unknown, fresh = (spool / f"{name}.fasta" for name in (jobs.scan().sha256, "0" * 64, "1" * 64))
    abandoned = spool / "1-abc.tmp"
    for path in (needed, unknown, fresh, abandoned):
        path.write_bytes(b">a\nM\n")
        if path != fresh:
            os.utime(path, (time.time() - 30 * 86_400,) * 2)
    remove_expired(worker, load_settings())
    assert set(spool.iterdir()) == {needed, fresh}
    finish_earlier(owner, days=8)
    remove_expired(worker, load_settings())
    assert set(spool.iterdir()) == {fresh}


def test_tallies_of_workers_long_gone_are_put_together_and_none_is_lost(
    owner: Engine, worker: Engine, job_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus takes a counter that falls, by however little, for one that began anew."""
    result_of = jobs.result_of
    monkeypatch.setattr(
        jobs, "result_of", lambda claim, *_: replace(result_of(claim), seconds=claim.worker_id / 13)
    )
    for content in ("b", "c", "d", "e"):
        registered = in_transaction(owner, jobs.register, jobs.scan(content=content))
        in_transaction(owner, jobs.run_job, registered.job_id, in_transaction(owner, jobs.start_worker))
    leave = text("""
        UPDATE workers SET state = 'gone', heartbeat_at = now() - make_interval(days => :days) WHERE id = :worker
    """)
    for days, gone in ((20, 1), (9, 2), (8, 3), (6, 4)):
        in_transaction(owner, lambda tx, **of: tx.execute(leave, of), days=days, worker=gone)
    before = in_transaction(worker, tallies.read_tallies)
    for _ in range(2):
        remove_expired(worker, load_settings())
        assert in_transaction(worker, tallies.read_tallies) == before
        of = in_transaction(
            worker, lambda tx: tx.execute(text("SELECT worker_id FROM tallies")).scalars().all()
        )
        assert set(of) == {1, 4, 5}
