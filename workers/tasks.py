"""The tasks: what a Celery child does with a message. `celery -A workers.tasks worker` runs them."""

from __future__ import annotations

from functools import cache
from typing import Any

import structlog
from celery import Task
from celery.signals import celeryd_init, worker_process_init, worker_process_shutdown

from virnucpro_core.ledger.transitions import EXTRACT, MERGE, VALIDATE
from virnucpro_core.logs import configure_logging
from virnucpro_core.settings import load_settings
from workers.app import app, task_name
from workers.process import WorkerProcess

log = structlog.get_logger()

LARGEST_ID = 2**63 - 1


@cache
def process_of(node: str) -> WorkerProcess:
    """This child's life, begun when it is first asked for."""
    queues = sorted(app.amqp.queues.consume_from)
    return WorkerProcess(load_settings(), node=node, queue=",".join(queues))


@celeryd_init.connect  # type: ignore[untyped-decorator]
def prepare(**_: Any) -> None:
    configure_logging()


@worker_process_init.connect  # type: ignore[untyped-decorator]
def begin(sender: str, **_: Any) -> None:
    process_of(sender)


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def end(sender: str, **_: Any) -> None:
    process_of(sender).close()


def run_chunk(self: Task, chunk_id: object) -> None:
    """Run the chunk that a message names, if it is there to be run. Anything may come out of a queue."""
    stage = self.name.removeprefix(task_name(""))
    if type(chunk_id) is not int or not 0 < chunk_id <= LARGEST_ID:
        log.error("message_rejected", stage=stage, task_id=self.request.id, reason="it names no chunk")
        return
    process_of(self.request.hostname).run(stage, chunk_id)


for _stage in (EXTRACT, MERGE, VALIDATE):
    app.task(run_chunk, name=task_name(_stage), bind=True)
