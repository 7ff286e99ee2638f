"""Compressed FASTA: told apart by magic bytes, decoded as a stream, never trusted to be whole."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import BinaryIO, Protocol

import zstandard

from virnucpro_core.errors import InputError

BLOCK_BYTES = 1 << 20
"""Bytes read from disk at a time: fits a core's cache, which the scan passes over several times."""

_COPY_AGAIN = "Copy or download the file again, or compress it anew."
_BGZIP_LARGEST = 1 << 16
_GZIP_PIECE = 1 << 17
_ZSTD_PIECE = 1 << 10
_ZSTD_LARGEST_WINDOW = 1 << 27


class Compression(StrEnum):
    PLAIN = "plain"
    GZIP = "gzip"
    BGZIP = "bgzip"
    ZSTD = "zstd"


class Decoder(Protocol):
    """Turns the bytes of a file into the bytes of FASTA, holding a bounded part of either."""

    def decode(self, raw: bytes) -> Iterator[bytes]:
        """Yields what `raw`, the next bytes of the file, decodes to.

        Raises:
            InputError: the stream is corrupt; `where` is the offset in the file, without the file.
        """
        ...

    def finish(self) -> None:
        """Checks that the stream may end here.

        Raises:
            InputError: the stream is cut off.
        """
        ...


def detect_compression(head: bytes) -> Compression:
    """Tells a file's compression by its first bytes (18 are enough), never by its name."""
    if head[:2] == b"\x1f\x8b":
        return Compression.GZIP if _read_bgzip_size(head) is None else Compression.BGZIP
    is_skippable_frame = head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5
    return Compression.ZSTD if head[:4] == b"\x28\xb5\x2f\xfd" or is_skippable_frame else Compression.PLAIN


def make_decoder(compression: Compression) -> Decoder:
    match compression:
        case Compression.PLAIN:
            return PlainDecoder()
        case Compression.GZIP:
            return GzipDecoder()
        case Compression.BGZIP:
            return BgzipDecoder()
        case Compression.ZSTD:
            return ZstdDecoder()


def read_blocks(
    file: BinaryIO, decoder: Decoder, on_raw: Callable[[bytes], None], *, max_bytes: float = math.inf
) -> Iterator[bytes]:
    """Yields the decoded bytes of an open file in blocks of about `BLOCK_BYTES`.

    Every decoded byte of every input passes here, and only here are the bytes read and the bytes made of them
    both at hand.

    Args:
        on_raw: called with each piece of the file as it lies on disk.
        max_bytes: decoded bytes at most.

    Raises:
        InputError: the stream is corrupt, cut off, or unpacks too far; `where` is the offset in the file,
            without the file.
    """
    held: list[bytes] = []
    held_bytes = raw_bytes = decoded_bytes = 0
    fault = None
    try:
        while raw := file.read(BLOCK_BYTES):
            on_raw(raw)
            raw_bytes += len(raw)
            for piece in decoder.decode(raw):
                decoded_bytes += len(piece)
                if decoded_bytes > max_bytes:
                    raise _unpacks_too_far(max_bytes, raw_bytes)
                held.append(piece)
                held_bytes += len(piece)
                if held_bytes >= BLOCK_BYTES:
                    yield b"".join(held)
                    held, held_bytes = [], 0
        decoder.finish()
    except InputError as error:
        fault = error
    # What came before a fault is passed on first: the reader can then tell the line that the fault is in.
    if held_bytes:
        yield b"".join(held)
    if fault is not None:
        raise fault


class PlainDecoder:
    def decode(self, raw: bytes) -> Iterator[bytes]:
        yield raw

    def finish(self) -> None:
        pass


class GzipDecoder:
    """Gzip with any number of members, and zeros behind them, as tape and block devices leave."""

    def __init__(self) -> None:
        self._offset = 0
        self._member: zlib._Decompress | None = None

    def decode(self, raw: bytes) -> Iterator[bytes]:
        # A member's end copies what is left of a piece: thousands of tiny members must not copy a megabyte each.
        for begin in range(0, len(raw), _GZIP_PIECE):
            yield from self._decode_piece(raw[begin : begin + _GZIP_PIECE])

    def _decode_piece(self, raw: bytes) -> Iterator[bytes]:
        begin = self._offset
        self._offset += len(raw)
        first_member = begin == 0
        while raw:
            if self._member is None:
                raw = raw if first_member else raw.lstrip(b"\0")
                if not raw:
                    return
                self._member = zlib.decompressobj(wbits=31)
                first_member = False
            try:
                piece = self._member.decompress(raw, BLOCK_BYTES)
            except zlib.error as error:
                raise _corrupt("gzip", str(error), self._offset - len(raw)) from error
            if self._member.eof:
                raw, self._member = self._member.unused_data, None
            else:
                raw = self._member.unconsumed_tail
            yield piece

    def finish(self) -> None:
        if self._member is not None:
            raise _cut_off("gzip", self._offset)


