"""The control: a house without fences must fail the tests that the others pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import Chaos
from tests.faults.house import running_house

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def test_without_fencing_the_double_commit_is_caught(tmp_path: Path) -> None:
    with running_house(tmp_path / "house", unfenced=True) as house:
        chaos = Chaos(house)
        house.lay("extract", "renamed", "stop")
        house.submit(force=True)

        def wakes_and_commits() -> bool:
            house.wake_the_stopped()
            return bool(chaos.committed_twice())

        house.wait_until(wakes_and_commits, "the sleeper commits what another has committed")
        with pytest.raises(AssertionError, match="committed twice"):
            chaos.assert_kept()
