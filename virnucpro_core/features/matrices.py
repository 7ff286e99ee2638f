"""Matrices: float32 embeddings with their ids and record numbers, one safetensors file each.

The file is what the safetensors library reads: eight bytes of header length, a JSON header, then the tensors

    ids         uint8 (id_bytes,)     all ids in UTF-8, one after the other
    id_offsets  int64 (rows + 1,)     where each id starts in `ids`, and where the last one ends
    records     int64 (rows,)         each row's record number in its input, from 1, rising
    embeddings  float32 (rows, width)

in this order, so that a merge can copy the small ones first and hash each byte once. Numbers are
little-endian. Spaces after the header align `id_offsets`, and all that follows it, to eight bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from virnucpro_core.errors import ArtifactError, MismatchError
from virnucpro_core.features.files import Written, new_file, open_artifact, read_blocks, reading
from virnucpro_core.recipe import EMBEDDING_WIDTH

Section = Literal["ids", "id_offsets", "records", "embeddings"]

_MAX_HEADER = 1 << 20
"""Header bytes that are believed; ours have about a kilobyte."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a matrix file's header says; everything else about the file follows from it.

    Attributes:
        rows: embeddings in the file.
        id_bytes: length of all ids together.
        width: numbers per embedding.
        metadata: what made the embeddings (recipe, execution class): the same for all chunks of a job.
    """

    rows: int
    id_bytes: int
    width: int
    metadata: Mapping[str, str]

    @property
    def header(self) -> bytes:
        """The file's first bytes, up to its first tensor."""
        header: dict[str, object] = {"__metadata__": dict(self.metadata)}
        start = 0
        for name, dtype, shape, size in self._tensors():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
            start += size
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text) + self.id_bytes) % 8)
        return len(text).to_bytes(8, "little") + text

    def sections(self) -> dict[Section, tuple[int, int]]:
        """Where each tensor's bytes start and end in the file, in the order of the file."""
        start = len(self.header)
        places: dict[Section, tuple[int, int]] = {}
        for name, _, _, size in self._tensors():
            places[name] = (start, start + size)
            start += size
        return places

    def _tensors(self) -> list[tuple[Section, str, list[int], int]]:
        return [
            ("ids", "U8", [self.id_bytes], self.id_bytes),
            ("id_offsets", "I64", [self.rows + 1], 8 * (self.rows + 1)),
            ("records", "I64", [self.rows], 8 * self.rows),
            ("embeddings", "F32", [self.rows, self.width], 4 * self.rows * self.width),
        ]


