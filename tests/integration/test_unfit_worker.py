"""A child that cannot run a chunk, for want of a model, a GPU or its memory: others get it, or it says why."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests import ledger_jobs
from tests.worker_chunks import chunk_row, submit
from virnucpro_core.gpus import MASK
from virnucpro_core.ledger.database import in_transaction
from workers.others import OFFER_AGAIN_SECONDS
from workers.process import WorkerProcess

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline
    from tests.fixtures_worker import Start

pytestmark = [pytest.mark.integration, pytest.mark.faults]
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_worker"]


@pytest.fixture
def given_way() -> list[float]:
    """For how many seconds `unfit` gave way to others."""
    return []


@pytest.fixture
def unfit(
    pipeline: Pipeline, tmp_path: Path, start: Start, given_way: list[float], monkeypatch: pytest.MonkeyPatch
) -> WorkerProcess:
    """A child on a host where the model is missing; it loses no time."""
    pipeline.configure(model_root=tmp_path / "models", max_attempts=2)
    process = start()
    monkeypatch.setattr(process.closing, "wait", given_way.append)
    return process


def test_unfit_worker_leaves_chunks_to_a_busy_one(
    pipeline: Pipeline, small_fasta: Path, unfit: WorkerProcess
) -> None:
    first, second, *_ = submit(pipeline, small_fasta)
    other = in_transaction(pipeline.ledger, ledger_jobs.start_worker)
    in_transaction(pipeline.ledger, ledger_jobs.claim, second, other)
    for _ in range(5):
        unfit.run("extract", first)
    state, attempts, error = chunk_row(pipeline, first)
    assert (state, attempts) == ("pending", 0)
    assert "a worker said: there is no model" in error, "nobody would know why it waits"
    (message,) = pipeline.rows(
        "SELECT published_at, due_at > now() AS later FROM outbox WHERE chunk_id = :chunk", chunk=first
    )
    assert message == (None, True)


def test_chunk_that_no_worker_takes_fails(
    pipeline: Pipeline, small_fasta: Path, unfit: WorkerProcess
) -> None:
    first, *_ = submit(pipeline, small_fasta)
    in_transaction(pipeline.ledger, ledger_jobs.start_worker)
    in_transaction(pipeline.ledger, ledger_jobs.start_worker, "finish@test", "finish")
    for _ in range(2):
        unfit.run("extract", first)
        assert chunk_row(pipeline, first)[:2] == ("pending", 0)
    for attempts, state in ((1, "pending"), (2, "failed")):
        unfit.run("extract", first)
        assert chunk_row(pipeline, first)[:2] == (state, attempts)
    assert "there is no model" in chunk_row(pipeline, first).error


def test_unfit_worker_gives_way_to_those_that_idle(
    pipeline: Pipeline, small_fasta: Path, unfit: WorkerProcess, given_way: list[float]
) -> None:
    """It idles, too, and would get the same message as often as they do, until the chunk fails."""
    first, second, *_ = submit(pipeline, small_fasta)
    other = in_transaction(pipeline.ledger, ledger_jobs.start_worker)
    unfit.run("extract", first)
    (seconds,) = given_way
    assert seconds > OFFER_AGAIN_SECONDS
    in_transaction(pipeline.ledger, ledger_jobs.claim, second, other)
    unfit.run("extract", first)
    assert len(given_way) == 1, "the other comes to it anyway, and there may be something else to do here"


def test_model_that_cannot_be_looked_at_is_the_reason_kept_with_the_chunk(
    pipeline: Pipeline, small_fasta: Path, tmp_path: Path, start: Start
) -> None:
    """As without a right to its folder: a process that ended of it would come back for ever, and never say why."""
    pipeline.configure(model_root=tmp_path / ("m" * 256))
    first, *_ = submit(pipeline, small_fasta)
    start().run("extract", first)
    state, attempts, error = chunk_row(pipeline, first)
    assert (state, attempts) == ("pending", 1)
    assert "the model cannot be looked at: File name too long" in error


def test_worker_whose_gpu_has_vanished_does_not_compute_on_the_cpu(
    pipeline: Pipeline, small_fasta: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MASK, "GPU-that-was")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    first, *_ = submit(pipeline, small_fasta)
    start().run("extract", first)
    assert "there are 0 GPUs here" in chunk_row(pipeline, first).error
    assert pipeline.job(1).execution_class is None


def accelerator_error(code: int) -> torch.AcceleratorError:
    """As torch raises it when CUDA itself fails."""
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code
    return error


CUBLAS_FULL = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), accelerator_error(2), CUBLAS_FULL]
)
def test_model_that_does_not_fit_is_the_reason_kept_with_the_chunk(
    error: Exception, pipeline: Pipeline, small_fasta: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another program holds the GPU's memory."""
    first, *_ = submit(pipeline, small_fasta)
    process = start()
    halves = []

    def load_half(encoder: torch.nn.Module, _: object) -> None:
        halves.append(weakref.ref(encoder))
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("virnucpro_core.embedding.loading.fill_encoder", load_half)
        process.run("extract", first)
        assert halves[0]() is None, "it must not keep what others need"
        assert chunk_row(pipeline, first)[:2] == ("pending", 1)
        assert f"no memory for the model: {error!s} [cpu]. End " in chunk_row(pipeline, first).error
        in_transaction(pipeline.ledger, ledger_jobs.start_worker)
        process.run("extract", first)
        assert chunk_row(pipeline, first)[:2] == ("pending", 1), "another worker may have more"
    assert "a worker said: there is no memory" in chunk_row(pipeline, first).error
    process.run("extract", first)
    pipeline.wait_until(lambda: chunk_row(pipeline, first) == ("done", 2, None))


def test_memory_that_others_took_fails_the_attempt_and_has_the_model_loaded_again(
    pipeline: Pipeline, small_fasta: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another program takes the GPU's memory between two chunks."""
    first, second, *_ = submit(pipeline, small_fasta)
    process = start()
    process.run("extract", first)
    assert process.models.model is not None
    encoder = weakref.ref(process.models.model.encoder)
    process.models.model.encoder.__dict__["itself"] = process.models.model  # torch leaves circles, too

    def raise_full(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("virnucpro_core.embedding.model.FastEsm.embed_pack", raise_full)
        process.run("extract", second)
    assert chunk_row(pipeline, second)[:2] == ("pending", 1)
    assert (
        "another program has taken the memory that the model had [cpu]. End "
        in chunk_row(pipeline, second).error
    )
    assert process.models.model is None
    process.run("extract", second)
    assert encoder() is None, "two models would need twice the memory"
    pipeline.wait_until(lambda: chunk_row(pipeline, second) == ("done", 2, None))


def test_device_that_is_broken_ends_the_process_that_loads_a_model(
    pipeline: Pipeline, small_fasta: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = submit(pipeline, small_fasta)

    def break_device(*_: object) -> None:
        raise accelerator_error(700)

    monkeypatch.setattr("virnucpro_core.embedding.loading.fill_encoder", break_device)
    with pytest.raises(SystemExit):
        start().run("extract", first)
