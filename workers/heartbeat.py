"""The heartbeat: a child's thread that keeps its row in the ledger alive, and so its leases."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
from collections.abc import Callable, Collection
from threading import Event, Thread

import structlog
from sqlalchemy import Engine

from virnucpro_core.errors import ServiceError
from virnucpro_core.gpus import GpuMeter
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.workers import beat, register_worker, retire_worker
from virnucpro_core.settings import Settings
from workers.reaper import free_chunks, hand_back_unknown, tell_freed

log = structlog.get_logger()

GIVEN_UP = 70  # exit code of a child whose leases are in other hands
LEAST_WATCHDOG_SECONDS = 60.0
UNKNOWN_CHUNK = "its worker knows nothing of it"


class Heartbeat:
    """Registers this process as a worker, renews it, and ends the process when the ledger has given it up.

    A watchdog outside Python's reach ends the process, too, when this thread cannot run for several leases: a
    library that never returns and holds the interpreter would otherwise keep a GPU for ever.

    Args:
        count_progress: returns a number that rises while the process gets anything done; None while it has nothing
            to do.
        held: returns the lease tokens of the chunks that the process works on.

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
        held: Callable[[], Collection[int]],
    ) -> None:
        self.ledger = ledger
        self.settings = settings
        self.node = node
        self.queue = queue
        self.device = device
        self.count_progress = count_progress
        self.held = held
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
        alive = in_transaction(
            self.ledger,
            beat,
            worker_id,
            progress=self.count_progress(),
            lease_seconds=self.settings.lease_seconds,
            gpu=self.gpu.read(),
            gpu_memory_peak=self.gpu_memory_peak,
        )
        if not alive and not self.stopping.is_set():
            log.error("worker_given_up", node=self.node, todo="Celery starts a new process.")
            os._exit(GIVEN_UP)
        self._hand_back_unknown(worker_id)

    def _hand_back_unknown(self, worker_id: int) -> None:
        """Free what this process holds by the ledger and does not work on.

        That is so where a database came back without its last transactions, the commit of a chunk among them. One
        that was claimed within the last lease may not be known here yet.
        """
        try:
            freed = in_transaction(
                self.ledger,
                hand_back_unknown,
                worker_id,
                UNKNOWN_CHUNK,
                self.held(),
                self.settings.lease_seconds,
            )
        except ServiceError as error:
            log.info("chunks_not_looked_for", reason=str(error))  # with the next beat
        else:
            tell_freed(freed, UNKNOWN_CHUNK)
