"""The DAG: cheap to parse, a form that refuses nonsense, tasks on a real ledger."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import RetryAction
from airflow.sdk.exceptions import ParamValidationError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from structlog.testing import capture_logs

from dags import virnucpro_ingest as ingest
from dags.inbox import BATCHES, find_inputs, make_batches, name_batch, write_path
from dags.outcomes import FileOutcome, sum_up
from tests import ledger_jobs as jobs
from virnucpro_core.errors import InputError, JobError, ServiceError, SettingsError
from virnucpro_core.ledger import queries, transitions
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.submissions import PATH_BYTES
from virnucpro_core.stack.programs import PROJECT

pytestmark = pytest.mark.integration

MAX_MAP_LENGTH = 1024  # Airflow's default of [core] max_map_length
FORM: dict[str, Any] = {
    "files": [],
    "model": "tiny",
    "force": False,
    "max_failed_share": None,
    "label": "none",
}

PARSE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
heavy = ("torch", "transformers", "celery", "kombu", "workers")
print(json.dumps({
    "errors": bag.import_errors,
    "files": sorted(stat.file for stat in bag.dagbag_stats),
    "dags": {name: sorted(task.task_id for task in dag.tasks) for name, dag in bag.dags.items()},
    "heavy": [name for name in heavy if name in sys.modules],
}))
"""


@pytest.fixture
def ledger(ledger_url: str, settings_environment: Callable[..., None]) -> Iterator[Engine]:
    """The ledger as its owner sees it, with the model "tiny"; the settings point at it."""
    settings_environment(dtype="float32")
    engine = open_ledger(ledger_url)
    with engine.begin() as tx:
        jobs.add_model(tx)
    yield engine
    engine.dispose()


@pytest.fixture
def inbox(settings_environment: Callable[..., None], tmp_path: Path) -> Path:
    return tmp_path / "inbox"


class Results:
    """What mapped tasks of a run have returned or left behind, and how `report` ended, as Airflow keeps it.

    It forgets what a task left when that is run again, and not before.

    Attributes:
        index: the map index of the task that plays now.
        states: of the instances of `report`, such as {"report_0": "success"}.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str, int], Any] = {}
        self.index = 0
        self.states: dict[str, str] = {}

    def xcom_push(self, key: str, value: Any, task: str = "register") -> None:
        self.kept[task, key, self.index] = json.loads(json.dumps(value))

    def xcom_pull(self, task_ids: list[str], map_indexes: list[int], key: str = "return_value") -> list[Any]:
        [task] = task_ids
        return [self.kept.get((task, key, index)) for index in map_indexes]

    def get_task_states(self, dag_id: str, task_ids: list[str], run_ids: list[str]) -> dict[str, Any]:
        assert (dag_id, task_ids) == ("virnucpro_ingest", ["report"])
        return dict.fromkeys(run_ids, self.states)


def write_fasta(path: Path, *sequences: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">protein{k}\n{sequence}\n" for k, sequence in enumerate(sequences)))
    return path


def register(*files: Path, results: Results | None = None, **form: Any) -> Any:
    names = [write_path(file) for file in files]
    return ingest.register.function(names, params=FORM | form, run_id="test", ti=results or Results())


def register_and_report(results: Results, ledger: Engine, file: Path) -> None:
    """Play a file's tasks until it has its accepted result."""
    registered = register(file)
    results.xcom_push("return_value", registered)
    finish(ledger, registered[0]["job"])
    results.xcom_push("return_value", report(registered)[0], task="report")
    results.states[f"report_{results.index}"] = "success"


def summarize(results: Results, *files: Path, **form: Any) -> None:
    ingest.summary.function(make_batches(files), params=FORM | form, run_id="test", ti=results)


def report(files: Any, **form: Any) -> tuple[Any, Any]:
    """Run `report`; returns its reports and what it tells with the asset."""

    class Event:
        extra: Any = None

    events = {ingest.FEATURES: Event()}
    reports = ingest.report.function(files, params=FORM | form, outlet_events=events)
    return reports, events[ingest.FEATURES].extra