class Matrix:
    """A matrix file mapped into memory: rows are read from disk as they are used.

    Attributes:
        path: the file.
        records: int64 (rows,), each row's record number, from 1, rising. Read-only.
        embeddings: float32 (rows, width). Read-only.
        metadata: what made the embeddings.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.metadata = layout.metadata
        data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        part = {name: data[start:stop] for name, (start, stop) in layout.sections().items()}
        self._ids: npt.NDArray[np.uint8] = part["ids"]
        self._id_offsets: npt.NDArray[np.int64] = part["id_offsets"].view("<i8")
        self.records: npt.NDArray[np.int64] = part["records"].view("<i8")
        shape = layout.rows, layout.width
        self.embeddings: npt.NDArray[np.float32] = part["embeddings"].view("<f4").reshape(shape)

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """A copy of some rows, float32 (k, width), read one by one: a touched map reads what lies around, too.

        Raises:
            ArtifactError: the file is gone, or cut short.
        """
        taken = np.empty((len(rows), self.embeddings.shape[1]), dtype="<f4")
        with open_artifact(self.path) as file:
            start, _ = read_layout(file, self.path).sections()["embeddings"]
            for row, into in zip(rows.tolist(), taken, strict=True):
                file.seek(start + row * into.nbytes)
                for block in read_blocks(file, into.nbytes, self.path):
                    into[:] = np.frombuffer(block, "<f4")
        return taken

    def ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The ids of rows `start` to `stop`.

        Raises:
            ArtifactError: they are not text: the file was altered.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        if start >= stop:
            return []
        offsets = self._id_offsets[start : stop + 1].tolist()
        first = offsets[0]
        text = self._ids[first : offsets[-1]].tobytes()
        try:
            return [text[a - first : b - first].decode() for a, b in pairwise(offsets)]
        except UnicodeDecodeError as error:
            raise _altered(self.path, "its ids are not text") from error


def write_matrix(
    path: Path,
    ids: Sequence[str],
    records: npt.NDArray[np.int64],
    embeddings: npt.NDArray[np.float32],
    metadata: Mapping[str, str],
) -> Written:
    """Writes a matrix file in one step; equal arguments give equal bytes.

    Args:
        path: the file's final name; missing folders are made.
        ids: one per row.
        records: int64 (rows,), rising, from 1.
        embeddings: float32 (rows, width).
        metadata: what made the embeddings. `merge_chunks` joins only chunks whose metadata are equal.

    Raises:
        MismatchError: the arrays do not belong together.
        ArtifactError: the file cannot be written.
    """
    rows = len(ids)
    if embeddings.dtype != np.float32 or embeddings.ndim != 2 or records.dtype != np.int64:
        got = f"{embeddings.dtype} {embeddings.shape} and {records.dtype} {records.shape}"
        raise MismatchError(f"a matrix takes float32 rows and int64 records, not {got}", where=str(path))
    if records.shape != (rows,) or len(embeddings) != rows:
        got = f"{rows} ids, {records.shape} record numbers, {len(embeddings)} rows"
        raise MismatchError(f"a matrix needs one id and one record per row, not {got}", where=str(path))
    if np.any(np.diff(records, prepend=0) <= 0):
        todo = "Sort the rows into input order."
        raise MismatchError("record numbers must rise from 1", where=str(path), todo=todo)
    encoded = [text.encode() for text in ids]
    offsets = np.fromiter(accumulate(map(len, encoded), initial=0), dtype="<i8", count=rows + 1)
    layout = Layout(rows, int(offsets[-1]), embeddings.shape[1], metadata)
    with new_file(path) as file:
        file.write(layout.header)
        file.write(b"".join(encoded))
        file.write(offsets.data)
        file.write(np.ascontiguousarray(records, dtype="<i8").data)
        file.write(np.ascontiguousarray(embeddings, dtype="<f4").data)
    return Written(path, file.sha256, file.bytes, rows)


def open_matrix(path: Path, *, width: int = EMBEDDING_WIDTH) -> Matrix:
    """Maps a matrix file after checking its header and size, not its checksum.

    Raises:
        ArtifactError: it is missing, cut short, of another width, or not a matrix file of ours.
    """
    with open_artifact(path) as file:
        layout = read_layout(file, path)
    if layout.width != width:
        raise _altered(path, f"its rows hold {layout.width} numbers, not {width}")
    with reading(path):
        return Matrix(path, layout)


def read_layout(file: BufferedReader, path: Path) -> Layout:
    """Reads a matrix file's header and leaves `file` at the first tensor.

    Raises:
        ArtifactError: the header is not as `write_matrix` writes it, or the file's size not what it says.
    """
    with reading(path):
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, _MAX_HEADER):
        raise _altered(path, "it does not start with a header")
    text = b"".join(map(bytes, read_blocks(file, length, path)))
    try:
        header = json.loads(text)
        rows, width = header["embeddings"]["shape"]
        (id_bytes,) = header["ids"]["shape"]
        metadata = header["__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _altered(path, "its header makes no sense") from error
    sizes_are_counts = all(type(count) is int and 0 <= count < 1 << 60 for count in (rows, id_bytes, width))
    if not sizes_are_counts or not _is_text_map(metadata):
        raise _altered(path, "its header makes no sense")
    layout = Layout(rows, id_bytes, width, metadata)
    # The one header for these sizes is known to the byte, so nothing else in it needs a check of its own.
    if layout.header[8:] != text:
        raise _altered(path, "its header is not one of ours")
    expected = layout.sections()["embeddings"][1]
    if size != expected:
        raise _altered(path, f"it has {size} bytes where its header says {expected}")
    return layout


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _altered(path: Path, why: str) -> ArtifactError:
    todo = "Have it made again, as by `virnucpro retry JOB --verify`."
    return ArtifactError(f"not a matrix file as it was written: {why}", where=str(path), todo=todo)
