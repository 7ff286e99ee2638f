"""The relay and the reaper, on a real ledger and a real broker."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Engine, make_url, text

from tests import ledger_jobs
from virnucpro_core.ledger.database import IDLE_TIMEOUT, in_transaction, open_ledger
from virnucpro_core.ledger.suspects import HOPELESS_DEATHS
from virnucpro_core.settings import load_settings
from virnucpro_core.stack.processes import Secrets, choose_port
from virnucpro_core.stack.valkey import ValkeyServer
from workers.app import KEY_PREFIX, make_app
from workers.reaper import reap
from workers.relay import Relay

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline"]

CHUNKS = 10


@pytest.fixture
def ledger(ledger_url: str, settings_environment: Callable[..., None]) -> Iterator[Engine]:
    """A ledger with one job of ten chunks."""
    settings_environment(window_per_worker=2, republish_seconds=5)
    engine = open_ledger(ledger_url)
    in_transaction(engine, ledger_jobs.add_model)
    in_transaction(engine, ledger_jobs.register, ledger_jobs.scan(CHUNKS))
    yield engine
    engine.dispose()


@pytest.fixture
def celery() -> Iterator[Celery]:
    """An application with this test's settings."""
    app = make_app(load_settings)
    yield app
    app.close()


@pytest.fixture
def relay(ledger: Engine, celery: Celery) -> Iterator[Relay]:
    """A relay whose turns the test takes."""
    relay = Relay(load_settings(), celery, Event())
    yield relay
    relay.ledger.dispose()


