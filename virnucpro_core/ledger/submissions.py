"""Submitting a file: scanned, then registered under a recipe. The command line and the DAGs both come here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import Engine

from virnucpro_core.errors import InputError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.registration import recipe_for, register
from virnucpro_core.ledger.work import Submission
from virnucpro_core.roots import open_below, resolve_below
from virnucpro_core.sequences.scan import scan_input
from virnucpro_core.settings import Settings

Label = Literal["", "host", "viral"]
"""What a merged file's `labels` say of its sequences; empty for nothing."""

COMPRESSION_SUFFIXES = (".gz", ".bgz", ".zst")
FASTA_SUFFIXES = (".fasta", ".faa", ".fa", ".fas")
NUCLEOTIDE_ENDING = "_DNABERT_S.pt"

PATH_BYTES = 1300
"""Bytes of a path at most: two of them are one entry of an index, for which PostgreSQL has 2704."""

STEM_BYTES = 200
"""Bytes of a stem at most: a file's name may have 255, and a result's names add up to 40 to the stem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """What became of a submitted file.

    Attributes:
        path: absolute path of the file.
        stem: what its result is named after.
        created: whether the job is new; otherwise the work was known, and is done or under way.
        records, chunks: what the file holds, and the chunks it is worked on in.
    """

    path: str
    stem: str
    job_id: int
    generation: int
    created: bool
    records: int
    chunks: int


def has_fasta_name(path: Path) -> bool:
    """Whether a file's name says that it is FASTA; its bytes decide later."""
    return cut_compression(path.name).lower().endswith(FASTA_SUFFIXES)


def name_stem(path: Path) -> str:
    """What a file's results are named after: its name without the suffixes of FASTA and of compression."""
    name = cut_suffix(cut_compression(path.name), FASTA_SUFFIXES)
    return name.encode(errors="surrogateescape")[:STEM_BYTES].decode(errors="ignore")


def cut_compression(name: str) -> str:
    return cut_suffix(name, COMPRESSION_SUFFIXES)


def cut_suffix(name: str, suffixes: tuple[str, ...]) -> str:
    for suffix in suffixes:
        if name.lower().endswith(suffix) and (left := name[: -len(suffix)]).strip("."):
            return left
    return name  # also where nothing but dots is left: `.` and `..` are no names of files


def find_nucleotides(path: Path) -> Path | None:
    """The nucleotide file that lies beside a FASTA file: `<stem>_DNABERT_S.pt`, or a link, also to one that is away.

    Raises:
        InputError: their folder cannot be searched.
    """
    beside = path.parent / f"{name_stem(path)}{NUCLEOTIDE_ENDING}"
    try:
        return beside if beside.exists() or beside.is_symlink() else None
    except OSError as error:
        raise InputError(
            f"the file's folder cannot be searched: {error.strerror}",
            where=str(path),
            todo="Correct the permissions of its folder.",
        ) from error


def submit_file(
    ledger: Engine,
    path: Path,
    *,
    settings: Settings,
    requested_by: str,
    model: str | None = None,
    nucleotides: Path | None = None,
    label: Label = "",
    max_failed_share: float | None = None,
    allow_nucleotides: bool = False,
    force: bool = False,
    forced_by: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Submitted:
    """Register a file's job, once: the same content under the same recipe is the same job.

    Args:
        ledger: the ledger, as the role `dag`.
        path: a FASTA file that the workers can read under the same path.
        settings: the folders that inputs are read from, dtype and residue policy of the recipe, the chunks' size,
            and defaults for what is not given.
        requested_by: who asks, a DAG run or a person.
        model: a registered model's name; the settings' model if None.
        nucleotides: the `*_DNABERT_S.pt` file to merge the result with.
        label: what the sequences are, for the merged file.
        max_failed_share: share of failed records above which the result is not accepted.
        allow_nucleotides: take a file that looks like nucleotides for proteins.
        force: compute everything again, as a new generation.
        forced_by: who forces, if that must count once only.
        on_progress: called with the bytes read of the file so far.

    Raises:
        SettingsError: no model is named anywhere.
        WeightsError: no model has that name.
        OutsideError: one of the files lies outside the folders that inputs are read from.
        InputError: one of the files cannot be used as a whole.
        ArtifactError: the spool cannot be written.
        ServiceError: the ledger cannot be used.
    """
    path = path.absolute()
    roots = settings.input_folders
    # Before anything else is said of a file that is none of theirs.
    resolve_below(path, roots)
    name = settings.require_model(model)
    # Before the scan, which takes long: a wrong model's name is told at once.
    recipe = in_transaction(ledger, recipe_for, name, dtype=settings.dtype, residues=settings.residues)
    submission = Submission(
        path=check_name(path),
        stem=name_stem(path),
        requested_by=requested_by,
        max_failed_share=settings.max_failed_share if max_failed_share is None else max_failed_share,
        label=label,
        nucleotide_path="" if nucleotides is None else check_name(nucleotides.absolute()),
        nucleotide_sha256="" if nucleotides is None else hash_nucleotides(nucleotides, roots),
    )
    scanned = scan_input(
        path,
        chunk_tokens=settings.chunk_tokens,
        spool_root=settings.spool_root.absolute(),
        roots=roots,
        max_expansion=settings.max_expansion,
        truncation=recipe.truncation,
        allow_nucleotides=allow_nucleotides,
        on_progress=on_progress,
    )
    registered = in_transaction(
        ledger,
        register,
        scanned=scanned,
        model=name,
        recipe=recipe,
        submission=submission,
        force=force,
        forced_by=forced_by,
    )
    return Submitted(
        path=submission.path,
        stem=submission.stem,
        job_id=registered.job_id,
        generation=registered.generation,
        created=registered.created,
        records=scanned.records,
        chunks=len(scanned.chunks),
    )


def check_name(path: Path) -> str:
    """The path as text that the ledger can hold.

    Raises:
        InputError: the path is not UTF-8, or too long.
    """
    try:
        length = len(str(path).encode())
    except UnicodeEncodeError as error:
        raise InputError(
            "a file's name is not UTF-8", where=repr(str(path)), todo="Rename the file or its folder."
        ) from error
    if length > PATH_BYTES:
        raise InputError(
            f"a file's path is longer than {PATH_BYTES} bytes",
            where=str(path),
            todo="Move it to a higher folder.",
        )
    return str(path)


def hash_nucleotides(path: Path, roots: Sequence[Path]) -> str:
    """sha256 of a nucleotide file below one of the roots.

    Raises:
        OutsideError: it lies below none of them.
        InputError: it cannot be read.
    """
    try:
        with open_below(path, roots) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"the nucleotide file cannot be read: {error.strerror}",
            where=str(path),
            todo="Correct its name or its permissions.",
        ) from error
