"""Metrics for Prometheus, read from the ledger when they are asked for: the program `virnucpro metrics`.

The ledger's numbers survive restarts of everything, Celery's events do not. What a GPU does comes from the ledger,
too, where its worker leaves it with every heartbeat: so one program serves all hosts.
"""

from __future__ import annotations

import errno
import math
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from threading import Event

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from virnucpro_core.errors import ServiceError
from virnucpro_core.failures import FailureReason
from virnucpro_core.ledger import tallies
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.overview import WorkerOverview
from virnucpro_core.ledger.rejections import RejectionReason
from virnucpro_core.ledger.setbacks import COUNTED
from virnucpro_core.ledger.snapshot import Snapshot, take_snapshot

log = structlog.get_logger()

PREFIX = "virnucpro_"
JOB_STATES = ("running", "succeeded", "failed", "cancelled")
CHUNK_STATES = ("pending", "running", "done", "failed")
GIVEN_UP = ("silent", "stuck")


class LedgerCollector(Collector):
    """All metrics of one ledger, and the space that is left where its results are written."""

    def __init__(self, ledger: Engine, output_root: Path) -> None:
        self.ledger = ledger
        self.output_root = output_root

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would otherwise collect once to find the names, and want the ledger."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The metrics of one snapshot; without the ledger `virnucpro_ledger_up` is 0 and those of it are missing."""
        yield from disk_metrics(self.output_root)
        started = time.perf_counter()
        try:
            snapshot = in_transaction(self.ledger, take_snapshot)
        except ServiceError as error:
            log.warning("ledger_away", reason=str(error))
            yield gauge("ledger_up", "Whether the ledger could be read.", 0)
            return
        yield gauge("ledger_up", "Whether the ledger could be read.", 1)
        yield gauge("snapshot_seconds", "What reading the ledger took.", time.perf_counter() - started)
        yield from queue_metrics(snapshot)
        yield from work_metrics(snapshot)
        yield from fault_metrics(snapshot)
        yield from worker_metrics(snapshot.workers)


def queue_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    """How much there is to do."""
    jobs = dict.fromkeys(JOB_STATES, 0) | dict(snapshot.jobs)
    yield gauge("jobs", "Jobs in the ledger.", jobs, "state")
    yield gauge(
        "chunks",
        "Chunks of running jobs, in the stage that each job is in; failed: those that their jobs failed of.",
        {(state, queue.queue): getattr(queue, state) for queue in snapshot.queues for state in CHUNK_STATES},
        "state",
        "queue",
    )
    yield gauge(
        "oldest_pending_seconds",
        "How long the chunk that waits for longest has waited; 0 without one.",
        {queue.queue: queue.oldest_pending_seconds for queue in snapshot.queues},
        "queue",
    )
    yield gauge(
        "outbox_sent",
        "Messages in the broker that nobody has taken.",
        {queue.queue: queue.sent for queue in snapshot.queues},
        "queue",
    )
    yield gauge(
        "outbox_unsent",
        "Messages that wait in the ledger for room in the broker, or for their time.",
        {queue.queue: queue.pending - queue.sent for queue in snapshot.queues},
        "queue",
    )
    yield gauge(
        "merge_lag_seconds",
        "How long the running job that has been in a stage after extraction for longest is in it; 0 without one.",
        {stage: snapshot.stage_seconds.get(stage, 0.0) for stage in snapshot.stages[1:]},
        "stage",
    )


def work_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    """What has been done, in all generations of all jobs."""
    done = snapshot.tallies
    outcomes = dict.fromkeys((tallies.EMBEDDED, *map(str, FailureReason)), 0.0)
    yield counter(
        "sequences",
        "Sequences that were embedded, or failed for a reason.",
        outcomes | done.by_label(tallies.SEQUENCES),
        "outcome",
    )
    yield counter("residues", "Residues in chunks that were extracted.", done.total(tallies.RESIDUES))
    tokens, positions = done.total(tallies.TOKENS), done.total(tallies.POSITIONS)
    yield counter("tokens", "Tokens of sequences that were extracted.", tokens)
    yield counter("positions", "Tokens that models took in, padding and repeats included.", positions)
    yield gauge(
        "padding_efficiency",
        "Tokens of sequences as a share of all that models took in.",
        tokens / (positions or 1),
    )
    seconds = HistogramMetricFamily(
        PREFIX + "chunk_seconds", "Seconds that chunks took to be computed.", labels=["stage"]
    )
    for stage in snapshot.stages:
        classes, total = done.chunk_seconds(stage)
        buckets = [("+Inf" if bound == math.inf else str(bound), count) for bound, count in classes]
        seconds.add_metric([stage], buckets, total)
    yield seconds


