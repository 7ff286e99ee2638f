"""`make run`: random weights, the stack, one file through the DAG, a summary, and everything stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Connection, Engine, Row

from virnucpro_core.errors import JobError, ServiceError
from virnucpro_core.estimates import estimate_file
from virnucpro_core.features.manifests import Manifest, find_faults, read_manifest
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.queries import find_job, find_submission, get_job
from virnucpro_core.ledger.registration import recipe_for
from virnucpro_core.ledger.work import MANIFEST, REPORT, SUFFIXES
from virnucpro_core.models import register_checkpoint
from virnucpro_core.roots import resolve_below
from virnucpro_core.settings import Settings, load_settings
from virnucpro_core.stack.airflow import ask, log_in
from virnucpro_core.stack.description import STATE_FOLDER, Description, read_description
from virnucpro_core.stack.processes import Secrets, interrupted_by_signals
from virnucpro_core.stack.stack import Stack

DAG = "virnucpro_ingest"
MODEL = "demo"
PARSE_SECONDS = 120.0
STANDSTILL_SECONDS = 3600.0
POLL_SECONDS = 1.0
MAX_FAILED_SHARE = 0.5  # the sample holds bad records on purpose
LOG_EVENTS = 5  # of a failed task, at the end


def run_demo(fasta: Path, *, state_folder: Path = STATE_FOLDER, console: Console | None = None) -> int:
    """Embed a FASTA file with demonstration weights through Airflow, the ledger and Celery.

    A stack that runs already is used and left running; otherwise one is started and stopped.

    Returns:
        0 if the job succeeded and its result is valid, else 1.

    Raises:
        InputError: the file cannot be used; nothing was started.
        OutsideError: a stack that runs already does not read from the file's folder.
        ServiceError: a part of the stack did not start or did not answer in time.
    """
    from virnucpro_core.embedding.demonstration import write_demo_weights

    console = console or Console()
    settings = read_also(load_settings(), fasta)
    with console.status(f"reading {fasta.name}"):  # what cannot be used is told before anything is started
        sha256 = estimate_file(fasta, settings).sha256
    checkpoint = write_demo_weights(load_settings().model_root / MODEL)
    console.print(
        Panel(
            "The weights are RANDOM, made for this demonstration: the embeddings mean nothing.\n"
            "The recipe and the manifest of the result say so too.",
            title="Demonstration",
            style="bold yellow",
        )
    )
    with interrupted_by_signals(), running_stack(settings, state_folder, console) as description:
        resolve_below(fasta, load_settings().input_folders)
        ledger = open_ledger(load_settings().database_url_for("owner"))
        try:
            in_transaction(ledger, register_checkpoint, MODEL, checkpoint, load_settings().model_root)
            password = Secrets(state_folder / "secrets").read("airflow-admin")
            started = time.time()
            with answering_airflow(state_folder), log_in(description.urls["Airflow"], password) as airflow:
                run = trigger(airflow, fasta.absolute())
                state = follow(airflow, run, ledger, sha256, console)
                if state == "failed":
                    show_failed_tasks(airflow, run, console)
            return summarise(ledger, fasta.absolute(), sha256, state, started, console)
        finally:
            ledger.dispose()


def read_also(settings: Settings, file: Path) -> Settings:
    """Settings that take a file's folder for one more input root: who starts a stack may say what it reads."""
    return settings.model_copy(update={"input_roots": (*settings.input_roots, file.resolve().parent)})


@contextmanager
def running_stack(settings: Settings, state_folder: Path, console: Console) -> Iterator[Description]:
    """The stack of a state folder, whose settings become this process's; started and stopped if need be."""
    stack = Stack(settings, state_folder)
    description = read_description(state_folder)
    is_ours = description is None
    if description is None:
        with console.status("starting") as status:
            description = stack.start(on_step=lambda step: status.update(f"starting: {step}"))
    try:
        os.environ.update(description.environment)
        load_settings.cache_clear()
        yield description
    finally:
        if is_ours:
            with console.status("stopping"):
                stack.stop()


@contextmanager
def answering_airflow(state_folder: Path) -> Iterator[None]:
    """Airflow's silence is an error in words: its API server may be short of memory, or of time.

    Raises:
        ServiceError: it does not answer.
    """
    try:
        yield
    except httpx.TransportError as error:
        raise ServiceError(
            f"Airflow does not answer: {error}",
            where=str(state_folder / "logs" / "api-server.log"),
            todo="Read its log, and run this again: it goes on with what is not done yet.",
        ) from error


def trigger(airflow: httpx.Client, fasta: Path) -> str:
    """Start the DAG for a file; returns the run's id.

    Raises:
        ServiceError: Airflow does not know the DAG, or refuses the run.
    """
    wait_for_dag(airflow)
    conf = {"files": [str(fasta)], "model": MODEL, "max_failed_share": MAX_FAILED_SHARE}
    return str(ask(airflow, "POST", f"/dags/{DAG}/dagRuns", logical_date=None, conf=conf)["dag_run_id"])


