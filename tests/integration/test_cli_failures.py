"""`virnucpro failures`: as text, CSV and JSON, for readers that take their time."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from tests import ledger_jobs
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction

if TYPE_CHECKING:
    from tests.fixtures_command import Completed
    from tests.fixtures_pipeline import Pipeline

    Command = Callable[..., Completed]

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_command"]


def run_extract(pipeline: Pipeline, job_id: int, *, failures: int) -> None:
    """Do a job's extract chunks as the ledger sees it, with so many failures in the first of them."""

    def run(tx: ledger_jobs.Connection) -> None:
        worker = ledger_jobs.start_worker(tx)
        for number, chunk in enumerate(ledger_jobs.pending_chunks(tx, job_id)):
            claimed = ledger_jobs.claim(tx, chunk, worker)
            result = ledger_jobs.result_of(claimed, failures if number == 0 else 0)
            ledger_jobs.transitions.complete(tx, claimed, result)

    in_transaction(pipeline.ledger, run)


def test_failures_as_text_csv_and_json(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pipeline.submit(small_fasta).job_id
    assert "none" in virnucpro("failures", job).out
    run_extract(pipeline, job, failures=1)
    monkeypatch.setenv("COLUMNS", "20")  # a pipe's lines are not cut to it
    as_text = virnucpro("failures", job).out
    assert as_text.startswith(f"job {job}: 1 empty\n")
    assert as_text.splitlines()[-1].split(maxsplit=3) == ["1", "r0", "empty", "it has no residues"]
    assert list(csv.reader(virnucpro("failures", job, "--csv").out.splitlines())) == [
        ["record", "id", "reason", "detail"],
        ["1", "r0", "empty", "it has no residues"],
    ]
    (failure,) = virnucpro("failures", job, "--json").json()
    assert (failure["record"], failure["id"], failure["reason"]) == (1, "r0", "empty")


def test_more_failures_than_shown_are_announced(
    pipeline: Pipeline, virnucpro: Command, tmp_path: Path
) -> None:
    fasta = tmp_path / "many.fasta"
    fasta.write_text(">a\nMK\n" * 60)
    job = pipeline.submit(fasta).job_id
    run_extract(pipeline, job, failures=60)
    ended = virnucpro("failures", job)
    assert ended.out.count("it has no residues") == 50
    assert "--csv prints all" in ended.err
    assert virnucpro("failures", job, "--csv").out.count("it has no residues") == 60


@pytest.mark.parametrize("form", [(), ("--csv",), ("--json",)])
def test_a_slow_reader_of_failures_keeps_no_transaction_open(
    form: tuple[str, ...],
    pipeline: Pipeline,
    virnucpro: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queries, "BATCH_RECORDS", 20)
    fasta = tmp_path / "many.fasta"
    fasta.write_text(">a\nMK\n" * 60)
    job = pipeline.submit(fasta).job_id
    run_extract(pipeline, job, failures=60)
    waiting: list[int] = []
    write = sys.stdout.write

    def look(text: str) -> int:
        # While a pager's pipe is full, the command waits in this call.
        held = "SELECT pid FROM pg_locks WHERE relation = 'jobs'::regclass AND pid <> pg_backend_pid()"
        waiting.extend(row.pid for row in pipeline.rows(held))
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", look)
    ended = virnucpro("failures", job, *form)
    assert (ended.code, waiting) == (0, [])
    if form:
        rows = csv.DictReader(ended.out.splitlines()) if form == ("--csv",) else json.loads(ended.out)
        assert [int(row["record"]) for row in rows] == list(range(1, 61))


READ = text("SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'failures'")


def test_a_batch_of_failures_reads_no_more_than_it_returns(pipeline: Pipeline, small_fasta: Path) -> None:
    """Else a million of them took a minute to list: all were sorted for each batch."""
    job = pipeline.submit(small_fasta).job_id
    fill = text("""
        INSERT INTO failures (job_id, generation, record, record_id, reason, detail)
        SELECT :job, 1, number, 'r' || number, 'empty', '' FROM generate_series(1, 20000) number
    """)
    with pipeline.ledger.begin() as tx:
        tx.execute(fill, {"job": job})
        tx.execute(text("ANALYZE failures"))
    with pipeline.ledger.begin() as tx:
        found = list(queries.failures_of(tx, job, limit=100, after=10_000))
        assert [found[0].record, found[-1].record] == [10_001, 10_100]
        assert tx.execute(READ).scalar_one() <= 200
