"""What a command writes: results to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from virnucpro_core.errors import VirnucproError

LONGEST_LINE = 100_000  # characters of a table's line

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script instead of text for a person.")]


def print_json(value: object) -> None:
    """Print one JSON document; paths and times as text."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=_encode))


def escape(text: str) -> str:
    """The text without anything that a terminal would obey: names of files may hold any character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape_lines(text: str) -> str:
    """As `escape`, but the end of a log keeps its lines; they are indented, so that none passes for ours."""
    return "\n    ".join(map(escape, text.splitlines()))


def print_line(text: str) -> None:
    """Print one line for a person."""
    print(escape(text))


def print_facts(facts: Mapping[str, object]) -> None:
    """Print `name: value` lines, aligned; a value of None or "" is left out."""
    told = {name.replace("_", " "): value for name, value in facts.items() if value not in (None, "")}
    width = max(map(len, told), default=0) + 2
    for name, value in told.items():
        print(f"{name + ':':{width}}{format_value(value)}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns; numbers to the right. No cell is cut or folded, however wide the table gets."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = [list(row) for row in rows]
    for place, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[place], int | float) for row in cells)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left")
    for row in cells:
        table.add_row(*(Text(format_value(value)) for value in row))
    console = Console()
    unbounded = console.options.update(max_width=LONGEST_LINE)
    console.width = max(console.measure(table, options=unbounded).maximum, 1)
    console.print(table)


def format_value(value: object) -> str:
    """A value as a person reads it, on one line."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.1f}"
        case datetime():
            return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        case _:
            return escape(str(value))


def format_counts(counts: Mapping[str, int]) -> str:
    """`3 empty, 1 oom`, or `none`."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items()) or "none"


def print_error(error: VirnucproError) -> None:
    """Say on stderr what happened, where, and what to do about it."""
    lines = Text.assemble(("error", "bold red"), f": {escape_lines(error.what)}")
    if error.where:
        lines.append(f"\n  where: {escape(error.where)}")
    if error.todo:
        lines.append(f"\n  to do: {escape_lines(error.todo)}")
    Console(stderr=True).print(lines, soft_wrap=True)


def print_note(text: str) -> None:
    """Say on stderr what a person should know and a script need not read."""
    print(escape(text), file=sys.stderr)


class Bar:
    """One progress bar of `show_progress`."""

    def __init__(self, progress: Progress, description: str, total: float | None) -> None:
        self._progress = progress
        self._task = progress.add_task(escape(description), total=total)

    def advance(self, steps: int) -> None:
        """Move the bar by so many steps."""
        self._progress.advance(self._task, steps)

    def set(self, completed: float, total: float | None = None, description: str | None = None) -> None:
        """Move the bar to `completed`; its total and description stay unless others are given."""
        self._progress.update(self._task, completed=completed, total=total, description=description)


@contextmanager
def show_progress(*bars: tuple[str, float | None], counts: bool = False) -> Iterator[list[Bar]]:
    """Show bars on stderr while the block runs, if a person sees it; elsewhere the bars do nothing.

    Args:
        bars: description and total of each.
        counts: show `done/total` numbers too.
    """
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
    if counts:
        columns.append(MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield [Bar(progress, description, total) for description, total in bars]


def _encode(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
