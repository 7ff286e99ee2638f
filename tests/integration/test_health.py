"""Health checks: they tell a service that works from one whose process merely lives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from celery import Celery
from sqlalchemy import text

from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.health import find_neglected
from workers.app import make_app
from workers.health import check_relay, check_workers

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline"]

HOST = socket.gethostname()


def ask(pipeline: Pipeline, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`virnucpro health …` as a container's health check runs it."""
    command = [sys.executable, "-m", "workers.health", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def find_fault(pipeline: Pipeline, app: Celery, host: str = HOST) -> str:
    """What is at fault with a host's worker; nothing if it is healthy."""
    try:
        check_workers(pipeline.settings, app, ["extract"], host)
    except ServiceError as error:
        return str(error)
    return ""


def test_worker_is_healthy_when_it_consumes(pipeline: Pipeline) -> None:
    workers = pipeline.start_workers("extract")
    (node,) = pipeline.live_nodes()
    # Its child is in the ledger before the parent listens.
    app = make_app()
    pipeline.wait_until(lambda: not find_fault(pipeline, app))
    healthy = ask(pipeline, "worker", "--queues", "extract")
    assert (healthy.returncode, healthy.stdout) == (0, f"{node}: consuming\n"), healthy.stderr
    lacking = ask(pipeline, "worker", "--queues", "extract,finish")
    assert lacking.returncode == ServiceError.exit_code
    assert "no worker for finish has a fresh heartbeat" in lacking.stderr
    # Its parent takes no message any more, but lives, and its child's heartbeat goes on.
    assert workers.process is not None
    (parent,) = psutil.Process(workers.process.pid).children()
    parent.suspend()
    try:
        assert "does not answer" in find_fault(pipeline, app)
    finally:
        parent.resume()
    pipeline.wait_until(lambda: not find_fault(pipeline, app))
    assert "no worker for extract" in find_fault(pipeline, app, "elsewhere")
    app.control.cancel_consumer("extract")
    pipeline.wait_until(lambda: "does not consume extract" in find_fault(pipeline, app))


def test_relay_is_healthy_when_it_serves(pipeline: Pipeline) -> None:
    relay = pipeline.start_relay()
    assert ask(pipeline, "relay").stdout == "a relay serves\n"
    assert relay.process is not None
    os.kill(relay.process.pid, signal.SIGKILL)
    relay.process.wait()
    # PostgreSQL drops the lock when it notices that the connection is closed.
    pipeline.wait_until(lambda: not pipeline.rows("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'"))
    dead = ask(pipeline, "relay")
    assert dead.returncode == ServiceError.exit_code
    assert "no relay serves this ledger" in dead.stderr


def test_relay_that_does_nothing_is_not_healthy(
    pipeline: Pipeline, small_fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the lock, and sleeps."""
    relay = pipeline.start_relay()
    assert relay.process is not None
    os.kill(relay.process.pid, signal.SIGSTOP)
    try:
        pipeline.submit(small_fasta)
        check_relay(pipeline.settings, make_app())  # nothing is late yet
        monkeypatch.setattr("workers.health.LATE_SECONDS", -1.0)
        with pytest.raises(ServiceError, match="messages of the queue extract are not published"):
            check_relay(pipeline.settings, make_app())
    finally:
        os.kill(relay.process.pid, signal.SIGCONT)


def test_silent_workers_that_nobody_gives_up_are_found(pipeline: Pipeline) -> None:
    in_transaction(
        pipeline.ledger,
        lambda tx: tx.execute(
            text("""
                INSERT INTO workers (node, queue, host, pid, device, lease_expires_at)
                VALUES ('gone', 'extract', 'gone', 1, 'cpu', now() - interval '70 seconds')
            """)
        ),
    )
    found = in_transaction(pipeline.ledger, find_neglected, window_per_worker=2, seconds=60)
    assert found == ["1 silent workers are not given up"]
    assert in_transaction(pipeline.ledger, find_neglected, window_per_worker=2, seconds=120) == []
