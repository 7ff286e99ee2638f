"""Workers as Celery processes, from a registered file to a published result."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
import torch

from virnucpro_core.features.exports import read_pt
from virnucpro_core.features.manifests import find_faults, read_manifest
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import submissions_of
from virnucpro_core.ledger.retention import remove_chunks
from virnucpro_core.settings import load_settings
from workers.app import make_app

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline"]

RECORDS, FAILURES = 12, 2
IDS = [
    "protein_0",
    "protein_1",
    "protein_2",
    "protein_3",
    "protein_3",
    *(f"protein_{k}" for k in range(5, 10)),
]


def test_registered_file_is_extracted_merged_validated_and_published(
    pipeline: Pipeline, small_fasta: Path
) -> None:
    pipeline.start_relay()
    pipeline.start_workers()
    submitted = pipeline.submit(small_fasta)
    assert submitted.chunks > 3
    job = pipeline.wait_for(submitted.job_id)
    assert (job.state, job.error) == ("succeeded", None)
    assert (job.records, job.embeddings, job.failed) == (RECORDS, RECORDS - FAILURES, FAILURES)

    folder = pipeline.published(job.id)
    ids, rows = read_pt(folder / "small_ESM.pt")
    assert ids == IDS
    assert all(row.shape == (1280,) and row.isfinite().all() and row.any() for row in rows)
    assert not torch.equal(rows[3], rows[4])
    manifest = read_manifest(folder / "small.manifest.json")
    assert find_faults(manifest, folder) == []
    assert manifest.input_sha256 == hashlib.sha256(small_fasta.read_bytes()).hexdigest()
    assert manifest.recipe.demonstration
    assert manifest.execution["dtype"] == "float32"
    listed = [json.loads(line) for line in (folder / "small.failures.jsonl").read_text().splitlines()]
    assert [(line["record"], line["id"], line["reason"]) for line in listed] == [
        (6, "empty", "empty"),
        (12, "digits", "invalid_residue"),
    ]
    assert pipeline.rows("SELECT * FROM outbox") == []
    assert pipeline.rows("SELECT * FROM chunks WHERE state <> 'done'") == []
    assert list(pipeline.settings.output_root.rglob("*.tmp")) == []
    assert pipeline.rows("SELECT published_generation FROM submissions")[0].published_generation == 1


@pytest.fixture
def long_fasta(tmp_path: Path) -> Path:
    """Twelve proteins of 900 residues: with the tests' chunk size a chunk each, of about a second."""
    path = tmp_path / "inbox" / "long.fasta"
    path.write_text("".join(f">p{k}\n{'MKVLAGICDEFHNPQRSTWY' * 45}\n" for k in range(12)))
    return path


