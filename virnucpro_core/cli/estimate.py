"""The command `estimate`: what files will ask for, before any time of a GPU is spent."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from virnucpro_core.cli.connections import connect
from virnucpro_core.cli.files import NucleotidesOption
from virnucpro_core.cli.jobs import PANEL, RegisteredModelOption
from virnucpro_core.cli.output import (
    AsJson,
    format_counts,
    print_error,
    print_facts,
    print_json,
    print_note,
    show_progress,
)
from virnucpro_core.errors import InputError, ServiceError, SettingsError, WeightsError
from virnucpro_core.formats import format_bytes, format_duration
from virnucpro_core.settings import load_settings

if TYPE_CHECKING:
    from virnucpro_core.estimates import Duration, FileEstimate, KnownJob

HOUR = 3600.0  # seconds


def add_commands(app: typer.Typer) -> None:
    app.command(rich_help_panel=PANEL)(estimate)


def estimate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="FASTA files.")],
    model: RegisteredModelOption = None,
    allow_nucleotides: NucleotidesOption = False,
    as_json: AsJson = False,
) -> None:
    """Tell what files will take: chunks, truncations, rejects, disk, and time by the rates of earlier jobs.

    Reads each file once and writes nothing. Times come from what this ledger's hosts have computed in the
    configured precision; where nothing has run yet, there are none. Time and disk are of files without a result;
    one whose job is half done counts whole. Which records will not fit a GPU's memory, or kill their worker,
    cannot be foretold.
    """
    from virnucpro_core.estimates import estimate_file, free_bytes, sum_up_now, total_disk

    settings = load_settings()
    if model is not None:
        check_model(model)
    found: list[FileEstimate] = []
    errors: list[InputError] = []
    for file in files:
        size = file.stat().st_size if file.is_file() else None
        try:
            with show_progress((f"reading {file.name}", size)) as (bar,):
                found.append(
                    estimate_file(
                        file.absolute(), settings, allow_nucleotides=allow_nucleotides, on_progress=bar.set
                    )
                )
        except InputError as error:
            print_error(error)
            errors.append(error)
    jobs, durations, missing = ask_ledger(found, model or settings.model)
    todo = files_to_compute(found, jobs)
    now = sum_up_now(durations)
    disk, free = total_disk(todo), free_bytes(settings.output_root)
    if as_json:
        print_json(
            {
                "files": [
                    asdict(one) | {"job": asdict(jobs[one.sha256]) if one.sha256 in jobs else None}
                    for one in found
                ],
                "tokens": sum(one.tokens for one in todo),
                "disk": disk,
                "free": free,
                "durations": [describe_duration(duration) for duration in durations],
                "duration_now": None if now is None else asdict(now),
                "no_duration": missing,
            }
        )
    else:
        for one in found:
            print_file(one, jobs.get(one.sha256))
        print_durations(durations, missing)
        if now is not None:
            print_facts(
                {
                    "time now": f"{format_duration(now.hours * HOUR)} on all workers that live now ({now.workers})"
                }
            )
        print_facts({"disk to come": f"at least {format_bytes(disk)}; {format_bytes(free)} are free"})
    if disk > free:
        print_note(f"There is not enough space below {settings.output_root}.")
    if errors:
        raise typer.Exit(max(error.exit_code for error in errors))


def check_model(model: str) -> None:
    """Refuse a model's name that is wrong before files are read, which takes long.

    Raises:
        WeightsError: the ledger has no model of that name.
    """
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.registration import recipe_for

    settings = load_settings()
    # A ledger that cannot be asked is told of when the files have been read.
    with suppress(SettingsError, ServiceError), connect() as ledger:
        in_transaction(ledger, recipe_for, model, dtype=settings.dtype, residues=settings.residues)


def ask_ledger(
    found: list[FileEstimate], model: str | None
) -> tuple[dict[str, KnownJob], list[Duration], str]:
    """What earlier jobs tell: the files' own, by sha256, and rates; or why there are no rates."""
    from virnucpro_core.estimates import find_durations, find_known_job
    from virnucpro_core.ledger.database import in_transaction

    settings = load_settings()
    jobs: dict[str, KnownJob] = {}
    try:
        with connect() as ledger:
            if model is not None:
                for one in found:
                    job = in_transaction(ledger, find_known_job, settings, one.sha256, model)
                    if job is not None:
                        jobs[one.sha256] = job
            tokens = sum(one.tokens for one in files_to_compute(found, jobs))
            if not tokens:
                return jobs, [], "none: there is nothing left to compute"
            durations = in_transaction(ledger, find_durations, settings, tokens, model)
    except (SettingsError, ServiceError, WeightsError) as error:
        return {}, [], f"unknown: there is no history to go by: {error}"
    named = f"with {model} " if model else ""
    missing = (
        "" if durations else f"unknown: no job has run {named}in {settings.dtype} yet, so there is no rate"
    )
    return jobs, durations, missing


def files_to_compute(found: list[FileEstimate], jobs: dict[str, KnownJob]) -> list[FileEstimate]:
    """The files whose result is not there yet; one of each content, as equal files are computed once."""
    by_content = {one.sha256: one for one in found}
    return [
        one for sha256, one in by_content.items() if sha256 not in jobs or jobs[sha256].state != "succeeded"
    ]


def describe_duration(duration: Duration) -> dict[str, object]:
    rate = duration.rate
    return {**asdict(duration), "tokens_per_second": round(rate.tokens_per_second, 1)}


def print_file(one: FileEstimate, job: KnownJob | None) -> None:
    """Print what follows from one file alone, and from its job, if it has one."""
    known = None
    if job is not None:
        known = f"job {job.id}, {job.state}"
        if job.state == "running":
            known += f": {job.chunks_left:,} chunks of {job.stage} left"
    print_facts(
        {
            "file": one.path,
            "known as": known,
            "records": one.records,
            "residues": one.residues,
            "tokens": one.tokens,
            "chunks": one.chunks,
            "truncated": one.truncated,
            "rejects": format_counts(one.rejects),
            "unknown residues": one.unknown,
            "disk": "at least "
            + ", ".join(f"{format_bytes(size)} {name}" for name, size in one.disk.items() if size),
        }
    )
    print()


def print_durations(durations: list[Duration], missing: str) -> None:
    if missing:
        print_facts({"time": missing})
    for duration in durations:
        rate = duration.rate
        time = f"{format_duration(duration.hours * HOUR)} on one worker of {rate.host}"
        if duration.hours_now is not None:
            now = format_duration(duration.hours_now * HOUR)
            time += f", {now} on all of its kind that live there now ({rate.workers_now})"
        print_facts(
            {
                "time": time,
                "  by": f"{rate.tokens_per_second:,.0f} tokens/s (chunks: {rate.chunks:,}, jobs: {rate.jobs:,}), "
                f"{rate.model} in {rate.execution['dtype']} on {rate.execution['hardware']}",
            }
        )
