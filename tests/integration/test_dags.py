"""The DAG: cheap to parse, a form that refuses nonsense, files that are registered on a real ledger."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import RetryAction
from airflow.sdk.exceptions import ParamValidationError
from sqlalchemy import Engine

from dags import virnucpro_ingest as ingest
from dags.inbox import find_inputs
from tests.dag_tasks import FORM, register, write_fasta
from virnucpro_core.errors import InputError, JobError, ServiceError, SettingsError
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.submissions import PATH_BYTES
from virnucpro_core.stack.programs import PROJECT

pytest_plugins = ["tests.fixtures_dags"]

pytestmark = pytest.mark.integration

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
