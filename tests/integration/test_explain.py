"""One record's story: what its setbacks, its chunk, its workers and its files say, on a real ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sqlalchemy import Connection, Engine, text

from tests import ledger_jobs as jobs
from virnucpro_core.ledger import suspects, transitions, workers
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.ledger.queries import artifacts_of
from virnucpro_core.ledger.setbacks import attempts_on

if TYPE_CHECKING:
    from tests.fixtures_command import Completed
    from tests.fixtures_pipeline import Pipeline

    Command = Callable[..., Completed]

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_command"]


def outcomes(tx: Connection, job: int, record: int) -> list[tuple[int, str, str | None]]:
    return [(one.attempt, one.outcome, one.error) for one in attempts_on(tx, job, "extract", record)]


def test_every_way_an_attempt_can_end_is_kept(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan(chunks=2)).job_id
    chunk, other = jobs.pending_chunks(tx, job)
    worker = jobs.start_worker(tx)

    transitions.fail(tx, jobs.claim(tx, chunk, worker), "no space left", max_attempts=9)
    jobs.claim(tx, chunk, worker)
    workers.retire_worker(tx, worker)
    worker = jobs.start_worker(tx)
    jobs.claim(tx, chunk, worker)
    workers.take_back(tx, worker, "its worker fell silent", max_attempts=9)
    jobs.claim(tx, chunk, jobs.start_worker(tx))
    cancel(tx, job, by="a person")
    resume(tx, job)
    worker = jobs.start_worker(tx)
    claimed = jobs.claim(tx, chunk, worker)
    transitions.complete(tx, claimed, jobs.result_of(claimed))
    resume(tx, job, [artifacts_of(tx, job)[0].id])
    jobs.claim(tx, chunk, worker)

    assert outcomes(tx, job, 3) == [
        (1, "failed", "no space left"),
        (2, "handed_back", "its worker was stopped"),
        (2, "died", "its worker fell silent"),
        (3, "cancelled", "cancelled by a person"),
        (1, "lost", "its artifact was lost"),
        (1, "running", None),
    ]
    assert outcomes(tx, job, 11) == [], "the other chunk's"
    assert other in jobs.pending_chunks(tx, job)


def test_half_of_a_chunk_keeps_the_history_of_the_whole(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan(chunks=1)).job_id
    (chunk,) = jobs.pending_chunks(tx, job)
    worker = jobs.start_worker(tx)
    for _ in range(2):
        suspects.break_down(tx, jobs.claim(tx, chunk, worker), "CUDA error", max_attempts=9)
    claimed = jobs.claim(tx, chunk, worker)
    suspects.split(tx, claimed, jobs.halves_of(claimed))
    for record in (1, 10):
        assert [outcome for _, outcome, _ in outcomes(tx, job, record)] == ["died", "died", "halved"]
    ended = {one.records for one in attempts_on(tx, job, "extract", 1)}
    assert ended == {10}, "the halves have not been claimed yet"


def test_lease_that_passed_on_leaves_no_setback(ledger: Engine) -> None:
    in_transaction(ledger, jobs.add_model)
    job = in_transaction(ledger, jobs.register, jobs.scan(chunks=1)).job_id
    (chunk,) = in_transaction(ledger, jobs.pending_chunks, job)
    stale = in_transaction(ledger, jobs.claim, chunk, in_transaction(ledger, jobs.start_worker))
    in_transaction(ledger, jobs.claim, chunk, in_transaction(ledger, jobs.start_worker))
    for end in (transitions.fail, suspects.break_down):
        with pytest.raises(transitions.StaleLeaseError):
            in_transaction(ledger, end, stale, "too late", max_attempts=9)
    errors = [error for _, _, error in in_transaction(ledger, outcomes, job, 1)]
    assert errors == ["the worker was replaced", None]


def test_setbacks_go_with_their_generation(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan(chunks=1)).job_id
    worker = jobs.start_worker(tx)
    transitions.fail(
        tx, jobs.claim(tx, jobs.pending_chunks(tx, job)[0], worker), "no space left", max_attempts=9
    )
    jobs.register(tx, jobs.scan(chunks=1), force=True)
    assert outcomes(tx, job, 1) == []
    jobs.run_job(tx, job, worker)
    assert tx.execute(text("SELECT count(*) FROM setbacks")).scalar_one() == 0


def test_story_of_a_record_from_the_queue_to_its_row(
    pipeline: Pipeline,
    virnucpro: Command,
    small_fasta: Path,
    nucleotides: Path,
    run_chunks: Callable[[str], None],
) -> None:
    pipeline.configure(export_rows=4)
    job = pipeline.submit(small_fasta, nucleotides=nucleotides).job_id
    wrong = nucleotides.with_name("wrong_DNABERT_S.pt")
    entry = {"label": "x", "mean_representation": [0.0] * 768}
    torch.save({"nucleotide": ["x"], "data": [entry]}, wrong)
    pipeline.submit(small_fasta, nucleotides=wrong)

    def explain(record: object) -> Any:
        return virnucpro("explain", job, record, "--json").json()

    (story,) = explain(8)
    assert (story["outcome"], story["attempts"], story["row"]) == ("waiting", [], None)
    assert story["id"] == "protein_6", "read from the input, as long as there is no result"
    assert [one["record"] for one in explain("protein_3")] == [4, 5]
    assert "No worker has claimed it yet." in virnucpro("explain", job, 8).out

    silent = in_transaction(pipeline.ledger, jobs.start_worker, "silent@test")
    in_transaction(pipeline.ledger, jobs.claim, story["chunk"]["id"], silent)
    in_transaction(pipeline.ledger, workers.take_back, silent, "its worker fell silent", max_attempts=4)
    in_transaction(pipeline.ledger, workers.retire_worker, silent)
    # Its class is not a real one's.
    in_transaction(
        pipeline.ledger,
        lambda tx: tx.execute(text("UPDATE jobs SET execution_class = NULL, execution = NULL")),
    )
    run_chunks("extract")
    run_chunks("merge")
    run_chunks("validate")

    (story,) = explain(8)
    assert (story["outcome"], story["row"], story["failure"]) == ("embedded", 6, None)
    assert [(one["outcome"], one["node"]) for one in story["attempts"]] == [
        ("died", "silent@test"),
        ("done", "extract@test"),
    ]
    assert story["in_input"] == {"id": "protein_6", "residues": 180, "computed": 180, "unknown": 0}
    assert (story["recipe"]["dtype"], story["execution"]["device"]) == ("float32", "cpu")
    place, merged, other = story["places"]
    assert (Path(place["path"]).name, place["row"]) == ("small_ESM.00002-of-00003.pt", 2)
    published = torch.load(pipeline.settings.output_root / place["path"], weights_only=True)
    assert published["proteins"][place["row"]] == "protein_6"
    assert (Path(merged["path"]).name, Path(other["path"]).name) == (
        "small_merged.pt",
        Path(place["path"]).name,
    )
    published = torch.load(pipeline.settings.output_root / merged["path"], weights_only=True)
    assert published["ids"][merged["row"]] == "protein_6"
    (untold,) = story["untold"]
    assert untold.startswith("its row in small_merged.pt: ")
    assert "the two sides do not match" in untold

    told = virnucpro("explain", job, "digits").out
    assert "failed, invalid_residue: '1' at residue 4 is not an amino acid" in told
    assert [one["row"] for one in explain("protein_3")] == [3, 4]
    for wanted in ("protein_99", 13, 0, "9" * 5000):
        ended = virnucpro("explain", job, wanted)
        assert (ended.code, f"job {job} has no record" in ended.err) == (1, True)
    assert "there is no job 99" in virnucpro("explain", 99, 1).err

    small_fasta.unlink()
    (story,) = explain("protein_6")
    assert (story["id"], story["record"], story["in_input"]) == ("protein_6", 8, None)
    assert "the input cannot be read" in story["untold"][0]


def test_record_of_a_job_that_stopped_does_not_wait(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path
) -> None:
    job = pipeline.submit(small_fasta).job_id

    def outcome() -> str:
        told: str = virnucpro("explain", job, 8, "--json").json()[0]["outcome"]
        return told

    assert outcome() == "waiting"
    virnucpro("cancel", job)
    assert outcome() == "stopped"
    told = virnucpro("explain", job, 8).out
    assert f"stopped: the job is cancelled; `virnucpro retry {job}` goes on with it" in told
    virnucpro("retry", job)
    assert outcome() == "waiting"
    chunk = virnucpro("explain", job, 8, "--json").json()[0]["chunk"]["id"]

    def fail(tx: Connection) -> None:
        claimed = jobs.claim(tx, chunk, jobs.start_worker(tx))
        transitions.fail(tx, claimed, "the input was replaced", max_attempts=4, permanent=True)

    in_transaction(pipeline.ledger, fail)
    assert outcome() == "stopped"
    assert "the job is failed" in virnucpro("explain", job, 8).out


def test_ids_that_look_like_numbers_are_found(pipeline: Pipeline, virnucpro: Command, tmp_path: Path) -> None:
    fasta = tmp_path / "inbox" / "numbers.fasta"
    fasta.write_text(">1000042\nMKVLAG\n>1\nMKVLAGI\n>x\nMKVLA\n")
    job = pipeline.submit(fasta).job_id

    def records(*arguments: object) -> list[int]:
        return [one["record"] for one in virnucpro("explain", job, *arguments, "--json").json()]

    assert records(1000042) == [1]
    assert records(1) == [1]
    assert records(1, "--id") == [2]
    ended = virnucpro("explain", job, 3, "--id")
    assert (ended.code, "no record with the id '3'" in ended.err) == (1, True)
