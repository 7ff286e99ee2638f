"""Files made to do harm: nothing in them runs, none takes memory without end, each ends in one of our errors."""

from __future__ import annotations

import io
import json
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pt_files import (
    Payload,
    call,
    listed,
    mapped,
    number,
    pickled,
    pt_bytes,
    tensor,
    text,
    write_export_by_hand,
)
from virnucpro_core import extract_fast_esm, merge_data
from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.exports import read_pt, write_pt
from virnucpro_core.features.files import Written, hash_file
from virnucpro_core.features.manifests import Counts, Manifest, ResultFile, read_manifest, write_manifest
from virnucpro_core.features.matrices import open_matrix, write_matrix
from virnucpro_core.features.merging import read_nucleotides
from virnucpro_core.features.validation import validate_export, validate_merged
from virnucpro_core.recipe import Recipe

pytestmark = pytest.mark.unit

ROW = np.ones((1, 1280), np.float32)


def as_torch_saves(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def as_old_torch_saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def as_a_zip_of_our_own(content: object) -> bytes:
    return pt_bytes(pickle.dumps(content, protocol=2))


FORMATS = [as_torch_saves, as_old_torch_saved, as_a_zip_of_our_own, pickle.dumps]


def merge_it_as_proteins(path: Path) -> None:
    merge_data(sound_nucleotides(path.parent), path, path.with_name("merged.pt"))


def merge_it_as_nucleotides(path: Path) -> None:
    merge_data(path, sound_export(path.parent), path.with_name("merged.pt"))


def read_it_as_a_submissions_nucleotides(path: Path) -> None:
    with path.open("rb") as file:
        read_nucleotides(path, file)


def validate_it_as_an_export(path: Path) -> None:
    told = validate_export(
        [Written(path, hash_file(path), path.stat().st_size, 1)], sound_matrix(path.parent)
    )
    raise ArtifactError(*told)


def validate_it_as_merged(path: Path) -> None:
    told = validate_merged(Written(path, hash_file(path), path.stat().st_size, 1), sound_matrix(path.parent))
    raise ArtifactError(*told)


def resume_from_it(path: Path) -> None:
    """`extract_fast_esm` finds a manifest that vouches for the file."""
    fasta = vouch_for(path, Path(f"{path}.json"))
    extract_fast_esm(fasta, path)


def vouch_for(path: Path, manifest_path: Path) -> Path:
    """Write a sound manifest for an export; returns the input that it names."""
    fasta = path.with_name("in.fasta")
    fasta.write_text(">a\nMKV\n")
    file = ResultFile(path.name, hash_file(path), path.stat().st_size, 1)
    recipe = Recipe(weights_sha256="1" * 64, token_dropout=True, dtype="float32")
    counts = Counts(records=1, embeddings=1, failures={}, residues=3, tokens=5, truncated=0, unknown=0)
    manifest = Manifest(
        input_name="in.fasta",
        input_sha256=hash_file(fasta),
        recipe=recipe,
        execution={},
        counts=counts,
        files=(file,),
        versions={},
    )
    write_manifest(manifest_path, manifest)
    return fasta


READERS = [
    read_pt,
    merge_it_as_proteins,
    merge_it_as_nucleotides,
    read_it_as_a_submissions_nucleotides,
    validate_it_as_an_export,
    validate_it_as_merged,
    resume_from_it,
]


def sound_export(folder: Path) -> Path:
    write_pt(folder / "sound_ESM.pt", ["a"], ROW)
    return folder / "sound_ESM.pt"


def sound_nucleotides(folder: Path) -> Path:
    entries = [{"label": "", "mean_representation": [0.5] * 768}]
    torch.save({"nucleotide": ["a"], "data": entries}, folder / "sound_DNABERT_S.pt")
    return folder / "sound_DNABERT_S.pt"


def sound_matrix(folder: Path) -> object:
    path = folder / "sound.safetensors"
    write_matrix(path, ["a"], np.ones(1, np.int64), ROW, {})
    return open_matrix(path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("serialise", FORMATS)
def test_a_payload_is_not_run(
    tmp_path: Path, reader: Callable[[Path], object], serialise: Callable[[object], bytes]
) -> None:
    witness = tmp_path / "it ran"
    payload = Payload(witness)
    path = tmp_path / "hostile.pt"
    path.write_bytes(serialise({"proteins": ["a"], "data": [payload], "ids": payload, "nucleotide": payload}))
    with pytest.raises(ArtifactError, match=r"not a usable \.pt file"):
        reader(path)
    assert not witness.exists()


@pytest.mark.parametrize("serialise", FORMATS)
def test_the_payload_is_live(tmp_path: Path, serialise: Callable[[object], bytes]) -> None:
    """Else the test above would prove nothing."""
    content = serialise(Payload(tmp_path / "it ran"))
    if serialise is pickle.dumps:
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert (tmp_path / "it ran").exists()


def test_a_sound_file_by_hand_is_read(tmp_path: Path) -> None:
    """The hostile ones below are read as far as what makes them hostile."""
    write_export_by_hand(tmp_path / "a.pt", tensor("0", 1280, 1280), {"0": ROW.tobytes()})
    ids, rows = read_pt(tmp_path / "a.pt")
    assert ids == ["a"]
    assert torch.equal(rows[0], torch.ones(1280))


@pytest.mark.parametrize(
    ("row", "records"),
    [
        pytest.param(call("builtins.bytearray", number(2**31 - 1)), {}, id="bytes of a number"),
        pytest.param(call("__builtin__.bytearray", number(2**31 - 1)), {}, id="the same by its old name"),
        pytest.param(call("torch.Tensor", number(2**15) * 2), {}, id="a tensor of numbers"),
        pytest.param(call("torch.FloatTensor", number(2**15) * 2), {}, id="a float tensor of numbers"),
        pytest.param(call("torch.storage.UntypedStorage", number(2**31 - 1)), {}, id="a storage of a number"),
        pytest.param(
            call("_codecs.encode", call("_codecs.encode", text("A") + text("latin1")) + text("hex")),
            {},
            id="a codec that doubles",
        ),
        pytest.param(tensor("0", 1280, 1280), {"0": bytes(16)}, id="a storage longer than its record"),
        pytest.param(tensor("0", 4, 1280), {"0": bytes(16)}, id="a row longer than its storage"),
        pytest.param(tensor("0", 4, 1280, offset=2**31 - 1), {"0": bytes(16)}, id="an offset outside"),
        pytest.param(tensor("0", 4, 2**31 - 1, 0), {"0": bytes(16)}, id="a row of one number many times"),
        pytest.param(tensor("1", 1280, 1280), {"0": ROW.tobytes()}, id="a record that is not there"),
        pytest.param(b"h\x07", {}, id="what was never made"),
        pytest.param(b"(" * 100_000, {}, id="marks"),
        pytest.param(b"]" * 100_000 + b"a" * 99_999, {}, id="lists in lists"),
    ],
)
def test_what_torch_would_make_of_few_bytes_is_not_made(
    tmp_path: Path, row: bytes, records: dict[str, bytes]
) -> None:
    path = tmp_path / "hostile.pt"
    write_export_by_hand(path, row, records)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=r"not a usable \.pt file"):
        read_pt(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_a_name_in_capitals_hides_nothing(tmp_path: Path) -> None:
    content = pt_bytes(pickled(call("builtins.bytearray", number(1000))))
    (tmp_path / "sound.pt").write_bytes(content)
    (tmp_path / "hostile.pt").write_bytes(content.replace(b"data.pkl", b"DATA.PKL"))
    assert torch.load(tmp_path / "hostile.pt", weights_only=True) == bytearray(1000), "torch finds it"
    for name in ("sound.pt", "hostile.pt"):
        with pytest.raises(ArtifactError, match="it calls"):
            read_pt(tmp_path / name)


@pytest.mark.parametrize("read", [read_pt, read_nucleotides])
def test_one_row_many_times_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Two bytes a row here, five kilobytes a row in memory."""
    many = b"".join(b"h\x01" for _ in range(100_000))
    entry = mapped(mean_representation=listed(*[b"K\x01"] * 768))
    row = tensor("0", 1280, 1280) if read is read_pt else entry
    ids = listed(text("a") + b"q\x01", many)
    rows = listed(row + b"q\x01", many)
    name = "proteins" if read is read_pt else "nucleotide"
    content = mapped(**{name: ids, "data": rows})
    (tmp_path / "hostile.pt").write_bytes(pt_bytes(pickled(content), {"0": ROW.tobytes()}))
    with pytest.raises(ArtifactError, match="more rows than it has room for"):
        read(tmp_path / "hostile.pt")


def test_tensors_that_ask_for_gradients_are_read_or_refused(tmp_path: Path) -> None:
    """As whoever forgot `torch.no_grad()` saves them: they are no plain numbers to numpy."""
    path = tmp_path / "own.pt"
    torch.save({"proteins": ["a"], "data": [torch.ones(1280, requires_grad=True)]}, path)
    merge_it_as_proteins(path)
    merged = torch.load(tmp_path / "merged.pt", weights_only=True)["data"]
    assert torch.equal(merged[0], torch.cat((torch.full((768,), 0.5), torch.ones(1280))))
    numbers = list(torch.ones(768, requires_grad=True))
    torch.save({"nucleotide": ["a"], "data": [{"label": "", "mean_representation": numbers}]}, path)
    with pytest.raises(ArtifactError, match="the mean_representation of 'a' is not numbers"):
        merge_it_as_nucleotides(path)
    torch.save({"ids": ["a"], "data": torch.zeros(1, 2048, requires_grad=True)}, path)
    with pytest.raises(ArtifactError, match="its protein embeddings are not those of the matrix"):
        validate_it_as_merged(path)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    content = pt_bytes(pickled(listed()), {"0": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert len(content) < 100_000
    (tmp_path / "bomb.pt").write_bytes(content)
    with pytest.raises(ArtifactError, match="unpack to more than its own size"):
        read_pt(tmp_path / "bomb.pt")


MATRIX_HEADER = {
    "__metadata__": {},
    "ids": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    "id_offsets": {"dtype": "I64", "shape": [2], "data_offsets": [1, 17]},
    "records": {"dtype": "I64", "shape": [1], "data_offsets": [17, 25]},
    "embeddings": {"dtype": "F32", "shape": [1, 1280], "data_offsets": [25, 5145]},
}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param((2**63 - 1).to_bytes(8, "little") + b"{}", id="a header of 9 exabytes"),
        pytest.param((2**32).to_bytes(8, "little") + b"{}", id="a header of 4 gigabytes"),
        pytest.param((1 << 20).to_bytes(8, "little") + b"{}", id="a header longer than the file"),
        pytest.param((900_000).to_bytes(8, "little") + b"[" * 900_000, id="lists in lists"),
        pytest.param((900_000).to_bytes(8, "little") + b'{"a":' * 180_000, id="objects in objects"),
        pytest.param((900_000).to_bytes(8, "little") + b"9" * 900_000, id="a long number"),
        pytest.param(b"\xff" * 16, id="all ones"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_hostile_matrix_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a matrix file as it was written"):
        open_matrix(tmp_path / "a.safetensors")


@pytest.mark.parametrize("rows", [2**59, 2**62, 2**64, 10**400, -1, 0, 1.5, "1", None, True])
def test_a_hostile_count_of_rows(tmp_path: Path, rows: object) -> None:
    header = json.loads(json.dumps(MATRIX_HEADER))
    header["embeddings"]["shape"][0] = header["records"]["shape"][0] = rows
    text_ = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text_).to_bytes(8, "little") + text_ + bytes(5145))
    with pytest.raises(ArtifactError, match="not a matrix file as it was written"):
        open_matrix(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [b'"\\ud800"', b"NaN", b"-Infinity", b"1e999", b'[{"\\udfff": 1}]'])
def test_a_manifest_that_could_not_be_written_again(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "a.json"
    vouch_for(sound_export(tmp_path), path)
    read_manifest(path)
    path.write_bytes(path.read_bytes().replace(b'"execution": {', b'"execution": {"x": ' + value))
    with pytest.raises(ArtifactError, match="not a usable manifest"):
        read_manifest(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 1_000_000, id="lists in lists"),
        pytest.param(b'{"a":' * 1_000_000, id="objects in objects"),
        pytest.param(b'{"format": ' + b"9" * 1_000_000 + b"}", id="a long number"),
        pytest.param(b'{"format": 1e999999999}', id="a large number"),
        pytest.param(b'{"format": NaN}', id="NaN"),
        pytest.param(b'"' + b"x" * 1_000_000 + b'"', id="long text"),
        pytest.param(b'"' + b"x" * (17 << 20) + b'"', id="larger than a manifest may be"),
        pytest.param(b'{"a": 1, "a": 2}', id="a name twice"),
        pytest.param(b"\xff\xfe{\x00", id="UTF-16"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_hostile_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a usable manifest") as caught:
        read_manifest(tmp_path / "a.json")
    assert len(str(caught.value)) < 2000
