"""Validation: results reopened from disk and compared with what they must hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.exports import load_pt, read_pt, read_strings
from virnucpro_core.features.files import Written, hash_file, is_unreadable, open_artifact, read_blocks
from virnucpro_core.features.matrices import Matrix, open_matrix, read_layout
from virnucpro_core.features.merging import MERGED_WIDTH, NUCLEOTIDE_WIDTH
from virnucpro_core.recipe import EMBEDDING_WIDTH

if TYPE_CHECKING:
    import torch

_BLOCK_ROWS = 1024
_NAMED = 10
"""Places named of each kind of fault; the rest are counted."""


class _Fault:
    """One kind of fault: how often it occurs, and the first places."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._count = 0
        self._places: list[str] = []

    def add(self, places: Iterable[object]) -> None:
        for place in places:
            self._count += 1
            if len(self._places) < _NAMED:
                self._places.append(str(place))

    def lines(self) -> list[str]:
        if not self._count:
            return []
        more = f" and {self._count - _NAMED} more" if self._count > _NAMED else ""
        return [f"{self._kind}: {', '.join(self._places)}{more}"]


@dataclass(slots=True)
class Findings:
    """What validation found.

    Attributes:
        records: records of the input.
        failures: records without an embedding.
        rows: embeddings in the result.
        errors: what is wrong, one line for each kind of fault, empty if nothing is.
    """

    records: int = 0
    failures: int = 0
    rows: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.errors

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "records": self.records,
            "failures": self.failures,
            "rows": self.rows,
            "errors": list(self.errors),
        }


def validate_embeddings(
    proteins: Sequence[str], data: Sequence[Any], expected_dim: int = EMBEDDING_WIDTH
) -> list[str]:
    """Checks embeddings in memory.

    Args:
        proteins: ids.
        data: one tensor per id.
        expected_dim: numbers per embedding.

    Returns:
        What is wrong, one line each, empty if nothing is: counts, shapes not (expected_dim,), NaN, Inf.
    """
    import torch

    errors = []
    if len(proteins) != len(data):
        errors.append(f"{len(proteins)} ids for {len(data)} embeddings")
    for name, row in zip(proteins, data, strict=False):
        if not isinstance(row, torch.Tensor):
            errors.append(f"{name}: a {type(row).__name__}, not a tensor")
            continue
        if row.shape != (expected_dim,):
            errors.append(f"{name}: shape {tuple(row.shape)}, not ({expected_dim},)")
        if row.isnan().any():
            errors.append(f"{name}: NaN")
        if row.isinf().any():
            errors.append(f"{name}: Inf")
    return errors


def validate_result(path: Path, *, sha256: str, ids: Iterable[str], failed: Iterable[int]) -> Findings:
    """Reopens a merged matrix and compares it with its input: every record an embedding or a failure, once.

    Memory does not grow with the rows, apart from the file's ids and record numbers, which are mapped.

    Args:
        path: the matrix file.
        sha256: its recorded checksum.
        ids: the id of every record of the input, in input order, those of failures included.
        failed: the numbers of the records that are failures, rising.

    Returns:
        The findings. A file that is missing, cut short or none of ours is an error in it, too.

    Raises:
        ArtifactError: the file cannot be read, which says nothing of what it holds.
    """
    findings = Findings()
    try:
        matrix = open_matrix(path)
        findings.rows = len(matrix)
        findings.errors += _check_bytes(matrix, sha256)
        _check_records(matrix, ids, failed, findings)
    except ArtifactError as error:
        findings.errors.append(_tell(error))
    return findings


def validate_export(exports: Sequence[Written], matrix: Matrix) -> list[str]:
    """Reopens `.pt` files one by one and compares them, to the bit, with the matrix they were written from.

    Args:
        exports: the files, in the order of their rows.
        matrix: what they were written from.

    Returns:
        What is wrong, one line each, empty if nothing is.

    Raises:
        ArtifactError: a file cannot be read, which says nothing of what it holds.
    """
    errors = []
    stop = 0
    for export in exports:
        start, stop = stop, stop + export.rows
        try:
            errors += _compare_export(export, matrix, start, stop)
        except ArtifactError as error:
            errors.append(_tell(error))
    if stop != len(matrix):
        errors.append(f"{stop} rows were exported, of {len(matrix)}")
    return errors


