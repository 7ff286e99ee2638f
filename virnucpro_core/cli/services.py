"""Commands that run services: `up`, `down`, `demo`, `worker`, `relay`, `metrics`, `db upgrade`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from virnucpro_core.cli.connections import connect
from virnucpro_core.cli.output import AsJson, print_facts, print_json, print_note
from virnucpro_core.logs import configure_logging
from virnucpro_core.queues import QUEUES
from virnucpro_core.settings import load_settings
from virnucpro_core.stack.programs import METRICS_PORT

PANEL = "Services"

GpusOption = Annotated[
    str,
    typer.Option(
        metavar="all|none|0,1",
        help="The GPUs that work, of those this process may see; `none` works on the CPU.",
    ),
]

database = typer.Typer(no_args_is_help=True, help="Bring the ledger's schema up to date.")


def add_commands(app: typer.Typer) -> None:
    for command in (up, down, demo, worker, relay, metrics):
        app.command(rich_help_panel=PANEL)(command)
    app.add_typer(database, name="db", rich_help_panel=PANEL)


def worker(
    gpus: GpusOption = "all",
    queues: Annotated[
        str,
        typer.Option(metavar="NAMES", help="`extract` computes embeddings, `finish` merges and validates."),
    ] = ",".join(QUEUES),
    stop_within: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="When told to stop, hand chunks back that take longer than this.",
            show_default="wait for them",
        ),
    ] = None,
) -> None:
    """Work on jobs until told to stop: a node per GPU (or one on the CPU), and one that merges and validates.

    SIGTERM and Ctrl-C let each node finish its chunk; what a worker does not finish is done by others. Needs
    the ledger's and the broker's URL, and `virnucpro relay` running once beside all workers.
    """
    limit = () if stop_within is None else ("--stop-within", str(stop_within))
    become("workers.launcher", "--gpus", gpus, "--queues", queues, *limit)


def relay() -> None:
    """Publish due work to the broker, and take chunks back from workers that fell silent, until told to stop.

    One relay serves all workers; a second one waits in case the first one dies.
    """
    become("workers.relay")


def metrics(
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address that it listens on; 0.0.0.0 is all of them.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", min=1, max=65535, help="The port that it listens on.")
    ] = METRICS_PORT,
) -> None:
    """Serve metrics for Prometheus at /metrics, read from the ledger, until told to stop.

    One serves all hosts: it tells of queues, work, faults, workers and their GPUs, and of the disk that results
    are written to, as seen from here. It has no login, and shows no names of files or records.
    """
    from virnucpro_core.metrics import LedgerCollector, serve

    configure_logging()
    with connect() as ledger:
        serve(LedgerCollector(ledger, load_settings().output_root), host=host, port=port)


def become(module: str, *arguments: str) -> None:
    """Replace this process by a Python module's: it gets this process's id, signals and exit code."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - our own modules


def up(gpus: GpusOption = "all", as_json: AsJson = False) -> None:
    """Start the whole stack and leave it running: PostgreSQL, Valkey, workers, relay, Airflow, Flower, metrics.

    A server whose URL is set is used instead of an embedded one. Data, logs and logins are kept in
    ./.virnucpro; commands that run in the same folder find the stack there.
    """
    from virnucpro_core.stack.processes import interrupted_by_signals
    from virnucpro_core.stack.stack import Stack

    with interrupted_by_signals():
        description = Stack(load_settings(), gpus=gpus).start(
            detached=True, on_step=lambda step: print_note(f"starting: {step}")
        )
    if as_json:
        print_json({"urls": description.urls, "logins": description.logins})
    else:
        print_facts({**description.urls, "logins": description.logins})
        print_note("It stays until `virnucpro down`; `virnucpro status`, run in this folder, shows its jobs.")


def down() -> None:
    """Stop the stack that `virnucpro up` started from this folder; returns when no process is left."""
    from virnucpro_core.stack.stack import Stack

    stack = Stack(load_settings())
    if stack.supervisor.is_running():
        print_note("stopping: workers may finish what they have in hand")
    stack.stop()


def demo(
    fasta: Annotated[Path, typer.Argument(metavar="FASTA", help="Proteins to embed.")] = Path(
        "samples/proteins.fasta"
    ),
) -> None:
    """Take one file all the way with RANDOM weights: start the stack, run the DAG, print a summary, stop it.

    Exit 0 only if the job succeeded and its result is valid. A second run finds the job done and computes
    nothing.
    """
    from virnucpro_core.stack.demo import run_demo

    code = run_demo(fasta)
    if code:
        raise typer.Exit(code)


@database.command()
def upgrade() -> None:
    """Bring the ledger's schema to this version's.

    Needs the role that owns it (VIRNUCPRO_OWNER_DATABASE_URL). Harmless on a schema that is up to date. Stop
    workers and relay before a new version's first upgrade.
    """
    from virnucpro_core.ledger.database import hide_password
    from virnucpro_core.ledger.database import upgrade as upgrade_ledger

    url = load_settings().database_url_for("owner")
    upgrade_ledger(url)
    print(f"{hide_password(url)} is up to date")
