"""A house for the tests that set one on fire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.chaos import Chaos
from tests.faults.house import running_house


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    """A house with a job that was run undisturbed; every test leaves it whole, or fails."""
    with running_house(tmp_path_factory.mktemp("house") / "house") as house:
        yield Chaos(house)
