"""The log files of a job's programs, read back: every line is JSON, and one job can be followed by its id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs
from structlog.typing import EventDict

from virnucpro_core.errors import ServiceError
from workers.process import WorkerProcess

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline"]

IN_HAND = {"job", "chunk", "stage", "title", "attempt", "worker"}
"""What every line about a chunk names that a worker has claimed."""

UNCLAIMED = {"model_loaded", "chunk_not_read_ahead"}
"""What workers say of a chunk before anybody has claimed it."""


def read_lines(pipeline: Pipeline, program: str) -> list[dict[str, Any]]:
    """The lines that a program has written; a line that is no JSON fails the test.

    But for one that Celery's signal handler prints, past all logging, and the line feed before it.
    """
    text = "".join(path.read_text() for path in sorted(pipeline.folder.glob(f"{program}-*.log")))
    lines = [line for line in text.splitlines() if line not in ("", "worker: Warm shutdown (MainProcess)")]
    return [json.loads(line) for line in lines]


def test_one_job_is_followed_by_its_id(pipeline: Pipeline, small_fasta: Path) -> None:
    other = small_fasta.with_name("other.fasta")
    other.write_text(">a\nMKVLAG\n")
    missing = small_fasta.with_name("missing.fasta")
    missing.write_text(">m\nMKVLAGI\n")
    # A process that loads its model may be silent for long: its message would be sent again, and declined.
    pipeline.configure(max_attempts=1, republish_seconds=300, lease_seconds=60)
    job, second, lost = (pipeline.submit(path).job_id for path in (small_fasta, other, missing))
    missing.unlink()
    relay = pipeline.start_relay()
    workers = pipeline.start_workers()
    assert [pipeline.wait_for(one).state for one in (job, second, lost)] == [
        "succeeded",
        "succeeded",
        "failed",
    ]
    workers.stop()
    relay.stop()  # it may be in the midst of a line

    sent = [line for line in read_lines(pipeline, "relay") if line.get("job") == job]
    told = read_lines(pipeline, "workers")
    done = [line for line in told if line.get("job") == job]
    chunks = {row.id: row for row in pipeline.rows("SELECT * FROM chunks WHERE job_id = :job", job=job)}
    assert len(chunks) > 4
    assert {line["chunk"] for line in sent if line["event"] == "message_sent"} == set(chunks)
    for event in ("claimed", "committed"):
        lines = [line for line in done if line["event"] == event]
        assert sorted(line["chunk"] for line in lines) == sorted(chunks)
        for line in lines:
            chunk = chunks[line["chunk"]]
            assert line.keys() >= IN_HAND
            assert (line["attempt"], line["worker"], line["stage"]) == (1, chunk.worker_id, chunk.stage)
            assert line["title"].startswith(f"job {job} small: {chunk.stage} chunk {chunk.ordinal + 1} of ")
    assert {"validated", "report_made"} <= {line["event"] for line in done}

    for line in told:
        if line.keys() & IN_HAND - {"worker"}:
            named = IN_HAND - {"attempt"} if line["event"] in UNCLAIMED else IN_HAND
            assert line.keys() >= named, line
            assert line["job"] in (job, second, lost)
    (failed,) = (line for line in told if line["event"] == "chunk_failed")
    assert (failed["job"], failed["now"], failed["level"]) == (lost, "failed", "error")
    assert "the input cannot be read" in failed["error"]
    # Celery's own lines are of the same kind.
    assert any(line.get("logger", "").startswith("celery") for line in told)


def test_what_goes_wrong_in_a_worker_is_told_with_its_ids(
    pipeline: Pipeline, small_fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread that computes, the one that reads ahead and the heartbeat."""
    pipeline.configure(heartbeat_seconds=0.05)
    job = pipeline.submit(small_fasta).job_id
    first, second, third, *_ = (row.id for row in pipeline.rows("SELECT id FROM chunks ORDER BY id"))

    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake of ours")

    def lose_ledger(*_: object, **__: object) -> None:
        raise ServiceError("the database is away")

    with capture_logs((merge_contextvars,)) as lines, start_process(pipeline) as process:
        worker = process.heartbeat.wait_for_worker()

        def find(event: str) -> EventDict | None:
            return next((line for line in lines if line["event"] == event), None)

        monkeypatch.setattr("workers.reading.next_published", break_down)
        process.run("extract", first)
        assert pipeline.wait_until(lambda: find("look_ahead_failed"))["worker"] == worker
        reading = process.look_ahead.reading
        assert reading is not None
        reading.result(60)  # the line is written before the thread is at its end, and free for the next
        monkeypatch.setattr("workers.reading.next_published", lose_ledger)
        process.run("extract", second)
        assert pipeline.wait_until(lambda: find("look_ahead_stopped"))["worker"] == worker
        with monkeypatch.context() as broken:
            broken.setattr("workers.heartbeat.beat", lose_ledger)
            assert pipeline.wait_until(lambda: find("heartbeat_missed"))["worker"] == worker
        monkeypatch.setattr("workers.process.claim", break_down)
        with pytest.raises(SystemExit):
            process.run("extract", third)
        given_up = find("process_given_up")
    assert given_up is not None
    assert given_up.keys() >= IN_HAND - {"attempt"}
    assert (given_up["job"], given_up["chunk"], given_up["worker"]) == (job, third, worker)


@contextmanager
def start_process(pipeline: Pipeline) -> Iterator[WorkerProcess]:
    process = WorkerProcess(pipeline.settings, node="extract@test", queue="extract")
    try:
        yield process
    finally:
        process.close()
