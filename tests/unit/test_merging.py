"""Merging: chunks in input order whatever their cut, and two kinds of embeddings joined record by record."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.rows import make_rows
from virnucpro_core.errors import ArtifactError, MismatchError, SettingsError
from virnucpro_core.features.exports import write_pt
from virnucpro_core.features.files import hash_file
from virnucpro_core.features.matrices import Matrix, open_matrix, write_matrix
from virnucpro_core.features.merging import merge_chunks, merge_data, merge_features, read_nucleotides

pytestmark = pytest.mark.unit

METADATA = {"recipe": "r", "execution": "e"}
NOTHING = np.empty(0, np.int64)
EXECUTION = 8 + len('{"__metadata__":{"execution":"')  # where in a chunk the execution class stands


def write_chunk(
    path: Path, records: Sequence[int] | np.ndarray, metadata: dict[str, str] = METADATA
) -> tuple[Path, str]:
    """A chunk whose rows and ids follow from their record numbers."""
    embeddings = np.repeat(np.asarray(records, np.float32)[:, None], 1280, axis=1)
    ids = [f"p{record}" for record in records]
    written = write_matrix(path, ids, np.asarray(records, np.int64), embeddings, metadata)
    return path, written.sha256


@given(data=st.data())
def test_the_merged_file_does_not_depend_on_the_chunks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    records = sorted(data.draw(st.sets(st.integers(1, 60))))
    ids = data.draw(
        st.lists(st.text("aé\U0001f9ec", max_size=3), min_size=len(records), max_size=len(records))
    )
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(records)), max_size=4))), len(records)]
    embeddings = make_rows(len(records), 5)
    numbers = np.array(records, np.int64)
    folder = tmp_path_factory.mktemp("merge")
    chunks = []
    for k, (start, stop) in enumerate(pairwise(cuts)):
        part = slice(start, stop)
        chunk = write_matrix(folder / str(k), ids[part], numbers[part], embeddings[part], METADATA)
        chunks.append((chunk.path, chunk.sha256))
    whole = write_matrix(folder / "whole", ids, numbers, embeddings, METADATA)
    merged = merge_chunks(chunks, folder / "merged")
    assert merged.path.read_bytes() == whole.path.read_bytes()
    assert (merged.sha256, merged.bytes, merged.rows) == (whole.sha256, whole.bytes, whole.rows)
    assert open_matrix(merged.path, width=5).ids() == ids


MERGE = """
import sys
from pathlib import Path
from virnucpro_core.features.merging import merge_chunks

def memory(kind):
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) << 10

