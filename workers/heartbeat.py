"""The heartbeat: a child's thread that keeps its row in the ledger alive, and so its leases."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from threading import Event, Thread

import structlog
from sqlalchemy import Engine

from virnucpro_core.errors import ServiceError
from virnucpro_core.gpus import GpuMeter
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.health import waits_in_broker
from virnucpro_core.ledger.workers import beat, register_worker, retire_worker
from virnucpro_core.settings import Settings
from workers.reaper import free_chunks, hand_back_soon, tell_freed

log = structlog.get_logger()

GIVEN_UP = 70  # exit code of a child whose leases are in other hands
LEAST_WATCHDOG_SECONDS = 60.0
UNKNOWN_CHUNK = "its worker knows nothing of it"


class Heartbeat:
    """Registers this process as a worker, renews it, and ends the process when the ledger has given it up.

    A watchdog outside Python's reach ends the process, too, when this thread cannot run for several leases: a
    library that never returns and holds the interpreter would otherwise keep a GPU for ever. And if the Celery node
    that is to bring messages hangs, it is ended, and this process with it: the launcher starts both again.

    Args:
        celery: the process id of that node; None where there is none.
        count_progress: returns a number that rises while the process gets anything done; None while it has nothing
            to do.

    Attributes:
        gpu_memory_peak: the most bytes that this process has had of its GPU, as far as it has said so.
    """

    def __init__(
        self,
        ledger: Engine,
        settings: Settings,
        *,
        node: str,
        queue: str,
        device: str,
        count_progress: Callable[[], int | None],
        celery: int | None = None,
    ) -> None:
        self.ledger = ledger
        self.settings = settings
        self.node = node
        self.queue = queue
        self.device = device
        self.count_progress = count_progress
        self.celery = celery
        self.idle_since = time.monotonic()
        self.gpu = GpuMeter(device)
        self.gpu_memory_peak = 0
        self.worker_id: int | None = None
        self.registered = Event()
        self.stopping = Event()
        self.thread = Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def wait_for_worker(self) -> int:
        """This worker's id, once the ledger could be reached."""
        self.registered.wait()
        assert self.worker_id is not None
        return self.worker_id

    def stop(self) -> None:
        """Retire the worker: chunks it still holds are free again, their attempts forgiven."""
        self.stopping.set()
        self.thread.join(self.settings.lease_seconds)
        faulthandler.cancel_dump_traceback_later()
        if self.worker_id is None:
            return
        try:
            freed = in_transaction(self.ledger, retire_worker, self.worker_id)
        except ServiceError as error:
            log.warning("worker_not_retired", node=self.node, worker=self.worker_id, reason=str(error))
        else:
            tell_freed(freed, "its worker was stopped")
            log.info("worker_retired", node=self.node, worker=self.worker_id, handed_back=len(freed))

    def _run(self) -> None:
        while not self.stopping.is_set():
            watchdog = max(LEAST_WATCHDOG_SECONDS, 4 * self.settings.lease_seconds)
            faulthandler.dump_traceback_later(watchdog, exit=True, file=sys.__stderr__ or sys.stderr)
            try:
                self._register() if self.worker_id is None else self._renew(self.worker_id)
            except ServiceError as error:
                log.warning("heartbeat_missed", node=self.node, reason=str(error))
            self.stopping.wait(self.settings.heartbeat_seconds)

    def _register(self) -> None:
        self.worker_id, predecessors = in_transaction(
            self.ledger,
            register_worker,
            node=self.node,
            queue=self.queue,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=self.device,
            lease_seconds=self.settings.lease_seconds,
        )
        structlog.contextvars.bind_contextvars(worker=self.worker_id)  # for what this thread logs
        log.info("worker_registered", node=self.node, device=self.device)
        self.registered.set()
        for predecessor in predecessors:
            # What cannot be freed now is the reaper's.
            free_chunks(self.ledger, predecessor, "the worker was replaced", self.settings)

    def _renew(self, worker_id: int) -> None:
        progress = self.count_progress()
        alive = in_transaction(
            self.ledger,
            beat,
            worker_id,
            progress=progress,
            lease_seconds=self.settings.lease_seconds,
            gpu=self.gpu.read(),
            gpu_memory_peak=self.gpu_memory_peak,
        )
        if not alive and not self.stopping.is_set():
            log.error("worker_given_up", node=self.node, todo="Celery starts a new process.")
            os._exit(GIVEN_UP)
        if progress is not None:
            self.idle_since = time.monotonic()
        else:
            self._use_rest(worker_id, time.monotonic() - self.idle_since)

    def _use_rest(self, worker_id: int, idle_seconds: float) -> None:
        """Look for what should keep this process from being idle.

        A chunk that it holds by the ledger: where a database came back without its last transactions, the commit.
        Or a message that waits: then the Celery node, which should bring it, hangs.
        """
        lease = self.settings.lease_seconds
        if idle_seconds > lease:
            # Not one that was claimed in this moment.
            freed = in_transaction(self.ledger, hand_back_soon, worker_id, UNKNOWN_CHUNK, lease)
            tell_freed(freed, UNKNOWN_CHUNK)
        stuck = self.settings.stuck_seconds
        if self.celery is None or idle_seconds < stuck:
            return
        if in_transaction(self.ledger, waits_in_broker, self.queue, seconds=stuck):
            log.error("celery_hangs", node=self.node, pid=self.celery, todo="The launcher starts it again.")
            os.kill(self.celery, signal.SIGKILL)
