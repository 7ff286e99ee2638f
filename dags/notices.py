"""Who is told when a run fails or is late: one of Airflow's own notifiers, which the settings name."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pkgutil import resolve_name
from typing import Any

import structlog
from airflow.sdk.bases.notifier import BaseNotifier
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference

from virnucpro_core.errors import SettingsError
from virnucpro_core.settings import PREFIX, load_settings

log = structlog.get_logger()


def make_notifier(context: Mapping[str, Any]) -> BaseNotifier | None:
    """The notifier that the settings name, None if they name none.

    Args:
        context: for its templates.

    Raises:
        SettingsError: there is no such notifier, or it does not take these options.
    """
    settings = load_settings()
    if not settings.notifier:
        return None
    try:
        notifier = resolve_name(settings.notifier)(**settings.notifier_options, context=dict(context))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SettingsError(
            f"the notifier cannot be used: {error}",
            where=settings.notifier,
            todo=f"Correct {PREFIX}NOTIFIER or {PREFIX}NOTIFIER_OPTIONS.",
        ) from error
    if not isinstance(notifier, BaseNotifier):
        raise SettingsError(
            "this is no notifier of Airflow's", where=settings.notifier, todo=f"Correct {PREFIX}NOTIFIER."
        )
    return notifier


def tell_failed(context: Mapping[str, Any]) -> None:
    """The DAG's callback for a run that failed."""
    told = {**context, "what": "failed"}
    log.error("the run failed", run=told["run_id"])
    notifier = make_notifier(told)
    if notifier is not None:
        notifier(told)


async def tell_late(context: Mapping[str, Any]) -> None:
    """The deadline's callback; it runs in the triggerer, which tells it what the run's answer in the API says.

    Airflow keeps the deadline of a run that failed, which has been told; and a backfill is of days long past.
    """
    run = context["dag_run"]["dag_run_id"]
    state, run_type = context["dag_run"]["state"], context["dag_run"]["run_type"]
    if state not in ("queued", "running") or run_type == "backfill":
        log.info("the run is not late", run=run, state=state, run_type=run_type)
        return
    what = f"is late: it was to end by {context['deadline']['deadline_time']}"
    log.warning("the run is late", run=run, deadline=str(context["deadline"]["deadline_time"]))
    notifier = make_notifier({**context, "run_id": run, "what": what})
    if notifier is not None:
        await notifier


def make_deadline() -> DeadlineAlert:
    """When a run is late. One without a logical date has no time that it should have ended by."""
    return DeadlineAlert(
        name="nightly",
        reference=DeadlineReference.DAGRUN_LOGICAL_DATE,
        interval=timedelta(hours=load_settings().late_hours),
        callback=AsyncCallback(tell_late),
    )
