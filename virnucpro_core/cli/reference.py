"""The reference of settings and commands, as Markdown, from the code itself.

python -m virnucpro_core.cli.reference docs/reference.md     (`make docs`)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from virnucpro_core.cli.application import EXIT_CODES, app
from virnucpro_core.errors import SettingsError
from virnucpro_core.settings import PREFIX, Settings

PROGRAM = "virnucpro"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
TYPES: dict[object, str] = {
    bool: "true or false",
    float: "number",
    int: "whole number",
    str: "text",
    Path: "path",
    SecretStr: "secret",
}

BEGINNING = """\
# Reference

*Written by `make docs` from the code; a test compares the two. Change the code instead of this page.*
"""

ABOUT_SETTINGS = f"""\
## Settings

Environment variables, read once when a process starts. Unknown ones are ignored, wrong ones are named and refused
(exit code {SettingsError.exit_code}). A secret may lie in a file instead:
`{PREFIX}DATABASE_URL_FILE=/run/secrets/database_url`.
"""

ABOUT_COMMANDS = """\
## Commands

Results go to stdout; progress, warnings and errors to stderr. `--help` says the same as this page,
`virnucpro --version` which version it is of.
"""


def write_reference() -> str:
    """The whole page."""
    return "\n".join(
        [BEGINNING, ABOUT_SETTINGS, *describe_settings(), "", ABOUT_COMMANDS, *describe_commands()]
    )


def describe_settings() -> Iterator[str]:
    rows = (
        (f"`{PREFIX}{name.upper()}`", describe_field(field), show_default(field), field.description or "")
        for name, field in Settings.model_fields.items()
    )
    yield from write_table(("variable", "value", "default", "meaning"), rows)


def describe_field(field: FieldInfo) -> str:
    """What a setting takes, in words."""
    bounds = [
        f"{word} {getattr(limit, kind)}"
        for limit in field.metadata
        for kind, word in BOUNDS.items()
        if getattr(limit, kind, None) is not None
    ]
    return ", ".join([describe_type(field.annotation), *bounds])


def describe_type(annotation: object) -> str:
    origin, inner = get_origin(annotation), [arg for arg in get_args(annotation) if arg is not NoneType]
    if origin is Annotated:
        return describe_type(inner[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join(map(describe_type, inner))
    if origin is tuple:
        return f"{describe_type(inner[0])}s"
    return TYPES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def show_default(field: FieldInfo) -> str:
    """A setting's default; empty where it has none, or one that its description tells."""
    default = field.get_default()
    if default is None or field.default_factory is not None:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def describe_commands() -> Iterator[str]:
    for name, command in walk_commands(typer.main.get_command(app), PROGRAM):
        title, context = f"`{name}`", typer.Context(command)
        told = get_docs_for_click(obj=command, ctx=context, name=name, title=title, indent=2)
        yield from (told.strip(), "")
    yield from ("### Exit codes", "")
    yield from write_table(("code", "meaning"), ((str(code), what) for code, what in EXIT_CODES.items()))
    yield ""


def walk_commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All commands below one, with their full names."""
    # What typer makes of an application has types without public names.
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for part, each in inner.items():
        yield from walk_commands(each, f"{name} {part}")


def write_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the page to the file that is named."""
    (path,) = sys.argv[1:]
    Path(path).write_text(write_reference())


if __name__ == "__main__":
    main()