def follow(
    airflow: httpx.Client,
    run: str,
    ledger: Engine,
    sha256: str,
    console: Console,
    *,
    standstill_seconds: float = STANDSTILL_SECONDS,
) -> str:
    """Show the progress of an input's job until the run ends; returns the run's state.

    Raises:
        ServiceError: for so many seconds nothing was seen to change.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    seen: tuple[object, ...] = ()
    changed = time.monotonic()
    with Progress(*columns, console=console) as progress:
        stage = "register"
        bar = progress.add_task(stage, total=None)
        while True:
            state = str(ask(airflow, "GET", f"/dags/{DAG}/dagRuns/{run}")["state"])
            job = find_demo_job(ledger, sha256)
            now: tuple[object, ...] = (state,)
            if job is not None:
                now = (state, job.state, job.stage, job.chunks_left, job.embeddings, job.failed)
                if job.stage != stage:
                    stage = job.stage
                    progress.console.print(f"job {job.id}: {stage}")
                done = job.embeddings + job.failed
                progress.update(bar, description=stage, total=job.records, completed=done)
            if state in ("success", "failed"):
                return state
            if now != seen:
                seen, changed = now, time.monotonic()
            elif time.monotonic() - changed > standstill_seconds:
                raise ServiceError(
                    f"the DAG run has made no progress for {standstill_seconds:.0f} s",
                    where=run,
                    todo="Look at it in Airflow's pages.",
                )
            time.sleep(POLL_SECONDS)


def show_failed_tasks(airflow: httpx.Client, run: str, console: Console) -> None:
    """Print which tasks of a run failed, and the end of what each one logged."""
    tasks = ask(airflow, "GET", f"/dags/{DAG}/dagRuns/{run}/taskInstances?state=failed")["task_instances"]
    for task in tasks:
        console.print(
            f"[bold red]task {task['task_id']} (map index {task['map_index']}) failed[/]; its log ends:"
        )
        log = f"/dags/{DAG}/dagRuns/{run}/taskInstances/{task['task_id']}/logs/{task['try_number']}"
        content = ask(airflow, "GET", f"{log}?map_index={task['map_index']}")["content"]
        # Such lines fold the log in Airflow's page.
        said = [event for event in content if not event["event"].startswith("::")]
        for event in said[-LOG_EVENTS:]:
            errors = [
                f"{error['exc_type']}: {error['exc_value']}" for error in event.get("error_detail") or ()
            ]
            console.print("  ", event["event"], *errors, markup=False, highlight=False)


def wait_for_dag(airflow: httpx.Client) -> None:
    """Wait until Airflow has parsed the DAG.

    Raises:
        ServiceError: it has not within the time; carries Airflow's import errors.
    """
    deadline = time.monotonic() + PARSE_SECONDS
    while airflow.get(f"/dags/{DAG}").status_code != httpx.codes.OK:
        if time.monotonic() > deadline:
            errors = ask(airflow, "GET", "/importErrors")["import_errors"]
            found = "\n".join(f"{error['filename']}:\n{error['stack_trace']}" for error in errors)
            raise ServiceError(
                f"Airflow does not know the DAG {DAG}\n{found}",
                where="dags",
                todo="Read the DAG processor's log.",
            )
        time.sleep(POLL_SECONDS)


def find_demo_job(ledger: Engine, sha256: str) -> Row[Any] | None:
    """The job of an input under the demonstration model, if it is registered."""
    settings = load_settings()

    def find(tx: Connection) -> Row[Any] | None:
        recipe = recipe_for(tx, MODEL, dtype=settings.dtype, residues=settings.residues)
        job_id = find_job(tx, sha256, recipe.sha256)
        return None if job_id is None else get_job(tx, job_id)

    return in_transaction(ledger, find)


def summarise(
    ledger: Engine, fasta: Path, sha256: str, run_state: str, started: float, console: Console
) -> int:
    """Print what became of a file; returns the exit code.

    Raises:
        JobError: the run ended without a job for it.
    """
    job = find_demo_job(ledger, sha256)
    if job is None:
        raise JobError(
            f"the DAG run ended as {run_state!r} without a job",
            where=str(fasta),
            todo=f"Read the task logs below {STATE_FOLDER}/airflow/logs.",
        )
    console.print(f"job {job.id}: {job.state}; DAG run: {run_state}")
    if job.state != "succeeded":
        # Markup is what looks like it: an error ends in [/the/file/that/it/is/about].
        why = job.error or "no error is recorded"
        console.print(why, style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 1
    submission = in_transaction(ledger, find_submission, job.id, str(fasta))
    folder = load_settings().output_root / submission.folder(job.input_sha256, job.recipe_sha256)
    manifest = read_manifest(folder / (submission.stem + SUFFIXES[MANIFEST]))
    faults = find_faults(manifest, folder)
    facts = describe(job, manifest, folder, faults)
    page = folder / (submission.stem + SUFFIXES[REPORT])
    if page.is_file():
        facts.append(("report", str(page)))
    if job.finished_at.timestamp() < started:
        facts.append(("work", "the job was done already: nothing was computed again"))
    facts.append(
        ("next", "open the report in a browser; docs/quickstart.md leads on to weights that mean something")
    )
    for name, value in facts:
        console.print(f"{name:<21}{value}", soft_wrap=True, markup=False, highlight=False)
    return 0 if run_state == "success" and not faults else 1


def describe(job: Row[Any], manifest: Manifest, folder: Path, faults: list[str]) -> list[tuple[str, str]]:
    """The summary of a job that succeeded, as lines of a name and a value."""
    counts = manifest.counts
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.failures.items()) or "none"
    facts = [
        ("records", f"{counts.records:,}"),
        ("embeddings", f"{counts.embeddings:,}"),
        ("failures", f"{job.failed:,} ({reasons})"),
        ("truncated", f"{counts.truncated:,}"),
        ("tokens/s per worker", f"{counts.tokens / job.seconds:,.0f}" if job.seconds else "unknown"),
    ]
    for file in manifest.files:
        facts += [("output", str(folder / file.name)), ("sha256", file.sha256)]
    facts.append(("validation", "; ".join(faults) or "valid"))
    if manifest.recipe.demonstration:
        facts.append(("weights", "RANDOM (demonstration)"))
    return facts
