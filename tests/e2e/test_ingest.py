"""The DAG through Airflow's REST API, on the whole stack."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.fixtures_airflow import DAG, House, wait_until
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import cancel
from virnucpro_core.stack.airflow import ask
from virnucpro_core.stack.programs import PROJECT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_sample_becomes_published_features(house: House) -> None:
    sample = PROJECT / "samples" / "proteins.fasta"
    run = house.run(sample, max_failed_share=0.2)
    job = house.job_of(sample)
    assert job.state == "succeeded"
    assert job.embeddings + job.failed == job.records
    house.check_published(job)
    [told] = house.features_told(run)
    exported = house.published(job) / "proteins_ESM.pt"
    assert {
        "kind": "export",
        "rows": job.embeddings,
        "sha256": hashlib.sha256(exported.read_bytes()).hexdigest(),
    } in told["job"]["results"]
    assert house.waiters(job.id) == []
    tasks = house.tasks(run)
    assert {task["rendered_map_index"] for (name, index), task in tasks.items() if index == 0} == {"proteins"}

    lines = house.log_lines(job.id)
    told_by = {
        Path(name).name.split(".")[0]: found for name, found in lines.items() if name.startswith("logs/")
    }
    chunks = {row[2] for row in house.chunks(job.id).values()}
    for program in ("relay", "workers"):
        assert {line["chunk"] for line in told_by[program] if "chunk" in line} >= chunks
    events = {line["event"] for name, found in lines.items() if "airflow" in name for line in found}
    said = (
        "the file is ",
        *(f"{stage} is done: " for stage in ("extract", "merge", "validate")),
        "the result is accepted",
    )
    assert [text for text in said if not any(event.startswith(text) for event in events)] == []

    before = house.chunks(job.id)
    house.run(sample, max_failed_share=0.2)
    assert house.chunks(job.id) == before, "a second run recomputed something"


def test_every_bad_record_becomes_a_failure_and_every_good_one_a_row(house: House, tmp_path: Path) -> None:
    good = b"MKVLATGGSWYHRENDQPCFI"
    fates: list[tuple[bytes, str]] = [
        (b">good1 first\n" + good + b"\n", "good1"),
        (b">\n" + good + b"\n", "no_id"),
        (b">   \n" + good + b"\n", "no_id"),
        (b">wrapped\r\nMKVLA\r\ntggsw\r\n", "wrapped"),
        (b">empty\n", "empty"),
        (b">star\n" + good + b"*\n", "star"),
        (b">only_star\n*\n", "empty"),
        (b">nul\nMKV\x00LAT\n", "invalid_residue"),
        (b">digits\nMKV12LAT\n", "invalid_residue"),
        (b">unknown\nMKJOBZ\n", "unknown"),
        (b">caf\xe9 latin-1\n" + good + b"\n", "bad_header"),
        (b">same\n" + good + b"\n", "same"),
        (b">same\n" + good[::-1] + b"\n", "same"),
        (b">giant\n" + good * 250_000 + b"\n", "giant"),
        (b">last\n" + good, "last"),
    ]
    file = tmp_path / "bad_records.fasta"
    file.write_bytes(b"".join(record for record, _ in fates))
    house.run(file, max_failed_share=1)
    job = house.job_of(file)
    reasons = {"no_id", "empty", "invalid_residue", "bad_header"}
    failures = [(k, fate) for k, (_, fate) in enumerate(fates, start=1) if fate in reasons]
    with house.ledger.connect() as tx:
        assert [(failure.record, failure.reason) for failure in queries.failures_of(tx, job.id)] == failures
    assert (job.records, job.embeddings, job.failed) == (
        len(fates),
        len(fates) - len(failures),
        len(failures),
    )
    assert job.truncated == 1
    assert house.check_published(job)["proteins"] == [fate for _, fate in fates if fate not in reasons]
    lines = (house.published(job) / "bad_records.failures.jsonl").read_text().splitlines()
    assert [(line["record"], line["reason"]) for line in map(json.loads, lines)] == failures


def test_clear_recomputes_nothing_but_what_was_deleted(house: House, proteins: Path) -> None:
    run = house.run(proteins)
    job = house.job_of(proteins)
    before = house.chunks(job.id)
    assert len(house.chunks(job.id, "extract")) > 2
    features = (house.published(job) / "proteins_ESM.pt").read_bytes()

    house.clear(run, "extract")
    house.wait_for_task(run, "extract", "success", attempt=2)
    assert house.wait_for_run(run) == "success"
    assert house.chunks(job.id) == before, "clearing a finished file recomputed something"

    lost = in_transaction(house.ledger, queries.artifacts_of, job.id, stage="extract")[1]
    (house.output / lost.path).unlink()
    house.clear(run, "extract")
    house.wait_for_task(run, "extract", "success", attempt=3)
    wait_until(lambda: house.job_of(proteins).state == "succeeded")
    # Airflow loses a Clear that comes in the moment in which it ends the run.
    assert house.wait_for_run(run) == "success"
    after = house.chunks(job.id)
    extracted = {place for place in before if place[0] == "extract"}
    assert {place for place in extracted if after[place] != before[place]} == {("extract", 1)}
    assert house.job_of(proteins).generation == 1
    published = house.published(job) / "proteins_ESM.pt"
    assert published.read_bytes() == features

    published.unlink()
    house.clear(run, "validate")
    house.wait_for_task(run, "validate", "success", attempt=2)
    assert published.read_bytes() == features
    assert {place: house.chunks(job.id)[place] for place in extracted} == {
        place: after[place] for place in extracted
    }, "publishing again recomputed a chunk"


def test_force_computes_anew_behind_a_result_that_is_always_there(house: House, proteins: Path) -> None:
    house.run(proteins)
    job = house.job_of(proteins)
    path = house.published(job) / "proteins_ESM.pt"
    stop = threading.Event()
    seen: Counter[tuple[int, str]] = Counter()
    faults: list[OSError] = []

    def watch() -> None:
        while not stop.wait(0.002):
            try:
                with path.open("rb") as file:
                    seen[os.fstat(file.fileno()).st_ino, hashlib.sha256(file.read()).hexdigest()] += 1
            except OSError as error:
                faults.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        house.run(proteins, force=True)
    finally:
        stop.set()
        watcher.join()
    assert faults == []
    assert house.job_of(proteins).generation == 2
    files, contents = ({pair[k] for pair in seen} for k in (0, 1))
    assert len(files) == 2, "the file was replaced once"
    assert len(contents) == 1, "both generations are of one execution class, so all that was read is complete"
    house.check_published(house.job_of(proteins))


def test_clear_and_mark_failed_while_waiting_touch_their_own_wait_alone(house: House, proteins: Path) -> None:
    with house.relay_at_rest():
        run = house.trigger(proteins)
        house.wait_for_task(run, "extract", "deferred", attempt=1)
        job = house.job_of(proteins)
        [first] = house.waiters(job.id)

        house.clear(run, "extract")
        house.wait_for_task(run, "extract", "deferred", attempt=2)
        # the old trigger's on_kill comes after the new attempt entered its row, and leaves that alone
        wait_until(lambda: first not in house.waiters(job.id))
        [second] = house.waiters(job.id)

        other = house.trigger(proteins)
        house.wait_for_task(other, "extract", "deferred", attempt=1)
        patch = f"{DAG}/dagRuns/{run}/taskInstances/extract/0"
        ask(house.airflow, "PATCH", patch, new_state="failed")
        wait_until(lambda: second not in house.waiters(job.id))
        assert len(house.waiters(job.id)) == 1
        assert house.job_of(proteins).state == "running"
    assert house.wait_for_run(run) == "failed"
    assert house.wait_for_run(other) == "success"
    house.check_published(house.job_of(proteins))


def test_clear_resumes_what_a_person_cancelled(house: House, proteins: Path) -> None:
    with house.relay_at_rest():
        run = house.trigger(proteins)
        house.wait_for_task(run, "extract", "deferred", attempt=1)
        in_transaction(house.ledger, cancel, house.job_of(proteins).id, by="a person")
        assert house.wait_for_run(run) == "failed"
        house.clear(run, "extract")
        house.wait_for_task(run, "extract", "deferred", attempt=2)
        assert house.job_of(proteins).state == "running"
    wait_until(lambda: house.job_of(proteins).state == "succeeded")
    house.wait_for_run(run)


def test_clear_of_a_file_that_was_accepted_fails_the_run_if_it_is_bad_now(
    house: House, proteins: Path
) -> None:
    run = house.run(proteins)
    proteins.write_text("")
    house.clear(run, "register", downstream=True)
    assert house.wait_for_run(run) == "failed", house.states(run)
    assert house.states(run)["report", 0] == "upstream_failed"
    assert f"{proteins}: the file is empty" in house.log(run, "summary", attempt=2)


def test_inbox_that_is_away_is_told_by_the_summary(house: House) -> None:
    house.inbox.rename(away := house.inbox.with_name("away"))
    try:
        run = house.trigger()
        assert house.wait_for_run(run) == "failed"
    finally:
        away.rename(house.inbox)
    assert "the run could not look for its files [find_files]" in house.log(run, "summary")


def test_inbox_with_a_bad_file_gives_the_good_ones_and_names_the_bad_one(
    house: House, proteins: Path
) -> None:
    empty_run = house.trigger(logical_date=datetime.now(UTC) - timedelta(days=1))
    assert house.wait_for_run(empty_run) == "success"
    house.wait_for_notice(empty_run, "is late")

    one, two, bad = (house.inbox / name for name in ("a/reads.fasta", "b/reads.fasta", "c/nothing.fasta"))
    records = proteins.read_text().split(">")[1:]
    for path, content in ((one, records[:3]), (two, records[3:6]), (bad, [])):
        path.parent.mkdir()
        path.write_text("".join(f">{record}" for record in content))
    odd = house.inbox / os.fsdecode(b"d/caf\xe9.fasta")
    odd.parent.mkdir()
    odd.write_bytes(one.read_bytes())
    run = house.trigger()
    assert house.wait_for_run(run) == "failed"
    house.wait_for_notice(run, "failed")
    folders = {house.published(house.job_of(path)) for path in (one, two)}
    assert len(folders) == 2, "equal stems collided"
    for path in (one, two):
        house.check_published(house.job_of(path))
    assert {file["path"] for file in house.features_told(run)} == {str(one), str(two)}
    states = house.states(run)
    assert [states["register", k] for k in range(4)] == ["success", "success", "failed", "failed"]
    assert states["summary", -1] == "failed"
    assert house.tasks(run)["register", 2]["try_number"] == 1, "an input error was tried again"
    log = house.log(run, "summary")
    assert f"{bad}: the file is empty" in log, "the summary names the file, and says why"
    assert "a file's name is not UTF-8" in log
    tab = house.airflow.get(
        house.airflow.base_url.copy_with(path="/virnucpro/run"), params={"run_id": run}
    ).text
    assert [str(path) in tab for path in (one, two, bad)] == [True] * 3
    assert f"/runs/{quote(run, safe='')}/tasks/register/mapped/2" in tab, (
        "nothing leads to the bad file's task"
    )

    for path in (bad, odd):
        path.unlink()
    house.clear(run, "find_files", downstream=True)
    assert house.wait_for_run(run) == "success", "what is not in the inbox any more is still told of"
