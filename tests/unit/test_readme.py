"""The README names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

PROJECT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(?P<file>[\w/…]+(?:\.py)?)::(?P<test>test_\w+)`")


def test_every_promise_names_a_test_that_exists() -> None:
    text = (PROJECT / "README.md").read_text()
    table = text.partition("## What is promised under which fault")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = NAMED.findall(row)
        assert named or "every test on a house" in row, row
        file = ""
        for name, test in named:
            file = file if name == "…" else name
            path = PROJECT / "tests" / (file if "/" in file else f"faults/{file}")
            assert f"def {test}(" in path.read_text(), f"{path} has no {test}"