*chunks, merged = sys.argv[1:]
before = memory("VmRSS")
written = merge_chunks([(Path(chunk[:-65]), chunk[-64:]) for chunk in chunks], Path(merged))
print(written.rows, written.bytes, memory("VmHWM") - before, "torch" in sys.modules)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    rows, count = 4000, 10
    chunks = []
    for k in range(count):
        path, sha256 = write_chunk(tmp_path / f"{k}", np.arange(k * rows + 1, (k + 1) * rows + 1))
        chunks.append(f"{path}={sha256}")
    command = [sys.executable, "-c", MERGE, *chunks, str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    merged_rows, merged_bytes, growth, imports_torch = done.stdout.split()
    assert int(merged_rows) == rows * count
    assert int(merged_bytes) > 200_000_000
    assert int(growth) < 16_000_000, "one chunk has 20 MB, the job 205 MB"
    assert imports_torch == "False"
    matrix = open_matrix(tmp_path / "merged")
    np.testing.assert_array_equal(matrix.embeddings[:, 1279], matrix.records)
    for path in tmp_path.iterdir():
        path.unlink()  # pytest keeps the folders of several runs


@given(place=st.integers(0, 12_000), which=st.sampled_from([0, 1]))
@example(place=EXECUTION, which=0)
@example(place=EXECUTION, which=1)
def test_a_flipped_byte_is_found_and_its_chunk_named(
    tmp_path_factory: pytest.TempPathFactory, place: int, which: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    chunks = [write_chunk(folder / "1", [1, 2]), write_chunk(folder / "2", [3, 4])]
    altered = chunks[which][0]
    content = bytearray(altered.read_bytes())
    content[place % len(content)] ^= 1
    altered.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        merge_chunks(chunks, folder / "merged")
    assert caught.value.where == str(altered)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_chunk_that_was_replaced_by_a_sound_one_is_found(tmp_path: Path) -> None:
    path, sha256 = write_chunk(tmp_path / "chunk", [1, 2])
    write_chunk(path, [1, 3])
    with pytest.raises(ArtifactError, match="not as it was recorded"):
        merge_chunks([(path, sha256)], tmp_path / "merged")


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_chunk_that_is_not_whole_is_named(tmp_path: Path, damage: str) -> None:
    good = write_chunk(tmp_path / "good", [1, 2])
    bad = write_chunk(tmp_path / "bad", [3, 4])
    if damage == "missing":
        bad[0].unlink()
    else:
        os.truncate(bad[0], bad[0].stat().st_size - 100)
    with pytest.raises(ArtifactError) as caught:
        merge_chunks([good, bad], tmp_path / "merged")
    assert caught.value.where == str(bad[0])
    assert not (tmp_path / "merged").exists()


def test_chunks_out_of_order_are_refused(tmp_path: Path) -> None:
    first, second = write_chunk(tmp_path / "1", [1, 2]), write_chunk(tmp_path / "2", [3, 4])
    for chunks in ([second, first], [first, first]):
        with pytest.raises(MismatchError, match="do not rise"):
            merge_chunks(chunks, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_chunks_of_another_execution_class_are_refused(tmp_path: Path) -> None:
    first = write_chunk(tmp_path / "1", [1])
    second = write_chunk(tmp_path / "2", [2], {**METADATA, "execution": "another GPU"})
    with pytest.raises(MismatchError, match="made in another way") as caught:
        merge_chunks([first, second], tmp_path / "merged")
    assert caught.value.where == str(second[0])


def test_a_job_without_any_embedding_merges_to_no_rows(tmp_path: Path) -> None:
    chunks = [write_chunk(tmp_path / name, NOTHING) for name in "ab"]
    assert merge_chunks(chunks, tmp_path / "merged").rows == 0
    assert len(open_matrix(tmp_path / "merged")) == 0


def test_no_chunks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no chunk"):
        merge_chunks([], tmp_path / "merged")


def write_nucleotides(path: Path, ids: Sequence[str], rows: np.ndarray) -> Path:
    entries = [
        {"label": name, "mean_representation": row} for name, row in zip(ids, rows.tolist(), strict=True)
    ]
    torch.save({"nucleotide": list(ids), "data": entries}, path)
    return path


def load_merged(path: Path) -> tuple[list[str], np.ndarray]:
    content = torch.load(path, weights_only=True)
    assert set(content) <= {"ids", "data", "labels"}
    assert content["data"].dtype == torch.float32
    return content["ids"], content["data"].numpy()


@given(ids=st.lists(st.sampled_from("abc"), max_size=7), data=st.data())
def test_the_kth_row_of_an_id_meets_its_kth_row(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("join")
    others = data.draw(st.permutations(ids))
    nucleotides, proteins = make_rows(len(ids), 768), make_rows(len(ids))
    write_nucleotides(folder / "x_DNABERT_S.pt", ids, nucleotides)
    write_pt(folder / "x_ESM.pt", others, proteins)
    written = merge_data(folder / "x_DNABERT_S.pt", folder / "x_ESM.pt", folder / "x_merged.pt")
    merged_ids, merged = load_merged(folder / "x_merged.pt")
    assert merged_ids == ids
    assert merged.shape == (len(ids), 2048)
    assert written.rows == len(ids)
    assert written.sha256 == hash_file(folder / "x_merged.pt")
    for row, name in enumerate(ids):
        k = ids[:row].count(name)
        partner = [place for place, other in enumerate(others) if other == name][k]
        np.testing.assert_array_equal(merged[row, :768], nucleotides[row])
        np.testing.assert_array_equal(merged[row, 768:], proteins[partner])


@pytest.mark.parametrize(("data_type", "labels"), [(None, None), ("host", [0]), ("viral", [1])])
def test_labels_follow_the_data_type(tmp_path: Path, data_type: str | None, labels: list[int] | None) -> None:
    write_nucleotides(tmp_path / "n.pt", ["a"], make_rows(1, 768))
    write_pt(tmp_path / "p.pt", ["a"], make_rows(1))
    merge_data(str(tmp_path / "n.pt"), str(tmp_path / "p.pt"), str(tmp_path / "m.pt"), data_type)  # type: ignore[arg-type]
    assert torch.load(tmp_path / "m.pt", weights_only=True).get("labels") == labels


def test_another_data_type_is_refused(tmp_path: Path) -> None:
    write_nucleotides(tmp_path / "n.pt", ["a"], make_rows(1, 768))
    write_pt(tmp_path / "p.pt", ["a"], make_rows(1))
    with pytest.raises(SettingsError, match="phage"):
        merge_data(tmp_path / "n.pt", tmp_path / "p.pt", tmp_path / "m.pt", "phage")  # type: ignore[arg-type]
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.parametrize(
    ("nucleotides", "proteins", "named"),
    [
        (["a", "b", "c"], ["a", "c"], "nucleotide row 2, 'b', has no protein row"),
        (["a", "c"], ["a", "b", "c"], "protein row 2, 'b', has no nucleotide row"),
        (["a", "b", "a"], ["a", "b"], "nucleotide row 3, 'a', has no protein row"),
        (["a", "b"], ["a", "b", "a"], "protein row 3, 'a', has no nucleotide row"),
        ([], ["a"], "protein row 1, 'a', has no nucleotide row"),
    ],
)
def test_sides_that_do_not_match_are_refused_naming_the_first(
    tmp_path: Path, nucleotides: list[str], proteins: list[str], named: str
) -> None:
    write_nucleotides(tmp_path / "n.pt", nucleotides, make_rows(len(nucleotides), 768))
    write_pt(tmp_path / "p.pt", proteins, make_rows(len(proteins)))
    with pytest.raises(MismatchError, match=named):
        merge_data(tmp_path / "n.pt", tmp_path / "p.pt", tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()


ENTRY = {"label": "a", "mean_representation": [0.5] * 768}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"proteins": ["a"], "data": [ENTRY]}, id="keys"),
        pytest.param({"nucleotide": ["a", "b"], "data": [ENTRY]}, id="too few entries"),
        pytest.param({"nucleotide": ["a"], "data": [[0.5] * 768]}, id="no dict"),
        pytest.param({"nucleotide": ["a"], "data": [{"label": "a"}]}, id="no numbers"),
        pytest.param({"nucleotide": ["a"], "data": [{"mean_representation": [0.5] * 767}]}, id="767 numbers"),
        pytest.param({"nucleotide": ["a"], "data": [{"mean_representation": ["x"] * 768}]}, id="text"),
        pytest.param({"nucleotide": ["a"], "data": [{"mean_representation": [[1, 2]] * 768}]}, id="nested"),
        pytest.param(
            {"nucleotide": ["a"], "data": [{"mean_representation": [float("nan")] * 768}]}, id="NaN"
        ),
        pytest.param({"nucleotide": ["a"], "data": [{"mean_representation": [1e39] * 768}]}, id="too large"),
        pytest.param({"nucleotide": ["a"], "data": [{"mean_representation": [10**400] * 768}]}, id="huge"),
    ],
)
def test_other_nucleotide_files_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "n.pt")
    write_pt(tmp_path / "p.pt", ["a"], make_rows(1))
    with pytest.raises(ArtifactError) as caught:
        merge_data(tmp_path / "n.pt", tmp_path / "p.pt", tmp_path / "m.pt")
    assert caught.value.where == str(tmp_path / "n.pt")


