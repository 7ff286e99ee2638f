"""What those see who watch: the overview of jobs and workers, and `status --watch`, on a real ledger."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Connection, Engine, text

from tests import ledger_jobs as jobs
from virnucpro_core.ledger import transitions
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.overview import (
    RECENT_CHUNKS,
    JobOverview,
    list_job_overviews,
    list_newest_failures,
    list_worker_overviews,
)

if TYPE_CHECKING:
    from tests.fixtures_command import Completed

    Command = Callable[..., Completed]

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_command"]

RUN_MAIN = "from virnucpro_core.cli import main; main()"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PROJECT = Path(__file__).parents[2]
RESIDUES = 900  # of a chunk of `jobs.scan`


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Engine]:
    engine = open_ledger(ledger_url)
    in_transaction(engine, jobs.add_model)
    yield engine
    engine.dispose()


@pytest.fixture
def tx(ledger: Engine) -> Iterator[Connection]:
    with ledger.connect() as connection:
        yield connection


def do_chunk(tx: Connection, chunk: int, worker: int, *, failures: int = 0) -> None:
    claimed = jobs.claim(tx, chunk, worker)
    transitions.complete(tx, claimed, jobs.result_of(claimed, failures))


def set_times(tx: Connection, chunk: int, claimed: float, finished: float) -> None:
    """A done chunk was claimed and finished so many seconds ago, of a job that began days before."""
    tx.execute(text("UPDATE jobs SET stage_since = now() - interval '7 days'"))
    change = """UPDATE chunks SET claimed_at = now() - make_interval(secs => :claimed),
                       finished_at = now() - make_interval(secs => :finished) WHERE id = :chunk"""
    tx.execute(text(change), {"chunk": chunk, "claimed": claimed, "finished": finished})


def overview(tx: Connection, job: int) -> JobOverview:
    (found,) = list_job_overviews(tx, jobs=[job])
    return found


def test_rate_and_time_left_are_of_residues(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan(chunks=4)).job_id
    chunks, worker = jobs.pending_chunks(tx, job), jobs.start_worker(tx)
    before = overview(tx, job)
    assert (before.residues, before.residues_done) == (4 * RESIDUES, 0)
    assert (before.residues_per_second, before.seconds_left) == (None, None)
    do_chunk(tx, chunks[0], worker, failures=2)
    set_times(tx, chunks[0], 20, 10)
    half = overview(tx, job)
    assert (half.residues_done, half.chunks_left, half.embeddings, half.failed) == (RESIDUES, 3, 8, 2)
    assert half.residues_per_second == pytest.approx(RESIDUES / 10)
    assert half.seconds_left == pytest.approx(3 * 10)
    for chunk in chunks[1:]:
        do_chunk(tx, chunk, worker)
    after = overview(tx, job)
    assert (after.stage, after.residues_done, after.seconds_left) == ("merge", 4 * RESIDUES, None)


def test_chunk_that_a_slow_worker_began_long_ago_does_not_spoil_the_rate(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan(chunks=RECENT_CHUNKS + 5)).job_id
    worker = jobs.start_worker(tx)
    for age, chunk in enumerate(jobs.pending_chunks(tx, job)[: RECENT_CHUNKS + 3]):
        do_chunk(tx, chunk, worker)
        set_times(tx, chunk, 2000 if age == 7 else 1 + age, age)
    assert overview(tx, job).residues_per_second == pytest.approx(RESIDUES)


def test_a_paused_job_has_no_rate_of_yesterday(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan()).job_id
    chunk = jobs.pending_chunks(tx, job)[0]
    do_chunk(tx, chunk, jobs.start_worker(tx))
    set_times(tx, chunk, 86_410, 86_400)
    assert overview(tx, job).residues_per_second is None


def test_the_rest_before_a_resumption_does_not_spoil_the_rate(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan()).job_id
    before, after, _ = jobs.pending_chunks(tx, job)
    worker = jobs.start_worker(tx)
    for chunk in (before, after):
        do_chunk(tx, chunk, worker)
    set_times(tx, before, 2010, 2000)
    set_times(tx, after, 20, 10)
    assert overview(tx, job).residues_per_second == pytest.approx(2 * RESIDUES / 2000)
    tx.execute(text("UPDATE jobs SET stage_since = now() - interval '1 minute'"))
    assert overview(tx, job).residues_per_second == pytest.approx(RESIDUES / 10)


def test_the_rate_falls_when_nothing_more_is_done(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan()).job_id
    chunk = jobs.pending_chunks(tx, job)[0]
    do_chunk(tx, chunk, jobs.start_worker(tx))
    set_times(tx, chunk, 1010, 1000)
    assert overview(tx, job).residues_per_second == pytest.approx(RESIDUES / 1000)


def test_each_worker_is_one_row_with_the_chunk_that_it_computes(tx: Connection) -> None:
    job = jobs.register(tx, jobs.scan(chunks=4)).job_id
    chunks = jobs.pending_chunks(tx, job)
    busy = jobs.start_worker(tx, "busy@test")
    jobs.start_worker(tx, "idle@test")
    do_chunk(tx, chunks[0], busy)
    jobs.claim(tx, chunks[1], busy)  # is being written
    jobs.claim(tx, chunks[2], busy)
    one, other = list_worker_overviews(tx)
    assert (one.node, one.job_id, one.stage, one.ordinal, one.chunks_total) == (
        "busy@test",
        job,
        "extract",
        2,
        4,
    )
    assert one.tokens_per_second == pytest.approx(200)
    assert one.chunk_seconds == pytest.approx(0)
    assert (other.node, other.job_id, other.chunk_seconds, other.tokens_per_second) == (
        "idle@test",
        None,
        None,
        None,
    )


def test_newest_failures_come_first(tx: Connection) -> None:
    first = jobs.register(tx, jobs.scan(content="a")).job_id
    second = jobs.register(tx, jobs.scan(content="b")).job_id
    worker = jobs.start_worker(tx)
    for job, age in ((first, 10), (second, 20)):
        chunk = jobs.pending_chunks(tx, job)[0]
        do_chunk(tx, chunk, worker, failures=2)
        set_times(tx, chunk, age + 1, age)
    assert [(one.job, one.record) for one in list_newest_failures(tx, 3)] == [
        (first, 2),
        (first, 1),
        (second, 2),
    ]
    assert [one.record for one in list_newest_failures(tx, 9, job_id=second)] == [2, 1]


def test_in_a_pipe_the_view_is_printed_once(
    ledger: Engine,
    settings_environment: Callable[..., None],
    virnucpro: Command,
) -> None:
    job = in_transaction(ledger, jobs.register, jobs.scan()).job_id

    def work(tx: Connection) -> None:
        worker = jobs.start_worker(tx, "GPU-a@test")
        tx.execute(
            text(
                "UPDATE workers SET device = 'GPU-a', gpu_memory_used = 3 * 2^30, gpu_memory_total = 139 * 2^30"
            )
        )
        first, second, _ = jobs.pending_chunks(tx, job)
        do_chunk(tx, first, worker, failures=1)
        transitions.fail(tx, jobs.claim(tx, second, worker), "no space left", max_attempts=9)

    in_transaction(ledger, work)
    ended = virnucpro("status", "--watch")
    assert (ended.code, "shown once" in ended.err) == (0, True)
    for seen in (
        "1 a",
        "2/3",
        "33%",
        "GPU-a@test",
        "200",
        "3.0 of 139 GiB",
        "it has no residues",
        "no space left",
    ):
        assert seen in ended.out
    assert "no space left" in virnucpro("status", job, "--watch").out
    assert (virnucpro("status", 99, "--watch").code, virnucpro("status", "--watch", "--json").code) == (1, 2)


class Screen:
    """What a person would read of a command's terminal."""

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.raw = ""

    def wait_for(self, *expected: str, seconds: float = 60) -> None:
        """Read until the newest picture shows all that is expected."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            picture = ESCAPES.sub("", self.raw.rpartition("VirNucPro  ")[2])
            if all(part in picture for part in expected):
                return
            if select.select([self.leader], [], [], 0.5)[0] and not self.read():
                break
        pytest.fail(f"{expected} was not shown; the end of what was: {self.raw[-3000:]!r}")

    def read(self) -> bool:
        """Read what there is, and wait if there is nothing; False once the other side is closed."""
        try:
            self.raw += os.read(self.leader, 100_000).decode(errors="replace")
        except OSError:  # how Linux says so
            return False
        return True

    def read_to_the_end(self) -> None:
        while self.read():
            pass


def test_on_a_terminal_the_view_follows_the_ledger(
    ledger: Engine, settings_environment: Callable[..., None]
) -> None:
    job = in_transaction(ledger, jobs.register, jobs.scan(chunks=4)).job_id
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", RUN_MAIN, "status", "--watch", "--every", "0.1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "50"}
    with subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        cwd=PROJECT,
        # These tests may run where Ctrl-C is ignored, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            os.close(follower)
            screen = Screen(leader)
            screen.wait_for(f"{job} a", "4/4", "0%", "No worker is running")
            worker = in_transaction(ledger, jobs.start_worker, "cpu0@test")
            first, second, *_ = in_transaction(ledger, jobs.pending_chunks, job)
            in_transaction(ledger, do_chunk, first, worker, failures=1)
            in_transaction(ledger, jobs.claim, second, worker)
            screen.wait_for("3/4", "25%", "cpu0@test", f"job {job} extract 2 of 4", "it has no residues")
            process.send_signal(signal.SIGINT)
            screen.read_to_the_end()
            assert process.wait(30) == 0
            # The alternate screen is left again.
            assert screen.raw.rindex("\x1b[?1049l") > screen.raw.rindex("\x1b[?1049h")
            assert "Traceback" not in screen.raw
        finally:
            process.kill()
            os.close(leader)
