"""One pass over a FASTA file: its checksum, its counts, and the chunks it is worked on in."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from virnucpro_core.errors import InputChangedError, InputError
from virnucpro_core.recipe import TRUNCATION
from virnucpro_core.roots import ANYWHERE, open_below, resolve_below
from virnucpro_core.sequences.chunks import ChunkCutter, ChunkRange
from virnucpro_core.sequences.compression import (
    BgzipDecoder,
    Compression,
    detect_compression,
    make_decoder,
    read_blocks,
)
from virnucpro_core.sequences.content import check_content
from virnucpro_core.sequences.hashing import HashThread
from virnucpro_core.sequences.spool import SpooledCopy
from virnucpro_core.sizes import MAX_EXPANSION

__all__ = ["ChunkRange", "ScannedInput", "read_range", "scan_input"]

FREE_BYTES = 64 << 20
"""Bytes that any input may unpack to, however small it is: small files of few different letters unpack far."""

_REGISTER_AGAIN = "Register the file again."


@dataclass(frozen=True, slots=True)
class ScannedInput:
    """What registration knows of an input.

    Attributes:
        path: absolute path of the file.
        sha256: of the file as it lies on disk.
        size: bytes on disk.
        compression: how the file is compressed.
        location: absolute path of the file to read ranges from: `path`, or its spooled copy.
        records: records in the file, good or bad.
        residues: their residues before truncation.
        chunks: consecutive ranges that hold every record once.
    """

    path: str
    sha256: str
    size: int
    compression: Compression
    location: str
    records: int
    residues: int
    chunks: tuple[ChunkRange, ...]


def scan_input(
    path: str | Path,
    *,
    chunk_tokens: int,
    spool_root: Path | None,
    roots: Sequence[Path] = ANYWHERE,
    max_expansion: float = MAX_EXPANSION,
    truncation: int = TRUNCATION,
    allow_nucleotides: bool = False,
    on_progress: Callable[[int], None] | None = None,
    on_block: Callable[[bytes], None] | None = None,
) -> ScannedInput:
    """Reads a FASTA file once, in memory that does not grow with it.

    Args:
        path: plain, gzip, bgzip or zstd FASTA; bytes decide, not the name.
        chunk_tokens: tokens of a chunk at most; a record that has more is a chunk alone.
        spool_root: folder where gzip and zstd inputs get an uncompressed copy; None for no copy, where nobody will
            read ranges of the input.
        roots: folders that the file must lie below, wherever its path leads.
        max_expansion: how many times its own size a compressed file may unpack to.
        truncation: residues of a record that count as tokens.
        allow_nucleotides: take nucleotides for proteins.
        on_progress: called with the bytes read from disk so far.
        on_block: called with the uncompressed bytes, block by block.

    Raises:
        OutsideError: the file lies below none of the roots.
        InputError: the file as a whole cannot be used; names file and line. A bad record raises nothing.
        NucleotideInputError: it holds nucleotides.
        InputChangedError: it was written to during the scan.
        ArtifactError: the spool cannot be written.
    """
    path = Path(path).absolute()
    with ExitStack() as stack:
        file = stack.enter_context(_open_input(path, roots))
        before = os.fstat(file.fileno())
        compression = _find_compression(file, path)
        copy = None
        if spool_root is not None and compression in (Compression.GZIP, Compression.ZSTD):
            copy = stack.enter_context(SpooledCopy(spool_root))
        hashes = stack.enter_context(HashThread())
        digest = hashlib.sha256()

        def take_raw(raw: bytes) -> None:
            hashes.update(digest, raw)
            if on_progress is not None:
                on_progress(file.tell())

        decoder = make_decoder(compression)
        cutter = ChunkCutter(
            chunk_tokens=chunk_tokens,
            truncation=truncation,
            hashes=hashes,
            find_virtual_offset=decoder.find_virtual_offset if isinstance(decoder, BgzipDecoder) else None,
        )
        max_bytes = max(FREE_BYTES, max_expansion * before.st_size)
        blocks = _name_faults(read_blocks(file, decoder, take_raw, max_bytes=max_bytes), path, cutter)
        head = next(blocks, b"")
        if not head:
            raise InputError(
                "the file is empty", where=f"{path}, line 1", todo="Give a file that has records."
            )
        check_content(head, path=path, allow_nucleotides=allow_nucleotides)
        for block in chain([head], blocks):
            if copy is not None:
                copy.write(block)
            cutter.feed(block)
            if on_block is not None:
                on_block(block)
        chunks = cutter.finish()
        sha256 = hashes.hexdigest(digest).result()
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InputChangedError(
                "the file was written to during the scan", where=str(path), todo=_REGISTER_AGAIN
            )
        return ScannedInput(
            path=str(path),
            sha256=sha256,
            size=after.st_size,
            compression=compression,
            location=str(copy.keep(sha256) if copy else path),
            records=sum(chunk.records for chunk in chunks),
            residues=sum(chunk.residues for chunk in chunks),
            chunks=chunks,
        )


def read_range(
    location: str | Path, compression: Compression, chunk: ChunkRange, *, roots: Sequence[Path] = ANYWHERE
) -> bytes:
    """Reads the uncompressed bytes of a chunk, and checks that they are those that were registered.

    Args:
        location: `ScannedInput.location`.
        compression: `ScannedInput.compression`.
        roots: folders that the location must lie below, wherever its path leads.

    Raises:
        InputChangedError: they are not.
        OutsideError: the location lies below none of the roots.
        InputError: they cannot be read at the moment; the file system may come back.
    """
    length = chunk.byte_end - chunk.byte_start
    where = f"{location}, records {chunk.first_record} to {chunk.first_record + chunk.records - 1}"
    try:
        with open_below(Path(location), roots) as file:
            if compression is Compression.BGZIP:
                data = _read_bgzip(file, chunk.virtual_start, length)
            else:
                # What is not there is not asked for: memory for it would be taken first.
                length = min(length, max(0, os.fstat(file.fileno()).st_size - chunk.byte_start))
                file.seek(chunk.byte_start)
                data = file.read(length)
    except OSError as error:
        raise InputError(
            f"the input cannot be read: {error.strerror}",
            where=where,
            todo="Mount its file system here or make it readable, then retry; or register the file again.",
        ) from error
    if hashlib.sha256(data).hexdigest() != chunk.sha256:
        raise InputChangedError("the input was changed after registration", where=where, todo=_REGISTER_AGAIN)
    return data


def _read_bgzip(file: BinaryIO, virtual_start: int | None, length: int) -> bytes:
    if virtual_start is None:
        raise ValueError("a chunk of a bgzip input has a virtual offset")
    first_block, within = virtual_start >> 16, virtual_start & 0xFFFF
    file.seek(first_block)
    data = bytearray()
    try:
        for block in read_blocks(file, BgzipDecoder(first_block), lambda _: None):
            data += block
            if len(data) >= within + length:
                break
    except InputError as error:
        raise InputChangedError(error.what, where=error.where, todo=_REGISTER_AGAIN) from error
    return bytes(data[within : within + length])


def _open_input(path: Path, roots: Sequence[Path]) -> BinaryIO:
    """Opens a regular file below one of the roots.

    Raises:
        OutsideError: it lies below none of them.
        InputError: there is none, or it cannot be opened.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "the file's name is not UTF-8", where=repr(str(path)), todo="Rename the file."
        ) from error
    try:
        mode = resolve_below(path, roots).stat().st_mode
        if stat.S_ISDIR(mode):
            os.scandir(path).close()  # where it cannot be read, that is what to mend
            raise InputError("this is a folder, not a file", where=str(path), todo="Name the files in it.")
        if not stat.S_ISREG(mode):
            raise InputError(
                "this is not a regular file", where=str(path), todo="Write the FASTA to a file first."
            )
        return open_below(path, roots)
    except FileNotFoundError as error:
        raise InputError("there is no such file", where=str(path), todo="Check the path.") from error
    except OSError as error:
        raise InputError(
            f"the file cannot be opened: {error.strerror}", where=str(path), todo="Check its permissions."
        ) from error


def _find_compression(file: BinaryIO, path: Path) -> Compression:
    try:
        head = file.read(18)
        file.seek(0)
    except OSError as error:
        raise _failing_disk(error, path, line=1) from error
    return detect_compression(head)


def _name_faults(blocks: Iterator[bytes], path: Path, cutter: ChunkCutter) -> Iterator[bytes]:
    """Passes blocks on; a fault of reading them gets the file and the line that the cutter is in."""
    try:
        yield from blocks
    except InputError as error:
        where = f"{path}, line {cutter.line}, {error.where}"
        raise InputError(error.what, where=where, todo=error.todo) from error
    except OSError as error:
        raise _failing_disk(error, path, line=cutter.line) from error


def _failing_disk(error: OSError, path: Path, *, line: int) -> InputError:
    return InputError(
        f"the file cannot be read: {error.strerror}",
        where=f"{path}, line {line}",
        todo="Check the disk that the file is on.",
    )
