"""`status --watch`: a live view of jobs, workers and what went wrong last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from virnucpro_core.cli.connections import connect
from virnucpro_core.cli.output import format_value, print_note, print_table
from virnucpro_core.errors import ServiceError
from virnucpro_core.formats import format_duration
from virnucpro_core.queues import EXTRACT_QUEUE

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from virnucpro_core.ledger.overview import JobOverview, RecentFailure, WorkerOverview
    from virnucpro_core.ledger.setbacks import RecentSetback

RUNNING_SHOWN, ENDED_SHOWN, NEWEST_SHOWN = 50, 5, 5
LEAST_JOBS = 3
SILENT_SECONDS = 10.0  # a heartbeat that is older is worth a warning
UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class View:
    """What one look found."""

    jobs: Sequence[JobOverview]
    workers: Sequence[WorkerOverview]
    failures: Sequence[RecentFailure]
    setbacks: Sequence[RecentSetback]
    taken_at: datetime


def watch(job_id: int | None, every: float) -> None:
    """Show jobs, workers and failures until Ctrl-C; once, where no person watches.

    Raises:
        JobError: there is no such job.
    """
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.queries import get_job

    console = Console()
    with connect() as ledger:
        if job_id is not None:
            in_transaction(ledger, get_job, job_id)
        view = look(ledger, job_id)
        if not console.is_terminal or console.is_dumb_terminal:
            print_view(view)
            print_note("This is no terminal that can be drawn on: shown once.")
            return
        with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
            trouble = ""
            while True:
                live.update(draw(view, trouble, console.height), refresh=True)
                time.sleep(every)
                try:
                    view, trouble = look(ledger, job_id), ""
                except ServiceError as error:
                    trouble = str(error)


def look(ledger: Engine, job_id: int | None) -> View:
    from virnucpro_core.ledger.database import in_transaction

    return in_transaction(ledger, gather, job_id)


def gather(tx: Connection, job_id: int | None) -> View:
    from virnucpro_core.ledger.overview import list_job_overviews, list_newest_failures, list_worker_overviews
    from virnucpro_core.ledger.setbacks import newest_setbacks

    if job_id is None:
        running = list_job_overviews(tx, limit=RUNNING_SHOWN, state="running")
        newest = list_job_overviews(tx, limit=ENDED_SHOWN)
        jobs = running + [job for job in newest if job.state != "running"]
    else:
        jobs = list_job_overviews(tx, jobs=[job_id])
    return View(
        jobs=jobs,
        workers=list_worker_overviews(tx),
        failures=list_newest_failures(tx, NEWEST_SHOWN, job_id=job_id),
        setbacks=newest_setbacks(tx, NEWEST_SHOWN, job_id=job_id),
        taken_at=datetime.now(UTC),
    )


def print_view(view: View) -> None:
    """Print a view as plain tables."""
    for title, columns, rows in list_tables(view):
        if rows or title == "Jobs":
            print_table([title, *columns[1:]], rows)
            print()


def draw(view: View, trouble: str, height: int) -> RenderableType:
    """A view as a terminal of so many lines shows it; `trouble` is why it is not the newest."""
    parts: list[RenderableType] = [
        Text(f"VirNucPro  {format_value(view.taken_at)}  Ctrl-C ends", style="dim")
    ]
    if trouble:
        parts.append(Text(f"the ledger does not answer: {trouble}", style="bold red"))
    elif not view.workers and any(job.state == "running" for job in view.jobs):
        parts.append(Text("No worker is running: `virnucpro worker` starts one.", style="bold yellow"))
    jobs, *others = [found for found in list_tables(view) if found[2] or found[0] == "Jobs"]
    # What does not fit is cut off below: jobs, which may be many, leave room for the rest.
    room = max(LEAST_JOBS, height - len(parts) - 2 - sum(len(rows) + 2 for _, _, rows in others))
    title, columns, rows = jobs
    more = f" ({len(rows) - room} more)" if len(rows) > room else ""
    parts += ["", make_table(title + more, columns, rows[:room], [draw_bar(job) for job in view.jobs])]
    for title, columns, rows in others:
        parts += ["", make_table(title, columns, rows)]
    return Group(*parts)


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    bars: Sequence[RenderableType] = (),
) -> Table:
    # A bar takes what room is left.
    table = Table(box=None, pad_edge=False, header_style="bold", expand=bool(bars))
    for column in (title, *columns[1:]):
        table.add_column(make_cell(column))
    if bars:
        table.add_column(ratio=1, no_wrap=True)
    for place, row in enumerate(rows):
        table.add_row(*map(make_cell, row), *bars[place : place + 1])
    return table


def make_cell(value: object) -> Text:
    # A cell that may not be wrapped, in a column that might: of these rich cuts the widest where there is no room.
    return Text(format_value(value), overflow="ellipsis", no_wrap=True)


def draw_bar(job: JobOverview) -> ProgressBar:
    return ProgressBar(total=max(job.residues, 1), completed=job.residues_done)


def list_tables(view: View) -> list[tuple[str, Sequence[str], list[list[object]]]]:
    """The tables of a view: title, which stands over the first column, columns, rows."""
    is_worked_on = any(EXTRACT_QUEUE in worker.queue.split(",") for worker in view.workers)
    return [
        ("Jobs", JOB_COLUMNS, [list_job(job, is_worked_on) for job in view.jobs]),
        ("Workers", WORKER_COLUMNS, [list_worker(one) for one in view.workers]),
        ("Newest failures", FAILURE_COLUMNS, [list_failure(one) for one in view.failures]),
        ("Newest setbacks", SETBACK_COLUMNS, [list_setback(one) for one in view.setbacks]),
    ]


JOB_COLUMNS = ("job", "state", "to do", "failed", "res./s", "time left", "done")


def list_job(job: JobOverview, is_worked_on: bool) -> list[object]:
    share = job.residues_done / job.residues if job.residues else 1.0
    left = UNKNOWN
    if job.seconds_left is not None:
        left = format_duration(job.seconds_left) if is_worked_on else "no worker"
    return [
        f"{job.id} {job.stem or ''}",
        job.stage if job.state == "running" else job.state,
        f"{job.chunks_left:,}/{job.chunks_total:,}",
        f"{job.failed:,}",
        UNKNOWN if job.residues_per_second is None else f"{job.residues_per_second:,.0f}",
        left,
        f"{share:.0%}",
    ]


WORKER_COLUMNS = ("worker", "chunk", "for", "tokens/s", "GPU memory", "heartbeat", "progress")


def list_worker(worker: WorkerOverview) -> list[object]:
    chunk = "idle"
    if worker.job_id is not None and worker.ordinal is not None:
        chunk = f"job {worker.job_id} {worker.stage} {worker.ordinal + 1} of {worker.chunks_total}"
    used, total = worker.gpu_memory_used, worker.gpu_memory_total
    silent = worker.heartbeat_seconds > SILENT_SECONDS
    return [
        shorten_node(worker.node),
        chunk,
        UNKNOWN if worker.chunk_seconds is None else format_duration(worker.chunk_seconds),
        UNKNOWN if worker.tokens_per_second is None else f"{worker.tokens_per_second:,.0f}",
        UNKNOWN if used is None or total is None else f"{used / 2**30:.1f} of {total / 2**30:.0f} GiB",
        f"{worker.heartbeat_seconds:.0f} s ago{' (silent)' if silent else ''}",
        UNKNOWN if worker.job_id is None else f"{worker.progress_seconds:.0f} s ago",
    ]


def shorten_node(node: str) -> str:
    """`GPU-1a2b3c4d@host` of a GPU's whole UUID and a host's whole name: as much as people tell them apart by."""
    name, _, host = node.partition("@")
    if name.startswith(("GPU-", "MIG-")):
        name = "-".join(name.split("-")[:2])
    return f"{name}@{host.split('.')[0]}"


FAILURE_COLUMNS = ("when", "job", "record", "id", "reason", "detail")


def list_failure(failure: RecentFailure) -> list[object]:
    return [
        format_moment(failure.finished_at),
        f"{failure.job}",
        f"{failure.record}",
        failure.id,
        failure.reason,
        failure.detail,
    ]


SETBACK_COLUMNS = ("when", "job", "records", "attempt", "node", "how", "why")


def list_setback(setback: RecentSetback) -> list[object]:
    return [
        format_moment(setback.ended_at),
        f"{setback.job}",
        f"{setback.first_record}-{setback.first_record + setback.records - 1}",
        f"{setback.attempt}",
        shorten_node(setback.node),
        setback.kind.replace("_", " "),
        setback.error,
    ]


def format_moment(moment: datetime) -> str:
    """`11-23 13:36:05`: what is shown is of these days."""
    return f"{moment.astimezone():%m-%d %H:%M:%S}"
