"""Metrics, on a real ledger: what is counted, that it never falls, and what a worker leaves for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection, Engine, text

from monitoring.dashboard import FILE
from tests import ledger_jobs as jobs
from virnucpro_core.failures import FailureReason
from virnucpro_core.gpus import GpuUse
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.ledger.outbox import send_again, take_due
from virnucpro_core.ledger.overview import list_job_overviews, list_newest_failures, list_worker_overviews
from virnucpro_core.ledger.rejections import RejectionReason, count_rejections
from virnucpro_core.ledger.setbacks import COUNTED
from virnucpro_core.ledger.tallies import count_duplicate
from virnucpro_core.ledger.transitions import complete, fail
from virnucpro_core.ledger.workers import beat, expire_stuck_workers, expire_workers
from virnucpro_core.metrics import LedgerCollector
from virnucpro_core.stack.postgres import LedgerUrls
from virnucpro_core.status import read_status

pytestmark = pytest.mark.integration

Samples = dict[tuple[str, str], float]


class Watcher:
    """Asks for metrics as Prometheus does, and reads what it gets as Prometheus does."""

    def __init__(self, ledger: Engine, folder: Path) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(LedgerCollector(ledger, folder))

    def look(self) -> Samples:
        """The values by name and labels in order: `("virnucpro_jobs", "state=running")`."""
        samples: Samples = {}
        for family in text_string_to_metric_families(generate_latest(self.registry).decode()):
            for sample in family.samples:
                key = (
                    sample.name,
                    ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items())),
                )
                assert key not in samples, f"{key} is there twice"
                samples[key] = sample.value
        return samples

    def value(self, name: str, labels: str = "") -> float:
        return self.look()[f"virnucpro_{name}", labels]


@pytest.fixture
def engines(ledger_urls: LedgerUrls) -> Iterator[dict[str, Engine]]:
    """A ledger with a model, as each role."""
    engines = {str(role): open_ledger(url) for role, url in ledger_urls.items()}
    in_transaction(engines["owner"], jobs.add_model)
    yield engines
    for engine in engines.values():
        engine.dispose()


@pytest.fixture
def ledger(engines: dict[str, Engine]) -> Engine:
    return engines["worker"]


@pytest.fixture
def watcher(engines: dict[str, Engine], tmp_path: Path) -> Watcher:
    """As the DAG's role: the program that serves metrics has no other."""
    return Watcher(engines["dag"], tmp_path)


def register(engines: dict[str, Engine], chunks: int = 4, *, force: bool = False) -> int:
    return in_transaction(engines["dag"], jobs.register, jobs.scan(chunks), force=force).job_id


def change(ledger: Engine, statement: str) -> None:
    in_transaction(ledger, lambda tx: tx.execute(text(statement)))


def test_an_empty_ledger_has_every_metric_at_nothing(watcher: Watcher) -> None:
    samples = watcher.look()
    assert samples["virnucpro_ledger_up", ""] == 1
    assert samples["virnucpro_sequences_total", "outcome=embedded"] == 0
    for reason in FailureReason:
        assert samples["virnucpro_sequences_total", f"outcome={reason}"] == 0
    for reason in RejectionReason:
        assert samples["virnucpro_messages_rejected_total", f"reason={reason}"] == 0
    assert samples["virnucpro_oldest_pending_seconds", "queue=extract"] == 0
    assert samples["virnucpro_chunk_seconds_count", "stage=merge"] == 0
    assert watcher.value("disk_free_bytes", f"folder={watcher_folder(samples)}") > 0


def watcher_folder(samples: Samples) -> str:
    (labels,) = [labels for name, labels in samples if name == "virnucpro_disk_free_bytes"]
    return labels.removeprefix("folder=")


