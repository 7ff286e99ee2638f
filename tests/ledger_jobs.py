"""Jobs to try the ledger on: registered without a file, run without a model."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from sqlalchemy import Connection, text

from virnucpro_core.failures import Failure, FailureReason
from virnucpro_core.ledger import queries, registration, transitions, workers
from virnucpro_core.ledger.work import Claim, NewArtifact, Registered, Result, Submission
from virnucpro_core.recipe import Recipe
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.scan import ScannedInput

WEIGHTS = "a" * 64
RECIPE = Recipe(weights_sha256=WEIGHTS, token_dropout=True, dtype="float32")
SUBMISSION = Submission(path="/in/a.fasta", stem="a", requested_by="test", max_failed_share=1.0)


def add_model(tx: Connection, name: str = "tiny") -> None:
    registration.add_model(
        tx,
        name=name,
        path=name,
        weights_sha256=WEIGHTS,
        layers=1,
        token_dropout=True,
        demonstration=True,
        config={},
    )


def scan(chunks: int = 3, records_each: int = 10, content: str = "a") -> ScannedInput:
    """What registration would have found in a file of so many equal chunks."""
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    ranges = [
        ChunkRange(
            ordinal=k,
            byte_start=1000 * k,
            byte_end=1000 * (k + 1),
            virtual_start=None,
            first_record=records_each * k + 1,
            records=records_each,
            residues=90 * records_each,
            sha256=sha256,
        )
        for k in range(chunks)
    ]
    return ScannedInput(
        path="/in/a.fasta",
        sha256=sha256,
        size=1000 * chunks,
        compression=Compression.PLAIN,
        location="/in/a.fasta",
        records=records_each * chunks,
        residues=90 * records_each * chunks,
        chunks=tuple(ranges),
    )


def register(
    tx: Connection,
    scanned: ScannedInput,
    submission: Submission = SUBMISSION,
    *,
    force: bool = False,
    forced_by: str | None = None,
    model: str = "tiny",
) -> Registered:
    return registration.register(
        tx,
        scanned=scanned,
        model=model,
        recipe=RECIPE,
        submission=submission,
        force=force,
        forced_by=forced_by,
    )


def start_worker(
    tx: Connection, node: str = "cpu@test", queue: str = "extract", lease_seconds: float = 60
) -> int:
    worker_id, predecessors = workers.register_worker(
        tx, node=node, queue=queue, host="test", pid=1, device="cpu", lease_seconds=lease_seconds
    )
    for predecessor in predecessors:
        workers.take_back(tx, predecessor, "the worker was replaced", max_attempts=9)
    return worker_id


def pending_chunks(tx: Connection, job_id: int) -> list[int]:
    return list(
        tx.execute(
            text("SELECT id FROM chunks WHERE job_id = :job AND state = 'pending' ORDER BY id"),
            {"job": job_id},
        ).scalars()
    )


def claim(tx: Connection, chunk_id: int, worker_id: int, execution_class: str = "class one") -> Claim:
    """Claim a chunk that must be free."""
    work = transitions.describe(tx, chunk_id)
    assert not isinstance(work, transitions.Declined), work
    claimed = transitions.claim(
        tx, work, worker_id, execution_class=execution_class, execution={"name": execution_class}
    )
    assert not isinstance(claimed, transitions.Declined), claimed
    return claimed


def halves_of(claimed: Claim) -> tuple[ChunkRange, ChunkRange]:
    """The halves of a chunk as `halve` would cut it."""
    chunk = claimed.work.range
    middle, cut = chunk.records // 2, chunk.byte_start + (chunk.byte_end - chunk.byte_start) // 2
    first = replace(chunk, byte_end=cut, records=middle, residues=90 * middle)
    second = replace(
        chunk,
        byte_start=cut,
        first_record=chunk.first_record + middle,
        records=chunk.records - middle,
        residues=chunk.residues - 90 * middle,
    )
    return first, second


def result_of(claimed: Claim, failures: int = 0) -> Result:
    """A result in which the first records failed."""
    chunk = claimed.work.range
    folder = claimed.work.artifact_folder()
    artifact = NewArtifact(
        kind="matrix",
        path=f"{folder}/{chunk.ordinal:08d}-{chunk.records}.safetensors",
        sha256="b" * 64,
        bytes=100,
        rows=1,
    )
    result = Result(artifacts=[artifact], tokens=100, seconds=0.5)
    if claimed.work.stage != transitions.EXTRACT:
        return result
    return replace(
        result,
        embeddings=chunk.records - min(failures, chunk.records),
        failures=[
            Failure(chunk.first_record + k, f"r{k}", FailureReason.EMPTY, "it has no residues")
            for k in range(min(failures, chunk.records))
        ],
    )


def run_job(tx: Connection, job_id: int, worker_id: int, failures: int = 0) -> None:
    """Run every stage of a job to its end."""
    while chunks := pending_chunks(tx, job_id):
        claimed = claim(tx, chunks[0], worker_id)
        result = result_of(claimed, failures)
        if claimed.work.stage == transitions.VALIDATE:
            published = [submission.id for submission in queries.submissions_of(tx, job_id)]
            result = replace(result, artifacts=[], published=published)
        transitions.complete(tx, claimed, result)


def state_of(tx: Connection, job_id: int) -> str:
    return str(queries.get_job(tx, job_id).state)


def outbox_chunks(tx: Connection) -> list[int]:
    return list(tx.execute(text("SELECT chunk_id FROM outbox ORDER BY chunk_id")).scalars())