def fault_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    """What went wrong: with chunks and workers, which was dealt with, and with jobs, which was not."""
    yield counter("job_failures", "How often a job failed.", snapshot.job_failures)
    yield counter(
        "setbacks",
        "Attempts on chunks that came to nothing by a fault: failed, or their worker died, halved them or was stopped.",
        dict.fromkeys(map(str, COUNTED), 0.0) | snapshot.tallies.by_label(tallies.SETBACKS),
        "kind",
    )
    yield counter(
        "lease_expired",
        "Workers that were given up: their lease ran out (silent), or they made no progress (stuck).",
        dict.fromkeys(GIVEN_UP, 0) | dict(snapshot.given_up),
        "reason",
    )
    yield gauge(
        "leases_overdue",
        "Chunks held by workers that are gone or silent, for the relay to take back.",
        snapshot.overdue_leases,
    )
    yield counter(
        "duplicate_commit_rejected",
        "Results that came when their lease had passed to another worker, as far as they could be counted.",
        snapshot.tallies.total(tallies.DUPLICATES),
    )
    yield counter(
        "messages_rejected",
        "Messages that were refused unread.",
        dict.fromkeys(map(str, RejectionReason), 0) | dict(snapshot.rejections),
        "reason",
    )


def worker_metrics(workers: Iterable[WorkerOverview]) -> Iterator[Metric]:
    """What each live worker and its GPU do."""
    info = InfoMetricFamily(PREFIX + "worker", "The live workers.", labels=["node"])
    by_node = {worker.node: worker for worker in workers}
    held = {node: worker.lease_seconds or 0.0 for node, worker in by_node.items()}
    for node, worker in by_node.items():
        info.add_metric([node], {"queue": worker.queue, "host": worker.host, "device": worker.device})
    yield info
    yield gauge(
        "lease_seconds", "How long a worker has held the oldest of its chunks; 0 without one.", held, "node"
    )
    for name, text, attribute in (
        ("worker_heartbeat_age_seconds", "Age of a worker's last heartbeat.", "heartbeat_seconds"),
        (
            "worker_progress_age_seconds",
            "Age of a worker's last progress; idle ones count.",
            "progress_seconds",
        ),
        ("tokens_per_second", "Tokens per second in a worker's last chunk.", "tokens_per_second"),
        ("gpu_utilization_ratio", "Share of time in which a worker's GPU computed.", "gpu_utilization"),
        ("gpu_mem_used_bytes", "Memory in use on a worker's GPU.", "gpu_memory_used"),
        ("gpu_mem_total_bytes", "Memory of a worker's GPU.", "gpu_memory_total"),
        ("gpu_mem_peak_bytes", "The most GPU memory that a worker has had.", "gpu_memory_peak"),
    ):
        told = {node: getattr(worker, attribute) for node, worker in by_node.items()}
        yield gauge(name, text, {node: value for node, value in told.items() if value is not None}, "node")


def disk_metrics(output_root: Path) -> Iterator[Metric]:
    """The space of the file system that results are written to; nothing if it cannot be read."""
    try:
        usage = shutil.disk_usage(output_root)
    except OSError as error:
        log.warning("output_not_readable", folder=str(output_root), reason=str(error))
        return
    folder = str(output_root)
    yield gauge("disk_free_bytes", "Space left for results.", {folder: usage.free}, "folder")
    yield gauge("disk_size_bytes", "Size of the file system for results.", {folder: usage.total}, "folder")


Values = float | Mapping[str, float] | Mapping[tuple[str, str], float]


def gauge(name: str, text: str, values: Values, *labels: str) -> Metric:
    return filled(GaugeMetricFamily(PREFIX + name, text, labels=labels), values)


def counter(name: str, text: str, values: Values, *labels: str) -> Metric:
    """A counter; its exposed name ends in `_total`."""
    return filled(CounterMetricFamily(PREFIX + name, text, labels=labels), values)


def filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    if not isinstance(values, Mapping):
        family.add_metric([], float(values))
        return family
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else list(key), float(value))
    return family


def serve(collector: Collector, *, host: str, port: int) -> None:
    """Answer `GET /metrics` until SIGTERM or Ctrl-C.

    Raises:
        ServiceError: the port cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ServiceError(
            f"metrics cannot be served: {error.strerror}",
            where=f"{host}:{port}",
            todo="Name another --port." if error.errno == errno.EADDRINUSE else "Correct --host and --port.",
        ) from error
    log.info("metrics_served", url=f"http://{host}:{port}/metrics")
    stop.wait()
    server.shutdown()
    server.server_close()
    thread.join()
