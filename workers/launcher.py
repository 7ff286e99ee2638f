"""The launcher: keeps a Celery node running for each GPU (or one on the CPU), and one that finishes jobs.

python -m workers.launcher --gpus all --queues extract,finish
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event

import structlog

from virnucpro_core.errors import ExecutionError, SettingsError, VirnucproError
from virnucpro_core.gpus import MASK, Gpu, choose_gpus, visible_gpus
from virnucpro_core.ledger.database import check_migrated, open_ledger
from virnucpro_core.logs import configure_logging
from virnucpro_core.queues import EXTRACT_QUEUE, FINISH_QUEUE, QUEUES
from virnucpro_core.settings import load_settings
from virnucpro_core.stack.processes import tied_to_parent
from workers.app import app, check_broker
from workers.pinning import LOCK_FOLDER, Lock, try_lock

log = structlog.get_logger()

POLL_SECONDS = 0.5
LONGEST_PAUSE = 30.0  # seconds before a node that keeps dying is started again
STEADY_SECONDS = 60.0  # a node that lived so long has nothing to do with the deaths before


@dataclass(frozen=True, slots=True)
class Node:
    """A Celery node to run.

    Attributes:
        name: unique on this host, as long as `lock` is held.
        queue: what it consumes.
        device: CUDA_VISIBLE_DEVICES of the node: one UUID, or nothing for the CPU.
        lock: held by the node and all its children, too.
    """

    name: str
    queue: str
    device: str
    lock: Lock

    def command(self) -> list[str]:
        """Prefork with one child: it can be killed and replaced, and the parent answers while it computes."""
        celery = [sys.executable, "-m", "celery", "-A", "workers.tasks", "--quiet", "worker"]
        options = ["-n", f"{self.name}@%h", "-Q", self.queue, "-P", "prefork", "-c", "1", "-l", "INFO"]
        return tied_to_parent([*celery, *options, "--without-gossip", "--without-mingle"], signal.SIGTERM)

    def environment(self) -> dict[str, str]:
        return {**os.environ, MASK: self.device, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


class RunningNode:
    """A node's process, started again when it ends."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.deaths = 0
        self.due = 0.0
        self.started = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def watch(self) -> None:
        """Start the process if it is due. The more often it ended, the longer the next start is put off."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.due:
                self._start(now)
            return
        status = self.process.poll()
        if status is None:
            return
        self.process = None
        self.deaths = 1 if now - self.started > STEADY_SECONDS else self.deaths + 1
        # The power is bounded by itself: after a thousand deaths it is beyond all numbers.
        pause = min(2.0 ** min(self.deaths - 1, 10), LONGEST_PAUSE)
        self.due = now + pause
        log.error("node_ended", node=self.node.name, status=status, deaths=self.deaths, restart_in=pause)

    def _start(self, now: float) -> None:
        self.started = now
        self.process = subprocess.Popen(
            self.node.command(),
            env=self.node.environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=[self.node.lock.descriptor],
            # Ctrl-C reaches a whole process group, but we stop nodes ourselves, in order.
            start_new_session=True,
        )
        log.info("node_started", node=self.node.name, pid=self.process.pid, device=self.node.device or "cpu")

    def signal(self, number: signal.Signals) -> None:
        """Pass a signal on, if there is anyone to get it."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self, deadline: float | None = None) -> bool:
        """Return when the process is gone, or at a time of the monotonic clock; whether it is gone."""
        if self.process is not None:
            try:
                self.process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        return True


def plan_nodes(gpus: Sequence[Gpu], queues: Iterable[str], lock_folder: Path = LOCK_FOLDER) -> list[Node]:
    """The nodes to run: for `extract` one a GPU, or one on the CPU; for `finish` one.

    Raises:
        ExecutionError: another node uses one of the GPUs.
        SettingsError: there is no such queue.
    """
    nodes: list[Node] = []
    for queue in queues:
        if queue not in QUEUES:
            raise SettingsError(
                f"there is no queue {queue!r}", where="--queues", todo=f"Name {' and '.join(QUEUES)}."
            )
        if queue == EXTRACT_QUEUE and gpus:
            nodes.extend(Node(gpu.name, queue, gpu.uuid, _lock_gpu(gpu, lock_folder)) for gpu in gpus)
        else:
            nodes.append(_first_free("cpu" if queue == EXTRACT_QUEUE else FINISH_QUEUE, queue, lock_folder))
    return nodes


def _lock_gpu(gpu: Gpu, folder: Path) -> Lock:
    lock = try_lock(gpu.uuid, folder)
    if lock is None:
        raise ExecutionError(
            "another worker uses this GPU", where=gpu.uuid, todo="Stop it, or name other GPUs with --gpus."
        )
    return lock


def _first_free(kind: str, queue: str, folder: Path) -> Node:
    """A node without a GPU, under the first number that no other on this host has."""
    for number in count():
        name = f"{kind}{number}"
        lock = try_lock(name, folder)
        if lock is not None:
            return Node(name, queue, "", lock)
    raise AssertionError("numbers do not end")


def run(nodes: Sequence[Node], stop: Event, stop_within: float | None = None) -> None:
    """Keep nodes running until told to stop; then let each finish the chunk in hand.

    Args:
        stop_within: seconds after which a chunk that is still in hand is handed back instead; None waits for it.
    """
    running = [RunningNode(node) for node in nodes]
    while not stop.is_set():
        for node in running:
            node.watch()
        stop.wait(POLL_SECONDS)

    def hurry(*_: object) -> None:
        for node in running:
            node.signal(signal.SIGQUIT)

    # Before it is told: whoever reads it may send the second signal at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hurry)
    log.info("stopping", nodes=len(running), todo="A second signal does not wait for the chunks in hand.")
    for node in running:
        node.signal(signal.SIGTERM)
    deadline = None if stop_within is None else time.monotonic() + stop_within
    if not all(node.wait(deadline) for node in running):
        log.warning("chunks_handed_back", reason=f"they were not finished within {stop_within:g} s")
        hurry()
        for node in running:
            node.wait()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="virnucpro worker", description="Run workers until told to stop.")
    parser.add_argument("--gpus", default="all", help="all, none (the CPU), or numbers such as 0,1")
    parser.add_argument("--queues", default=",".join(QUEUES), help="extract, finish, or both")
    parser.add_argument("--stop-within", type=float, help="seconds for the chunks in hand when told to stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    configure_logging()
    options = parse_arguments(arguments)
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = load_settings()
        check_migrated(open_ledger(settings.database_url_for("worker")))
        check_broker(app)
        visible = [] if options.gpus == "none" else visible_gpus()
        queues = [queue.strip() for queue in options.queues.split(",")]
        nodes = plan_nodes(choose_gpus(options.gpus, visible), queues)
    except VirnucproError as error:
        log.error("worker_cannot_start", reason=str(error))  # noqa: TRY400 - a trace would hide the reason
        return error.exit_code
    run(nodes, stop, options.stop_within)
    return 0


if __name__ == "__main__":
    sys.exit(main())
