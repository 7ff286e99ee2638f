"""The control: a house without fences must fail the tests that the others pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import Chaos
from tests.faults.house import House, HouseError, running_house

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


HOUSES = 3
"""The sleeper may be stopped while another of its threads is in a transaction. Its chunk is then not taken from it
in time; that house has nothing to say."""


def test_without_fencing_the_double_commit_is_caught(tmp_path: Path) -> None:
    for number in range(HOUSES):
        with running_house(tmp_path / f"house{number}", unfenced=True) as house:
            chaos = Chaos(house)
            house.lay("extract", "renamed", "stop")
            house.submit(force=True)
            if not commits_twice(house, chaos):
                continue
            with pytest.raises(AssertionError, match="committed twice"):
                chaos.assert_kept()
            return
    pytest.fail(f"no sleeper of {HOUSES} houses committed what another had committed")


def commits_twice(house: House, chaos: Chaos) -> bool:
    """Whether a chunk is committed twice within a minute, the sleeper being woken when another has committed it."""

    def wakes_and_commits() -> bool:
        if house.rows("SELECT 1 FROM chunks WHERE stage = 'extract' AND state = 'done' AND attempts > 1"):
            house.wake_the_stopped(now=True)
        return bool(chaos.committed_twice())

    try:
        return house.wait_until(wakes_and_commits, "the sleeper commits what another has committed", 60)
    except HouseError:
        return False
