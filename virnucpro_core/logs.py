"""Logging: key-value events on stderr, for people on a terminal and as JSON lines everywhere else."""

from __future__ import annotations

import logging
import sys

import structlog

WITHOUT_LOCALS = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
"""Local variables may hold secrets: no traceback shows them."""


def configure_logging(minimum: int = logging.INFO) -> None:
    """Set up structlog for this process; each program calls it once, when it starts.

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
        # keeps its lines.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