class ZstdDecoder:
    """Zstandard with any number of frames and windows up to 128 MiB (what `zstd -d` accepts unasked)."""

    def __init__(self) -> None:
        self._offset = 0
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_LARGEST_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def decode(self, raw: bytes) -> Iterator[bytes]:
        # Four bytes can stand for a block of 128 KiB, and the library returns all that a piece decodes to at
        # once: small pieces bound it at 32 MiB. Its bounded reader cannot tell a cut-off frame.
        for begin in range(0, len(raw), _ZSTD_PIECE):
            piece = raw[begin : begin + _ZSTD_PIECE]
            while piece:
                if self._frame is None:
                    self._frame = self._decompressor.decompressobj()
                try:
                    decoded = self._frame.decompress(piece)
                except zstandard.ZstdError as error:
                    if "too much memory" in str(error):
                        raise _wide_window(self._offset + begin) from error
                    raise _corrupt("zstd", str(error), self._offset + begin) from error
                piece = b""
                if self._frame.eof:
                    piece, self._frame = self._frame.unused_data, None
                if decoded:
                    yield decoded
        self._offset += len(raw)

    def finish(self) -> None:
        if self._frame is not None:
            raise _cut_off("zstd", self._offset)


class BgzipDecoder:
    """Bgzip (the SAM specification's BGZF): gzip members of at most 64 KiB that can be entered one by one.

    Args:
        offset: offset in the file of the first block that will be decoded.
    """

    def __init__(self, offset: int = 0) -> None:
        self._offset = offset
        self._held = b""
        self._decoded = 0
        self._block_starts: list[int] = []
        self._block_offsets: list[int] = []
        self._ended = False

    def decode(self, raw: bytes) -> Iterator[bytes]:
        self._held += raw
        begin = 0
        while (header := self._held[begin : begin + 18]) and len(header) == 18:
            size = _read_bgzip_size(header)
            if size is None:
                raise _corrupt("bgzip", "here begins no bgzip block", self._offset)
            if begin + size > len(self._held):
                break
            decoded = self._decode_block(self._held[begin : begin + size])
            self._block_starts.append(self._decoded)
            self._block_offsets.append(self._offset)
            self._decoded += len(decoded)
            self._offset += size
            self._ended = not decoded
            begin += size
            yield decoded
        self._held = self._held[begin:]

    def _decode_block(self, block: bytes) -> bytes:
        inflate = zlib.decompressobj(wbits=31)
        try:
            decoded = inflate.decompress(block, _BGZIP_LARGEST)
        except zlib.error as error:
            raise _corrupt("bgzip", str(error), self._offset) from error
        if not inflate.eof or inflate.unused_data:
            raise _corrupt("bgzip", "a block and its stated size differ", self._offset)
        return decoded

    def finish(self) -> None:
        # Only the empty block that ends every bgzip file tells a whole file from one cut between blocks.
        if self._held or not self._ended:
            raise _cut_off("bgzip", self._offset)

    def find_virtual_offset(self, position: int) -> int:
        """Returns a decoded byte's virtual offset: its block's offset in the file << 16 | that in the block.

        Positions must not fall from call to call: what lies before is forgotten.
        """
        block = bisect_right(self._block_starts, position) - 1
        del self._block_starts[:block], self._block_offsets[:block]
        return self._block_offsets[0] << 16 | (position - self._block_starts[0])


def _read_bgzip_size(head: bytes) -> int | None:
    """Returns the size in bytes of the bgzip block that `head` begins, or None if it begins none."""
    # htslib, too, takes a member for a block of bgzip only when BC is its first and single extra field.
    is_gzip_with_extra = head[:3] == b"\x1f\x8b\x08" and len(head) >= 18 and head[3] & 4
    if is_gzip_with_extra and head[10:16] == b"\x06\x00BC\x02\x00":
        return int.from_bytes(head[16:18], "little") + 1
    return None


def _corrupt(name: str, why: str, offset: int) -> InputError:
    return InputError(
        f"the {name} stream is corrupt: {why}", where=f"byte {offset} of the file", todo=_COPY_AGAIN
    )


def _unpacks_too_far(limit: float, offset: int) -> InputError:
    return InputError(
        f"the file unpacks to more than {limit:,.0f} bytes, too many for its size",
        where=f"byte {offset} of the file",
        todo="If it holds what it should, unpack it first, or raise VIRNUCPRO_MAX_EXPANSION.",
    )


def _wide_window(offset: int) -> InputError:
    return InputError(
        f"the zstd stream asks for a window of more than {_ZSTD_LARGEST_WINDOW >> 20} MiB",
        where=f"byte {offset} of the file",
        todo="Unpack it first, or compress it anew with a smaller window (`zstd` without `--long`).",
    )


def _cut_off(name: str, offset: int) -> InputError:
    return InputError(f"the {name} stream is cut off", where=f"byte {offset} of the file", todo=_COPY_AGAIN)
