"""What became of a run's files: the report of each, the asset's event, and the summary that lets a run fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import Engine
from structlog.testing import capture_logs

from dags import virnucpro_ingest as ingest
from dags.outcomes import FileOutcome, sum_up
from tests import ledger_jobs as jobs
from tests.dag_tasks import (
    FORM,
    Results,
    finish,
    register,
    register_and_report,
    report,
    summarize,
    write_fasta,
)
from virnucpro_core.errors import InputError, JobError
from virnucpro_core.ledger import transitions

pytest_plugins = ["tests.fixtures_dags"]

pytestmark = pytest.mark.integration


def test_asset_event_carries_rows_and_checksum(ledger: Engine, inbox: Path) -> None:
    files = register(write_fasta(inbox / "a.fasta", "MKVLAT", "MKW"))
    finish(ledger, files[0]["job"])
    reports, extra = report(files)
    assert extra == {"files": reports}
    assert json.loads(json.dumps(extra)) == extra
    job = reports[0]["job"]
    assert (job["records"], job["embeddings"], job["failures"]) == (2, 2, {})
    assert job["results"] == [{"kind": "matrix", "rows": 1, "sha256": "b" * 64}]
    assert job["folder"].startswith("results/a-")


def test_a_file_stays_accepted_while_its_job_is_validated_again_for_an_equal_one(
    ledger: Engine, inbox: Path
) -> None:
    first = register(write_fasta(inbox / "a.fasta", "MKVLAT"))
    finish(ledger, first[0]["job"])
    second = register(write_fasta(inbox / "equal.fasta", "MKVLAT"))
    assert second[0]["job"] == first[0]["job"]
    [told], extra = report(first)
    assert (told["fault"], extra) == ("", {"files": [told]})
    with pytest.raises(JobError, match="job 1 running"):
        report(second)


def test_a_file_is_not_accepted_while_its_job_is_computed_anew(ledger: Engine, inbox: Path) -> None:
    files = register(file := write_fasta(inbox / "a.fasta", "MKVLAT"))
    finish(ledger, files[0]["job"])
    register(file, force=True)
    with pytest.raises(JobError, match="job 1 running"):
        report(files)


def test_a_file_that_its_job_was_not_asked_for_is_named(ledger: Engine, inbox: Path) -> None:
    [file] = register(write_fasta(inbox / "a.fasta", "MKVLAT"))
    with pytest.raises(JobError, match=r"was not asked for this file.*/else\.fasta"):
        report([file | {"path": "/else.fasta"}])


def test_too_many_failures_fail_the_report_and_the_form_decides_how_many(ledger: Engine, inbox: Path) -> None:
    files = register(write_fasta(inbox / "a.fasta", "MKVLAT", "MKW"))
    finish(ledger, files[0]["job"], failures=1)
    with pytest.raises(JobError, match="1 of 2 records failed"):
        report(files)
    reports, _ = report(files, max_failed_share=0.5)
    assert reports[0]["job"]["failures"] == {"empty": 1}


def test_asset_event_leaves_out_what_is_not_accepted(ledger: Engine, inbox: Path) -> None:
    files = register(
        write_fasta(inbox / "bad.fasta"),
        write_fasta(inbox / "good.fasta", "MKV"),
        write_fasta(inbox / "late.fasta", "MKW"),
    )
    finish(ledger, files[1]["job"])
    reports, extra = report(files)
    assert [Path(one["path"]).name for one in extra["files"]] == ["good.fasta"]
    assert [bool(one["fault"]) for one in reports] == [True, False, True]


def make_outcome(path: str, fault: str = "") -> FileOutcome:
    return {
        "path": path,
        "fault": fault,
        "job": {"records": 3, "embeddings": 2, "failures": {"empty": 1}, "truncated": 0},
    }


def test_summary_names_every_file_without_a_result() -> None:
    sum_up(["/a", "/b"], [make_outcome("/a"), make_outcome("/b")])
    with pytest.raises(JobError, match="2 of 3 files") as caught:
        sum_up(["/a", "/b", "/c"], [make_outcome("/a"), make_outcome("/b", "job 2 failed")])
    assert "/b: job 2 failed" in str(caught.value)
    assert "/c: it did not get through" in str(caught.value)


def test_summary_says_why_though_the_files_own_tasks_left_no_report(ledger: Engine, inbox: Path) -> None:
    """With one file a task, as in most runs: `register` failed, `extract` did, `report` did, or nobody knows."""
    results = Results()
    refused, failed, faulty, odd, unknown = (inbox / f"{name}.fasta" for name in ("bad", "b", "c", "d", "e"))
    write_fasta(refused)
    with pytest.raises(InputError):
        register(refused, results=results)
    for file, sequences in ((failed, ["MKV"]), (faulty, ["MKW", "MKA"]), (odd, ["MKL"])):
        results.index += 1
        registered = register(write_fasta(file, *sequences))
        results.xcom_push("return_value", registered)
        job = registered[0]["job"]
        if file == failed:
            with ledger.begin() as tx:
                claimed = jobs.claim(tx, jobs.pending_chunks(tx, job)[0], jobs.start_worker(tx))
                transitions.fail(tx, claimed, "the input changed", max_attempts=1, permanent=True)
        else:
            finish(ledger, job, failures=file == faulty)
    files = (refused, failed, faulty, odd, unknown)
    with capture_logs() as lines, pytest.raises(JobError, match="5 of 5 files"):
        summarize(results, *files)
    said = {line["file"]: line["fault"] for line in lines if line["event"] == "a file has no accepted result"}
    assert set(said) == {str(file) for file in files}
    assert "the file is empty" in said[str(refused)]
    assert said[str(failed)].endswith("failed: job 1 b: extract chunk 1 of 1: the input changed")
    assert "1 of 2 records failed, more than" in said[str(faulty)]
    assert said[str(odd)] == "it did not get through its stages: see its failed task; its job succeeded"
    assert said[str(unknown)] == "it did not get through its stages: see its failed task"


def test_summary_does_not_believe_what_was_reported_before_a_clear(ledger: Engine, inbox: Path) -> None:
    results = Results()
    file = write_fasta(inbox / "a.fasta", "MKVLAT")
    register_and_report(results, ledger, file)
    summarize(results, file)
    write_fasta(file)
    with pytest.raises(InputError):
        register(file, results=results)
    del results.kept["register", "return_value", 0]
    results.states["report_0"] = "upstream_failed"
    with pytest.raises(JobError, match="the file is empty"):
        summarize(results, file)


def test_summary_forgets_a_file_that_has_left_the_inbox(ledger: Engine, inbox: Path) -> None:
    """`find_files` was cleared: the tasks of the last place are removed, what they left is still there."""
    results = Results()
    stays, bad, left = (inbox / f"{name}.fasta" for name in "abc")
    register_and_report(results, ledger, write_fasta(stays, "MKVLAT"))
    results.index = 1
    with pytest.raises(InputError):
        register(write_fasta(bad), results=results)
    results.index = 2
    register_and_report(results, ledger, write_fasta(left, "MKW"))
    results.states["report_2"] = "removed"
    with capture_logs() as lines:
        summarize(results, stays)
    assert "1 of 1 files are accepted" in lines[-1]["event"]


def test_summary_says_so_if_nobody_could_look_for_files() -> None:
    with pytest.raises(JobError, match=r"could not look for its files \[find_files\]"):
        ingest.summary.function(None, params=FORM, run_id="test", ti=Results())
