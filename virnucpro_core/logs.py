"""Logging: key-value events on stderr, for people on a terminal and as JSON lines everywhere else.

Keys mean the same in every program: `job` and `chunk` are ids in the ledger, `worker` is the id of a worker's
row there, `attempt` counts the claims of a chunk. So one job can be followed through the logs of all of them.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypedDict

import structlog

if TYPE_CHECKING:
    from typing import Unpack

    from virnucpro_core.ledger.work import Claim, Work

WITHOUT_LOCALS = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
"""Local variables may hold secrets: no traceback shows them."""


class Subject(TypedDict, total=False):
    """What a line is about; `title` says it in words."""

    job: int
    chunk: int
    stage: str
    title: str
    attempt: int
    worker: int


def about(**subject: Unpack[Subject]) -> AbstractContextManager[None]:
    """Every line that this thread logs within the block names its subject."""
    return structlog.contextvars.bound_contextvars(**subject)


def about_work(work: Work) -> AbstractContextManager[None]:
    """As `about`, for a chunk that nobody need have claimed."""
    return about(job=work.job_id, chunk=work.chunk_id, stage=work.stage, title=work.title)


def about_attempt(claim: Claim) -> AbstractContextManager[None]:
    """As `about`, for a chunk in the hands of a worker."""
    work = claim.work
    return about(
        job=work.job_id,
        chunk=work.chunk_id,
        stage=work.stage,
        title=work.title,
        attempt=claim.attempt,
        worker=claim.worker_id,
    )


class ToStructlog(logging.Handler):
    """Hands on what libraries log, so that it comes out as our own lines do."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                record.levelno // 10 * 10, record.getMessage(), logger=record.name, exc_info=record.exc_info
            )
        except Exception:  # noqa: BLE001 - a library's broken line is told by `logging`, and stops nothing
            self.handleError(record)


def configure_logging(minimum: int = logging.INFO) -> None:
    """Set up structlog for this process; each program calls it once, when it starts.

    Of what libraries log, warnings and worse are shown, and what their own loggers are set to.

    Args:
        minimum: the lowest level that is shown, as the `logging` module numbers them.
    """
    to_person = sys.stderr.isatty()
    shown: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if to_person
        else [structlog.processors.ExceptionRenderer(WITHOUT_LOCALS), structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *shown,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(minimum),
        # Asked for when a line is written: a program that replaces its stderr (Celery, a test)
        # keeps its lines. It writes a line and its end at once: processes share a pipe, and another's line may come
        # between two writes. (One of more than PIPE_BUF bytes, 4096, is whole only while the pipe has room for it.)
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
    )
    root = logging.getLogger()
    if not any(isinstance(handler, ToStructlog) for handler in root.handlers):
        root.addHandler(ToStructlog())
