"""Roots: a path from outside leads below them or nowhere, whatever it is made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from virnucpro_core import roots as module
from virnucpro_core.errors import InputError, OutsideError
from virnucpro_core.roots import ANYWHERE, open_below, resolve_below

pytestmark = pytest.mark.unit


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """The one root: it holds `in.fasta` and a folder; beside it lies `out/out.fasta`."""
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "in.fasta").write_bytes(b"in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out.fasta").write_bytes(b"out")
    return root


def test_what_lies_below_is_opened_by_any_name(inside: Path) -> None:
    (inside / "link.fasta").symlink_to("in.fasta")
    (inside.parent / "way in").symlink_to(inside)
    for path in (
        inside / "in.fasta",
        inside / "folder" / ".." / "in.fasta",
        inside / "link.fasta",
        inside.parent / "way in" / "in.fasta",
    ):
        with open_below(path, [inside.parent / "elsewhere", inside]) as file:
            assert file.read() == b"in"


def test_a_root_may_be_a_link(inside: Path) -> None:
    (inside.parent / "root by another name").symlink_to(inside)
    with open_below(inside / "in.fasta", [inside.parent / "root by another name"]) as file:
        assert file.read() == b"in"


def by_dots(inside: Path) -> Path:
    return inside / ".." / "out" / "out.fasta"


def by_an_absolute_path(inside: Path) -> Path:
    return inside.parent / "out" / "out.fasta"


def by_a_link(inside: Path) -> Path:
    (inside / "link.fasta").symlink_to("../out/out.fasta")
    return inside / "link.fasta"


def by_a_link_of_a_folder(inside: Path) -> Path:
    (inside / "way out").symlink_to(inside.parent / "out")
    return inside / "way out" / "out.fasta"


def by_a_link_and_dots(inside: Path) -> Path:
    # To the shell this is root/out.fasta; to the kernel it is out/../out/out.fasta.
    (inside / "way out").symlink_to(inside.parent / "out")
    return inside / "way out" / ".." / "out" / "out.fasta"


def by_a_chain_of_links(inside: Path) -> Path:
    (inside / "one").symlink_to("two")
    (inside / "two").symlink_to("folder/../../out")
    return inside / "one" / "out.fasta"


def by_a_name_that_begins_alike(inside: Path) -> Path:
    beside = inside.with_name("root2")
    beside.mkdir()
    (beside / "out.fasta").write_bytes(b"out")
    return beside / "out.fasta"


def by_a_file_of_the_kernels(inside: Path) -> Path:
    return Path("/proc/self/environ")


@pytest.mark.parametrize(
    "lead_out",
    [
        by_dots,
        by_an_absolute_path,
        by_a_link,
        by_a_link_of_a_folder,
        by_a_link_and_dots,
        by_a_chain_of_links,
        by_a_name_that_begins_alike,
        by_a_file_of_the_kernels,
    ],
)
def test_what_leads_out_is_refused(inside: Path, lead_out: Callable[[Path], Path]) -> None:
    path = lead_out(inside)
    assert path.is_file(), "it would be there to be read"
    for function in (resolve_below, open_below):
        with pytest.raises(OutsideError, match="leads out of") as caught:
            function(path, [inside])
        assert str(inside) in caught.value.what
        assert str(path) in caught.value.where
        assert "VIRNUCPRO_INPUT_ROOTS" in caught.value.todo


def test_nothing_is_said_of_what_lies_outside(inside: Path) -> None:
    with pytest.raises(OutsideError):
        open_below(inside.parent / "out" / "missing.fasta", [inside])


def test_a_relative_path_starts_here(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inside)
    assert resolve_below(Path("in.fasta"), [Path()]) == inside / "in.fasta"
    with pytest.raises(OutsideError):
        resolve_below(Path("../out/out.fasta"), [Path()])


@pytest.mark.parametrize("name", ["a\0b", "\0", "../\0"])
def test_a_name_that_no_file_can_have(inside: Path, name: str) -> None:
    with pytest.raises(OutsideError):
        open_below(inside / name, [inside])


def test_only_regular_files_are_opened_and_nothing_blocks(inside: Path) -> None:
    os.mkfifo(inside / "pipe")
    for path in (inside / "pipe", inside / "folder"):
        with pytest.raises(InputError, match="not a regular file"):
            open_below(path, [inside])
    with pytest.raises(InputError, match="not a regular file"):
        open_below(Path("/dev/null"), ANYWHERE)
    (inside / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="levels of symbolic links"):
        open_below(inside / "loop", [inside])


def test_a_folder_exchanged_for_a_link_at_the_last_moment(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race that resolving alone would lose."""
    path = inside / "folder" / "out.fasta"
    path.write_bytes(b"in")
    really_open = os.open

    def exchange_and_open(name: Path, flags: int) -> int:
        path.unlink()
        path.parent.rmdir()
        path.parent.symlink_to(inside.parent / "out")
        return really_open(name, flags)

    monkeypatch.setattr(module.os, "open", exchange_and_open)
    with pytest.raises(OutsideError, match=r"led to .*out\.fasta when it was opened"):
        open_below(path, [inside])


def test_a_file_exchanged_for_a_link_at_the_last_moment(
    inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def exchange_and_open(name: Path, flags: int) -> int:
        (inside / "in.fasta").unlink()
        (inside / "in.fasta").symlink_to(inside.parent / "out" / "out.fasta")
        return really_open(name, flags)

    monkeypatch.setattr(module.os, "open", exchange_and_open)
    with pytest.raises(OSError, match="levels of symbolic links"):
        open_below(inside / "in.fasta", [inside])
