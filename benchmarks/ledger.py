"""Does the cost of a transition grow with the job? 100,000 chunks through relay, broker, Celery and ledger.

    python -m benchmarks.ledger [--chunks 100000]

The extractor computes nothing, so this is the pipeline's own ceiling. Prints and writes
benchmarks/results/ledger.json: chunks per second in the first and the last tenth, beside the rate at which Celery
itself runs a no-op task on the same broker, and the same transitions called directly.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
from sqlalchemy import Engine, text

from benchmarks.noop_tasks import noop
from tests import ledger_jobs
from virnucpro_core.ledger.database import in_transaction, open_ledger, upgrade
from virnucpro_core.settings import load_settings
from virnucpro_core.stack.postgres import PostgresServer
from virnucpro_core.stack.processes import Secrets, choose_port
from virnucpro_core.stack.valkey import ValkeyServer
from workers.app import KEY_PREFIX, app

RESULTS = Path(__file__).parent / "results" / "ledger.json"
NOOPS = 10_000
EXTRACT_KEY = f"{KEY_PREFIX}extract"


@contextmanager
def process(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as child:
        try:
            yield child
        finally:
            child.terminate()
            child.wait()


def celery_worker(folder: Path, name: str) -> ExitStack:
    stack = ExitStack()
    arguments = ["worker", "-Q", "extract", "-c", "1", "-n", f"{name}@%h", "--loglevel", "WARNING"]
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.noop_tasks", *arguments]
    stack.enter_context(process(*command, log=folder / f"{name}.log"))
    return stack


def measure_celery(broker: redis.Redis, folder: Path) -> float:
    """No-op tasks per second, between the first tenth and the last of those in the queue."""
    for _ in range(NOOPS):
        noop.apply_async((1,), queue="extract")
    with celery_worker(folder, "noop"):
        wait_until(lambda: broker.llen(EXTRACT_KEY) <= NOOPS * 0.9)
        started, left = time.perf_counter(), broker.llen(EXTRACT_KEY)
        wait_until(lambda: broker.llen(EXTRACT_KEY) <= NOOPS * 0.1)
        return (left - broker.llen(EXTRACT_KEY)) / (time.perf_counter() - started)


def wait_until(condition: object, pause: float = 0.02) -> None:
    assert callable(condition)
    while not condition():
        time.sleep(pause)


def measure_pipeline(ledger: Engine, folder: Path, chunks: int) -> dict[str, float]:
    in_transaction(ledger, ledger_jobs.add_model)
    started = time.perf_counter()
    job = in_transaction(ledger, ledger_jobs.register, ledger_jobs.scan(chunks=chunks, records_each=1))
    registered = time.perf_counter() - started
    relay = process(sys.executable, "-m", "workers.relay", log=folder / "relay.log")
    with celery_worker(folder, "chunks"), relay:
        wait_until(lambda: chunks_left(ledger, job.job_id) == 0, pause=0.5)
    with ledger.connect() as tx:
        seconds = tx.execute(
            text("""
                SELECT extract(epoch FROM max(finished_at) FILTER (WHERE place <= :tenth)
                                          - min(finished_at))::float8 AS first,
                       extract(epoch FROM max(finished_at)
                                          - min(finished_at) FILTER (WHERE place > :all - :tenth))::float8 AS last,
                       extract(epoch FROM max(finished_at) - min(finished_at))::float8 AS whole
                  FROM (SELECT finished_at, row_number() OVER (ORDER BY finished_at) AS place
                          FROM chunks WHERE job_id = :job AND stage = 'extract') c
            """),
            {"job": job.job_id, "tenth": chunks // 10, "all": chunks},
        ).one()
    return {
        "register_chunks_per_s": chunks / registered,
        "first_tenth_chunks_per_s": chunks / 10 / seconds.first,
        "last_tenth_chunks_per_s": chunks / 10 / seconds.last,
        "chunks_per_s": chunks / seconds.whole,
    }


def chunks_left(ledger: Engine, job_id: int) -> int:
    with ledger.connect() as tx:
        job = tx.execute(text("SELECT stage, chunks_left FROM jobs WHERE id = :job"), {"job": job_id}).one()
    return int(job.chunks_left) if job.stage == "extract" else 0


def check_nothing_rejected(ledger: Engine) -> None:
    """A rejected message is a fast one: its task never ran."""
    with ledger.connect() as tx:
        rejected = tx.execute(text("SELECT reason, messages FROM rejections")).all()
    if rejected:
        raise RuntimeError(f"messages were rejected, so the rates mean nothing: {rejected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    chunks = parser.parse_args().chunks
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        secrets = Secrets(folder / "secrets")
        postgres = PostgresServer(folder / "postgres", choose_port(), secrets)
        valkey = ValkeyServer(folder / "valkey", choose_port(), secrets)
        for server, log in ((postgres, "postgres.log"), (valkey, "valkey.log")):
            server.prepare()
            stack.enter_context(server.process(folder / log)).start(server.is_ready)
        urls = postgres.create_ledger_database()
        upgrade(urls["owner"])
        os.environ |= {
            "VIRNUCPRO_OWNER_DATABASE_URL": urls["owner"],
            "VIRNUCPRO_DAG_DATABASE_URL": urls["dag"],
            "VIRNUCPRO_WORKER_DATABASE_URL": urls["worker"],
            "VIRNUCPRO_BROKER_URL": valkey.url(1),
            "VIRNUCPRO_LEASE_SECONDS": "86400",
            # a no-op chunk ends in a millisecond: the default window would measure the relay's round trip
            "VIRNUCPRO_WINDOW_PER_WORKER": "64",
        }
        load_settings.cache_clear()
        broker = stack.enter_context(redis.Redis.from_url(valkey.url(1)))
        ledger = open_ledger(urls["owner"])
        celery_rate = measure_celery(broker, folder)
        rates = measure_pipeline(ledger, folder, chunks)
        check_nothing_rejected(ledger)
        ledger.dispose()
        app.close()
    report = {
        "chunks": chunks,
        "celery_noop_per_s": celery_rate,
        **rates,
        "last_to_first": rates["last_tenth_chunks_per_s"] / rates["first_tenth_chunks_per_s"],
        "share_of_celery": rates["chunks_per_s"] / celery_rate,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({key: round(value, 3) for key, value in report.items()}, indent=2) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
