"""Merging: chunks into one matrix, and protein embeddings with nucleotide embeddings into `_merged.pt`."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from virnucpro_core.errors import ArtifactError, MismatchError, SettingsError
from virnucpro_core.features.exports import load_pt, odd_pt, read_pt, read_strings, save_pt
from virnucpro_core.features.files import (
    NewFile,
    Written,
    check_apart,
    check_writable,
    hash_file,
    new_file,
    open_artifact,
    read_blocks,
)
from virnucpro_core.features.matrices import Layout, Matrix, Section, read_layout
from virnucpro_core.recipe import EMBEDDING_WIDTH

DataType = Literal["host", "viral"]

NUCLEOTIDE_WIDTH = 768
"""Numbers per nucleotide embedding: DNABERT-S's hidden size."""

MERGED_WIDTH = NUCLEOTIDE_WIDTH + EMBEDDING_WIDTH

_LABELS = {"host": [0], "viral": [1]}


@dataclass(slots=True)
class _Chunk:
    """A chunk artifact while it is merged.

    Attributes:
        digest: sha256 of what was read so far; the file is read once, in the order of its bytes.
        fault: what is wrong with its content; reported only if its checksum is right.
    """

    path: Path
    sha256: str
    layout: Layout
    digest: hashlib._Hash
    fault: str = ""

    def read(self, section: Section) -> Iterator[memoryview]:
        start, stop = self.layout.sections()[section]
        with open_artifact(self.path) as file:
            file.seek(start)
            for block in read_blocks(file, stop - start, self.path):
                self.digest.update(block)
                yield block


def merge_chunks(chunks: Iterable[tuple[Path, str]], merged: Path) -> Written:
    """Joins a job's chunk artifacts into one matrix file.

    Each chunk is read and hashed once, 4 MiB at a time, so memory does not grow with the rows (1.3 KB are
    kept per chunk). The bytes depend on rows and metadata alone, not on how rows were cut into chunks.

    Args:
        chunks: path and sha256 of each artifact, in input order.
        merged: the file to write.

    Raises:
        ArtifactError: a chunk is missing, cut short or altered (`where` is its path), or `merged` cannot be
            written.
        MismatchError: the chunks do not belong together: different metadata or width, records not rising.
    """
    sources = [_open_chunk(path, sha256) for path, sha256 in chunks]
    if not sources:
        raise MismatchError("there is no chunk to merge", where=str(merged))
    first = sources[0].layout
    for source in sources:
        if (source.layout.width, source.layout.metadata) != (first.width, first.metadata):
            raise _unlike(sources[0], source)
    rows = sum(source.layout.rows for source in sources)
    id_bytes = sum(source.layout.id_bytes for source in sources)
    with new_file(merged) as file:
        file.write(Layout(rows, id_bytes, first.width, first.metadata).header)
        for source in sources:
            for block in source.read("ids"):
                file.write(block)
        _copy_id_offsets(sources, file)
        _copy_records(sources, file)
        for source in sources:
            for block in source.read("embeddings"):
                file.write(block)
            _check(source)
    return Written(merged, file.sha256, file.bytes, rows)


def merge_data(
    DNABERT_S_data: str | os.PathLike[str],  # noqa: N803 - the contract's names
    ESM_data: str | os.PathLike[str],  # noqa: N803
    merged_file: str | os.PathLike[str],
    data_type: DataType | None = None,
) -> Written:
    """Joins a `*_DNABERT_S.pt` and a `*_ESM.pt` file into `{'ids': [...], 'data': (n, 2048) float32}`.

    The k-th row of an id on one side meets its k-th row on the other; the order is the nucleotides'.

    Args:
        DNABERT_S_data: nucleotide embeddings, 768 numbers each.
        ESM_data: protein embeddings, 1280 numbers each.
        merged_file: the file to write.
        data_type: `host` adds `'labels': [0]`, `viral` adds `'labels': [1]`.

    Raises:
        MismatchError: an id is on one side only, or more often; the first that differs is named.
        ArtifactError: a file is not what it should be, holds NaN or Inf, or cannot be written.
        SettingsError: `data_type` is something else, or `merged_file` is one of the sides.
    """
    import torch

    check_apart(Path(merged_file), Path(DNABERT_S_data), Path(ESM_data))
    check_writable(Path(merged_file))
    nucleotides = read_nucleotides(Path(DNABERT_S_data))
    ids, rows = read_pt(Path(ESM_data))
    order = _pair(nucleotides.ids, ids, ("nucleotide", "protein"), nucleotides.path)
    proteins = np.empty((len(rows), EMBEDDING_WIDTH), np.float32)
    if rows:
        torch.stack([rows[row] for row in order], out=torch.from_numpy(proteins))
    return _write_merged(Path(merged_file), nucleotides, proteins, data_type)


