"""Roots: the folders that a path from outside must stay below, wherever `..` and symbolic links lead."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

from virnucpro_core.errors import InputError, OutsideError

ANYWHERE = (Path("/"),)

INPUT_ADVICE = (
    "Move the file below one of these folders; or add its folder to VIRNUCPRO_INPUT_ROOTS, here and where the "
    "workers run, and start them again."
)

OUTPUT_ADVICE = "Find out who wrote this path into the ledger, or made a folder below the output root a link."


def resolve_below(path: Path, roots: Sequence[Path], *, todo: str = INPUT_ADVICE) -> Path:
    """The real path that a path leads to: absolute, without `..` and symbolic links. Nothing need be there.

    Use what this returns and not `path`: a link may be changed in between.

    Args:
        path: relative ones start in the current folder.
        roots: folders; they may be symbolic links themselves.
        todo: what a person should do who meant this path.

    Raises:
        OutsideError: it lies below none of the roots.
    """
    where = repr(str(path))
    if "\0" not in str(path):
        real = Path(os.path.realpath(path))
        if is_below(real, roots):
            return real
        where = str(path) if real == path else f"{path}, which is {real}"
    named = ", ".join(str(Path(root).absolute()) for root in roots)
    raise OutsideError(f"this path leads out of {named}", where=where, todo=todo)


def open_below(path: Path, roots: Sequence[Path]) -> BufferedReader:
    """Opens a regular file for reading, if it lies below one of the roots.

    Raises:
        OutsideError: it does not, or one of its folders became a link that leads out at that moment.
        InputError: it is no regular file.
        OSError: it cannot be opened.
    """
    real = resolve_below(path, roots)
    # Without O_NONBLOCK a pipe would wait for its writer.
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_opened(descriptor, path, roots)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def check_opened(descriptor: int, path: Path, roots: Sequence[Path]) -> None:
    """Checks what was opened rather than its name, which may have changed since it was resolved."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise InputError("this is not a regular file", where=str(path), todo="Name a regular file.")
    if sys.platform == "linux":
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not is_below(opened, roots):
            what = f"this path led to {opened} when it was opened"
            raise OutsideError(what, where=str(path), todo=INPUT_ADVICE)


def is_below(real: Path, roots: Sequence[Path]) -> bool:
    """Whether a real path lies below one of the roots, or is one."""
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots)
