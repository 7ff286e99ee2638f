"""How durations, sizes and times are written for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from virnucpro_core.formats import format_bytes, format_duration, format_time

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (None, ""),
        (0.0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (61.0, "1 min"),
        (3599.0, "1 h 0 min"),
        (12_000.0, "3 h 20 min"),
        (187_200.0, "2 d 4 h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float | None, written: str) -> None:
    assert format_duration(seconds) == written


@pytest.mark.parametrize(
    ("size", "written"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (51_200_000_000, "51.2 GB"), (10**16, "10000.0 TB")],
)
def test_sizes_are_short(size: int, written: str) -> None:
    assert format_bytes(size) == written


def test_times_are_in_utc() -> None:
    assert format_time(None) == ""
    moment = datetime(2026, 11, 22, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))
    assert format_time(moment) == f"{moment.astimezone(UTC):%Y-%m-%d} 23:02:03 UTC"