def merge_features(
    nucleotides: Nucleotides,
    matrix: Matrix,
    merged_file: Path,
    *,
    records: int,
    data_type: DataType | None = None,
) -> Written:
    """As `merge_data`, from a job's merged matrix and in its order, the input's.

    Args:
        nucleotides: one row per record of the input, in its order (those of records without a protein
            embedding are left out), or one per embedding.
        matrix: the job's protein embeddings.
        merged_file: the file to write.
        records: records in the input.
        data_type: as for `merge_data`.

    Raises:
        MismatchError, ArtifactError, SettingsError: as for `merge_data`.
    """
    if len(nucleotides.ids) == records:
        nucleotides = nucleotides.select(matrix.records - 1)
    order = _pair(matrix.ids(), nucleotides.ids, ("protein", "nucleotide"), nucleotides.path)
    return _write_merged(merged_file, nucleotides.select(order), matrix.embeddings, data_type)


@dataclass(frozen=True, slots=True)
class Nucleotides:
    """The content of a `*_DNABERT_S.pt` file.

    Attributes:
        ids: one per row.
        rows: float32 (rows, 768), all finite.
    """

    path: Path
    ids: list[str]
    rows: npt.NDArray[np.float32]

    def select(self, rows: npt.NDArray[np.int64]) -> Nucleotides:
        """These rows, numbered from 0, in this order."""
        return Nucleotides(self.path, [self.ids[row] for row in rows.tolist()], self.rows[rows])


def read_nucleotides(path: Path, file: BinaryIO | None = None) -> Nucleotides:
    """Reads `{'nucleotide': [id, …], 'data': [{'label': …, 'mean_representation': [768 numbers]}, …]}`.

    Args:
        path: the file.
        file: the same, if it has been opened already; read from its start.

    Raises:
        ArtifactError: the file holds anything else, or numbers that are not finite.
    """
    content = load_pt(path, {"nucleotide", "data"}, file=file)
    ids, entries = read_strings(content["nucleotide"], path), content["data"]
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise odd_pt(path, "it does not hold one entry per id")
    rows = np.empty((len(ids), NUCLEOTIDE_WIDTH), np.float32)
    for row, name, entry in zip(rows, ids, entries, strict=True):
        numbers = entry.get("mean_representation") if isinstance(entry, dict) else None
        if not isinstance(numbers, list) or len(numbers) != NUCLEOTIDE_WIDTH:
            raise odd_pt(path, f"{name!r} has no mean_representation of {NUCLEOTIDE_WIDTH} numbers")
        try:
            with np.errstate(over="ignore"):  # too large a number becomes Inf, which is refused below
                row[:] = numbers
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            # A RuntimeError if they are tensors that ask for gradients.
            raise odd_pt(path, f"the mean_representation of {name!r} is not numbers") from error
        if not np.isfinite(row).all():
            raise odd_pt(path, f"the mean_representation of {name!r} holds NaN or Inf")
    return Nucleotides(path, ids, rows)


def _open_chunk(path: Path, sha256: str) -> _Chunk:
    with open_artifact(path) as file:
        layout = read_layout(file, path)
    return _Chunk(path, sha256, layout, hashlib.sha256(layout.header))


