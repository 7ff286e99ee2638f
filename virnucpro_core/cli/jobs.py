"""Commands about jobs in the ledger: `status`, `failures`, `report`, `verify`, `retry`, `cancel`."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virnucpro_core.cli.connections import connect, name_person
from virnucpro_core.cli.output import (
    AsJson,
    format_counts,
    print_facts,
    print_json,
    print_line,
    print_note,
    print_table,
    show_progress,
)
from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.files import check_writable
from virnucpro_core.settings import load_settings

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from virnucpro_core.failures import Failure
    from virnucpro_core.status import JobStatus
    from virnucpro_core.verification import Verification

PANEL = "Jobs"
JOB_COLUMNS = (
    "stem",
    "state",
    "stage",
    "chunks_left",
    "records",
    "embeddings",
    "failed",
    "model",
    "created_at",
)
FAILURE_COLUMNS = ("record", "id", "reason", "detail")
NO_REPORT = "not made; `virnucpro report` writes one, or says why it cannot"
SHOWN_FAILURES = 50  # in text; --csv and --json have all

JobArgument = Annotated[
    int, typer.Argument(metavar="JOB", help="The job's number, as `virnucpro status` lists it.")
]
RegisteredModelOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A registered model's name.", show_default="VIRNUCPRO_MODEL"),
]


def add_commands(app: typer.Typer) -> None:
    for command in (status, failures, report, verify, retry, cancel):
        app.command(rich_help_panel=PANEL)(command)


def status(
    job: Annotated[
        int | None, typer.Argument(metavar="JOB", help="A job's number.", show_default="the newest 50 jobs")
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Show jobs, workers and failures live, until Ctrl-C. Not on a terminal: once."
        ),
    ] = False,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Time between two looks of --watch.")
    ] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Show the newest jobs, or all that is known of one; with --watch, live."""
    if watch:
        from virnucpro_core.cli.watch import watch as watch_jobs

        if as_json:
            raise typer.BadParameter("--watch is for people: leave --json out, or --watch")
        watch_jobs(job, every)
        return
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.queries import list_jobs, live_workers
    from virnucpro_core.status import read_status

    with connect() as ledger:
        if job is not None:
            told = in_transaction(ledger, read_status, job)
            print_json(asdict(told)) if as_json else print_status(told)
            return
        jobs, workers = in_transaction(ledger, lambda tx: (list_jobs(tx), live_workers(tx)))
    rows = [{"job": row.id} | {column: getattr(row, column) for column in JOB_COLUMNS} for row in jobs]
    if as_json:
        print_json(rows)
        return
    print_table(["job", *JOB_COLUMNS], [list(row.values()) for row in rows])
    if any(row.state == "running" for row in jobs) and not workers:
        print_note("No worker is running: `virnucpro worker` starts one, `virnucpro up` the whole stack.")


