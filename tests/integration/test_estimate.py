"""What `estimate` says, beside what the pipeline then does, and by which history it goes."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection, text

from tests import ledger_jobs as jobs
from virnucpro_core.ledger import transitions
from virnucpro_core.ledger.database import in_transaction

if TYPE_CHECKING:
    from tests.fixtures_command import Completed
    from tests.fixtures_pipeline import Pipeline

    Command = Callable[..., Completed]

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_command"]

MODEL = "tiny"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "inbox" / "mixed.fasta"
    path.write_text(f">a\n{'MKVLAG' * 20}\n>cut\n{'MKVLAG' * 200}\n>empty\n>digits\nMK1\n>j\nMJJ\n")
    return path


def history(pipeline: Pipeline, fasta: Path, host: str, seconds: float) -> int:
    """A job that a host has done, 100 tokens a chunk in so many seconds each."""
    job = pipeline.submit(fasta).job_id

    def run(tx: Connection) -> None:
        worker = jobs.start_worker(tx, f"cpu0@{host}")
        tx.execute(text("UPDATE workers SET host = :host WHERE id = :id"), {"host": host, "id": worker})
        for chunk in jobs.pending_chunks(tx, job):
            work = transitions.describe(tx, chunk)
            assert not isinstance(work, transitions.Declined)
            execution = {"dtype": "float32", "device": "cpu", "hardware": f"the CPU of {host}"}
            claimed = transitions.claim(tx, work, worker, execution_class=host, execution=execution)
            assert not isinstance(claimed, transitions.Declined)
            transitions.complete(tx, claimed, jobs.result_of(claimed))
        tx.execute(text("UPDATE chunks SET seconds = :s WHERE job_id = :job"), {"s": seconds, "job": job})
        tx.execute(text("UPDATE workers SET state = 'gone' WHERE host = 'gone'"))

    in_transaction(pipeline.ledger, run)
    return job


def test_file_alone_tells_counts_and_disk_and_no_hours(
    pipeline: Pipeline, virnucpro: Command, fasta: Path
) -> None:
    packed = fasta.with_name("mixed.fasta.gz")
    packed.write_bytes(gzip.compress(fasta.read_bytes()))
    told = virnucpro("estimate", fasta, packed, "--json").json()
    plain, copied = told["files"]
    assert (plain["records"], plain["embeddings"], plain["truncated"], plain["unknown"]) == (5, 3, 1, 2)
    assert plain["rejects"] == {"empty": 1, "invalid_residue": 1}
    assert plain["tokens"] == 120 + 1024 + 3 + 3 * 2
    assert plain["disk"] == {
        "chunk artifacts": 3 * (5120 + 16) + 5,
        "result matrix": 3 * (5120 + 16) + 5,
        "export": 3 * 5120 + 5,
    }
    assert copied["disk"]["uncompressed copy"] == fasta.stat().st_size
    assert not pipeline.settings.spool_root.exists(), "an estimate writes nothing"
    assert (told["durations"], told["free"] > 0) == ([], True)
    assert "no job has run" in told["no_duration"]
    assert "time: unknown: no job has run" in " ".join(virnucpro("estimate", fasta).out.split())
    assert pipeline.submit(fasta).chunks == plain["chunks"]
    assert pipeline.rows("SELECT count(*) AS n FROM jobs")[0].n == 1


def test_hours_are_those_of_each_host_and_class_that_has_run(
    pipeline: Pipeline, virnucpro: Command, fasta: Path, small_fasta: Path
) -> None:
    history(pipeline, small_fasta, "gone", seconds=2)
    other = small_fasta.with_name("other.fasta")
    other.write_text(">o\nMKVLAG\n")
    history(pipeline, other, "here", seconds=1)

    def add_gpu(tx: Connection) -> None:
        worker = jobs.start_worker(tx, "gpu0@here")
        tx.execute(
            text("UPDATE workers SET host = 'here', device = 'GPU-aaaa1111' WHERE id = :id"), {"id": worker}
        )

    in_transaction(pipeline.ledger, add_gpu)

    def estimate(*options: object) -> Any:
        return virnucpro("estimate", fasta, "--model", MODEL, "--json", *options).json()

    told = estimate()
    by_host = {one["rate"]["host"]: one for one in told["durations"]}
    assert (by_host["gone"]["tokens_per_second"], by_host["here"]["tokens_per_second"]) == (50, 100)
    assert by_host["here"]["hours"] == pytest.approx(told["tokens"] / 100 / 3600)
    assert by_host["here"]["hours_now"] == by_host["here"]["hours"], "one worker of the CPU lives there"
    assert by_host["gone"]["hours_now"] is None
    assert told["no_duration"] == ""
    assert told["duration_now"] == {"hours": by_host["here"]["hours"], "workers": 1}
    text_form = virnucpro("estimate", fasta).out
    assert "100 tokens/s (chunks: 1, jobs: 1), tiny in float32 on the CPU of here" in text_form

    pipeline.configure(dtype="float16")
    told = estimate()
    assert (told["durations"], "in float16" in told["no_duration"]) == ([], True)


def test_workers_that_are_hosts_of_their_own_are_summed_up(
    pipeline: Pipeline, virnucpro: Command, fasta: Path, small_fasta: Path
) -> None:
    """As containers are. What a host did in two classes counts once, by the newer one."""
    for k, (host, seconds) in enumerate([("a", 4), ("a", 1), ("b", 2)]):
        other = small_fasta.with_name(f"other{k}.fasta")
        other.write_text(f">o\nMKVLAG{'A' * k}\n")
        job = history(pipeline, other, host, seconds)
        execution = f'{{"dtype": "float32", "device": "cpu", "hardware": "CPU {k}"}}'
        in_transaction(
            pipeline.ledger,
            lambda tx, job=job, execution=execution: tx.execute(
                text("UPDATE jobs SET execution = CAST(:it AS jsonb) WHERE id = :job"),
                {"it": execution, "job": job},
            ),
        )
    told = virnucpro("estimate", fasta, "--model", MODEL, "--json").json()
    assert len(told["durations"]) == 3
    assert told["duration_now"]["workers"] == 2
    assert told["duration_now"]["hours"] == pytest.approx(told["tokens"] / (100 + 50) / 3600)
    assert "on all workers that live now (2)" in virnucpro("estimate", fasta, "--model", MODEL).out


def test_file_that_is_done_takes_nothing_more(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path
) -> None:
    job = pipeline.submit(small_fasta).job_id
    options = (small_fasta, "--model", MODEL, "--json")
    told = virnucpro("estimate", *options).json()
    assert told["files"][0]["job"]["state"] == "running"
    assert told["tokens"] > 0
    in_transaction(pipeline.ledger, lambda tx: jobs.run_job(tx, job, jobs.start_worker(tx)))
    copy = shutil.copy(small_fasta, small_fasta.with_name("copy.fasta"))
    told = virnucpro("estimate", copy, *options).json()
    assert [one["job"]["id"] for one in told["files"]] == [job, job]
    assert (told["tokens"], told["disk"]) == (0, 0)
    text_form = virnucpro("estimate", copy, "--model", MODEL).out
    assert f"job {job}, succeeded" in text_form
    assert "nothing left to compute" in text_form


def test_without_a_ledger_the_file_is_told_of_all_the_same(
    virnucpro: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role in ("", "OWNER_", "DAG_", "WORKER_"):
        monkeypatch.delenv(f"VIRNUCPRO_{role}DATABASE_URL", raising=False)
    good, missing = Path("good.fasta"), Path("missing.fasta")
    good.write_text(">a\nMKVLAG\n")
    ended = virnucpro("estimate", missing, good)
    assert (ended.code, "there is no such file" in ended.err) == (3, True)
    assert "no database is named" in ended.out
    assert "tokens:           8" in ended.out


def test_unknown_model_is_told_before_reading_if_named_and_is_no_history_if_set(
    pipeline: Pipeline, virnucpro: Command, fasta: Path
) -> None:
    ended = virnucpro("estimate", fasta.with_name("never_read.fasta"), "--model", "tyni")
    assert (ended.code, ended.out) == (4, "")
    assert "no model is registered as 'tyni'" in ended.err
    assert "there is no such file" not in ended.err
    pipeline.configure(model="elsewhere")
    told = virnucpro("estimate", fasta, "--json").json()
    assert (told["files"][0]["chunks"], told["durations"]) == (pipeline.submit(fasta).chunks, [])
    assert "no model is registered as 'elsewhere'" in told["no_duration"]


def test_file_outside_the_roots_is_refused_as_it_would_be_later(
    pipeline: Pipeline, virnucpro: Command, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "a.fasta"
    outside.write_text(">a\nMK\n")
    ended = virnucpro("estimate", outside)
    assert (ended.code, "leads out of" in ended.err) == (3, True)
