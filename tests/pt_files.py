"""`.pt` files made by hand: torch would not write them, and should not have to read them."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path


class Payload:
    """Something that makes a folder when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.witness),)


def text(value: str) -> bytes:
    """Pickles text."""
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def number(value: int) -> bytes:
    """Pickles a number of 32 bits."""
    return b"J" + value.to_bytes(4, "little", signed=True)


def call(name: str, arguments: bytes) -> bytes:
    """Pickles a call of `module.name` with a tuple's content."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(".encode() + arguments + b"tR"


def tensor(key: str, numel: int, size: int, stride: int = 1, *, offset: int = 0) -> bytes:
    """Pickles a one-dimensional float32 tensor over the storage in record `data/<key>`."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel)
    view = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85"
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage + b"tQ" + view + b"\x89" + call("collections.OrderedDict", b""),
    )


def listed(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + b"e"


def mapped(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def pt_bytes(pickle: bytes, records: dict[str, bytes] | None = None, *, compression: int = 0) -> bytes:
    """An archive as `torch.save` lays it out, with this pickle and these storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for key, record in (records or {}).items():
            archive.writestr(f"archive/data/{key}", record)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def write_export_by_hand(path: Path, row: bytes, records: dict[str, bytes]) -> None:
    """An export of one row, with anything for a tensor."""
    content = mapped(proteins=listed(text("a")), data=listed(row))
    path.write_bytes(pt_bytes(pickled(content), records))
