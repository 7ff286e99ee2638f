"""What fuzzing starts from: sound inputs of every kind, and ways to spoil them."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fasta_files import compress, messy_fasta
from tests.fuzz.targets import COMPRESSIONS, STORAGES, WIDTH, damage
from tests.pt_files import call, listed, mapped, number, pickled, pt_bytes, tensor, text
from virnucpro_core.failures import FailureReason
from virnucpro_core.features.manifests import Counts, Manifest, ResultFile, write_manifest
from virnucpro_core.features.matrices import write_matrix
from virnucpro_core.recipe import Recipe
from workers.messages import TASKS

FASTA = b">a one\nMKLV\nMK*\n>b\r\nLL L\r\n\n>c\xc3\xa9\nVV1\n>\nM\n"

MANIFEST = Manifest(
    input_name="a.fasta",
    input_sha256="1" * 64,
    recipe=Recipe(weights_sha256="2" * 64, token_dropout=True, dtype="float16"),
    execution={"torch": "2", "shapes": [[1, 128]]},
    counts=Counts(
        records=3,
        embeddings=2,
        failures={FailureReason.EMPTY: 1},
        residues=9,
        tokens=13,
        truncated=0,
        unknown=0,
    ),
    files=(ResultFile("a.pt", "3" * 64, 10, 2),),
    versions={"python": "3.11.7"},
)

ENVELOPE = {
    "body": base64.b64encode(b'[[1], {}, {"callbacks": null, "chord": null}]').decode(),
    "content-type": "application/json",
    "content-encoding": "utf-8",
    "headers": {"lang": "py", "task": "virnucpro.extract", "id": "7", "argsrepr": "job 1", "eta": None},
    "properties": {
        "delivery_tag": "8",
        "delivery_info": {"exchange": "", "routing_key": "extract"},
        "body_encoding": "base64",
    },
}

ROW = tensor("0", WIDTH, WIDTH)
ENTRY = mapped(label=text(""), mean_representation=listed(*[b"K\x01"] * 768))
PICKLES = [
    mapped(proteins=listed(text("a")), data=listed(ROW)),
    mapped(nucleotide=listed(text("a")), data=listed(ENTRY)),
    mapped(ids=listed(text("a")), data=ROW, labels=listed(b"K\x00")),
]
"""A pickle for each reader of `.pt` files."""


def written(write: Callable[[Path], object]) -> bytes:
    """The bytes of a file that a function writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        write(path)
        return path.read_bytes()


MATRIX = written(
    partial(
        write_matrix,
        ids=["a", "bcd"],
        records=np.array([1, 3]),
        embeddings=np.ones((2, WIDTH), np.float32),
        metadata={"recipe": "{}"},
    )
)
MANIFEST_BYTES = written(partial(write_manifest, manifest=MANIFEST))

SEEDS: dict[str, list[bytes]] = {
    "fasta": [
        *(
            bytes([form, where, 9]) + FASTA
            for form in (0, 1, 64, 65, 66, 67, 129, 130, 131)
            for where in (0, 5)
        ),
        *(bytes([0, 0, 9]) + compress(FASTA, compression) for compression in COMPRESSIONS),
    ],
    "manifest": [MANIFEST_BYTES],
    "pt": [
        *(bytes([form]) + pickled(content) for form, content in zip((6, 4, 5), PICKLES, strict=True)),
        *(bytes([form]) + pt_bytes(pickled(content), STORAGES) for form, content in enumerate(PICKLES)),
    ],
    "matrix": [MATRIX],
    "message": [json.dumps(ENVELOPE).encode()],
    "control": [b"abcdef"],
}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", ".", "..", "a/b", "\0", "\ud800", 2**63, 10**30, *sorted(TASKS)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def spoilt(draw: st.DrawFn, sound: dict[str, Any]) -> bytes:
    """A JSON object with a few of its values replaced, left out or added."""
    content = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(0, 3))):
        place = content
        while isinstance(place, dict) and place:
            name = draw(st.sampled_from(sorted(place)))
            if not isinstance(place[name], dict) or draw(st.booleans()):
                break
            place = place[name]
        if isinstance(place, dict):
            name = draw(st.sampled_from([*sorted(place), "new"]))
            if draw(st.booleans()):
                place[name] = draw(json_values)
            else:
                place.pop(name, None)
    return json.dumps(content).encode()


@st.composite
def damaged(draw: st.DrawFn, sound: list[bytes]) -> bytes:
    """A sound input, cut short or with some bytes changed."""
    content = draw(st.sampled_from(sound))
    for _ in range(draw(st.integers(0, 4))):
        content = damage(content, draw(st.integers(0, 255)), draw(st.integers(0, 255)))
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


fragments = st.sampled_from(
    [
        *PICKLES,
        ROW,
        ENTRY,
        tensor("0", WIDTH, 2**20),
        tensor("0", 2**20, WIDTH),
        tensor("1", WIDTH, WIDTH),
        call("collections.OrderedDict", b""),
        call("builtins.bytearray", number(2**30)),
        call("os.system", text("true")),
        text("a"),
        number(-1),
        *(bytes([opcode]) for opcode in b"(.]})aeutq\x85\x86\x87h\x00QRbNKJGX\x81\x88\x89s"),
    ]
)


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Instructions of a pickle in any order, for any reader."""
    body = b"".join(draw(st.lists(fragments, max_size=12)))
    return bytes([draw(st.integers(0, 255)) | 4]) + pickled(body)


STRATEGIES: dict[str, st.SearchStrategy[bytes]] = {
    "fasta": st.builds(
        lambda head, body: head + body, st.binary(min_size=3, max_size=3), messy_fasta | st.binary()
    )
    | damaged(SEEDS["fasta"]),
    "manifest": spoilt(json.loads(MANIFEST_BYTES)) | damaged(SEEDS["manifest"]),
    "pt": pickles() | damaged(SEEDS["pt"]),
    "matrix": damaged(SEEDS["matrix"]) | st.binary(),
    "message": spoilt(ENVELOPE)
    | damaged(SEEDS["message"])
    | json_values.map(lambda v: json.dumps(v).encode()),
    "control": st.binary(max_size=8),
}