def _copy_id_offsets(sources: Sequence[_Chunk], file: NewFile) -> None:
    file.write(bytes(8))
    base = 0
    for source in sources:
        last = first = 0
        for block in source.read("id_offsets"):
            offsets = np.frombuffer(block, "<i8")
            if np.any(np.diff(offsets, prepend=last) < 0):
                source.fault = "its ids overlap"
            last = int(offsets[-1])
            # Each chunk's first offset, 0, is where the chunk before it ended.
            file.write((offsets[1 - first :] + base).data)
            first = 1
        if last != source.layout.id_bytes:
            source.fault = "its ids end too early or too late"
        base += source.layout.id_bytes


def _copy_records(sources: Sequence[_Chunk], file: NewFile) -> None:
    last = 0
    for source in sources:
        for block in source.read("records"):
            records = np.frombuffer(block, "<i8")
            if np.any(np.diff(records, prepend=last) <= 0):
                source.fault = f"its record numbers do not rise from {last}, where the chunk before it ended"
            last = int(records[-1])
            file.write(block)


def _unlike(source: _Chunk, other: _Chunk) -> MismatchError | ArtifactError:
    """The error for two chunks whose headers differ: one is altered, or they never belonged together."""
    for suspect in (source, other):
        if hash_file(suspect.path) != suspect.sha256:
            return _altered(suspect)
    todo = "Extract both under one recipe and one execution class."
    return MismatchError(
        f"a chunk was made in another way than {source.path}", where=str(other.path), todo=todo
    )


def _altered(source: _Chunk) -> ArtifactError:
    todo = "Have it made again, as by `virnucpro retry JOB --verify`: the other chunks are kept."
    return ArtifactError("a chunk is not as it was recorded", where=str(source.path), todo=todo)


def _check(source: _Chunk) -> None:
    if source.digest.hexdigest() != source.sha256:
        raise _altered(source)
    if source.fault:
        todo = "Give each chunk once, in input order."
        raise MismatchError(f"a chunk does not fit: {source.fault}", where=str(source.path), todo=todo)


def _write_merged(
    path: Path, nucleotides: Nucleotides, proteins: npt.NDArray[np.float32], data_type: DataType | None
) -> Written:
    if data_type is not None and data_type not in _LABELS:
        raise SettingsError(f"data_type cannot be {data_type!r}", todo="Use 'host', 'viral' or None.")
    import torch

    merged = np.concatenate([nucleotides.rows, proteins], axis=1)
    finite = np.isfinite(merged).all(axis=1)
    if not finite.all():
        what = f"the protein embedding of {nucleotides.ids[int(finite.argmin())]!r} holds NaN or Inf"
        raise ArtifactError(what, where=str(path), todo="Validate the protein file.")
    content: dict[str, object] = {"ids": nucleotides.ids, "data": torch.from_numpy(merged)}
    if data_type is not None:
        content["labels"] = _LABELS[data_type]
    with new_file(path) as file:
        save_pt(content, file)
    return Written(path, file.sha256, file.bytes, len(merged))


def _pair(
    ids: Sequence[str], others: Sequence[str], sides: tuple[str, str], where: Path
) -> npt.NDArray[np.int64]:
    """int64 (rows,): for each of `ids` the place of its partner in `others`, the k-th with the k-th."""
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for row, name in enumerate(others):
        waiting[name].append(row)
    partners = np.empty(len(ids), np.int64)
    todo = "Make both from the same records: each id must be on both sides equally often."
    for row, name in enumerate(ids):
        if not waiting.get(name):
            what = f"{sides[0]} row {row + 1}, {name!r}, has no {sides[1]} row"
            raise MismatchError(f"the two sides do not match: {what}", where=str(where), todo=todo)
        partners[row] = waiting[name].popleft()
    left = min((rows[0] for rows in waiting.values() if rows), default=None)
    if left is not None:
        what = f"{sides[1]} row {left + 1}, {others[left]!r}, has no {sides[0]} row"
        raise MismatchError(f"the two sides do not match: {what}", where=str(where), todo=todo)
    return partners
