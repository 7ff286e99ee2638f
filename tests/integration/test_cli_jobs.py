"""The commands on jobs, against a real ledger; where a job has to run, with real workers."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from sqlalchemy import Connection, text

from tests import ledger_jobs
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import cancel
from virnucpro_core.ledger.queries import submissions_of

if TYPE_CHECKING:
    from tests.fixtures_command import Completed
    from tests.fixtures_pipeline import Pipeline

    Command = Callable[..., Completed]

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_command"]

MODEL = "tiny"


def submit(virnucpro: Command, *arguments: object) -> dict[str, object]:
    (told,) = virnucpro("submit", *arguments, "--model", MODEL, "--json").json()
    assert isinstance(told, dict)
    return told


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_no_name_of_a_file_commands_the_terminal(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path
) -> None:
    hostile = small_fasta.rename(small_fasta.with_name("a\x1b[2J\u202eb\x9b2J.fasta"))
    escaped = "a\\x1b[2J\\u202eb\\x9b2J"
    ended = [virnucpro("submit", hostile, "--model", MODEL), virnucpro("estimate", hostile)]
    ended += [virnucpro("status", *options) for options in ([], [1], ["--watch"])]
    ended += [virnucpro("explain", 1, 1), virnucpro("report", 1, "-o", f"{hostile}.html")]
    hostile.rename(small_fasta)
    ended.append(virnucpro("submit", hostile, "--model", MODEL))
    assert [one.code for one in ended] == [0] * 7 + [3]
    for one in ended:
        assert escaped in one.out + one.err
        assert (one.out + one.err).replace("\n", "").isprintable()


def test_submitting_twice_registers_one_job(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path
) -> None:
    first = submit(virnucpro, small_fasta)
    again = submit(virnucpro, small_fasta, "--max-failed-share", 0.5)
    assert (first["created"], again["created"]) == (True, False)
    assert first["job"] == again["job"]
    (row,) = pipeline.rows("SELECT path, stem, requested_by, max_failed_share FROM submissions")
    assert (row.path, row.stem, row.max_failed_share) == (str(small_fasta), "small", 0.5)
    assert row.requested_by
    listed = virnucpro("status", "--json").json()
    assert [(job["job"], job["stem"], job["state"]) for job in listed] == [(first["job"], "small", "running")]


def test_submit_needs_a_registered_model(pipeline: Pipeline, virnucpro: Command, small_fasta: Path) -> None:
    ended = virnucpro("submit", small_fasta)
    assert (ended.code, "no model is named" in ended.err) == (2, True)
    ended = virnucpro("submit", small_fasta, "--model", "other")
    assert (ended.code, "'other'" in ended.err) == (4, True)
    assert pipeline.rows("SELECT 1 FROM jobs") == []


def test_a_bad_file_does_not_keep_others_from_being_submitted(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path
) -> None:
    missing = small_fasta.with_name("missing.fasta")
    ended = virnucpro("submit", missing, small_fasta, "--model", MODEL, "--json")
    assert ended.code == 3
    assert str(missing) in ended.err
    assert [told["file"] for told in json.loads(ended.out)] == [str(small_fasta)]


def test_a_bad_file_does_not_hide_what_became_of_the_others(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel_all(_: float) -> None:
        for job in pipeline.rows("SELECT id FROM jobs"):
            in_transaction(pipeline.ledger, cancel, job.id, by="somebody")

    monkeypatch.setattr("virnucpro_core.cli.submissions.time.sleep", cancel_all)
    missing = small_fasta.with_name("missing.fasta")
    ended = virnucpro("submit", missing, small_fasta, "--model", MODEL, "--wait")
    assert ended.code == 3
    assert str(missing) in ended.err
    assert "cancelled" in ended.err
    assert virnucpro("submit", small_fasta, "--model", MODEL, "--wait").code == 1


def test_label_and_nucleotides_reach_the_submission(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path, tmp_path: Path
) -> None:
    nucleotides = tmp_path / "elsewhere_DNABERT_S.pt"
    nucleotides.write_bytes(b"checked when it is merged")
    submit(virnucpro, small_fasta, "--label", "viral", "--nucleotides", nucleotides)
    (row,) = pipeline.rows("SELECT label, nucleotide_path FROM submissions")
    assert (row.label, row.nucleotide_path) == ("viral", str(nucleotides))
    ended = virnucpro("submit", small_fasta, "--model", MODEL, "--nucleotides", tmp_path / "missing.pt")
    assert (ended.code, "missing.pt" in ended.err) == (3, True)


def test_cancel_and_retry(pipeline: Pipeline, virnucpro: Command, small_fasta: Path) -> None:
    job = submit(virnucpro, small_fasta)["job"]
    assert virnucpro("cancel", job).code == 0
    assert virnucpro("status", job, "--json").json()["state"] == "cancelled"
    ended = virnucpro("cancel", job)
    assert (ended.code, "is over: cancelled" in ended.err) == (1, True)
    told = virnucpro("retry", job, "--json").json()
    assert told["lost"] == 0
    assert told["waiting"] == told["chunks"] > 1
    assert virnucpro("status", job, "--json").json()["state"] == "running"


@pytest.mark.parametrize("command", ["status", "failures", "retry", "cancel", "verify"])
def test_unknown_job(command: str, pipeline: Pipeline, virnucpro: Command) -> None:
    ended = virnucpro(command, 99)
    assert ended.code == 1
    assert "there is no job 99" in ended.err


def test_status_says_when_nobody_works(pipeline: Pipeline, virnucpro: Command, small_fasta: Path) -> None:
    assert virnucpro("status").err == ""
    submit(virnucpro, small_fasta)
    assert "No worker is running" in virnucpro("status").err
    in_transaction(pipeline.ledger, ledger_jobs.start_worker)
    assert virnucpro("status").err == ""


def test_weights_are_registered_relative_to_the_model_root(
    pipeline: Pipeline, virnucpro: Command, tmp_path: Path
) -> None:
    root = pipeline.settings.model_root
    told = virnucpro("weights", "add", "mine", root / MODEL, "--json").json()
    assert (told["name"], told["layers"]) == ("mine", 1)
    pipeline.configure(model_root=tmp_path)
    assert virnucpro("weights", "add", "far", root / MODEL).code == 0
    listed = {model["name"]: model["folder"] for model in virnucpro("weights", "show", "--json").json()}
    assert listed == {MODEL: MODEL, "mine": MODEL, "far": str(root / MODEL)}
    assert virnucpro("weights", "show", "mine", "--json").json()["sha256"] == told["sha256"]
    ended = virnucpro("weights", "show", "unknown")
    assert (ended.code, "'unknown'" in ended.err) == (4, True)


def test_a_name_keeps_its_weights(pipeline: Pipeline, virnucpro: Command, tmp_path: Path) -> None:
    virnucpro("weights", "demo", tmp_path / "other", "--layers", 1, "--seed", 5)
    ended = virnucpro("weights", "add", MODEL, tmp_path / "other")
    assert ended.code == 4
    assert "stands for other weights" in ended.err


def test_a_verdict_reaches_the_ledger(pipeline: Pipeline, virnucpro: Command, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline.settings.model_root / MODEL, tmp_path / "copy")
    assert virnucpro("weights", "show", MODEL, "--json").json()["selftest"] == "not run"
    ended = virnucpro("selftest", "--model", folder, "--device", "cpu")
    assert (ended.code, ended.out.count("[PASS]"), ended.err) == (0, 11, "")
    assert virnucpro("weights", "show", MODEL, "--json").json()["selftest"] == "float32 passed"
    virnucpro("weights", "add", "again", folder)
    assert virnucpro("weights", "show", "again", "--json").json()["selftest"] == "float32 passed"


def test_upgrade_makes_a_schema_and_is_harmless_again(
    virnucpro: Command, database_url: str, settings_environment: Callable[..., None]
) -> None:
    settings_environment(owner_database_url=database_url, dag_database_url=database_url)
    assert virnucpro("status").code == 5
    for _ in range(2):
        ended = virnucpro("db", "upgrade")
        assert (ended.code, "is up to date" in ended.out) == (0, True)
    assert virnucpro("status", "--json").json() == []


def test_interrupted_wait_leaves_the_job_running(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("virnucpro_core.cli.submissions.time.sleep", interrupt)
    ended = virnucpro("submit", small_fasta, "--model", MODEL, "--wait")
    assert ended.code == 130
    assert "The jobs go on" in ended.err
    assert [job["state"] for job in virnucpro("status", "--json").json()] == ["running"]


def test_nucleotides_of_another_file_with_the_same_content_fail_that_file_alone(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path
) -> None:
    copy = Path(shutil.copy(small_fasta, small_fasta.with_name("copy.fasta")))
    job = pipeline.submit(small_fasta).job_id
    pipeline.submit(copy)

    def finish(tx: Connection) -> None:
        ledger_jobs.run_job(tx, job, ledger_jobs.start_worker(tx))
        tx.execute(
            text("UPDATE submissions SET error = 'ids do not match' WHERE path = :path"), {"path": str(copy)}
        )

    in_transaction(pipeline.ledger, finish)
    options = ("--model", MODEL, "--wait")
    assert virnucpro("submit", small_fasta, *options).code == 0
    ended = virnucpro("submit", copy, *options)
    assert (ended.code, "nucleotides were not merged: ids do not match" in ended.err) == (1, True)


def test_job_from_submission_to_repair(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path, tmp_path: Path
) -> None:
    """One job as a person meets it: waited for, judged, verified, damaged, mended, forced."""
    ids = ["protein_0", "protein_1", "protein_2", "protein_3", "protein_3", "empty"]
    ids += [*(f"protein_{k}" for k in range(5, 10)), "digits"]
    entries = [{"label": id_, "mean_representation": [float(k)] * 768} for k, id_ in enumerate(ids)]
    torch.save({"nucleotide": ids, "data": entries}, small_fasta.with_name("small_DNABERT_S.pt"))
    pipeline.start_relay()
    pipeline.start_workers()
    accepted = virnucpro(
        "submit", small_fasta, "--model", MODEL, "--wait", "--max-failed-share", 0.2, "--json"
    )
    (told,) = accepted.json()
    job = told["job"]
    assert (told["state"], told["records"], told["embeddings"]) == ("succeeded", 12, 10)
    assert told["failures"] == {"empty": 1, "invalid_residue": 1}

    # known by now, and judged by the share that is allowed
    ended = virnucpro("submit", small_fasta, "--model", MODEL, "--wait", "--max-failed-share", 0.1)
    assert ended.code == 1
    assert "16.67% of job" in ended.err
    status = virnucpro("status", job).out
    assert "1 empty, 1 invalid_residue (16.67%)" in status
    assert "RANDOM" in status
    assert "tokens/s per worker:" in status

    row = pipeline.job(job)
    root = pipeline.settings.output_root
    submission = in_transaction(pipeline.ledger, submissions_of, job)[-1]
    folder = root / submission.folder(row.input_sha256, row.recipe_sha256)
    assert f"published:   {folder}\n" in status
    assert f"report:      {folder / 'small.report.html'}\n" in status
    verified = virnucpro("verify", job, "--json").json()
    artifacts = pipeline.rows("SELECT path, stage FROM artifacts ORDER BY id")
    published = sorted(path.name for path in folder.iterdir())
    assert published == [
        "small.failures.jsonl",
        "small.manifest.json",
        "small.report.html",
        "small_ESM.pt",
        "small_merged.pt",
    ]
    assert (verified["passed"], verified["files"]) == (True, len(artifacts) + len(published))

    # a chunk that cannot be read may be intact: it is told, and nothing is done
    damaged = next(artifact.path for artifact in artifacts if artifact.stage == "extract")
    (root / damaged).rename(root / "aside")
    (root / damaged).symlink_to(root / damaged)
    ended = virnucpro("verify", job)
    assert (ended.code, f"{damaged}: it cannot be read" in ended.out) == (6, True)
    ended = virnucpro("retry", job, "--verify")
    assert (ended.code, "nothing was changed" in ended.err) == (5, True)
    assert pipeline.job(job).state == "succeeded"
    (root / "aside").replace(root / damaged)

    # a flipped byte in a chunk, and a published file gone
    flip_byte(root / damaged)
    (folder / "small_ESM.pt").unlink()
    ended = virnucpro("verify", job)
    assert ended.code == 6
    assert f"{damaged}: its sha256 is " in ended.out
    assert f"{folder.relative_to(root)}/small_ESM.pt: it is missing" in ended.out
    before = {row.id for row in pipeline.rows("SELECT id FROM artifacts WHERE stage = 'extract'")}
    told = virnucpro("retry", job, "--verify", "--json").json()
    assert told["lost"] == 1
    pipeline.wait_for(job)
    assert virnucpro("verify", job).code == 0
    after = {row.id for row in pipeline.rows("SELECT id FROM artifacts WHERE stage = 'extract'")}
    assert len(before - after) == 1

    # a published file that is gone is noticed without reading, and nothing is extracted for it
    (folder / "small_merged.pt").unlink()
    told = virnucpro("retry", job, "--json").json()
    assert (told["lost"], told["waiting"]) == (0, 1)
    pipeline.wait_for(job)
    assert virnucpro("verify", job).code == 0
    assert {row.id for row in pipeline.rows("SELECT id FROM artifacts WHERE stage = 'extract'")} == after

    # force: a new generation, and the published file is there at every moment
    seen: list[bool] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append((folder / "small_ESM.pt").is_file())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        forced = ("submit", small_fasta, "--model", MODEL, "--wait", "--force", "--max-failed-share", 0.2)
        (told,) = virnucpro(*forced, "--json").json()
    finally:
        done.set()
        watcher.join()
    assert (told["job"], told["generation"], told["created"]) == (job, 2, False)
    assert seen
    assert all(seen)
    assert virnucpro("verify", job).code == 0