@pytest.fixture
def broker(broker_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(broker_url) as client:
        yield client


def queued(broker: redis.Redis, queue: str = "extract") -> int:
    length = broker.llen(f"{KEY_PREFIX}{queue}")
    assert isinstance(length, int)
    return length


def chunks_queued(broker: redis.Redis) -> list[int]:
    """Whose messages the broker holds, the next one first."""
    raw = broker.lrange(f"{KEY_PREFIX}extract", 0, -1)
    assert isinstance(raw, list)
    return [json.loads(base64.b64decode(json.loads(message)["body"]))[0][0] for message in reversed(raw)]


def age_messages(ledger: Engine, seconds: float) -> None:
    """Make all published messages older than they are."""
    change = text("UPDATE outbox SET published_at = published_at - make_interval(secs => :seconds)")
    in_transaction(ledger, lambda tx: tx.execute(change, {"seconds": seconds}))


def test_only_a_window_is_published(relay: Relay, ledger: Engine, broker: redis.Redis) -> None:
    relay.turn()
    relay.turn()
    assert queued(broker) == 2
    for node in ("cpu0@a", "cpu1@a", "cpu2@a"):
        in_transaction(ledger, ledger_jobs.start_worker, node)
    relay.turn()
    assert queued(broker) == 6


def test_messages_go_to_our_broker_whatever_variables_name_for_another_program(
    ledger: Engine, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        monkeypatch.setenv(name, "memory://another")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "django-db")
    with make_app(load_settings) as celery:
        relay = Relay(load_settings(), celery, Event())
        relay.turn()
        relay.ledger.dispose()
    assert queued(broker) == 2


def test_claimed_chunk_makes_room_for_another(relay: Relay, ledger: Engine, broker: redis.Redis) -> None:
    relay.turn()
    worker = in_transaction(ledger, ledger_jobs.start_worker)
    (first, *_) = in_transaction(ledger, ledger_jobs.pending_chunks, 1)
    in_transaction(ledger, ledger_jobs.claim, first, worker)
    relay.turn()
    assert queued(broker) == 3


def test_message_names_chunk_task_and_title(relay: Relay, broker: redis.Redis) -> None:
    relay.turn()
    (raw,) = broker.lrange(f"{KEY_PREFIX}extract", -1, -1)
    message = json.loads(raw)
    assert message["content-type"] == "application/json"
    assert message["headers"]["task"] == "virnucpro.extract"
    assert message["headers"]["argsrepr"] == "job 1 a: extract chunk 1 of 10"
    arguments, _, _ = json.loads(base64.b64decode(message["body"]))
    assert arguments == [1]


def test_flushed_broker_is_filled_again(relay: Relay, ledger: Engine, broker: redis.Redis) -> None:
    relay.turn()
    broker.flushdb()
    relay.turn()
    assert queued(broker) == 0
    age_messages(ledger, 6)
    relay.turn()
    assert queued(broker) == 2


def test_message_whose_row_a_stopped_process_has_locked_holds_up_no_other(
    relay: Relay, ledger: Engine, broker: redis.Redis
) -> None:
    relay.turn()
    broker.flushdb()
    age_messages(ledger, 6)
    with ledger.begin() as stopped:
        stopped.execute(text("SELECT 1 FROM outbox WHERE chunk_id = 1 FOR UPDATE"))
        relay.turn()
        assert queued(broker) == 1


def test_lost_message_is_sent_again_while_others_wait(
    relay: Relay, ledger: Engine, broker: redis.Redis
) -> None:
    """As with a process that dies while it loads its model. It must not wait for the end of all other work."""
    relay.turn()
    broker.rpop(f"{KEY_PREFIX}extract")
    age_messages(ledger, 6)
    relay.turn()
    relay.turn()
    assert chunks_queued(broker) == [2, 1]


def test_waiting_message_is_not_sent_again(relay: Relay, ledger: Engine, broker: redis.Redis) -> None:
    relay.turn()
    age_messages(ledger, 600)
    relay.turn()
    assert queued(broker) == 2


def test_delayed_message_waits_for_its_time(
    relay: Relay, ledger: Engine, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.relay.TURN_SECONDS", 600.0)
    change = text("UPDATE outbox SET due_at = now() + make_interval(secs => :seconds)")
    in_transaction(ledger, lambda tx: tx.execute(change, {"seconds": 60}))
    wait = relay.turn()
    assert queued(broker) == 0
    assert 0 < wait <= 60
    in_transaction(ledger, lambda tx: tx.execute(change, {"seconds": 0}))
    relay.turn()
    assert queued(broker) == 2


def set_clock_back(ledger: Engine) -> None:
    """By an hour: what the database's clock has written lies in its future."""
    stamps = {
        "outbox": ("due_at", "published_at"),
        "workers": ("heartbeat_at", "progress_at", "lease_expires_at"),
        "chunks": ("claimed_at",),
    }
    for table, columns in stamps.items():
        later = ", ".join(f"{column} = {column} + interval '1 hour'" for column in columns)
        in_transaction(
            ledger, lambda tx, table=table, later=later: tx.execute(text(f"UPDATE {table} SET {later}"))
        )


def test_messages_do_not_wait_until_a_clock_that_was_set_back_is_where_it_was(
    relay: Relay, ledger: Engine, broker: redis.Redis
) -> None:
    set_clock_back(ledger)
    relay.turn()
    assert queued(broker) == 2
    broker.flushdb()
    set_clock_back(ledger)
    relay.turn()
    relay.turn()
    assert queued(broker) == 2


def test_worker_has_no_more_than_its_time_after_the_clock_was_set_back(ledger: Engine) -> None:
    worker = in_transaction(ledger, ledger_jobs.start_worker, lease_seconds=60)
    (first, *_) = in_transaction(ledger, ledger_jobs.pending_chunks, 1)
    in_transaction(ledger, ledger_jobs.claim, first, worker)
    set_clock_back(ledger)
    assert reap(ledger, load_settings()) == []
    bounded = text("SELECT lease_expires_at <= now() + interval '60 s' AND progress_at <= now() FROM workers")
    assert in_transaction(ledger, lambda tx: tx.execute(bounded).scalar_one())
    expire(ledger, worker, "lease_expires_at")
    assert [chunk.chunk_id for chunk in reap(ledger, load_settings())] == [first]


def expire(ledger: Engine, worker: int, column: str) -> None:
    change = text(f"UPDATE workers SET {column} = now() - interval '1 hour' WHERE id = :worker")
    in_transaction(ledger, lambda tx: tx.execute(change, {"worker": worker}))


@pytest.mark.parametrize(
    ("aged", "reason"), [("lease_expires_at", "fell silent"), ("progress_at", "made no progress for 60 s")]
)
def test_chunk_of_a_silent_or_stuck_worker_is_freed(
    ledger: Engine, settings_environment: Callable[..., None], aged: str, reason: str
) -> None:
    settings_environment(stuck_seconds=60)
    healthy = in_transaction(ledger, ledger_jobs.start_worker, "cpu0@a")
    lost = in_transaction(ledger, ledger_jobs.start_worker, "cpu1@a")
    first, second, *_ = in_transaction(ledger, ledger_jobs.pending_chunks, 1)
    in_transaction(ledger, ledger_jobs.claim, first, healthy)
    in_transaction(ledger, ledger_jobs.claim, second, lost)
    early = text("UPDATE chunks SET claimed_at = now() - interval '1 hour' WHERE id = :chunk")
    in_transaction(ledger, lambda tx: tx.execute(early, {"chunk": second}))
    expire(ledger, lost, aged)
    (recovered,) = reap(ledger, load_settings())
    assert (recovered.chunk_id, recovered.state) == (second, "pending")
    error = text("SELECT error FROM chunks WHERE id = :chunk")
    said = in_transaction(ledger, lambda tx: tx.execute(error, {"chunk": second}).scalar_one())
    assert reason in said
    assert reap(ledger, load_settings()) == []


def test_chunk_that_no_worker_survives_fails_with_its_job(ledger: Engine) -> None:
    (first, *_) = in_transaction(ledger, ledger_jobs.pending_chunks, 1)
    states = []
    for _ in range(HOPELESS_DEATHS):
        worker = in_transaction(ledger, ledger_jobs.start_worker)
        in_transaction(ledger, ledger_jobs.claim, first, worker)
        expire(ledger, worker, "lease_expires_at")
        (recovered,) = reap(ledger, load_settings())
        states.append(recovered.state)
    assert states == ["pending"] * (HOPELESS_DEATHS - 1) + ["failed"]
    job = in_transaction(ledger, lambda tx: tx.execute(text("SELECT state, error FROM jobs")).one())
    assert job.state == "failed"
    assert "workers died of it" in job.error


def test_lock_held_by_a_stopped_process_does_not_hold_up_the_reaper(ledger: Engine) -> None:
    worker = in_transaction(ledger, ledger_jobs.start_worker)
    (first, *_) = in_transaction(ledger, ledger_jobs.pending_chunks, 1)
    in_transaction(ledger, ledger_jobs.claim, first, worker)
    expire(ledger, worker, "lease_expires_at")
    with ledger.begin() as stopped:
        stopped.execute(text("SELECT 1 FROM jobs FOR UPDATE"))
        assert reap(ledger, load_settings()) == []
    assert len(reap(ledger, load_settings())) == 1


def test_broker_that_is_away_loses_no_message(
    ledger: Engine, settings_environment: Callable[..., None], tmp_path: Path
) -> None:
    server = ValkeyServer(tmp_path / "valkey", choose_port(), Secrets(tmp_path / "secrets"))
    server.prepare()
    settings_environment(broker_url=server.url())
    celery = make_app(load_settings)
    relay = Relay(load_settings(), celery, Event())
    try:
        with pytest.raises(BrokerError):
            relay.turn()
        unpublished = text("SELECT count(*) FROM outbox WHERE published_at IS NULL")
        assert in_transaction(ledger, lambda tx: tx.execute(unpublished).scalar_one()) == CHUNKS
        with server.process(tmp_path / "valkey.log") as process:
            process.start(server.is_ready)
            relay.turn()
            with redis.Redis.from_url(server.url()) as client:
                assert queued(client) == 2
            celery.close()
    finally:
        relay.ledger.dispose()


def test_broker_that_hangs_is_away_until_it_goes_on(
    pipeline: Pipeline, small_fasta: Path, tmp_path: Path
) -> None:
    """A stopped broker closes no connection, and the relay must not wait for it inside its transaction."""
    server = ValkeyServer(tmp_path / "valkey", choose_port(), Secrets(tmp_path / "secrets"))
    server.prepare()
    pipeline.configure(broker_url=server.url(), window_per_worker=2)
    with server.process(tmp_path / "valkey.log") as process:
        process.start(server.is_ready)
        relay = pipeline.start_relay()
        pipeline.submit(small_fasta)
        with redis.Redis.from_url(server.url()) as client:
            pipeline.wait_until(lambda: queued(client) == 2)
        assert process.process is not None
        process.process.send_signal(signal.SIGSTOP)
        worker = in_transaction(pipeline.ledger, ledger_jobs.start_worker)
        (first, *_) = in_transaction(pipeline.ledger, ledger_jobs.pending_chunks, 1)
        in_transaction(pipeline.ledger, ledger_jobs.claim, first, worker)  # makes room for another
        pipeline.wait_until(lambda: "broker_away" in relay.log.read_text(), seconds=IDLE_TIMEOUT)
        process.process.send_signal(signal.SIGCONT)
        with redis.Redis.from_url(server.url()) as client:
            pipeline.wait_until(lambda: queued(client) >= 3)
        published = "SELECT 1 FROM outbox WHERE published_at IS NOT NULL HAVING count(*) = 2"
        pipeline.wait_until(lambda: pipeline.rows(published))
        assert "ledger_away" not in relay.log.read_text()
        relay.stop()


def test_second_relay_waits_until_the_first_is_gone(
    pipeline: Pipeline, small_fasta: Path, broker_url: str
) -> None:
    first = pipeline.start_relay()
    second = pipeline.start_relay("relay_waits")
    first.kill()
    pipeline.wait_until(lambda: "relay_serves" in second.log.read_text())
    pipeline.submit(small_fasta)
    with redis.Redis.from_url(broker_url) as broker:
        pipeline.wait_until(lambda: queued(broker) == 2)


def test_relay_goes_on_after_its_connections_were_cut(
    pipeline: Pipeline, small_fasta: Path, broker_url: str, ledger_urls: dict[str, str]
) -> None:
    relay = pipeline.start_relay()
    cut = text("""
        SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
         WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
    """)
    same_role = open_ledger(ledger_urls["worker"])
    assert in_transaction(same_role, lambda tx: tx.execute(cut).scalar_one()) >= 1
    same_role.dispose()
    # Three times, if it met a connection that was still being cut.
    pipeline.wait_until(lambda: relay.log.read_text().count("relay_serves") >= 2)
    pipeline.submit(small_fasta)
    with redis.Redis.from_url(broker_url) as broker:
        broker.execute_command("CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal")
        # One whose answer was cut off is sent again.
        pipeline.wait_until(lambda: len(set(chunks_queued(broker))) == 2)


@pytest.mark.parametrize("module", ["workers.relay", "workers.launcher"])
@pytest.mark.parametrize("fault", ["password", "down", "database", "migrations"])
def test_start_without_its_services_is_refused_in_words(
    module: str,
    fault: str,
    settings_environment: Callable[..., None],
    database_url: str,
    ledger_urls: dict[str, str],
    broker_url: str,
) -> None:
    password = broker_url.partition("redis://:")[2].partition("@")[0]
    stranger = make_url(ledger_urls["worker"]).set(password="wrong").render_as_string(hide_password=False)
    nowhere = f"redis://:{password}@127.0.0.1:{choose_port()}/1"
    variables, said = {
        "password": (
            {"broker_url": broker_url.replace(password, "wrong")},
            "the broker refused the password",
        ),
        "down": ({"broker_url": nowhere}, "the broker cannot be reached"),
        "database": ({"worker_database_url": stranger}, "PostgreSQL refused the password"),
        "migrations": ({"worker_database_url": database_url}, "Run `virnucpro db upgrade`"),
    }[fault]
    settings_environment(**variables)
    command = [sys.executable, "-m", module, *(["--gpus", "none"] if "launcher" in module else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert password not in done.stdout + done.stderr