@pytest.mark.parametrize("side", ["x_DNABERT_S.pt", "x_ESM.pt"])
def test_the_merged_file_replaces_neither_of_its_sides(tmp_path: Path, side: str) -> None:
    sides = (
        write_nucleotides(tmp_path / "x_DNABERT_S.pt", "a", make_rows(1, 768)),
        write_pt(tmp_path / "x_ESM.pt", ["a"], make_rows(1)).path,
    )
    before = hash_file(tmp_path / side)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(SettingsError, match="would replace its own input"):
        merge_data(*sides, tmp_path / "link" / side)
    assert hash_file(tmp_path / side) == before


def test_a_merged_file_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for target in (pipe, tmp_path, tmp_path / ("m" * 256)):
        with pytest.raises(ArtifactError) as caught:
            merge_data(tmp_path / "absent_DNABERT_S.pt", tmp_path / "absent_ESM.pt", target)
        assert caught.value.where == str(target)
    assert pipe.is_fifo()


def test_a_protein_row_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    write_nucleotides(tmp_path / "n.pt", ["a", "b"], make_rows(2, 768))
    proteins = make_rows(2)
    proteins[1, 7] = np.inf
    write_pt(tmp_path / "p.pt", ["a", "b"], proteins)
    with pytest.raises(ArtifactError, match="'b' holds NaN or Inf"):
        merge_data(tmp_path / "n.pt", tmp_path / "p.pt", tmp_path / "m.pt")


def make_matrix(path: Path, records: Sequence[int], ids: Sequence[str]) -> Matrix:
    write_matrix(path, ids, np.array(records, np.int64), make_rows(len(ids)), METADATA)
    return open_matrix(path)


@pytest.mark.parametrize("rows", ["of all records", "of embeddings", "of embeddings, in another order"])
def test_nucleotides_meet_the_embeddings_of_their_records(tmp_path: Path, rows: str) -> None:
    # Record 2 failed; its id comes again, so only its number tells which of the two is left.
    records, all_ids = [1, 3, 4], ["a", "b", "b", "c"]
    matrix = make_matrix(tmp_path / "m", records, ["a", "b", "c"])
    nucleotides = make_rows(4, 768)
    kept = {"of all records": [0, 1, 2, 3], "of embeddings": [0, 2, 3]}.get(rows, [3, 0, 2])
    path = write_nucleotides(tmp_path / "n.pt", [all_ids[row] for row in kept], nucleotides[kept])
    merge_features(read_nucleotides(path), matrix, tmp_path / "x_merged.pt", records=4, data_type="viral")
    ids, merged = load_merged(tmp_path / "x_merged.pt")
    assert ids == ["a", "b", "c"]
    np.testing.assert_array_equal(merged[:, :768], nucleotides[[0, 2, 3]])
    np.testing.assert_array_equal(merged[:, 768:], matrix.embeddings)


def test_nucleotides_of_another_input_are_refused(tmp_path: Path) -> None:
    matrix = make_matrix(tmp_path / "m", [1, 3], ["a", "c"])
    path = write_nucleotides(tmp_path / "n.pt", ["a", "b", "x"], make_rows(3, 768))
    with pytest.raises(MismatchError, match="protein row 2, 'c', has no nucleotide row"):
        merge_features(read_nucleotides(path), matrix, tmp_path / "x_merged.pt", records=3)
