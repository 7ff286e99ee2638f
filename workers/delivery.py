"""Delivery: whether a child's Celery node brings it the messages that wait."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from threading import Thread

import structlog

from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.health import waits_in_broker
from workers.process import WorkerProcess

log = structlog.get_logger()

LEAST_PATIENCE_SECONDS = 60.0  # a node may pause for half of it before it looks for a broker that was away


def watch_delivery(
    process: WorkerProcess, parent: int, check_broker: Callable[[], None], seconds: float
) -> None:
    """End a Celery node that hangs or has ceased to consume, and this child with it: the launcher starts both again.

    The ledger would miss nobody: the child's heart beats, and it has nothing to do. But a sound node whose child is
    idle takes a message within milliseconds, so it is unsound if one waited at each look in so many seconds.

    Args:
        parent: the process id of the Celery node, which forked this child.
        check_broker: raises `ServiceError` where the broker cannot be used: then no node could bring anything.
    """

    def is_undelivered() -> bool:
        if not process.is_idle():
            return False
        try:
            waits = in_transaction(process.ledger, waits_in_broker, process.queue, seconds=pause)
            if waits:
                check_broker()
        except ServiceError as error:
            log.info("delivery_not_watched", reason=str(error))
            return False
        return waits and process.is_idle()

    def watch() -> None:
        waited = 0.0  # by looks, not by a clock, which goes on while all of this host sleeps
        while waited < seconds:
            if process.closing.wait(pause):
                return
            waited = waited + pause if is_undelivered() else 0.0
        log.error(
            "node_given_up",
            node=process.heartbeat.node,
            reason=f"it left messages waiting for {seconds:g} s, and its child idle",
            todo="The launcher starts it again; if this comes often, look at the broker.",
        )
        os.kill(parent, signal.SIGKILL)

    pause = process.settings.heartbeat_seconds
    Thread(target=watch, name="delivery", daemon=True).start()