def validate_merged(merged: Written, matrix: Matrix) -> list[str]:
    """Reopens a `*_merged.pt` file that `merge_features` wrote and compares it with the matrix.

    Returns:
        What is wrong, one line each, empty if nothing is: checksum, ids, shape, NaN, Inf, protein embeddings.

    Raises:
        ArtifactError: the file cannot be read, which says nothing of what it holds.
    """
    import torch

    try:
        sha256 = hash_file(merged.path)  # first, as in `_compare_export`
        content = load_pt(merged.path, {"ids", "data"}, optional={"labels"})
        ids, data = read_strings(content["ids"], merged.path), content["data"]
    except ArtifactError as error:
        return [_tell(error)]
    errors = []
    shape = len(ids), MERGED_WIDTH
    if sha256 != merged.sha256:
        errors.append(f"{merged.path}: sha256 {sha256} instead of {merged.sha256}")
    if ids != matrix.ids():
        errors.append(f"{merged.path}: its ids are not those of the matrix")
    elif not isinstance(data, torch.Tensor) or data.shape != shape or data.dtype != torch.float32:
        errors.append(f"{merged.path}: its data is not a float32 tensor of shape {shape}")
    elif not data.isfinite().all():
        errors.append(f"{merged.path}: NaN or Inf")
    elif not _equal(data.detach()[:, NUCLEOTIDE_WIDTH:], matrix, 0):
        errors.append(f"{merged.path}: its protein embeddings are not those of the matrix")
    return errors


def _tell(error: ArtifactError) -> str:
    """An error of a file's content as a line of the findings; raised on if its content is not known."""
    if is_unreadable(error):
        raise error
    return str(error)


def _check_bytes(matrix: Matrix, sha256: str) -> list[str]:
    """Reads the file once: its checksum, and the rows that cannot be embeddings."""
    broken, empty = _Fault("NaN or Inf in the embeddings of records"), _Fault("nothing but zeros for records")
    with open_artifact(matrix.path) as file:
        layout = read_layout(file, matrix.path)
        digest = hashlib.sha256(layout.header)
        start, stop = layout.sections()["embeddings"]
        for block in read_blocks(file, start - len(layout.header), matrix.path):
            digest.update(block)
        row = 0
        for block in read_blocks(file, stop - start, matrix.path, block=4 * layout.width * _BLOCK_ROWS):
            digest.update(block)
            embeddings = np.frombuffer(block, "<f4").reshape(-1, layout.width)
            records = matrix.records[row : row + len(embeddings)]
            broken.add(records[~np.isfinite(embeddings).all(axis=1)])
            empty.add(records[~embeddings.any(axis=1)])
            row += len(embeddings)
    altered = [] if digest.hexdigest() == sha256 else [f"sha256 {digest.hexdigest()} instead of {sha256}"]
    return altered + broken.lines() + empty.lines()


def _check_records(matrix: Matrix, ids: Iterable[str], failed: Iterable[int], findings: Findings) -> None:
    """Walks through the input's records, the failures and the matrix side by side."""
    lost = _Fault("neither embedding nor failure for records")
    double = _Fault("both embedding and failure for records")
    renamed = _Fault("another id than in the input at records")
    foreign = _Fault("embeddings of no record of the input")
    unknown = _Fault("failures out of order, twice, or of no record of the input")
    rows, failures = _rows(matrix), iter(failed)
    row, failure = next(rows, None), next(failures, None)
    for findings.records, name in enumerate(ids, start=1):
        has_row = row is not None and row[0] == findings.records
        has_failure = failure == findings.records
        if has_row == has_failure:
            (double if has_row else lost).add([findings.records])
        if row is not None and has_row:
            if row[1] != name:
                renamed.add([f"{findings.records} ({row[1]!r} for {name!r})"])
            row = next(rows, None)
        if has_failure:
            findings.failures += 1
            failure = next(failures, None)
    if row is not None:
        foreign.add([row[0]])
        foreign.add(record for record, _ in rows)
    if failure is not None:
        unknown.add([failure])
        unknown.add(failures)
    for fault in (lost, double, renamed, foreign, unknown):
        findings.errors += fault.lines()


def _rows(matrix: Matrix) -> Iterator[tuple[int, str]]:
    for start in range(0, len(matrix), _BLOCK_ROWS):
        stop = start + _BLOCK_ROWS
        yield from zip(matrix.records[start:stop].tolist(), matrix.ids(start, stop), strict=True)


def _compare_export(export: Written, matrix: Matrix, start: int, stop: int) -> list[str]:
    # Hashed first: a decoder may take a file that cannot be read for one that is damaged.
    sha256 = hash_file(export.path)
    if sha256 != export.sha256:
        return [f"{export.path}: sha256 {sha256} instead of {export.sha256}"]
    ids, rows = read_pt(export.path)
    if ids != matrix.ids(start, stop):
        return [f"{export.path}: its ids are not rows {start + 1} to {stop} of the matrix"]
    if not _equal(rows, matrix, start):
        return [f"{export.path}: its embeddings are not those of the matrix"]
    return []


def _equal(rows: Sequence[torch.Tensor] | torch.Tensor, matrix: Matrix, start: int) -> bool:
    """Whether `rows` are the matrix's from `start` on, to the bit."""
    import torch

    for first in range(0, len(rows), _BLOCK_ROWS):
        part = torch.stack(tuple(rows[first : first + _BLOCK_ROWS])).numpy()
        if part.tobytes() != matrix.embeddings[start + first : start + first + len(part)].tobytes():
            return False
    return True
