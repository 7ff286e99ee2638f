"""Chaos: runs schedules of faults against a house, and checks after each one that every promise was kept.

python -m tests.faults.chaos --seeds 20        # seeds 0 to 19
python -m tests.faults.chaos --seed 17 --seed 3
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from tests.faults.faults import AWAY, STRIKES, Undo
from tests.faults.house import House, HouseError, is_running, running_house
from tests.faults.schedule import Fault, plan
from virnucpro_core.errors import ServiceError

ENDED = ("succeeded", "failed", "cancelled")
SETTLE_SECONDS = 20.0


class Chaos:
    """A house, the job that is run in it, and the bytes that the job gave when nobody disturbed it."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.job_id = house.submit()
        house.wait_until(self.has_ended, "the job ends")
        self.undisturbed = house.read_published(self.job_id)
        assert set(self.undisturbed) == {"chaos_ESM.pt", "chaos_merged.pt", "chaos.failures.jsonl"}
        assert self.read_report(), "there is no report"
        self.assert_kept()

    def run(self, schedule: Sequence[Fault]) -> None:
        """Compute the job anew while the schedule's faults strike.

        Raises:
            AssertionError: a promise was broken.
        """
        house = self.house
        house.wait_for_workers()
        house.submit(force=True)
        siege = Siege(self, schedule)
        try:
            house.wait_until(siege.is_over, "the job ends")
        finally:
            siege.undo_all()
        self.assert_kept()

    def has_ended(self) -> bool:
        return self.house.job(self.job_id).state in ENDED

    def chunks_done(self) -> int:
        (row,) = self.house.rows(
            "SELECT CASE WHEN j.stage = 'extract' THEN j.chunks_total - j.chunks_left ELSE 1000 END AS done"
            " FROM jobs j WHERE id = :job",
            job=self.job_id,
        )
        done: int = row.done
        return done

    def assert_kept(self) -> None:
        """Check every promise, once all is quiet."""
        house = self.house
        twice = self.committed_twice()
        assert not twice, f"chunks were committed twice: {twice}"
        job = house.job(self.job_id)
        assert job.state == "succeeded", f"the job is {job.state}: {job.error}"
        assert job.embeddings + job.failed == job.records
        assert house.read_published(self.job_id) == self.undisturbed, "the result has other bytes"
        self.assert_report_is_recorded()
        self.settle("messages", lambda: house.rows("SELECT chunk_id FROM outbox"))
        self.settle("leases", lambda: house.rows("SELECT id FROM chunks WHERE lease_token IS NOT NULL"))
        self.settle("files that nobody recorded", self.strays)
        self.settle("processes of workers that were given up", self.undead)

    def assert_report_is_recorded(self) -> None:
        """The report tells of times and workers, so its bytes are each run's own; a fault may have prevented it."""
        recorded = {
            row.sha256 for row in self.house.rows("SELECT sha256 FROM artifacts WHERE kind = 'report'")
        }
        report = self.read_report()
        if report or recorded:
            assert hashlib.sha256(report).hexdigest() in recorded, (
                "the report is not the one that is recorded"
            )

    def read_report(self) -> bytes:
        """The published report; nothing where there is none."""
        path = self.house.published(self.job_id) / "chaos.report.html"
        return path.read_bytes() if path.exists() else b""

    def settle(self, what: str, look: Callable[[], Sequence[object]]) -> None:
        """Wait until there are none of these left."""
        left: Sequence[object] = ()

        def is_settled() -> bool:
            nonlocal left
            left = look()
            return not left

        try:
            self.house.wait_until(is_settled, f"there are no {what}", SETTLE_SECONDS)
        except HouseError as error:
            raise AssertionError(f"{what} are left: {left}\n{error}") from error

    def committed_twice(self) -> list[int]:
        """Chunks with more than one commit (since their artifact was lost, if it was)."""
        rows = self.house.rows("SELECT chunk_id FROM commits GROUP BY chunk_id HAVING count(*) > 1")
        return [row.chunk_id for row in rows]

    def strays(self) -> list[str]:
        """Temporary files, and files of the job that are no artifact."""
        recorded = {row.path for row in self.house.rows("SELECT path FROM artifacts")}
        # os.walk, unlike glob, minds no folder that goes away meanwhile
        files = (Path(folder, name) for folder, _, names in os.walk(self.house.output) for name in names)
        relative = [path.relative_to(self.house.output).as_posix() for path in files]
        return [
            name
            for name in relative
            if name.endswith(".tmp") or (name.startswith("jobs/") and name not in recorded)
        ]

    def undead(self) -> list[int]:
        """Processes of workers that the ledger has given up."""
        rows = self.house.rows("SELECT pid, started_at FROM workers WHERE state <> 'live'")
        live = {row.pid for row in self.house.live()}
        return [row.pid for row in rows if row.pid not in live and is_running(row.pid, row.started_at)]


