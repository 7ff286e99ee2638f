"""The documentation: the reference is what the code says, and what pages name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from virnucpro_core.cli.reference import write_reference
from virnucpro_core.settings import PREFIX, Settings

pytestmark = pytest.mark.unit

PROJECT = Path(__file__).resolve().parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)(?P<place>[^)#\s]*)(?:#(?P<heading>[^)\s]*))?\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_reference_is_what_the_code_says() -> None:
    assert (PROJECT / "docs" / "reference.md").read_text() == write_reference(), "run `make docs`"


def test_reference_names_every_setting_and_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_reference()
    assert all(f"`{PREFIX}{name.upper()}`" in text for name in Settings.model_fields)
    monkeypatch.chdir(tmp_path)
    for name, value in (("HOME", str(tmp_path)), ("COLUMNS", "50"), (f"{PREFIX}OUTPUT_ROOT", "/elsewhere")):
        monkeypatch.setenv(name, value)
    assert write_reference() == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(FENCE.sub("", page.read_text())):
        target = (page.parent / link["place"]).resolve() if link["place"] else page
        assert target.exists(), link[0]
        if link["heading"]:
            assert link["heading"] in headings(target), link[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_variables_that_pages_name_exist(page: Path) -> None:
    reference = write_reference()
    of_containers = (PROJECT / ".env.example").read_text()
    text = page.read_text()
    for command in re.findall(
        r"(?:^|`|; )virnucpro ((?:weights |db |health )?[a-z0-9]+)", text, re.MULTILINE
    ):
        assert f"### `virnucpro {command}`" in reference, command
    for name in re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", text):
        assert f"`{name.removesuffix('_FILE')}`" in reference or f"{name}=" in of_containers, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_source_files_that_pages_name_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:virnucpro_core|workers|dags|tests|benchmarks|docs|migrations)/[\w./]*)`", page.read_text()
    ):
        assert (PROJECT / name).exists(), name
