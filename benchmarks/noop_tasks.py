"""The tasks of benchmarks/ledger.py: an extract that claims and commits but computes nothing, and a bare no-op."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from celery.signals import worker_process_init

from virnucpro_core.ledger import transitions
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.work import NewArtifact, Result
from virnucpro_core.ledger.workers import register_worker
from virnucpro_core.settings import load_settings
from workers.app import app
from workers.messages import task_name


@cache
def join_ledger() -> tuple[Any, int]:
    settings = load_settings()
    ledger = open_ledger(settings.database_url_for("worker"))
    worker_id, _ = in_transaction(
        ledger,
        register_worker,
        node=f"noop{os.getpid()}",
        queue="extract",
        host="benchmark",
        pid=os.getpid(),
        device="none",
        lease_seconds=settings.lease_seconds,
    )
    return ledger, worker_id


@worker_process_init.connect  # type: ignore[untyped-decorator]
def begin(**_: Any) -> None:
    join_ledger()


@app.task(name=task_name(transitions.EXTRACT))  # type: ignore[untyped-decorator]
def extract(chunk_id: int) -> None:
    ledger, worker_id = join_ledger()
    work = in_transaction(ledger, transitions.describe, chunk_id)
    if isinstance(work, transitions.Declined):
        return
    claimed = in_transaction(ledger, transitions.claim, work, worker_id, execution_class="none", execution={})
    if isinstance(claimed, transitions.Declined):
        return
    artifact = NewArtifact(
        kind="matrix",
        path=f"{work.artifact_folder()}/{work.range.ordinal:08d}.safetensors",
        sha256="0" * 64,
        bytes=1,
        rows=work.range.records,
    )
    result = Result(artifacts=[artifact], embeddings=work.range.records)
    in_transaction(ledger, transitions.complete, claimed, result)


# Under the name of a stage that this benchmark has no worker for: another name would be rejected.
@app.task(name=task_name(transitions.MERGE))  # type: ignore[untyped-decorator]
def noop(_: int) -> None:
    return None