class Siege:
    """One schedule at work: faults strike as chunks get done, and are undone when their time is over."""

    def __init__(self, chaos: Chaos, schedule: Sequence[Fault]) -> None:
        self.chaos = chaos
        self.pending = deque(schedule)
        self.undoing: list[tuple[float, Undo]] = []
        self.most_done = 0

    def is_over(self) -> bool:
        """Do what is due now; tells whether all of it is done, and the job has ended."""
        house = self.chaos.house
        now = time.monotonic()
        for due in [entry for entry in self.undoing if entry[0] <= now]:
            self.undoing.remove(due)
            due[1]()
        house.wake_the_stopped()
        house.start_failed()
        with suppress(ServiceError):
            self.most_done = max(self.most_done, self.chaos.chunks_done())
        while self.pending and self.pending[0].after <= self.most_done:
            fault = self.pending.popleft()
            with suppress(ServiceError, *AWAY):
                undo = STRIKES[fault.kind](house, fault.where)
                if undo is not None:
                    self.undoing.append((now + fault.seconds, undo))
        return not self.pending and not self.undoing and self.chaos.has_ended()

    def undo_all(self) -> None:
        """Leave a house in which everything runs."""
        for _, undo in self.undoing:
            undo()
        house = self.chaos.house
        house.start_database()
        house.start_broker()
        house.start_services()
        house.remove_traps()


def run_seed(chaos: Chaos, seed: int) -> bool:
    """Run one schedule and print its line; tells whether every promise was kept."""
    schedule = plan(seed)
    began = time.monotonic()
    verdict = "kept"
    try:
        chaos.run(schedule)
    except AssertionError as error:
        verdict = f"BROKEN: {error}"
    print(
        f"seed {seed:4} {time.monotonic() - began:5.1f} s  {', '.join(map(str, schedule))}: {verdict}",
        flush=True,
    )
    return verdict == "kept"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=0, help="run the seeds 0 to n-1")
    parser.add_argument("--seed", type=int, action="append", default=[], help="run this one")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    seeds = deque([*options.seed, *range(options.seeds)])
    count, struck = len(seeds), Counter(fault.kind for seed in seeds for fault in plan(seed))
    folder = Path(tempfile.mkdtemp(prefix="virnucpro-chaos-"))
    started = time.monotonic()
    broken: list[int] = []
    while seeds:
        # What a broken promise leaves behind is no start for the next schedule: that gets a house of its own.
        with running_house(folder / str(len(broken))) as house:
            print(f"undisturbed; logs in {house.logs}", flush=True)
            chaos = Chaos(house)
            while seeds:
                seed = seeds.popleft()
                if not run_seed(chaos, seed):
                    broken.append(seed)
                    break
    if not broken:
        shutil.rmtree(folder)
    seconds = time.monotonic() - started
    print(f"{count} seeds, {struck.total()} faults, {seconds:.0f} s; broken: {broken or 'none'}")
    print(", ".join(f"{kind}: {times}" for kind, times in struck.most_common()))
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
