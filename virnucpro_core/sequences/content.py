"""What a file holds, judged by its first megabyte: FASTA of proteins, or a fault worth a clear error."""

from __future__ import annotations

import string
from pathlib import Path

from virnucpro_core.errors import InputError, NucleotideInputError
from virnucpro_core.sequences.residues import WHITESPACE

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_NUCLEOTIDES = b"ACGTUN"
_NUCLEOTIDE_SHARE = 0.9
"""Proteins hold about 27% of these letters, reads and genomes nearly nothing else."""
_NUCLEOTIDE_SAMPLE = 30
"""Letters needed to judge: a protein of 30 residues reaches the share with a probability below 1e-11."""

_TEXT_BYTES = bytes({*range(0x20, 0x7F), *range(0x80, 0x100), *WHITESPACE, 0x1A})
_NOT_LETTERS = bytes(set(range(256)) - set(string.ascii_uppercase.encode()))
_GIVE_FASTA = "Give protein FASTA, plain or compressed with gzip, bgzip or zstd."


def check_content(head: bytes, *, path: Path, allow_nucleotides: bool) -> None:
    """Checks that a file's first block begins protein FASTA.

    Args:
        head: the first uncompressed bytes.
        path: the file, for the errors.
        allow_nucleotides: whether nucleotides are taken for proteins.
    Raises:
        InputError: binary, no FASTA, or text before the first header; names the file and line.
        NucleotideInputError: at least 90% of the sequence letters are A, C, G, T, U or N.
    """
    body = head.lstrip(WHITESPACE)
    blank = head[: len(head) - len(body)]
    line = blank.count(b"\n") + 1
    where = f"{path}, line {line}"
    if not body.startswith(b">"):
        raise _explain_no_fasta(body, where)
    # The block may end between the two bytes of a line end.
    if b"\r" in head[:-1] and b"\n" not in head:
        raise InputError(
            "the lines end in carriage returns alone",
            where=where,
            todo="Convert the line ends (`tr '\\r' '\\n'`).",
        )
    if blank and not blank.endswith(b"\n"):
        raise InputError(
            "there is white space before the first header",
            where=where,
            todo="Remove it: a header's '>' begins its line.",
        )
    if not allow_nucleotides:
        _refuse_nucleotides(body, where)


def _refuse_nucleotides(body: bytes, where: str) -> None:
    sequences = [line for line in body.split(b"\n") if not line.startswith(b">")]
    letters = b"".join(sequences).upper().translate(None, _NOT_LETTERS)
    nucleotides = len(letters) - len(letters.translate(None, _NUCLEOTIDES))
    if len(letters) >= _NUCLEOTIDE_SAMPLE and nucleotides >= _NUCLEOTIDE_SHARE * len(letters):
        raise NucleotideInputError(
            f"this looks like nucleotides, not proteins: {nucleotides / len(letters):.0%} of the first "
            f"{len(letters)} letters are A, C, G, T, U or N",
            where=where,
            todo="Translate the sequences, or allow nucleotides (`--allow-nucleotides`, in Python "
            "`allow_nucleotides=True`) if these are proteins.",
        )


def _explain_no_fasta(body: bytes, where: str) -> InputError:
    if body.startswith(_BYTE_ORDER_MARK):
        return InputError(
            "the file begins with a byte-order mark", where=where, todo="Save it as UTF-8 without one."
        )
    if body.translate(None, _TEXT_BYTES):
        return InputError("the file is binary, not FASTA", where=where, todo=_GIVE_FASTA)
    if b"\n>" not in body:
        what = "the file is FASTQ, not FASTA" if body.startswith(b"@") else "there is no FASTA in the file"
        return InputError(what, where=where, todo=_GIVE_FASTA)
    return InputError(
        "there is text before the first header",
        where=where,
        todo="Remove it, or put a header (a line that starts with '>') above it.",
    )