def test_forced_generation_replaces_the_result_and_merges_nucleotides(
    pipeline: Pipeline, small_fasta: Path, nucleotides: Path
) -> None:
    pipeline.start_relay()
    pipeline.start_workers()
    job = pipeline.wait_for(pipeline.submit(small_fasta).job_id)
    folder = pipeline.published(job.id)
    export = folder / "small_ESM.pt"
    first = export.read_bytes()
    assert not (folder / "small_merged.pt").exists()

    pipeline.submit(small_fasta, nucleotides=nucleotides, label="viral", force=True)
    with export.open("rb") as reader:
        job = pipeline.wait_for(job.id)
        assert reader.read() == first
    assert (job.state, job.generation) == ("succeeded", 2)
    assert export.read_bytes() == first
    merged = torch.load(pipeline.published(job.id, 1) / "small_merged.pt", weights_only=True)
    assert merged["ids"] == IDS
    assert merged["labels"] == [1]
    assert merged["data"].shape == (len(IDS), 2048)
    assert merged["data"][:, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    generations = pipeline.settings.output_root / "jobs" / f"{job.id:08d}"
    pipeline.wait_until(lambda: [path.name for path in generations.iterdir()] == ["g2"])


def test_late_nucleotides_need_no_chunks_and_wrong_ones_harm_nobody(
    pipeline: Pipeline, small_fasta: Path, nucleotides: Path, tmp_path: Path
) -> None:
    pipeline.start_relay()
    pipeline.start_workers()
    job_id = pipeline.submit(small_fasta).job_id
    pipeline.wait_for(job_id)
    first = (pipeline.published(job_id) / "small_ESM.pt").read_bytes()
    assert in_transaction(pipeline.ledger, remove_chunks, job_id, pipeline.settings.output_root) > 3
    ran = pipeline.rows("SELECT id, claimed_at FROM chunks WHERE stage = 'extract' ORDER BY id")

    wrong = tmp_path / "wrong_DNABERT_S.pt"
    entries = [{"label": "x", "mean_representation": [0.0] * 768}]
    torch.save({"nucleotide": ["x"], "data": entries}, wrong)
    pipeline.submit(small_fasta, nucleotides=wrong)
    pipeline.submit(small_fasta, nucleotides=nucleotides, label="host")
    pipeline.submit(small_fasta, nucleotides=nucleotides, label="viral")
    job = pipeline.wait_for(job_id)
    assert (job.state, job.generation) == ("succeeded", 1)
    assert pipeline.rows("SELECT id, claimed_at FROM chunks WHERE stage = 'extract' ORDER BY id") == ran
    errors = [row.error for row in in_transaction(pipeline.ledger, submissions_of, job_id)]
    assert [error is None for error in errors] == [True, False, True, True]
    assert "the two sides do not match" in str(errors[1])
    folders = [pipeline.published(job_id, k) for k in range(4)]
    assert len(set(folders)) == 4
    assert all((folder / "small_ESM.pt").read_bytes() == first for folder in folders)
    labels = [torch.load(folder / "small_merged.pt", weights_only=True)["labels"] for folder in folders[2:]]
    assert labels == [[0], [1]]
    assert not (folders[1] / "small_merged.pt").exists()


def test_messages_are_hints(pipeline: Pipeline, small_fasta: Path) -> None:
    """Every message three times, and some that nobody meant."""
    submitted = pipeline.submit(small_fasta)
    chunks = [row.id for row in pipeline.rows("SELECT id FROM chunks ORDER BY id")]
    app = make_app(load_settings)
    app.send_task("virnucpro.merge", args=[chunks[0]], queue="extract")
    app.send_task("virnucpro.nonsense", args=[chunks[0]], queue="extract")
    for chunk in ["1", None, -1, 2**80, True, 999, *chunks * 3]:
        app.send_task("virnucpro.extract", args=[chunk], queue="extract")
    app.send_task("virnucpro.extract", args=[], queue="extract")
    app.close()
    pipeline.start_relay()
    pipeline.start_workers()
    job = pipeline.wait_for(submitted.job_id)
    assert job.state == "succeeded"
    assert job.embeddings == RECORDS - FAILURES
    assert {row.attempts for row in pipeline.rows("SELECT attempts FROM chunks")} == {1}
    wait_for_lines(pipeline, "committed", len(chunks) + 2)
    # The last message is behind those that are repeated.
    wait_for_lines(pipeline, "message_rejected", 8)

    def counted() -> dict[str, int]:
        return {row.reason: row.messages for row in pipeline.rows("SELECT * FROM rejections")}

    pipeline.wait_until(lambda: sum(counted().values()) == 8)  # a thread of the node's counts, after a while
    assert counted() == {"stage": 1, "task": 1, "chunk": 6}


def wait_for_lines(pipeline: Pipeline, event: str, count: int) -> None:
    """Wait until the logs tell of an event so often, and no oftener: a worker commits first, and then says so."""
    pipeline.wait_until(lambda: pipeline.logs().count(event) >= count)
    assert pipeline.logs().count(event) == count


def stop_extracting(pipeline: Pipeline) -> tuple[int, int]:
    """Process and chunk of the extract worker, stopped (SIGSTOP) while it holds the chunk."""
    (extracting,) = pipeline.rows("SELECT id FROM workers WHERE queue = 'extract'")
    return pipeline.stop_in_mid_chunk(extracting.id)


def test_killed_child_is_replaced_and_its_chunk_runs_again(
    pipeline: Pipeline, long_fasta: Path, broker_url: str
) -> None:
    pipeline.start_relay()
    pipeline.start_workers()
    submitted = pipeline.submit(long_fasta)
    pid, chunk = stop_extracting(pipeline)
    os.kill(pid, signal.SIGKILL)
    with redis.Redis.from_url(broker_url) as broker:
        broker.flushdb()
    job = pipeline.wait_for(submitted.job_id)
    assert (job.state, job.embeddings) == ("succeeded", 12)
    (killed,) = pipeline.rows("SELECT attempts FROM chunks WHERE id = :chunk", chunk=chunk)
    assert killed.attempts == 2
    (worker,) = pipeline.rows("SELECT state FROM workers WHERE pid = :pid", pid=pid)
    assert worker.state in ("gone", "silent")  # replaced, or before that its lease ran out


def test_stopped_worker_finishes_its_chunk_and_leaves_the_rest(pipeline: Pipeline, long_fasta: Path) -> None:
    pipeline.configure(lease_seconds=60)
    pipeline.start_relay()
    pipeline.start_workers("finish")
    extracting = pipeline.start_workers("extract")
    submitted = pipeline.submit(long_fasta)
    pid, chunk = stop_extracting(pipeline)
    assert extracting.process is not None
    extracting.process.terminate()
    pipeline.wait_until(lambda: "stopping" in extracting.log.read_text())
    os.kill(pid, signal.SIGCONT)
    assert extracting.process.wait(120) == 0
    held = pipeline.rows("SELECT state, attempts FROM chunks WHERE id = :chunk", chunk=chunk)
    assert held == [("done", 1)]
    assert pipeline.rows("SELECT * FROM chunks WHERE state = 'running'") == []
    assert pipeline.job(submitted.job_id).state == "running"
    pipeline.start_workers("extract")
    assert pipeline.wait_for(submitted.job_id).state == "succeeded"
    assert {row.attempts for row in pipeline.rows("SELECT attempts FROM chunks")} == {1}


def test_hurried_worker_hands_its_chunk_back(pipeline: Pipeline, long_fasta: Path) -> None:
    pipeline.configure(chunk_tokens=100_000, lease_seconds=60)
    pipeline.start_relay()
    extracting = pipeline.start_workers("extract")
    pipeline.submit(long_fasta)
    pid, _ = stop_extracting(pipeline)
    assert extracting.process is not None
    extracting.process.terminate()
    pipeline.wait_until(lambda: "stopping" in extracting.log.read_text())
    extracting.process.terminate()
    os.kill(pid, signal.SIGCONT)
    extracting.process.wait(120)
    assert pipeline.rows("SELECT state, attempts FROM chunks") == [("pending", 0)]


def test_worker_hands_back_what_it_cannot_finish_in_time(pipeline: Pipeline, long_fasta: Path) -> None:
    pipeline.configure(chunk_tokens=100_000, lease_seconds=60)
    pipeline.start_relay()
    extracting = pipeline.start_workers("extract", "--stop-within", "0.1")
    pipeline.submit(long_fasta)
    pid, _ = stop_extracting(pipeline)
    assert extracting.process is not None
    extracting.process.terminate()
    pipeline.wait_until(lambda: "chunks_handed_back" in extracting.log.read_text())
    os.kill(pid, signal.SIGCONT)
    assert extracting.process.wait(120) == 0
    assert pipeline.rows("SELECT state, attempts FROM chunks") == [("pending", 0)]


def test_damaged_artifacts_are_made_again(pipeline: Pipeline, long_fasta: Path) -> None:
    pipeline.start_relay()
    pipeline.start_workers("extract")
    submitted = pipeline.submit(long_fasta)
    pipeline.wait_for(submitted.job_id, lambda job: job.stage == "merge")
    root = pipeline.settings.output_root
    paths = [root / row.path for row in pipeline.rows("SELECT path FROM artifacts ORDER BY ordinal")]
    paths[3].unlink()
    flipped = bytearray(paths[7].read_bytes())
    flipped[-1] ^= 1
    paths[7].write_bytes(flipped)
    pipeline.start_workers("finish")
    job = pipeline.wait_for(submitted.job_id)
    assert (job.state, job.embeddings) == ("succeeded", 12)
    finished = pipeline.rows("SELECT ordinal, error FROM chunks WHERE stage = 'extract' ORDER BY finished_at")
    assert {row.ordinal for row in finished[-2:]} == {3, 7}
    wait_for_lines(pipeline, "committed", 12 + 2 + 2)


def test_input_replaced_after_registration_fails_the_job(pipeline: Pipeline, small_fasta: Path) -> None:
    submitted = pipeline.submit(small_fasta)
    small_fasta.write_text(small_fasta.read_text().replace("MKVL", "MKVA"))
    pipeline.start_relay()
    pipeline.start_workers("extract")
    job = pipeline.wait_for(submitted.job_id)
    assert job.state == "failed"
    assert "the input was changed after registration" in job.error
    assert str(small_fasta) in job.error


def test_model_that_is_missing_or_another_fails_the_job_in_words(
    pipeline: Pipeline, small_fasta: Path, tmp_path: Path
) -> None:
    pipeline.configure(model_root=tmp_path / "models", max_attempts=1)
    pipeline.start_relay()
    pipeline.start_workers("extract")
    job = pipeline.wait_for(pipeline.submit(small_fasta).job_id)
    assert job.state == "failed"
    assert "there is no model" in job.error
    assert job.execution_class is None


def test_child_that_met_an_unknown_error_is_replaced(
    pipeline: Pipeline, long_fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN_ONCE", str(tmp_path / "broken"))
    pipeline.configure(lease_seconds=60)  # whoever imports torch on a busy machine gives no sign for seconds
    pipeline.start_relay()
    pipeline.start_workers("finish")
    pipeline.start_node("tests.breaking_worker", "extract")
    job = pipeline.wait_for(pipeline.submit(long_fasta).job_id)
    assert (job.state, job.embeddings) == ("succeeded", 12)
    attempts = sorted(
        row.attempts for row in pipeline.rows("SELECT attempts FROM chunks WHERE stage = 'extract'")
    )
    assert attempts == [1] * 11 + [2]
    assert "RuntimeError: CUDA error" in pipeline.logs()
    assert '"locals"' not in pipeline.logs()
    assert [
        row.state for row in pipeline.rows("SELECT state FROM workers WHERE queue = 'extract' ORDER BY id")
    ] == [
        "gone",
        "live",
    ]
