"""A short run of every fuzzer, all that earlier runs found, and proof that a finding is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.engine import CORPUS, run_hypothesis
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import RECORDS, TARGETS, run

pytestmark = [pytest.mark.unit, pytest.mark.faults]

PROJECT = Path(__file__).resolve().parents[2]
EXAMPLES, RUNS = 300, 2000


@pytest.mark.parametrize(
    "found", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_what_was_found_is_mended(found: Path, tmp_path: Path) -> None:
    run(TARGETS[found.parent.name], found.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_sound(name: str, tmp_path: Path) -> None:
    """Fuzzing that starts from rubbish stays at the door."""
    outcomes = [run(TARGETS[name], seed, tmp_path) for seed in SEEDS[name]]
    assert outcomes.count(RECORDS) > len(outcomes) / 2


@pytest.mark.parametrize("name", TARGETS)
def test_hypothesis_finds_nothing(name: str, tmp_path: Path) -> None:
    figures = run_hypothesis(name, EXAMPLES, 1, tmp_path)
    assert figures.runs >= EXAMPLES
    assert len(figures.outcomes) > 1, "it gets past the door, and is turned away, too"


def run_atheris(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    scratch = folder / "scratch"
    scratch.mkdir()
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz.engine", name, str(RUNS), "1", str(folder), str(scratch)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("name", TARGETS)
def test_atheris_finds_nothing(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86_64 alone")
    ended = run_atheris(name, tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads((tmp_path / f"{name}-atheris.json").read_text())["runs"] >= RUNS


def test_hypothesis_reports_a_finding(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_hypothesis("control", EXAMPLES, 1, tmp_path)


def test_atheris_reports_a_finding(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86_64 alone")
    ended = run_atheris("control", tmp_path)
    assert ended.returncode != 0
    assert "ZeroDivisionError" in ended.stdout + ended.stderr
    (found,) = tmp_path.glob("control-crash-*")
    assert len(found.read_bytes()) == 3
