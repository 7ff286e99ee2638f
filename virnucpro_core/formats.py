"""How durations, sizes and times are written for people: by commands, the page in Airflow, and reports."""

from __future__ import annotations

from datetime import UTC, datetime

UNITS = ("B", "KB", "MB", "GB", "TB")


def format_duration(seconds: float | None) -> str:
    """Two units at most: "45 s", "12 min", "3 h 20 min", "2 d 4 h"; nothing for None."""
    if seconds is None:
        return ""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def format_bytes(size: int) -> str:
    """A size with three digits or so: "51.2 GB"; a KB has 1000 bytes."""
    value, unit = float(size), UNITS[0]
    for unit in UNITS:
        if value < 1000 or unit == UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def format_time(moment: datetime | None) -> str:
    """A moment in UTC, to the second; nothing for None."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if moment else ""
