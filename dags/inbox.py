"""Which files a run takes, and how they are spread over mapped tasks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import structlog

from virnucpro_core.errors import SettingsError
from virnucpro_core.ledger.submissions import has_fasta_name, name_stem

BATCHES = 250  # mapped instances of a stage at most; Airflow refuses more than [core] max_map_length, 1024

log = structlog.get_logger()


def find_inputs(inbox: Path, named: Sequence[str]) -> list[Path]:
    """The files a run is asked for, each once: those named, else all FASTA files in the inbox.

    A relative name starts in the inbox. The inbox is searched with all its folders; hidden files and folders
    are passed over, so that an upload can take place under a name with a leading dot. Links to folders are not
    followed. What cannot be looked at, a folder, a file or where a link leads, is taken for an input: it is then
    refused under its name, the run fails, and the other files go on.

    Raises:
        SettingsError: the inbox is asked for, and cannot be read.
    """
    if named:
        return list(dict.fromkeys(inbox / name for name in named))
    unreadable: list[Path] = []

    def note(error: OSError) -> None:
        if Path(error.filename) == inbox:
            raise SettingsError(
                f"the inbox cannot be read: {error.strerror}",
                where=str(inbox),
                todo="Create it, or make it readable for the user that Airflow runs as; or set VIRNUCPRO_INBOX.",
            ) from error
        if not isinstance(error, FileNotFoundError):  # who removed a folder meanwhile took its files out
            path = Path(error.filename)
            log.warning("the folder cannot be read", folder=write_path(path), reason=error.strerror)
            unreadable.append(path)

    found: list[Path] = []
    for folder, folders, names in os.walk(inbox, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in filter(os.path.islink, [Path(folder, name) for name in folders]):
            log.warning(
                "a link to a folder is not followed: its files are not taken", folder=write_path(link)
            )
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if has_fasta_name(path) and is_input(path)]
    return sorted(found + unreadable)


def is_input(path: Path) -> bool:
    """Whether this is a file, or may be one that cannot be looked at: a link may lead nowhere for the moment."""
    try:
        return path.is_file() or (path.is_symlink() and not path.exists())
    except OSError:
        return True


def make_batches(files: Sequence[Path]) -> list[list[str]]:
    """A batch per file up to `BATCHES` files; above that, as many files in each as keep to that number."""
    size = max(1, -(-len(files) // BATCHES))
    return [
        [write_path(file) for file in files[start : start + size]] for start in range(0, len(files), size)
    ]


def write_path(path: Path) -> str:
    r"""A path as text, which is all that tasks hand on: of a name that is not UTF-8, a byte becomes `\udce9`, say."""
    return str(path).encode(errors="backslashreplace").decode()


def read_path(text: str) -> Path:
    """The path that was written: whoever opens it says what is wrong with its name."""
    return Path(re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda byte: chr(int(byte[1], 16)), text))


def name_batch(files: Sequence[str]) -> str:
    """What a person reads in the grid instead of a map index."""
    first = name_stem(Path(files[0]))
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"
