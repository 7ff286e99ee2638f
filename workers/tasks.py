"""The tasks: what a Celery child does with a message. `celery -A workers.tasks worker` runs them."""

from __future__ import annotations

import logging
import os
from functools import cache, partial
from typing import Any

from celery import Task
from celery.signals import (
    celeryd_init,
    setup_logging,
    worker_process_init,
    worker_process_shutdown,
    worker_shutting_down,
)

from virnucpro_core.logs import configure_logging
from virnucpro_core.settings import load_settings
from virnucpro_core.stack.processes import die_with_parent
from workers.app import app, check_broker
from workers.delivery import LEAST_PATIENCE_SECONDS, watch_delivery
from workers.messages import STAGES, task_name
from workers.process import WorkerProcess
from workers.shutdown import bound_shutdown

LAUNCHER = os.getppid()

TASK_LOGGERS = ("celery.worker.strategy", "celery.app.trace")
"""They tell that a task came and ended, but of which job it is only we can tell, and do."""


@cache
def process_of(node: str) -> WorkerProcess:
    """This child's life, begun when it is first asked for."""
    queues = sorted(app.amqp.queues.consume_from)
    return WorkerProcess(load_settings(), node=node, queue=",".join(queues))


@celeryd_init.connect  # type: ignore[untyped-decorator]
@setup_logging.connect  # type: ignore[untyped-decorator]
def prepare(**_: Any) -> None:
    """Have what Celery says come out as our own lines do: before its first word, and where it would set up text."""
    configure_logging()
    logging.captureWarnings(True)  # noqa: FBT003 - the function has no other name for it
    logging.getLogger("celery").setLevel(logging.INFO)
    for name in TASK_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def end_in_time(**_: Any) -> None:
    bound_shutdown(LAUNCHER, load_settings().stuck_seconds)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def begin(sender: str, **_: Any) -> None:
    # An orphan would keep its GPU to itself. One whose parent ended before this gets no message any more.
    die_with_parent()
    process = process_of(sender)
    patience = max(LEAST_PATIENCE_SECONDS, process.settings.stuck_seconds)
    watch_delivery(process, os.getppid(), partial(check_broker, app), patience)


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def end(sender: str, **_: Any) -> None:
    process_of(sender).close()


def run_chunk(self: Task, chunk_id: int) -> None:
    """Run the chunk that a message names, if it is there to be run."""
    stage = self.name.removeprefix(task_name(""))
    process_of(self.request.hostname).run(stage, chunk_id)


for _stage in STAGES:
    app.task(run_chunk, name=task_name(_stage), bind=True)
