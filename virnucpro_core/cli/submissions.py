"""The command `submit`: files become jobs, and a person may wait for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from virnucpro_core.cli.connections import connect, name_person
from virnucpro_core.cli.files import NucleotidesOption
from virnucpro_core.cli.jobs import PANEL, RegisteredModelOption, print_status
from virnucpro_core.cli.output import AsJson, print_error, print_json, print_line, print_note, show_progress
from virnucpro_core.errors import InputError, JobError
from virnucpro_core.settings import load_settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from virnucpro_core.ledger.submissions import Label, Submitted
    from virnucpro_core.status import JobStatus

POLL_SECONDS = 1.0


def add_commands(app: typer.Typer) -> None:
    app.command(rich_help_panel=PANEL)(submit)


def submit(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="FASTA files, where the workers can read them.")
    ],
    model: RegisteredModelOption = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the jobs, and fail if one of them does.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Compute again what is computed already, as a new generation.")
    ] = False,
    label: Annotated[
        Literal["host", "viral"] | None,
        typer.Option(help="What the sequences are, for the merged file's `labels`."),
    ] = None,
    nucleotides: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The `*_DNABERT_S.pt` file to merge the result with.",
            show_default="<stem>_DNABERT_S.pt beside FILE, if it is there",
        ),
    ] = None,
    max_failed_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Share of failed records above which the job counts as failed.",
            show_default="VIRNUCPRO_MAX_FAILED_SHARE",
        ),
    ] = None,
    allow_nucleotides: NucleotidesOption = False,
    as_json: AsJson = False,
) -> None:
    """Register FASTA files as jobs. The same content under the same recipe is computed once.

    A file that was submitted before leads to the job it has; one that failed or was cancelled goes on with
    what is missing. A file that cannot be used is reported and does not keep the others from being submitted.
    With --wait the command ends when all jobs have; interrupting it leaves them running.
    """
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.status import read_status

    if nucleotides is not None and len(files) > 1:
        raise typer.BadParameter("one nucleotide file belongs to one FASTA file: submit them pair by pair")
    with connect() as ledger:
        jobs, errors = submit_files(
            ledger,
            files,
            model=model,
            nucleotides=nucleotides,
            label=label or "",
            max_failed_share=max_failed_share,
            allow_nucleotides=allow_nucleotides,
            force=force,
        )
        if wait:
            wait_for(ledger, [job.job_id for job in jobs.values()])
        statuses = {file: in_transaction(ledger, read_status, job.job_id) for file, job in jobs.items()}
    if as_json:
        print_json(
            [
                {"file": file, "created": jobs[file].created, **asdict(status)}
                for file, status in statuses.items()
            ]
        )
    elif wait:
        for place, status in enumerate(statuses.values()):
            if place:
                print()
            print_status(status)
    else:
        for file, status in statuses.items():
            known = "registered" if jobs[file].created else "known already"
            print_line(f"{file}: job {status.job}, {known}, {status.state}, generation {status.generation}")
        if any(status.state == "running" for status in statuses.values()):
            print_note("`virnucpro status --watch` shows how they get on.")
    codes = [error.exit_code for error in errors]
    if wait:
        share = load_settings().max_failed_share if max_failed_share is None else max_failed_share
        codes += [
            JobError.exit_code for file, status in statuses.items() if not check_outcome(status, file, share)
        ]
    if codes:
        raise typer.Exit(max(codes))


def submit_files(
    ledger: Engine,
    files: Sequence[Path],
    *,
    model: str | None,
    nucleotides: Path | None,
    label: Label,
    max_failed_share: float | None,
    allow_nucleotides: bool,
    force: bool,
) -> tuple[dict[Path, Submitted], list[InputError]]:
    """Submit each file with the same wishes; one that cannot be used is reported, and the next is taken."""
    from virnucpro_core.ledger.submissions import find_nucleotides, submit_file

    jobs: dict[Path, Submitted] = {}
    errors: list[InputError] = []
    for file in files:
        size = file.stat().st_size if file.is_file() else None
        try:
            with show_progress((f"reading {file.name}", size)) as (bar,):
                jobs[file] = submit_file(
                    ledger,
                    file,
                    settings=load_settings(),
                    requested_by=name_person(),
                    nucleotides=nucleotides or find_nucleotides(file),
                    on_progress=bar.set,
                    model=model,
                    label=label,
                    max_failed_share=max_failed_share,
                    allow_nucleotides=allow_nucleotides,
                    force=force,
                )
        except InputError as error:
            print_error(error)
            errors.append(error)
    return jobs, errors


def wait_for(ledger: Engine, job_ids: Sequence[int]) -> None:
    """Return when none of the jobs runs any more, with a bar over their records meanwhile."""
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.queries import progress_of

    found = in_transaction(ledger, progress_of, job_ids)
    with show_progress(("waiting", sum(job.records for job in found)), counts=True) as (bar,):
        try:
            while running := [job for job in found if job.state == "running"]:
                stages = ", ".join(sorted({job.stage for job in running}))
                done = sum(job.embeddings + job.failed for job in found)
                bar.set(done, description=f"{len(running)} running: {stages}")
                time.sleep(POLL_SECONDS)
                found = in_transaction(ledger, progress_of, job_ids)
        except KeyboardInterrupt:
            print_note("The jobs go on; `virnucpro status` shows them, `virnucpro cancel` stops one.")
            raise


def check_outcome(status: JobStatus, file: Path, max_failed_share: float) -> bool:
    """Whether a file's job succeeded with no more failures than allowed; says on stderr why not."""
    # Others may have submitted the same content, with nucleotides of their own.
    submissions = [one for one in status.submissions if one.path == str(file.absolute())]
    if status.state != "succeeded":
        reason = f": {status.error}" if status.error else ""
        todo = f"`virnucpro retry {status.job}` goes on with what is missing."
        print_error(JobError(f"job {status.job} {status.state}{reason}", where=str(file), todo=todo))
    elif status.failed_share > max_failed_share:
        print_error(
            JobError(
                f"{status.failed_share:.2%} of job {status.job}'s records failed, more than {max_failed_share:.2%}",
                where=str(file),
                todo=f"`virnucpro failures {status.job}` lists them; --max-failed-share accepts more.",
            )
        )
    elif error := max(submissions, key=lambda one: one.submitted_at).error:
        todo = "Correct the file of nucleotides, and submit both again."
        print_error(
            JobError(f"job {status.job}'s nucleotides were not merged: {error}", where=str(file), todo=todo)
        )
    else:
        return True
    return False
