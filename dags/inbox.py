"""Which files a run takes, and how they are spread over mapped tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from virnucpro_core.errors import SettingsError
from virnucpro_core.ledger.submissions import has_fasta_name, name_stem

BATCHES = 250  # mapped instances of a stage at most; Airflow refuses more than [core] max_map_length, 1024


def find_inputs(inbox: Path, named: Sequence[str]) -> list[Path]:
    """The files a run is asked for, each once: those named, else all FASTA files in the inbox.

    A relative name starts in the inbox. The inbox is searched with all its folders; hidden files and folders
    are passed over, so that an upload can take place under a name with a leading dot.

    Raises:
        SettingsError: the inbox is asked for, and is no folder.
    """
    if named:
        return list(dict.fromkeys(inbox / name for name in named))
    if not inbox.is_dir():
        raise SettingsError(
            "the inbox is not a folder", where=str(inbox), todo="Create it, or set VIRNUCPRO_INBOX."
        )
    return sorted(
        path
        for path in inbox.rglob("*")
        if has_fasta_name(path)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(inbox).parts)
    )


def make_batches(files: Sequence[Path]) -> list[list[str]]:
    """A batch per file up to `BATCHES` files; above that, as many files in each as keep to that number."""
    size = max(1, -(-len(files) // BATCHES))
    return [[str(file) for file in files[start : start + size]] for start in range(0, len(files), size)]


def name_batch(files: Sequence[str]) -> str:
    """What a person reads in the grid instead of a map index."""
    first = name_stem(Path(files[0]))
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"
