"""Where the page VirNucPro is found, and what leads to it from Airflow's own pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from airflow.configuration import conf
from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

DAG_ID = "virnucpro_ingest"
PREFIX = "/virnucpro"  # of our application below Airflow's base URL
ROUTE = "virnucpro"  # of the page that Airflow shows it in


def base_path() -> str:
    """What Airflow's own paths begin with, behind a proxy say; "" at the root."""
    return urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")


def page_path(*parts: str) -> str:
    """The path of one of our pages."""
    return "/".join([f"{base_path()}{PREFIX}", *parts])


def framed_path(path: str) -> str:
    """The path of Airflow's page that shows one of ours beside the menu."""
    return f"{base_path()}/plugin/{ROUTE}{path}"


def task_path(run_id: str, task_id: str, map_index: int = -1) -> str:
    """The path of Airflow's own page of a task."""
    mapped = "" if map_index < 0 else f"/mapped/{map_index}"
    return f"{base_path()}/dags/{DAG_ID}/runs/{quote(run_id, safe='')}/tasks/{task_id}{mapped}"


class JobLink(BaseOperatorLink):
    """Leads from a task to the page of its job, or of all jobs of the run where it has several."""

    @property
    def name(self) -> str:
        return "VirNucPro job"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:
        files: Sequence[Any] = operator.files
        jobs = {file["job"] for file in files if file["job"] is not None}
        if len(jobs) == 1:
            return framed_path(page_path("jobs", str(jobs.pop())))
        return framed_path(f"{page_path('run')}?run_id={quote(ti_key.run_id, safe='')}")