def test_queues_are_counted_without_looking_at_each_chunk(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    job = register(engines)
    worker = in_transaction(ledger, jobs.start_worker)
    in_transaction(ledger, take_due, "extract", 3)
    change(engines["owner"], "UPDATE outbox SET since = now() - interval '1 hour' WHERE chunk_id = 4")
    first, second, *_ = in_transaction(ledger, jobs.pending_chunks, job)
    done = in_transaction(ledger, jobs.claim, first, worker)
    in_transaction(ledger, complete, done, jobs.result_of(done))
    in_transaction(ledger, jobs.claim, second, worker)
    samples = watcher.look()
    counted = {
        state: samples["virnucpro_chunks", f"queue=extract,state={state}"]
        for state in ("pending", "running", "done", "failed")
    }
    assert counted == {"pending": 2, "running": 1, "done": 1, "failed": 0}
    assert samples["virnucpro_outbox_sent", "queue=extract"] == 1
    assert samples["virnucpro_outbox_unsent", "queue=extract"] == 1
    assert 3600 <= samples["virnucpro_oldest_pending_seconds", "queue=extract"] < 3700
    assert samples["virnucpro_oldest_pending_seconds", "queue=finish"] == 0
    assert samples["virnucpro_jobs", "state=running"] == 1


def test_a_chunk_that_every_worker_declines_grows_old(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    register(engines, 1)
    change(engines["owner"], "UPDATE outbox SET since = now() - interval '1 hour'")
    in_transaction(ledger, send_again, 1, delay=2, reason="its job is pinned to another execution class")
    assert 3600 <= watcher.value("oldest_pending_seconds", "queue=extract") < 3700


def test_attempts_that_came_to_nothing_and_failed_jobs_are_counted_for_ever(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    job = register(engines)
    worker = in_transaction(ledger, jobs.start_worker)
    first, second, *_ = in_transaction(ledger, jobs.pending_chunks, job)
    claimed = in_transaction(ledger, jobs.claim, first, worker)
    in_transaction(ledger, fail, claimed, "no space left on device", max_attempts=5)
    in_transaction(ledger, jobs.claim, second, worker)
    successor = in_transaction(ledger, jobs.start_worker)  # the process died, and was started again at once
    for _ in range(2):  # fails, is resumed, fails again
        claimed = in_transaction(ledger, jobs.claim, first, successor)
        in_transaction(ledger, fail, claimed, "cannot succeed", max_attempts=5, permanent=True)
        in_transaction(engines["dag"], resume, job)
    register(engines, force=True)
    in_transaction(ledger, jobs.run_job, job, successor)  # forgets the older generation
    samples = watcher.look()
    counted = {kind: samples["virnucpro_setbacks_total", f"kind={kind}"] for kind in map(str, COUNTED)}
    assert counted == {"failed": 3, "died": 1, "halved": 0, "handed_back": 0}
    assert samples["virnucpro_job_failures_total", ""] == 2


def test_cancelled_and_failed_jobs_wait_for_nothing(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    job = register(engines)
    worker = in_transaction(ledger, jobs.start_worker)
    first, second, *_ = in_transaction(ledger, jobs.pending_chunks, job)
    in_transaction(ledger, jobs.claim, second, worker)  # it is still at work when its job ends
    claimed = in_transaction(ledger, jobs.claim, first, worker)
    in_transaction(ledger, fail, claimed, "broken", max_attempts=1)
    samples = watcher.look()
    assert samples["virnucpro_chunks", "queue=extract,state=pending"] == 0
    assert samples["virnucpro_chunks", "queue=extract,state=running"] == 1
    assert samples["virnucpro_chunks", "queue=extract,state=failed"] == 1
    assert samples["virnucpro_jobs", "state=failed"] == 1
    other = in_transaction(engines["dag"], jobs.register, jobs.scan(content="b")).job_id
    in_transaction(engines["dag"], cancel, other, by="a person")
    assert watcher.value("chunks", "queue=extract,state=pending") == 0


def test_work_is_counted_and_counters_never_fall(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    """Not even when the job begins anew, and its own counters with it."""
    job = register(engines)
    worker = in_transaction(ledger, jobs.start_worker)
    in_transaction(ledger, jobs.run_job, job, worker, 1)
    first = watcher.look()
    assert first["virnucpro_sequences_total", "outcome=embedded"] == 36
    assert first["virnucpro_sequences_total", "outcome=empty"] == 4
    assert first["virnucpro_residues_total", ""] == 4 * 900
    assert first["virnucpro_tokens_total", ""] == 400
    assert first["virnucpro_chunk_seconds_bucket", "le=0.3,stage=extract"] == 0
    assert first["virnucpro_chunk_seconds_bucket", "le=1.0,stage=extract"] == 4
    assert first["virnucpro_chunk_seconds_bucket", "le=+Inf,stage=extract"] == 4
    assert first["virnucpro_chunk_seconds_sum", "stage=extract"] == 2.0
    assert first["virnucpro_chunk_seconds_count", "stage=validate"] == 1
    assert first["virnucpro_jobs", "state=succeeded"] == 1
    register(engines, force=True)
    assert in_transaction(ledger, lambda tx: tx.execute(text("SELECT tokens FROM jobs")).scalar_one()) == 0
    again = watcher.look()
    counters = {key: value for key, value in first.items() if key[0].endswith(("_total", "_bucket", "_sum"))}
    assert {key: again[key] for key in counters} == counters
    in_transaction(ledger, jobs.run_job, job, in_transaction(ledger, jobs.start_worker, "cpu1@test"), 1)
    assert watcher.value("sequences_total", "outcome=embedded") == 72


def test_padding_is_a_share_of_what_models_took_in(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    job = register(engines)
    worker = in_transaction(ledger, jobs.start_worker)
    first, *_ = in_transaction(ledger, jobs.pending_chunks, job)
    claimed = in_transaction(ledger, jobs.claim, first, worker)
    in_transaction(ledger, complete, claimed, replace(jobs.result_of(claimed), positions=125))
    assert watcher.value("positions_total") == 125
    assert watcher.value("padding_efficiency") == 0.8


def test_merge_lag_is_the_time_in_a_stage_after_extraction(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    job = register(engines, 1)
    change(engines["owner"], "UPDATE jobs SET stage_since = now() - interval '1 day'")
    assert watcher.value("merge_lag_seconds", "stage=merge") == 0
    worker = in_transaction(ledger, jobs.start_worker)
    (chunk,) = in_transaction(ledger, jobs.pending_chunks, job)
    claimed = in_transaction(ledger, jobs.claim, chunk, worker)
    in_transaction(ledger, complete, claimed, jobs.result_of(claimed))
    assert 0 < watcher.value("merge_lag_seconds", "stage=merge") < 60
    change(engines["owner"], "UPDATE jobs SET stage_since = now() - interval '1 hour'")
    samples = watcher.look()
    assert 3600 <= samples["virnucpro_merge_lag_seconds", "stage=merge"] < 3700
    assert samples["virnucpro_merge_lag_seconds", "stage=validate"] == 0
    assert samples["virnucpro_chunks", "queue=finish,state=pending"] == 1
    in_transaction(engines["dag"], cancel, job, by="a person")
    in_transaction(engines["dag"], resume, job)
    assert watcher.value("merge_lag_seconds", "stage=merge") < 60, "it was not in it while it was cancelled"


def test_workers_that_are_given_up_and_what_they_hold_are_counted(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    job = register(engines)
    silent = in_transaction(ledger, jobs.start_worker, "silent@test")
    in_transaction(ledger, jobs.start_worker, "stuck@test")
    in_transaction(ledger, jobs.start_worker, "well@test")
    first, *_ = in_transaction(ledger, jobs.pending_chunks, job)
    in_transaction(ledger, jobs.claim, first, silent)
    assert watcher.value("leases_overdue") == 0
    change(ledger, "UPDATE workers SET lease_expires_at = now() - interval '1 s' WHERE node = 'silent@test'")
    change(ledger, "UPDATE workers SET progress_at = now() - interval '1 h' WHERE node = 'stuck@test'")
    assert watcher.value("leases_overdue") == 1
    in_transaction(ledger, expire_workers)
    in_transaction(ledger, expire_stuck_workers, stuck_seconds=60)
    samples = watcher.look()
    assert samples["virnucpro_leases_overdue", ""] == 1
    assert samples["virnucpro_lease_expired_total", "reason=silent"] == 1
    assert samples["virnucpro_lease_expired_total", "reason=stuck"] == 1
    in_transaction(ledger, jobs.start_worker, "silent@test")
    assert watcher.value("lease_expired_total", "reason=silent") == 1


def test_refused_messages_and_duplicate_results_are_counted(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    job = register(engines)
    worker = in_transaction(ledger, jobs.start_worker)
    first, *_ = in_transaction(ledger, jobs.pending_chunks, job)
    claimed = in_transaction(ledger, jobs.claim, first, worker)
    in_transaction(ledger, count_duplicate, claimed)
    in_transaction(ledger, count_rejections, {RejectionReason.TASK: 3})
    assert watcher.value("duplicate_commit_rejected_total") == 1
    assert watcher.value("messages_rejected_total", "reason=task") == 3


def test_a_worker_tells_of_its_gpu_and_of_its_chunk(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    """Also while it writes one chunk and computes the next."""
    job = register(engines)
    worker = in_transaction(ledger, jobs.start_worker, "gpu0-aaaa1111@test")
    in_transaction(ledger, jobs.start_worker, "cpu0@test")
    first, second, third, *_ = in_transaction(ledger, jobs.pending_chunks, job)
    claimed = in_transaction(ledger, jobs.claim, first, worker)
    in_transaction(ledger, complete, claimed, jobs.result_of(claimed))
    in_transaction(ledger, jobs.claim, second, worker)
    in_transaction(ledger, jobs.claim, third, worker)
    change(engines["owner"], f"UPDATE chunks SET claimed_at = now() - interval '90 s' WHERE id = {second}")
    use = GpuUse(0.93, 40 << 30, 139 << 30)
    options = {"progress": 1, "lease_seconds": 60.0, "gpu": use, "gpu_memory_peak": 30 << 30}
    assert in_transaction(ledger, beat, worker, **options)
    samples = watcher.look()
    node = "node=gpu0-aaaa1111@test"
    assert samples["virnucpro_gpu_utilization_ratio", node] == 0.93
    assert samples["virnucpro_gpu_mem_used_bytes", node] == 40 << 30
    assert samples["virnucpro_gpu_mem_total_bytes", node] == 139 << 30
    assert samples["virnucpro_gpu_mem_peak_bytes", node] == 30 << 30
    assert samples["virnucpro_tokens_per_second", node] == 200
    assert 90 <= samples["virnucpro_lease_seconds", node] < 120
    assert samples["virnucpro_worker_heartbeat_age_seconds", "node=cpu0@test"] < 30
    assert ("virnucpro_gpu_mem_used_bytes", "node=cpu0@test") not in samples
    assert samples["virnucpro_worker_info", f"device=cpu,host=test,{node},queue=extract"] == 1


MILLION = """
    INSERT INTO chunks (job_id, stage, ordinal, byte_start, byte_end, first_record, records, residues, sha256,
                        state, attempts, worker_id, claimed_at, finished_at, embeddings, failed, tokens, seconds)
    SELECT job_id, stage, k, byte_start, byte_end, first_record, records, residues, sha256,
           CASE WHEN done THEN 'done' ELSE 'pending' END, 1, 1 + k / 2 % 16, now(), now() - make_interval(secs => k),
           CASE WHEN done THEN records END, CASE WHEN done THEN 0 END, 100, 0.5
      FROM chunks CROSS JOIN (SELECT k, k % 2 = 0 AS done FROM generate_series(1, 1000000) k) WHERE id = 1;
    INSERT INTO outbox (chunk_id, queue) SELECT id, 'extract' FROM chunks WHERE id > 1 AND state = 'pending';
    UPDATE jobs SET chunks_total = 1000001, chunks_left = 500001, residues_done = 500000 * 900,
                    records = 10000010, embeddings = 4000000, failed = 1000000;
    UPDATE chunks SET failed = 2, embeddings = records - 2 WHERE state = 'done';
    UPDATE chunks SET error = 'no space left on device' WHERE id IN (SELECT id FROM chunks
                                                                      WHERE state = 'pending' LIMIT 100);
    INSERT INTO failures (job_id, generation, record, record_id, reason, detail)
    SELECT 1, 1, k, 'r' || k, 'empty', 'it has no residues' FROM generate_series(1, 1000000) k
"""


@pytest.mark.system  # filling the ledger takes a minute
def test_a_million_chunks_are_read_in_well_under_a_second(
    engines: dict[str, Engine], ledger: Engine, watcher: Watcher
) -> None:
    register(engines, 1)
    for k in range(16):
        in_transaction(ledger, jobs.start_worker, f"gpu{k}@test")
    for statement in MILLION.split(";"):
        change(engines["owner"], statement)
    change(engines["owner"], "ANALYZE")  # as autovacuum does
    samples = watcher.look()
    assert samples["virnucpro_chunks", "queue=extract,state=pending"] == 500_001
    assert samples["virnucpro_chunks", "queue=extract,state=done"] == 500_000
    assert samples["virnucpro_tokens_per_second", "node=gpu3@test"] == 200
    assert min(watcher.value("snapshot_seconds") for _ in range(5)) < 0.1
    for look in (list_job_overviews, list_worker_overviews, partial(list_newest_failures, limit=8)):
        assert fastest(engines["dag"], look) < 0.1
    assert (
        fastest(engines["dag"], partial(read_status, job_id=1)) < 0.5
    )  # counts a million failures by reason


def fastest(ledger: Engine, look: Callable[[Connection], object]) -> float:
    """Seconds."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        in_transaction(ledger, look)
        taken.append(time.perf_counter() - began)
    return min(taken)


def test_every_metric_that_is_watched_exists(engines: dict[str, Engine], watcher: Watcher) -> None:
    """The dashboard's and the rules' queries name no other."""
    use = GpuUse(0.5, 1, 2)
    worker = in_transaction(engines["worker"], jobs.start_worker)
    job = register(engines)
    in_transaction(engines["worker"], beat, worker, progress=1, lease_seconds=60, gpu=use, gpu_memory_peak=1)
    in_transaction(engines["worker"], jobs.run_job, job, worker)
    known = {name for name, _ in watcher.look()}
    rules = FILE.parents[2] / "prometheus" / "rules.yml"
    watched = set(re.findall(r"virnucpro_\w+", FILE.read_text() + rules.read_text()))
    assert len(watched) > 20
    assert watched - known == set()


def test_without_the_ledger_it_says_so(tmp_path: Path) -> None:
    away = open_ledger("postgresql+psycopg://nobody:secret@127.0.0.1:1/none")
    samples = Watcher(away, tmp_path).look()
    away.dispose()
    assert samples["virnucpro_ledger_up", ""] == 0
    assert {name for name, _ in samples} == {
        "virnucpro_ledger_up",
        "virnucpro_disk_free_bytes",
        "virnucpro_disk_size_bytes",
    }
