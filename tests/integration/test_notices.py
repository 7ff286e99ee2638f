"""Who is told of a run that failed or is late, and how a wrong setting is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.serialization.serialized_objects import DagSerialization
from structlog.testing import capture_logs

from dags import virnucpro_ingest as ingest
from dags.notices import make_deadline, tell_failed, tell_late
from virnucpro_core.errors import SettingsError

pytestmark = pytest.mark.integration

LATE: dict[str, Any] = {
    "dag_run": {"dag_run_id": "nightly", "state": "running", "run_type": "scheduled"},
    "deadline": {"id": "a", "deadline_time": "2026-11-22 08:00:00+00:00"},
}


def test_the_notifier_of_the_settings_tells_of_both(
    settings_environment: Callable[..., None], tmp_path: Path
) -> None:
    told = tmp_path / "told"
    settings_environment(
        notifier="tests.notifiers.FileNotifier",
        notifier_options=json.dumps({"path": str(told), "text": "{{ run_id }} {{ what }}"}),
    )
    tell_failed({"run_id": "nightly"})
    asyncio.run(tell_late(LATE))
    assert told.read_text().splitlines() == [
        "nightly failed",
        "nightly is late: it was to end by 2026-11-22 08:00:00+00:00",
    ]


@pytest.mark.parametrize(
    "of_run",
    [{"state": "failed"}, {"state": "success"}, {"run_type": "backfill"}],
    ids=lambda one: str(*one.values()),
)
def test_a_run_that_is_over_and_a_backfill_are_not_late(
    settings_environment: Callable[..., None], tmp_path: Path, of_run: dict[str, str]
) -> None:
    told = tmp_path / "told"
    settings_environment(
        notifier="tests.notifiers.FileNotifier",
        notifier_options=json.dumps({"path": str(told), "text": "{{ run_id }} {{ what }}"}),
    )
    asyncio.run(tell_late(LATE | {"dag_run": LATE["dag_run"] | of_run}))
    assert not told.exists()


def test_without_a_notifier_the_log_is_told(settings_environment: Callable[..., None]) -> None:
    with capture_logs() as logs:
        tell_failed({"run_id": "nightly"})
        asyncio.run(tell_late(LATE))
    assert [(line["event"], line["log_level"], line["run"]) for line in logs] == [
        ("the run failed", "error", "nightly"),
        ("the run is late", "warning", "nightly"),
    ]


@pytest.mark.parametrize(
    ("notifier", "options"),
    [
        ("nowhere.Notifier", "{}"),
        ("tests.notifiers.Missing", "{}"),
        ("no path", "{}"),
        ("pathlib.Path", "{}"),
        ("tests.notifiers.FileNotifier", '{"to": "me"}'),
    ],
)
def test_wrong_notifier_is_named(
    settings_environment: Callable[..., None], notifier: str, options: str
) -> None:
    settings_environment(notifier=notifier, notifier_options=options)
    with pytest.raises(SettingsError, match="VIRNUCPRO_NOTIFIER"):
        tell_failed({"run_id": "nightly"})


def test_deadline_follows_the_setting_and_reaches_the_scheduler(
    settings_environment: Callable[..., None],
) -> None:
    settings_environment(late_hours=2.5)
    assert make_deadline().interval == timedelta(hours=2.5)
    written = DagSerialization.serialize_dag(ingest.DAG)
    assert "dags.notices.tell_late" in json.dumps(written["deadline"])
    assert written["has_on_failure_callback"]
    tasks = {task["__var"]["task_id"]: task["__var"] for task in written["tasks"]}
    assert tasks["extract"]["_operator_extra_links"] == {"VirNucPro job": "_link_JobLink"}
