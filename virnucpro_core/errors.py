"""Every error this project raises on purpose: what happened, where, and what to do about it."""

from __future__ import annotations


class VirnucproError(Exception):
    """Root of the project's errors.

    Args:
        what: what happened, in one sentence without a full stop.
        where: the file, line, record, table or URL it happened at (never a secret).
        todo: what the reader should do next, as one imperative sentence.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        self.what = what
        self.where = where
        self.todo = todo
        super().__init__(what, where, todo)

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        advice = f" {self.todo}" if self.todo else ""
        told = f"{self.what}{place}.{advice}"
        # A path in it may not be UTF-8, which neither a log nor the ledger can hold.
        return told.encode(errors="backslashreplace").decode()


class SettingsError(VirnucproError):
    """A setting is missing or makes no sense."""

    exit_code = 2


class InputError(VirnucproError):
    """A FASTA file as a whole cannot be used; a bad record is a failure instead."""

    exit_code = 3


class InputChangedError(InputError):
    """The bytes of an input are no longer those that were registered."""


class OutsideError(InputError):
    """A path leads out of the folders that the pipeline reads from or writes to."""


class NucleotideInputError(InputError):
    """Nucleotides came where proteins belong."""


class WeightsError(VirnucproError):
    """A checkpoint is missing, incomplete, or is not FastESM2."""

    exit_code = 4


class ServiceError(VirnucproError):
    """The database or the broker cannot be used as it is."""

    exit_code = 5


class ArtifactError(VirnucproError):
    """A file that we wrote is missing, cut short or altered."""

    exit_code = 6


class MismatchError(VirnucproError):
    """Two things that must line up do not (ids of a merge, a tokenizer's alphabet)."""

    exit_code = 6


class JobError(VirnucproError):
    """A job failed, was cancelled, or does not exist."""

    exit_code = 1


class StaleLeaseError(VirnucproError):
    """A worker tried to commit work that is no longer its own."""


class ExecutionError(VirnucproError):
    """A device cannot run what was asked of it."""

    exit_code = 7
