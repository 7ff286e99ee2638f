"""What can be done to a house. Each fault strikes at once, and returns what undoes it, if it must be undone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType

import redis
from celery import Celery

from tests.faults.house import House, send
from virnucpro_core.ledger.work import job_folder
from virnucpro_core.stack.processes import ServerProcess
from workers.app import KEY_PREFIX, make_app
from workers.messages import task_name

Undo = Callable[[], None]
Strike = Callable[[House, str], Undo | None]

GARBAGE = [
    b"not json",
    b"{}",
    b"[1, 2]",
    b'{"body": "bm90IGpzb24=", "content-type": "application/json", "properties": {"delivery_tag": "x"}}',
    (
        b'{"body": "gASVAAAAAA==", "content-encoding": "binary", "content-type": "application/x-python-serialize",'
        b' "headers": {"task": "virnucpro.extract", "id": "y"}, "properties": {"delivery_tag": "y",'
        b' "body_encoding": "base64", "delivery_info": {"exchange": "virnucpro", "routing_key": "extract"}}}'
    ),
]
"""What a queue may hold that is no message: not JSON, no envelope, no body, a pickle."""


# Workers. `where` is the launcher: a (extract and finish) or b (extract, with a wrong clock).


def kill_child(house: House, where: str) -> None:
    send(house.child(where), signal.SIGKILL)


def kill_parent(house: House, where: str) -> None:
    send(house.parent(where), signal.SIGKILL)


def kill_both(house: House, where: str) -> None:
    child = house.child(where)
    send(house.parent(where), signal.SIGKILL)
    send(child, signal.SIGKILL)


def kill_launcher(house: House, where: str) -> Undo:
    house.launchers[where].kill()
    return house.start_services


def terminate_launcher(house: House, where: str) -> Undo:
    process = house.launchers[where].process
    if process is not None:
        process.terminate()

    def start_again() -> None:
        house.launchers[where].stop()
        house.start_services()

    return start_again


def stop_child(house: House, where: str) -> Undo:
    child = house.child(where)
    send(child, signal.SIGSTOP)
    return lambda: send(child, signal.SIGCONT)


def trap(house: House, where: str) -> Undo | None:
    """`where` is queue, step and action: a child of the queue does that to itself when it comes to the step."""
    queue, step, action = where.split(".")
    house.lay(queue, step, action)
    return None


# The relay.


def kill_relay(house: House, where: str) -> Undo:
    house.relay.kill()
    return house.start_services


def stop_relay(house: House, where: str) -> Undo:
    process = house.relay.process
    if process is not None:
        process.send_signal(signal.SIGSTOP)

    def go_on() -> None:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)

    return go_on


# The broker.


def restart_broker(house: House, where: str) -> None:
    """With its data (`kept`) or without (`lost`)."""
    house.broker.stop()
    if where == "lost":
        for path in house.valkey.folder.rglob("appendonly*.*"):
            path.unlink()
    house.start_broker()


def take_broker_down(house: House, where: str) -> Undo:
    house.broker.stop()
    return house.start_broker


def flush_broker(house: House, where: str) -> None:
    with house.connect_broker() as broker:
        broker.flushall()


def reset_broker(house: House, where: str) -> None:
    with house.connect_broker() as broker:
        broker.execute_command("CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal")


def repeat_messages(house: House, where: str) -> None:
    """Every chunk's message again, whatever has become of it."""
    with celery_of(house) as app:
        for row in house.rows("SELECT id, stage FROM chunks ORDER BY id"):
            queue = "extract" if row.stage == "extract" else "finish"
            app.send_task(task_name(row.stage), args=[row.id], queue=queue, ignore_result=True)


def send_garbage(house: House, where: str) -> None:
    with house.connect_broker() as broker:
        for message in GARBAGE:
            broker.lpush(f"{KEY_PREFIX}{where}", message)
    with celery_of(house) as app:
        app.send_task("virnucpro.nonsense", args=[1], queue=where)
        app.send_task("virnucpro.extract", args=["x" * 1000, None], kwargs={"y": 1}, queue=where)
        app.send_task("virnucpro.merge", args=[-(2**70)], queue=where)


def celery_of(house: House) -> Celery:
    return make_app(lambda: house.settings)


# The database.


def restart_database(house: House, where: str) -> None:
    """PostgreSQL's `fast` shutdown, or `immediate`: a crash, with recovery when it starts."""
    stop_database(house.database, where)
    house.start_database()


def take_database_down(house: House, where: str) -> Undo:
    stop_database(house.database, where)
    return house.start_database


def stop_database(database: ServerProcess, how: str) -> None:
    database.stop_signal = signal.SIGQUIT if how == "immediate" else signal.SIGINT
    database.stop()


def cut_connections(house: House, where: str) -> None:
    with house.postgres.connect() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE usename = 'virnucpro_worker' AND pid <> pg_backend_pid()"
        )


# Files. `where` says how; the victim is a recorded chunk artifact of the running job.


def damage_artifact(house: House, where: str) -> None:
    rows = house.rows(
        "SELECT path FROM artifacts WHERE stage = 'extract' AND kind = 'matrix'"
        " AND job_id = (SELECT max(id) FROM jobs WHERE state = 'running') ORDER BY id DESC LIMIT 1"
    )
    if not rows:
        return
    path = house.output / rows[0].path
    with suppress(FileNotFoundError):
        content = path.read_bytes()
        if where == "deleted":
            path.unlink()
        elif where == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def block_output(house: House, where: str) -> Undo | None:
    """A file stands where a stage's folder should be (as root, permissions would keep nobody out)."""
    rows = house.rows("SELECT id, generation FROM jobs WHERE state = 'running' ORDER BY id DESC LIMIT 1")
    if not rows:
        return None
    folder = house.output / job_folder(rows[0].id) / f"g{rows[0].generation}" / where
    aside = folder.with_name(f"{where}-aside")
    if folder.exists():
        folder.rename(aside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_bytes(b"")

    def unblock() -> None:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)

    return unblock


STRIKES: Mapping[str, Strike] = MappingProxyType(
    {
        "kill child": kill_child,
        "kill parent": kill_parent,
        "kill both": kill_both,
        "kill launcher": kill_launcher,
        "terminate launcher": terminate_launcher,
        "stop child": stop_child,
        "trap": trap,
        "kill relay": kill_relay,
        "stop relay": stop_relay,
        "restart broker": restart_broker,
        "broker down": take_broker_down,
        "flush broker": flush_broker,
        "reset broker": reset_broker,
        "repeat messages": repeat_messages,
        "garbage": send_garbage,
        "restart database": restart_database,
        "database down": take_database_down,
        "cut connections": cut_connections,
        "damage artifact": damage_artifact,
        "block output": block_output,
    }
)

AWAY = (redis.RedisError, OSError)
"""A fault may meet what another one took away."""
