"""The report of a job: made by the worker beside the result, on demand by the command, and a courtesy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection

from tests import ledger_jobs as jobs
from virnucpro_core.htmlreport import contents
from virnucpro_core.htmlreport.lengths import Lengths, survey_lengths
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import submissions_of
from virnucpro_core.ledger.work import job_folder

if TYPE_CHECKING:
    from tests.fixtures_command import Completed
    from tests.fixtures_pipeline import Pipeline

    Command = Callable[..., Completed]

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_command"]

HOSTILE = "<script>alert('id')</script>"


@pytest.fixture
def hostile_fasta(tmp_path: Path) -> Path:
    """Six proteins of several lengths, and a bad record whose id is a script, in a file whose name is one, too."""
    lengths = (20, 52, 96, 500, 1201, 20)
    records = [f">p{k}\n{('MKVLAGICDEFHNPQRSTWY' * 61)[: length + k]}\n" for k, length in enumerate(lengths)]
    path = tmp_path / "inbox" / "<img src=x onerror=alert(1)>.fasta"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join([*records, f">{HOSTILE} bad\nMKV1AG\n"]))
    return path


def test_job_ends_with_a_report_that_can_be_made_again(
    pipeline: Pipeline, virnucpro: Command, hostile_fasta: Path, tmp_path: Path
) -> None:
    pipeline.start_relay()
    pipeline.start_workers()
    submitted = pipeline.submit(hostile_fasta, max_failed_share=1)
    job = pipeline.wait_for(submitted.job_id)
    assert (job.state, job.failed) == ("succeeded", 1)
    stem = hostile_fasta.stem
    folder = pipeline.published(job.id)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{stem}.failures.jsonl",
        f"{stem}.manifest.json",
        f"{stem}.report.html",
        f"{stem}_ESM.pt",
    ]
    page = (folder / f"{stem}.report.html").read_text()
    assert "&lt;script&gt;alert(&#39;id&#39;)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<img src=x" not in page
    assert all(f'id="{chart}"' in page for chart in ("lengths", "speed", "norms", "projection"))
    artifacts = pipeline.rows("SELECT kind, sha256 FROM artifacts WHERE stage <> 'extract'")
    shown = {row.kind for row in artifacts if row.sha256 in page}
    assert shown == {"export", "failures", "manifest"}
    assert job.input_sha256 in page
    assert job.recipe_sha256 in page

    # it says nothing of the moment it was made in
    assert virnucpro("report", job.id, "-o", tmp_path / "again.html").code == 0
    assert (tmp_path / "again.html").read_text() == page
    assert virnucpro("verify", job.id).code == 0
    told = virnucpro("status", job.id, "--json").json()
    assert Path(told["submissions"][0]["report"]).name == f"{stem}.report.html"

    # it is a file of the result like the others: missed, and made again
    (folder / f"{stem}.report.html").unlink()
    assert virnucpro("verify", job.id).code == 6
    virnucpro("retry", job.id, "--verify")
    pipeline.wait_for(job.id)
    assert (folder / f"{stem}.report.html").read_text() == page

    # what is gone is left out, and the page says so
    hostile_fasta.unlink()
    assert virnucpro("report", job.id, "-o", tmp_path / "later.html").code == 0
    later = (tmp_path / "later.html").read_text()
    assert "The input cannot be read" in later
    assert 'id="lengths"' not in later
    assert 'id="projection"' in later
    assert [text.count("coloured by length") + text.count("Colour is") for text in (page, later)] == [2, 0]


def test_input_is_read_once_for_the_reports_of_all_submissions(
    pipeline: Pipeline,
    small_fasta: Path,
    run_chunks: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def survey_and_count(chunks: Any, *args: Any, **options: Any) -> Lengths:
        read.append(len(chunks))
        return survey_lengths(chunks, *args, **options)

    monkeypatch.setattr(contents, "survey_lengths", survey_and_count)
    other = small_fasta.with_name("other.fasta")
    other.write_bytes(small_fasta.read_bytes())
    job_id = pipeline.submit(small_fasta).job_id
    assert pipeline.submit(other).job_id == job_id
    for stage in ("extract", "merge", "validate"):
        run_chunks(stage)
    job = pipeline.job(job_id)
    assert (job.state, len(read)) == ("succeeded", 1)
    for submission in in_transaction(pipeline.ledger, submissions_of, job_id):
        folder = pipeline.settings.output_root / submission.folder(job.input_sha256, job.recipe_sha256)
        page = (folder / f"{submission.stem}.report.html").read_text()
        shown = [name for name in ("small_ESM.pt", "other_ESM.pt") if name in page]
        assert shown == [f"{submission.stem}_ESM.pt"]


def test_of_many_failures_the_first_are_read_and_no_cursor_stays_open(
    tx: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "SHOWN_FAILURES", 2)
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    jobs.run_job(tx, job_id, jobs.start_worker(tx), failures=1)
    told = contents.ask_ledger(tx, job_id)  # a cursor that is left open is told of by psycopg, as a warning
    assert [failure.record for failure in told.first_failures] == [1, 11]
    assert sum(told.failures.values()) == 3


def test_broken_report_fails_no_job(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path, tmp_path: Path
) -> None:
    """Folders are in the way where the report is to be written and, of another job, where it is published."""
    unwritten = pipeline.submit(small_fasta).job_id
    other = small_fasta.with_name("other.fasta")
    other.write_bytes(small_fasta.read_bytes() + b">more\nMKV\n")
    unpublished = pipeline.submit(other).job_id
    root = pipeline.settings.output_root
    (root / job_folder(unwritten) / "g1/validate/report_1.html").mkdir(parents=True)
    (pipeline.published(unpublished) / "other.report.html").mkdir(parents=True)
    pipeline.start_relay()
    pipeline.start_workers()
    ended = [pipeline.wait_for(job) for job in (unwritten, unpublished)]
    assert [(job.state, job.error) for job in ended] == [("succeeded", None)] * 2
    assert "report_not_made" in pipeline.logs()
    assert "report_not_published" in pipeline.logs()
    assert {path.name for path in pipeline.published(unwritten).iterdir()} == {
        "small.failures.jsonl",
        "small.manifest.json",
        "small_ESM.pt",
    }
    assert (pipeline.published(unpublished) / "other_ESM.pt").is_file()

    # both are seen
    assert "report:    not made" in virnucpro("status", unwritten).out
    verified = virnucpro("verify", unpublished)
    assert verified.code == 6
    assert "other.report.html: it cannot be read" in verified.out
    # and mended
    (pipeline.published(unpublished) / "other.report.html").rmdir()
    virnucpro("retry", unpublished)
    pipeline.wait_for(unpublished)
    assert virnucpro("verify", unpublished).code == 0
    assert virnucpro("report", unwritten, "-o", tmp_path / "small.html").code == 0
