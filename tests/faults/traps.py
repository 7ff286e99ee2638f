"""Traps: what a Celery child of the chaos house does to itself at a step of its work, if it finds a file there.

`<folder>/<queue>.<step>.<number>` holds the name of an action. The first child that comes to the step takes the
file away and does what it says, so one file is one fault.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Connection, text

FOLDER = "CHAOS_TRAPS"
UNFENCED = "CHAOS_UNFENCED"
POISON = "poison"
"""A file of record ids, one a line, none of which a child survives."""

STEPS = {
    "claimed": "after the claim",
    "extracting": "in the middle of a chunk, with some records done",
    "synced": "the artifact's bytes are on disk under a temporary name",
    "renamed": "the artifact has its name, the ledger does not know it",
    "committing": "inside the transaction that commits, all of it done but the commit",
    "committed": "after the commit",
}


def kill_child() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def kill_both() -> None:
    kill_parent()
    kill_child()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def has_stopped(pid: int) -> bool:
    """Whether a process sleeps by SIGSTOP, or is no more."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def segfault() -> None:
    faulthandler.disable()
    faulthandler._sigsegv()


def hang() -> None:
    while True:
        time.sleep(1)


def orphan() -> None:
    """The child hangs, and its parent is no more."""
    kill_parent()
    hang()


ACTIONS: dict[str, Callable[[], None]] = {
    "kill-child": kill_child,
    "kill-parent": kill_parent,
    "kill-both": kill_both,
    "stop": stop,
    "segfault": segfault,
    "hang": hang,
    "orphan": orphan,
}

TRANSACTION_FAULTS = {
    "deadlock": "DO $$ BEGIN RAISE EXCEPTION 'a deadlock' USING ERRCODE = '40P01'; END $$",
    "serialization": "DO $$ BEGIN RAISE EXCEPTION 'a conflict' USING ERRCODE = '40001'; END $$",
    "cut": "SELECT pg_terminate_backend(pg_backend_pid())",
}


def take(step: str) -> str:
    """The action laid at this step, now this process's alone; empty if there is none."""
    from workers.app import app

    (queue,) = app.amqp.queues.consume_from
    for laid in sorted(Path(os.environ[FOLDER]).glob(f"{queue}.{step}.*")):
        mine = laid.with_name(f"sprung-{os.getpid()}-{laid.name}")
        with suppress(FileNotFoundError):  # another child was faster
            laid.rename(mine)
            return mine.read_text()
    return ""


def spring(step: str) -> None:
    action = take(step)
    if action:
        ACTIONS[action]()


def lay() -> None:
    """Have this process look for a trap at each step of its work."""
    from workers import process
    from workers.models import ModelKeeper
    from workers.process import WorkerProcess

    WorkerProcess._claim = springing("claimed", WorkerProcess._claim)
    WorkerProcess._count_records = springing("extracting", WorkerProcess._count_records)
    WorkerProcess._commit = springing("committed", springing("renamed", WorkerProcess._commit, before=True))
    process.commit = committing(process.commit)
    os.fsync = syncing(os.fsync)
    ModelKeeper.load = with_poison(ModelKeeper.load)
    if os.environ.get(UNFENCED):
        remove_fences()


def springing(step: str, function: Callable[..., Any], *, before: bool = False) -> Callable[..., Any]:
    """The function with a trap before or after it."""

    def stepping(*arguments: Any, **options: Any) -> Any:
        if before:
            spring(step)
        result = function(*arguments, **options)
        if not before:
            spring(step)
        return result

    return stepping


def committing(commit: Callable[..., str]) -> Callable[..., str]:
    """The transaction with a trap, and with faults that only a transaction can meet, at its end."""

    def stepping(tx: Connection, *arguments: Any) -> str:
        state = commit(tx, *arguments)
        action = take("committing")
        if action in TRANSACTION_FAULTS:
            tx.execute(text(TRANSACTION_FAULTS[action]))
        elif action:
            ACTIONS[action]()
        return state

    stepping.__name__ = commit.__name__  # it is logged
    return stepping


def syncing(fsync: Callable[[int], None]) -> Callable[[int], None]:
    """fsync with a trap behind it that is for files, not for folders."""

    def stepping(descriptor: int) -> None:
        fsync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            spring("synced")

    return stepping


def with_poison(load_model: Callable[..., Any]) -> Callable[..., Any]:
    """Loading the model, and then embedding with it, with records that the process does not survive."""

    def stepping(*arguments: Any) -> Any:
        from virnucpro_core.embedding import extraction  # imports torch, which every child does here

        if extraction.extract.__module__ == extraction.__name__:
            extraction.extract = dying_of_poison(extraction.extract)
        return load_model(*arguments)

    return stepping


def dying_of_poison(extract: Callable[..., Any]) -> Callable[..., Any]:
    """Embedding with records, as many as there are lines in a file, that the process does not survive."""

    def stepping(batch: Any, *arguments: Any, **options: Any) -> Any:
        poison = Path(os.environ[FOLDER]) / POISON
        if poison.exists() and {batch.ids[row] for row in batch.rows} & set(poison.read_text().split()):
            segfault()
        return extract(batch, *arguments, **options)

    return stepping


def remove_fences() -> None:
    """The control: a worker that commits whoever holds the chunk, and does not mind having been given up."""
    from virnucpro_core.ledger import transitions
    from workers import heartbeat

    beat = heartbeat.beat

    def beat_on(*arguments: Any, **options: Any) -> bool:
        beat(*arguments, **options)
        return True

    unfenced = transitions.FINISH_CHUNK.text.replace("lease_token = :token", "CAST(:token AS bigint) > 0")
    assert unfenced != transitions.FINISH_CHUNK.text
    transitions.FINISH_CHUNK = text(unfenced)
    heartbeat.beat = beat_on
