"""What is fuzzed: each reader of bytes from outside, and what has to be true whatever the bytes are.

A target takes bytes and returns what became of them: records, or the name of one of our errors. Whatever else it
raises is a finding.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from kombu.serialization import loads as decode_content
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from tests.fasta_files import compress
from tests.pt_files import pt_bytes
from virnucpro_core.errors import VirnucproError
from virnucpro_core.features.exports import load_pt, read_pt
from virnucpro_core.features.manifests import find_faults, read_manifest, write_manifest
from virnucpro_core.features.matrices import open_matrix
from virnucpro_core.features.merging import read_nucleotides
from virnucpro_core.features.validation import validate_embeddings
from virnucpro_core.sequences import scan
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.fasta import parse_records
from workers.messages import LARGEST_ID, TASKS, RejectedMessageError, purify

RECORDS = "records"
COMPRESSIONS = list(Compression)
WIDTH = 4  # numbers in a row of the files that are fuzzed: small files find more

STORAGES = {"0": bytes(4 * WIDTH), "1": bytes(4000)}
"""Records of a `.pt` file: a row's numbers, and room for more rows."""

FREE_BYTES = 1 << 20  # a fuzzer soon finds out how to write 64 MiB

Target = Callable[[bytes, Path], str]


def check(holds: bool, what: str) -> None:
    """A promise about what was read; `assert` would not do where pytest does not rewrite it."""
    if not holds:
        raise AssertionError(what)


def damage(content: bytes, place: int, value: int) -> bytes:
    """One byte changed; none if `value` is 0."""
    if not value or not content:
        return content
    place = (place * 257) % len(content)
    return content[:place] + bytes([content[place] ^ value]) + content[place + 1 :]


def fasta(data: bytes, folder: Path) -> str:
    """A FASTA file. Three bytes say whether and how the rest is compressed, damaged and cut into chunks."""
    form, where, tokens, content = (*(data + bytes(3))[:3], data[3:])
    if form >= 64:
        content = compress(content, COMPRESSIONS[form % 4], 1 + form)
        content = damage(content, where, where if form >= 128 else 0)
    path = folder / "input"
    path.write_bytes(content)
    spool = folder / "spool"
    try:
        with patch.object(scan, "FREE_BYTES", FREE_BYTES):
            scanned = scan.scan_input(
                path, chunk_tokens=1 + tokens, truncation=7, spool_root=spool, allow_nucleotides=True
            )
        read = records = 0
        for chunk in scanned.chunks:
            batch = parse_records(
                scan.read_range(scanned.location, scanned.compression, chunk),
                first_record=chunk.first_record,
                residues="strict" if form & 1 else "unknown",
                truncation=7,
            )
            check(len(batch.ids) == chunk.records, "the chunk has its records")
            check(len(batch.rows) + len(batch.failures) == len(batch.ids), "each is a row or a failure")
            check(len(batch.tokens) == batch.offsets[-1], "tokens are a row's")
            texts = (*batch.ids, *(failure.detail for failure in batch.failures))
            check(
                all("\0" not in text and text.encode() is not None for text in texts),
                "the ledger can hold it",
            )
            read += chunk.byte_end - chunk.byte_start
            records += chunk.records
        check(records == scanned.records, "the chunks have all records")
        check(scanned.size == len(content), "all was read")
    finally:
        for copy in spool.glob("*"):
            check(copy.suffix == ".fasta", "no temporary copy is left")
            copy.unlink()
    return RECORDS


def manifest(data: bytes, folder: Path) -> str:
    """A manifest."""
    path = folder / "a.json"
    path.write_bytes(data)
    found = read_manifest(path)
    find_faults(found, folder)
    write_manifest(path, found)
    check(read_manifest(path) == found, "what is written is read")
    return RECORDS


def pt(data: bytes, folder: Path) -> str:
    """A `.pt` file. The first byte says who reads it, and whether the rest is the file or the pickle in it."""
    form, content = (data + b"\0")[0], data[1:]
    if form & 4:
        content = pt_bytes(content, STORAGES)
    path = folder / "a.pt"
    path.write_bytes(content)
    if form % 3 == 0:
        ids, rows = read_pt(path, width=WIDTH)
        validate_embeddings(ids, rows, WIDTH)
    elif form % 3 == 1:
        nucleotides = read_nucleotides(path)
        check(nucleotides.rows.shape == (len(nucleotides.ids), 768), "a row for each id")
    else:
        load_pt(path, {"ids", "data"}, optional={"labels"})
    return RECORDS


def matrix(data: bytes, folder: Path) -> str:
    """A chunk artifact."""
    path = folder / "a.safetensors"
    path.write_bytes(data)
    found = open_matrix(path, width=WIDTH)
    found.ids()
    check(found.embeddings.shape == (len(found), WIDTH), "a row for each record")
    return RECORDS


def message(data: bytes, folder: Path) -> str:
    """An item of a queue of the broker's."""
    try:
        found = loads(bytes_to_str(data))
    except Exception as error:  # noqa: BLE001 - as our transport does: whatever it is, it is not JSON
        return f"not JSON: {type(error).__name__}"
    pure = purify(found, "extract")
    check(purify(json.loads(json.dumps(pure)), "extract") == pure, "what is pure stays as it is")
    check(pure["headers"]["task"] in TASKS, "a task of ours")
    kind, encoding = pure["content-type"], pure["content-encoding"]
    body = decode_content(b64decode(pure["body"]), kind, encoding, accept={"application/json"})
    (chunk,), options, embed = body
    check(
        type(chunk) is int and 0 < chunk <= LARGEST_ID and not options and not embed, "a chunk, and no more"
    )
    return RECORDS


def control(data: bytes, folder: Path) -> str:
    """Falls over what is easily found: proves that a finding is noticed."""
    return str(1 // (len(data) - 3))


TARGETS: dict[str, Target] = {
    "fasta": fasta,
    "manifest": manifest,
    "pt": pt,
    "matrix": matrix,
    "message": message,
}
"""By name; the name is that of the folder of its corpus, too."""


def run(target: Target, data: bytes, folder: Path) -> str:
    """What became of an input.

    Raises:
        Exception: a finding.
    """
    try:
        return target(data, folder)
    except (VirnucproError, RejectedMessageError) as error:
        check(len(str(error)) < 5000, "an error can be read")
        return type(error).__name__
