"""The `virnucpro` command: its groups, its exit codes, and how it ends when something goes wrong."""

from __future__ import annotations

import errno
import logging
import os
import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer

from virnucpro_core.cli import estimate, explain, files, health, jobs, services, submissions, weights
from virnucpro_core.cli.output import print_error
from virnucpro_core.errors import ArtifactError, VirnucproError
from virnucpro_core.logs import configure_logging
from virnucpro_core.stack.description import use_running_stack

EXIT_CODES = {
    0: "done",
    1: "a job, a check or a self-test failed, or there is no such job",
    2: "the command line or a setting is wrong",
    3: "an input file cannot be used",
    4: "a model's weights are missing, incomplete or not FastESM2",
    5: "the database, the broker or another service cannot be used",
    6: "a result is missing, damaged or cannot be written, or two files do not belong together",
    7: "the device cannot run what was asked",
    130: "interrupted",
}
"""What the exit codes mean; `VirnucproError.exit_code` says which error has which."""

REFUSALS = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Free space there",
    errno.EIO: "Look at the device",
    errno.EACCES: "Give this user the right, or choose another folder",
    errno.EPERM: "Give this user the right, or choose another folder",
    errno.EROFS: "Choose another folder",
    errno.EEXIST: "Move away what is there in place of a folder",
    errno.ENOTDIR: "Move away what is there in place of a folder",
}
"""What the system refuses for reasons that a person can mend, wherever it does; all else is a bug of ours."""

STACK_COMMANDS = ("up", "down", "demo")
"""They make the stack: what a crashed one left behind must not pass for the user's own settings."""

EPILOG = "\n\n".join(["Exit codes:", *(f"- {code}: {meaning}" for code, meaning in EXIT_CODES.items())])

app = typer.Typer(
    name="virnucpro",
    help="FastESM2 protein features for VirNucPro: from FASTA files to validated embeddings.\n\n"
    "`virnucpro up` starts, in this folder, all that the commands about jobs need; `virnucpro demo` shows it at work.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# --help lists them in this order.
for module in (files, weights, estimate, submissions, jobs, explain, services, health):
    module.add_commands(app)


def show_version(asked: bool) -> None:
    if asked:
        print(f"virnucpro {version('virnucpro-pipeline')}")
        raise typer.Exit


@app.callback()
def begin(
    context: typer.Context,
    _: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    configure_logging(logging.WARNING)
    if context.invoked_subcommand not in STACK_COMMANDS:
        use_running_stack(os.environ)


def main() -> None:
    """Run the command line; the process ends here, with one of `EXIT_CODES`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal's own encoding may lack what is in an id: a list would end there, in its middle.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        try:
            app()
        finally:
            print(end="", flush=True)
    except VirnucproError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        if error.filename is None:
            drop_output()
        what = f"the system refuses to go on: {error.strerror}"
        where = str(error.filename or "standard output")
        print_error(ArtifactError(what, where=where, todo=f"{REFUSALS[error.errno]}, then run it again."))
        sys.exit(ArtifactError.exit_code)


def drop_output() -> None:
    """Send what is left in standard output's buffer nowhere: Python would fail at it once more as it ends."""
    if sys.stdout is not None:  # as it is where nobody gave us one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
