"""Publishing: the name a person reads is always there, always whole."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from virnucpro_core.errors import ArtifactError
from virnucpro_core.features import publishing
from virnucpro_core.features.files import remove_abandoned
from virnucpro_core.features.publishing import publish, publish_result
from workers.publication import Publication

pytestmark = pytest.mark.unit


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_published_file_is_the_artifact(tmp_path: Path) -> None:
    source = tmp_path / "artifact"
    source.write_bytes(b"rows")
    publish(source, tmp_path / "out" / "x_ESM.pt")
    assert (tmp_path / "out" / "x_ESM.pt").samefile(source)
    assert names(tmp_path / "out") == ["x_ESM.pt"]


def test_a_new_generation_replaces_the_old(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        (source := tmp_path / content.decode()).write_bytes(content)
        publish(source, tmp_path / "out" / "x")
    assert (tmp_path / "out" / "x").read_bytes() == b"new"
    assert (tmp_path / "old").read_bytes() == b"old"


def test_publishing_again_leaves_one_name(tmp_path: Path) -> None:
    (source := tmp_path / "artifact").write_bytes(b"rows")
    for _ in range(2):
        publish(source, tmp_path / "out" / "x")
    assert names(tmp_path / "out") == ["x"]


def test_what_a_link_points_to_is_published(tmp_path: Path) -> None:
    (tmp_path / "artifact").write_bytes(b"rows")
    (tmp_path / "link").symlink_to("artifact")
    publish(tmp_path / "link", tmp_path / "x")
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "x").samefile(tmp_path / "artifact")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system at hand")
def test_another_file_system_gets_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path("/dev/shm") / f"virnucpro-test-{os.getpid()}"
    try:
        source.write_bytes(b"rows" * 3_000_000)
        assert source.stat().st_dev != tmp_path.stat().st_dev
        publish(source, tmp_path / "out" / "x")
        assert (tmp_path / "out" / "x").read_bytes() == source.read_bytes()
    finally:
        source.unlink()
    assert names(tmp_path / "out") == ["x"]
    assert "published_as_copy" in capsys.readouterr().out


def test_a_file_system_without_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    (source := tmp_path / "artifact").write_bytes(b"rows")
    monkeypatch.setattr(publishing.os, "link", refuse)
    publish(source, tmp_path / "out" / "x")
    assert (tmp_path / "out" / "x").read_bytes() == b"rows"
    assert not (tmp_path / "out" / "x").samefile(source)


def test_a_temporary_name_is_not_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link
    removed: list[Path] = []

    def link_then_clean(source: Path, temporary: Path) -> None:
        link(source, temporary)
        removed.extend(remove_abandoned(tmp_path))

    (source := tmp_path / "artifact").write_bytes(b"rows")
    monkeypatch.setattr(publishing.os, "link", link_then_clean)
    publish(source, tmp_path / "out" / "x")
    assert removed == []
    assert names(tmp_path / "out") == ["x"]


def test_a_reader_never_finds_it_missing_or_half_written(tmp_path: Path) -> None:
    contents = {bytes([letter]) * 100_000 for letter in b"ab"}
    sources = []
    for content in sorted(contents):
        sources.append(tmp_path / chr(content[0]))
        sources[-1].write_bytes(content)
    target = tmp_path / "out" / "x"
    publish(sources[0], target)
    seen = set()
    reading, done = threading.Event(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(target.read_bytes() if target.exists() else b"")
            reading.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(60)
    for k in range(300):
        publish(sources[k % 2], target)
    done.set()
    reader.join()
    assert seen <= contents


def test_a_missing_artifact_leaves_the_published_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ArtifactError, match="missing") as caught:
        publish(tmp_path / "artifact", tmp_path / "x")
    assert caught.value.where == str(tmp_path / "artifact")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (source := tmp_path / "artifact").write_bytes(b"rows")
    (tmp_path / "out" / "x").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="cannot be written") as caught:
        publish(source, tmp_path / "out" / "x")
    assert caught.value.where == str(tmp_path / "out" / "x")
    assert names(tmp_path / "out") == ["x"]


def publish_shards(folder: Path, content: bytes, shards: int) -> list[str]:
    """Publishes a result of so many shards, each of the same content, as generation `content`."""
    generation = folder / content.decode()
    generation.mkdir()
    sources = [generation / f"{k}.pt" for k in range(shards)]
    for source in sources:
        source.write_bytes(content)
    (generation / "manifest").write_bytes(content)
    out = folder / "out"
    published = publish_result(sources, out / "x_ESM.pt", generation / "manifest", out / "x.manifest.json")
    assert all(path.read_bytes() == content for path in [*published, out / "x.manifest.json"])
    return [path.name for path in published]


def test_of_each_result_only_the_newest_shards_stay(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    others = ["x_ESM.pt.json", "xx_ESM.pt", "y_ESM.00001-of-00002.pt", "x_ESM.1-of-2.pt"]
    for name in others:
        (tmp_path / "out" / name).touch()
    assert publish_shards(tmp_path, b"one", 3) == [f"x_ESM.0000{k}-of-00003.pt" for k in (1, 2, 3)]
    assert publish_shards(tmp_path, b"two", 2) == [f"x_ESM.0000{k}-of-00002.pt" for k in (1, 2)]
    assert publish_shards(tmp_path, b"three", 1) == ["x_ESM.pt"]
    assert names(tmp_path / "out") == sorted([*others, "x.manifest.json", "x_ESM.pt"])
    publish_shards(tmp_path, b"four", 2)
    assert not (tmp_path / "out" / "x_ESM.pt").exists()


def test_a_result_that_is_not_whole_does_not_replace_the_manifest(tmp_path: Path) -> None:
    publish_shards(tmp_path, b"one", 1)
    (source := tmp_path / "artifact").write_bytes(b"two")
    with pytest.raises(ArtifactError):
        publish_result(
            [source, tmp_path / "missing"],
            tmp_path / "out" / "x_ESM.pt",
            source,
            tmp_path / "out" / "x.manifest.json",
        )
    assert (tmp_path / "out" / "x.manifest.json").read_bytes() == b"one"
    assert (tmp_path / "out" / "x_ESM.pt").read_bytes() == b"one"


def test_what_is_in_the_way_of_a_result_without_failures_is_named(tmp_path: Path) -> None:
    (source := tmp_path / "artifact").write_bytes(b"rows")
    (in_the_way := tmp_path / "out" / "x.failures.jsonl").mkdir(parents=True)
    publication = Publication(
        folder=tmp_path / "out",
        stem="x",
        exports=[source],
        merged=None,
        merged_is_stale=False,
        failures=None,
        report=None,
        manifest=source,
    )
    with pytest.raises(ArtifactError, match="cannot be removed") as caught:
        publication.publish()
    assert caught.value.where == str(in_the_way)
    in_the_way.rmdir()
    publication.publish()
    assert names(tmp_path / "out") == ["x.manifest.json", "x_ESM.pt"]