def failures(
    job: JobArgument,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print all as CSV: record, id, reason, detail.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the records of a job that have no embedding, and why, in input order.

    Records are numbered from 1. The text form shows the first ones; --csv and --json print all.
    """
    if as_csv and as_json:
        raise typer.BadParameter("give --csv or --json, not both")
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.queries import failure_batches, failure_counts, failures_of, get_job

    def read_first(tx: Connection) -> tuple[dict[str, int], list[Failure]]:
        return failure_counts(tx, job), list(failures_of(tx, job, limit=SHOWN_FAILURES))

    # Nothing is printed within a transaction: a pager may read on after any time.
    with connect() as ledger:
        in_transaction(ledger, get_job, job)
        if as_csv:
            # As they are: a program looks for its own ids. What is for spreadsheets is the CSV of Airflow's page.
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(FAILURE_COLUMNS)
            for batch in failure_batches(ledger, job):
                writer.writerows(astuple(failure) for failure in batch)
            return
        if as_json:
            print_json([asdict(failure) for batch in failure_batches(ledger, job) for failure in batch])
            return
        counts, first = in_transaction(ledger, read_first)
    print(f"job {job}: {format_counts(counts)}")
    if counts:
        print_table(FAILURE_COLUMNS, [astuple(failure) for failure in first])
    if sum(counts.values()) > SHOWN_FAILURES:
        print_note(f"The first {SHOWN_FAILURES} are shown; --csv prints all.")


def report(
    job: JobArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file to write.")],
) -> None:
    """Write a job's report: one HTML file for people, which loads nothing and runs nothing.

    It is the page that is published beside the result, and can be made at any time. What cannot be read any more
    (the input, the embeddings), or is not there yet, is left out, and the page says so.
    """
    check_writable(out)
    from virnucpro_core.htmlreport.contents import gather
    from virnucpro_core.htmlreport.files import write_report

    with connect() as ledger, show_progress((f"reading the input of job {job}", None)) as (bar,):
        written = write_report(out, gather(ledger, load_settings(), job, on_progress=bar.set))
    print_line(f"job {job}: {out}, {written.bytes:,} bytes")


def retry(
    job: JobArgument,
    reread: Annotated[
        bool,
        typer.Option("--verify", help="Read every file again, and redo those whose checksum is wrong, too."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Have a job do what is missing or failed, and nothing else.

    A file that is missing or has another size than the ledger says is made again, and what is intact is kept.
    This is harmless on a job that runs or is complete. A cancelled job goes on.
    """
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.jobs import resume
    from virnucpro_core.verification import look_at_job

    with connect() as ledger:
        root = load_settings().output_root
        found = verify_with_bar(ledger, job) if reread else look_at_job(ledger, root, job)
        found.require_readable()
        resumed = in_transaction(ledger, resume, job, found.lost)
    if as_json:
        print_json({"job": job, **asdict(resumed)})
    else:
        print(
            f"job {job}: {resumed.lost} of {resumed.chunks} chunks were lost; {resumed.waiting} wait to run"
        )


def cancel(job: JobArgument) -> None:
    """Stop a running job. Its finished chunks are kept: `virnucpro retry` goes on with the others."""
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.jobs import cancel as cancel_job

    with connect() as ledger:
        in_transaction(ledger, cancel_job, job, by=name_person())
    print(f"job {job} is cancelled")


def verify(job: JobArgument, as_json: AsJson = False) -> None:
    """Read a job's artifacts and published files again, and compare them with the ledger's checksums.

    Exit 0 if every byte is as it was recorded, 6 if a file is missing or altered; `virnucpro retry JOB
    --verify` has such files made again.
    """
    with connect() as ledger:
        verification = verify_with_bar(ledger, job)
    if as_json:
        print_json({"passed": verification.passed, **asdict(verification)})
    else:
        for fault in verification.faults:
            print_line(f"{fault.path}: {fault.what}")
        outcome = (
            "are as recorded"
            if verification.passed
            else f"were compared; at fault: {len(verification.faults)}"
        )
        print(f"job {job}: {verification.files:,} files, {verification.bytes:,} bytes {outcome}")
    if not verification.passed:
        raise typer.Exit(ArtifactError.exit_code)


def verify_with_bar(ledger: Engine, job: int) -> Verification:
    from virnucpro_core.verification import verify_job

    with show_progress((f"reading job {job}", None)) as (bar,):
        return verify_job(ledger, load_settings().output_root, job, on_progress=bar.set)


def print_status(told: JobStatus) -> None:
    """Print all that is known of a job; paths as they are seen from here."""
    share = told.failed / told.records
    root = load_settings().output_root
    print_facts(
        {
            "job": told.job,
            "file": told.stem,
            "state": told.state,
            "stage": told.stage,
            "error": told.error,
            "setback": told.setback,
            "generation": told.generation,
            "model": f"{told.model} (RANDOM demonstration weights)" if told.demonstration else told.model,
            "chunks left": f"{told.chunks_left:,} of {told.chunks_total:,} in this stage",
            "records": told.records,
            "embeddings": told.embeddings,
            "failures": f"{format_counts(told.failures)} ({share:.2%})",
            "truncated": told.truncated,
            "unknown residues": told.unknown,
            "tokens": told.tokens,
            "tokens/s per worker": told.tokens_per_second,
            "created": told.created_at,
            "finished": told.finished_at,
        }
    )
    for submission in told.submissions:
        print_facts(
            {
                "submitted": submission.path,
                "  by": submission.requested_by,
                "  label": submission.label,
                "  nucleotides": submission.nucleotide_path,
                "  published": root / submission.folder if submission.published else "not yet",
                "  report": root / submission.report
                if submission.report
                else NO_REPORT
                if submission.published
                else None,
            }
        )
