"""Reading a job's files again for a person who waits: it may take minutes, and a proxy's patience is short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Literal

from sqlalchemy import Engine

from virnucpro_core.errors import ServiceError
from virnucpro_core.settings import load_settings
from virnucpro_core.verification import Verification, verify_job

PULSE_SECONDS = 5.0


class Verifier:
    """Verifies one job at a time, in a thread of its own: reading two at once would be no quicker.

    Whoever asks for a job that is being read already waits for the same result.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="virnucpro-verify")
        self._running: dict[int, Future[Verification]] = {}
        self._lock = Lock()
        self._closed = False

    def submit(self, ledger: Engine, job_id: int) -> Future[Verification]:
        """The verification of a job, begun if it does not run already."""
        with self._lock:
            self._running = {job: future for job, future in self._running.items() if not future.done()}
            if job_id not in self._running:
                self._running[job_id] = self._pool.submit(
                    verify_job, ledger, load_settings().output_root, job_id, on_progress=self._check_open
                )
            return self._running[job_id]

    def state_of(self, job_id: int) -> Literal["", "waiting", "reading"]:
        """Whether a job's files are being read by this process, or wait until those of another job are."""
        with self._lock:
            future = self._running.get(job_id)
        if future is None or future.done():
            return ""
        return "reading" if future.running() else "waiting"

    def close(self) -> None:
        """Give up what is being read, at the end of the file it is at."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _check_open(self, done: int, total: int) -> None:
        if self._closed:
            raise ServiceError(
                "the server was stopped while it read the files",
                where=f"{done:,} of {total:,} bytes",
                todo="Verify again.",
            )


async def stream_when_done(
    future: Future[Verification], render: Callable[[asyncio.Future[Verification]], str]
) -> AsyncIterator[str]:
    """A page that begins at once and says something every few seconds, and what it has to say at the end.

    Whoever waits holds no thread: the server has few, for all requests together.
    """
    reading = asyncio.wrap_future(future)
    while not reading.done():
        yield "\n"
        await asyncio.wait({reading}, timeout=PULSE_SECONDS)
    yield await asyncio.to_thread(render, reading)