def finish(ledger: Engine, job: int, failures: int = 0) -> None:
    """Play the workers until the job is done."""
    with ledger.begin() as tx:
        jobs.run_job(tx, job, jobs.start_worker(tx), failures)


def test_parsing_is_cheap_and_finds_the_dag_alone(tmp_path: Path) -> None:
    environment = {"AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT), "PATH": ""}
    parsed = subprocess.run(
        [sys.executable, "-c", PARSE, str(PROJECT / "dags")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(parsed.stdout.splitlines()[-1])
    assert found["errors"] == {}
    assert [Path(file).name for file in found["files"]] == ["virnucpro_ingest.py"]
    stages = {"register", "extract", "merge", "validate"}
    assert set(found["dags"]["virnucpro_ingest"]) == {"find_files", *stages, "report", "summary"}
    assert found["heavy"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"files": "reads.fasta"},
        {"files": [""]},
        {"model": 3},
        {"force": "yes"},
        {"max_failed_share": 1.1},
        {"label": "bacterial"},
    ],
)
def test_form_refuses(wrong: dict[str, Any]) -> None:
    params = copy.deepcopy(ingest.DAG.params)
    params.update(FORM)
    params.validate()
    with pytest.raises(ParamValidationError):
        params.update(wrong)


def test_form_needs_nothing_filled_in() -> None:
    assert ingest.DAG.params.validate() == FORM | {"model": None}


@settings(max_examples=30)
@given(st.integers(0, 12_000))
@example(10_000)
def test_batches_hold_every_file_once_in_few_enough_mapped_tasks(count: int) -> None:
    files = [Path(f"/in/{k}.fa") for k in range(count)]
    batches = make_batches(files)
    assert [name for batch in batches for name in batch] == [str(file) for file in files]
    assert len(batches) <= BATCHES < MAX_MAP_LENGTH
    assert count > BATCHES or all(len(batch) == 1 for batch in batches)


def test_batches_are_named_after_their_files() -> None:
    assert name_batch(["/in/reads.faa.gz"]) == "reads"
    assert name_batch(["/in/reads.faa.gz", "/in/b.fa", "/in/c.fa"]) == "reads and 2 more"


def test_inbox_is_searched_for_fasta_files(inbox: Path) -> None:
    wanted = ["a.fasta", "b.FAA.gz", "deep/er/c.fa.zst", "deep/a.fasta"]
    for name in [*wanted, "a_DNABERT_S.pt", "notes.txt", ".upload.fasta", ".hidden/d.fa", "reads.gz"]:
        write_fasta(inbox / name, "MKV")
    (inbox / "folder.fa").mkdir()
    assert find_inputs(inbox, []) == sorted(inbox / name for name in wanted)


@contextmanager
def as_nobody() -> Iterator[None]:
    """To root everything is readable: be somebody else meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_inbox() -> Iterator[Path]:
    """An inbox that `as_nobody` gets to, which pytest's own folders are too private for."""
    before = os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            (Path(folder) / "inbox").mkdir()
            yield Path(folder) / "inbox"
    finally:
        os.umask(before)


def test_what_cannot_be_read_is_refused_by_its_name_and_the_others_go_on(
    ledger: Engine,
    open_inbox: Path,
    settings_environment: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings_environment(input_roots=str(open_inbox))
    # It reads the migrations, which may lie where nobody but root comes to.
    monkeypatch.setattr("dags.connections.check_migrated", lambda ledger: None)
    good = write_fasta(open_inbox / "good.fasta", "MKVLAT")
    (closed := write_fasta(open_inbox / "deep/closed/a.fasta", "MKV").parent).chmod(0)
    (below := open_inbox / "listed/below").mkdir(parents=True)
    (listed := write_fasta(open_inbox / "listed/b.fasta", "MKV")).parent.chmod(0o444)
    write_fasta(open_inbox / ".hidden/c.fasta", "MKV").parent.chmod(0)
    with as_nobody():
        found = find_inputs(open_inbox, [])
        files = register(*found)
    assert found == [closed, good, listed, below]
    assert [file["job"] is None for file in files] == [True, False, True, True]
    assert f"Permission denied [{closed}]" in files[0]["refused"]
    assert f"Permission denied [{listed}]" in files[2]["refused"]


def test_an_inbox_that_cannot_be_read_is_an_error(open_inbox: Path) -> None:
    write_fasta(open_inbox / "a.fasta", "MKV")
    open_inbox.chmod(0)
    with as_nobody(), pytest.raises(SettingsError, match=rf"Permission denied \[{open_inbox}\].*readable"):
        find_inputs(open_inbox, [])


def test_links_to_folders_are_not_followed_and_links_to_files_are(inbox: Path, tmp_path: Path) -> None:
    outside = write_fasta(tmp_path / "outside/a.fasta", "MKV")
    inbox.mkdir(exist_ok=True)
    (inbox / "folder").symlink_to(outside.parent)
    (inbox / "folder.fasta").symlink_to(outside.parent)
    (inbox / "file.fasta").symlink_to(outside)
    with capture_logs() as lines:
        assert find_inputs(inbox, []) == [inbox / "file.fasta"]
    assert {line["folder"] for line in lines} == {str(inbox / "folder"), str(inbox / "folder.fasta")}


def test_a_link_that_leads_nowhere_is_refused_by_its_name(
    ledger: Engine, inbox: Path, tmp_path: Path
) -> None:
    (dangling := inbox / "dangling.fasta").symlink_to(tmp_path / "nowhere")
    (loop := inbox / "loop.fasta").symlink_to(loop)
    found = find_inputs(inbox, [])
    assert found == [dangling, loop]
    refused = register(*found, write_fasta(inbox / "good.fasta", "MKVLAT"))
    assert f"there is no such file [{dangling}]" in refused[0]["refused"]
    assert f"the file cannot be opened: Too many levels of symbolic links [{loop}]" in refused[1]["refused"]


def test_a_name_that_is_not_utf_8_is_refused_and_keeps_no_others_out(ledger: Engine, inbox: Path) -> None:
    folder = inbox / os.fsdecode(b"caf\xe9")
    odd = write_fasta(folder / "a.fasta", "MKV")
    (inbox / "link.fasta").symlink_to(Path("/nowhere") / odd.name / folder.name)
    found = find_inputs(inbox, [])
    good = write_fasta(inbox / "good.fasta", "MKVLAT")
    files = register(*found, good)
    assert [Path(file["path"]).name for file in files] == ["a.fasta", "link.fasta", "good.fasta"]
    assert "name is not UTF-8" in files[0]["refused"]
    assert "caf\\udce9" in files[0]["refused"]
    assert "leads out of" in files[1]["refused"]
    json.dumps(files, ensure_ascii=False).encode()
    assert files[2]["job"] is not None


def test_named_files_are_taken_once_and_from_the_inbox(inbox: Path) -> None:
    assert find_inputs(inbox, ["b.fa", "/else/a.fa", "b.fa"]) == [inbox / "b.fa", Path("/else/a.fa")]


def test_an_inbox_that_is_missing_is_an_error_and_an_empty_one_is_not(inbox: Path) -> None:
    assert ingest.find_files.function(params=FORM) == []
    with pytest.raises(SettingsError, match="VIRNUCPRO_INBOX"):
        find_inputs(inbox / "nowhere", [])


def test_registering_twice_finds_the_job_and_force_begins_a_generation(ledger: Engine, inbox: Path) -> None:
    file = write_fasta(inbox / "a.fasta", "MKVLAT", "MKW")
    first, second = register(file), register(file)
    assert first == second == [{"path": str(file), "job": first[0]["job"], "refused": ""}]
    assert in_transaction(ledger, queries.get_job, first[0]["job"]).generation == 1
    assert register(file, force=True) == first
    assert in_transaction(ledger, queries.get_job, first[0]["job"]).generation == 2


def test_a_run_that_forces_a_new_file_computes_it_once(ledger: Engine, inbox: Path) -> None:
    """Its task may be tried again after the commit, and an equal file may lie beside it."""
    file, equal = (write_fasta(inbox / name, "MKVLAT", "MKW") for name in ("a.fasta", "equal.fasta"))
    [first] = register(file, force=True)
    assert [one["job"] for one in register(file, equal, force=True)] == [first["job"]] * 2
    assert in_transaction(ledger, queries.get_job, first["job"]).generation == 1


def test_submission_says_who_asked_and_for_what(ledger: Engine, inbox: Path) -> None:
    file = write_fasta(inbox / "reads.fasta", "MKVLAT")
    (inbox / "reads_DNABERT_S.pt").write_bytes(b"nucleotides")
    [registered] = register(file, label="viral", max_failed_share=0.5)
    [submission] = in_transaction(ledger, queries.submissions_of, registered["job"])
    assert submission.nucleotide_path == str(inbox / "reads_DNABERT_S.pt")
    assert (submission.label, submission.max_failed_share) == ("viral", 0.5)
    assert submission.requested_by == "virnucpro_ingest test"


def test_a_path_is_refused_if_it_is_longer_than_the_ledger_holds(ledger: Engine, inbox: Path) -> None:
    # Nothing that could be compressed.
    deep = inbox.joinpath(*(hashlib.shake_256(bytes([k])).hexdigest(80) for k in range(7)))
    too_long = write_fasta(deep / ("x" * 200) / "a.fasta", "MKV")
    room = PATH_BYTES - len(f"{deep}/_DNABERT_S.pt")
    longest = write_fasta(deep / f"{'x' * room}.fasta", "MKVLAT")
    (deep / f"{longest.stem}_DNABERT_S.pt").write_bytes(b"nucleotides")
    refused, registered = register(too_long, longest)
    assert f"longer than {PATH_BYTES} bytes [{too_long}]" in refused["refused"]
    [submission] = in_transaction(ledger, queries.submissions_of, registered["job"])
    assert len(submission.nucleotide_path) == PATH_BYTES


def test_nucleotides_that_a_link_does_not_lead_to_are_missed(ledger: Engine, inbox: Path) -> None:
    file = write_fasta(inbox / "reads.fasta", "MKVLAT")
    (beside := inbox / "reads_DNABERT_S.pt").symlink_to(inbox / "nowhere.pt")
    with pytest.raises(InputError, match=rf"nucleotide file cannot be read: No such file.*{beside}"):
        register(file)


def test_equal_stems_are_different_jobs(ledger: Engine, inbox: Path) -> None:
    files = register(write_fasta(inbox / "one/a.fasta", "MKV"), write_fasta(inbox / "two/a.fasta", "MKW"))
    assert files[0]["job"] != files[1]["job"]


def test_a_bad_file_does_not_keep_the_others_of_its_batch_out(ledger: Engine, inbox: Path) -> None:
    bad = write_fasta(inbox / "bad.fasta")
    good = write_fasta(inbox / "good.fasta", "MKVLAT")
    refused, registered = register(bad, good)
    assert refused["job"] is None
    assert str(bad) in refused["refused"]
    assert registered["job"] is not None


def test_a_name_that_leads_out_of_the_inbox_is_refused(
    ledger: Engine, inbox: Path, tmp_path: Path, settings_environment: Callable[..., None]
) -> None:
    settings_environment(input_roots="")
    outside = write_fasta(tmp_path / "outside.fasta", "MKV")
    (inbox / "link.fasta").symlink_to(outside)
    named = find_inputs(inbox, ["link.fasta", "../outside.fasta", str(outside), "a\0b.fasta"])
    *refused, registered = register(*named, write_fasta(inbox / "good.fasta", "MKVLAT"))
    assert [file["job"] for file in refused] == [None] * 4
    assert all("leads out of" in file["refused"] for file in refused)
    assert registered["job"] is not None


def test_a_bad_file_alone_fails_its_task_with_file_and_line(ledger: Engine, inbox: Path) -> None:
    bad = inbox / "bad.fasta"
    bad.write_text("\nMKV\n>a\nMKV\n")
    with pytest.raises(InputError, match=f"{bad}, line 2"):
        register(bad)


def test_only_services_are_worth_another_attempt() -> None:
    policy = ingest.RETRIES["retry_policy"]
    assert policy.evaluate(ServiceError("down"), 1, 5).action is RetryAction.RETRY
    for error in (InputError("bad"), JobError("failed"), SettingsError("wrong"), ValueError("bug")):
        assert policy.evaluate(error, 1, 5).action is RetryAction.FAIL


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
