"""How long a Celery node may take to end once nobody is there to lose patience with it."""

from __future__ import annotations

import os
import time
from threading import Thread

import structlog

log = structlog.get_logger()

ABANDONED = 72  # exit code of a node that did not end by itself
POLL_SECONDS = 1.0


def bound_shutdown(launcher: int, seconds: float) -> None:
    """End this node, which has been told to stop, `seconds` after its launcher is gone; its child dies with it.

    A launcher waits for the chunk in hand, and whoever stops the launcher decides for how long. When it was killed,
    nobody is left to decide: a child that hangs while the ledger cannot be asked, or Celery's own last words to a
    broker that is gone for good, would keep the node and its GPU for ever.

    Args:
        launcher: the process that started this node.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(POLL_SECONDS)
        time.sleep(seconds)
        log.error("node_abandoned", waited=seconds, todo="Look above for what it waited for.")
        os._exit(ABANDONED)

    Thread(target=watch, name="shutdown", daemon=True).start()
