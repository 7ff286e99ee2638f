"""The `virnucpro` command in this process, as a plugin: `pytest_plugins = ["tests.fixtures_command"]`.

def test_something(virnucpro):
    assert virnucpro("status", "--json").json() == []
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from virnucpro_core.cli import main
from virnucpro_core.settings import load_settings

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Completed:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def virnucpro(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Completed]]:
    """Runs the command with these arguments in an empty folder, and returns its exit code and output."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT), prepend=os.pathsep)  # for children, wherever they run
    monkeypatch.setenv("COLUMNS", "200")
    load_settings.cache_clear()

    def run(*arguments: object) -> Completed:
        monkeypatch.setattr(sys, "argv", ["virnucpro", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Completed(code or 0, *capsys.readouterr())

    yield run
    structlog.reset_defaults()
    load_settings.cache_clear()
