"""What Airflow loads: our application, the entry in its menu, the tab on a run."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from airflow.plugins_manager import AirflowPlugin

from dags.links import PREFIX, ROUTE, page_path

NAME = "VirNucPro"


class VirnucproPlugin(AirflowPlugin):
    """The page VirNucPro, by the entry point `airflow.plugins` of this package."""

    name = "virnucpro"
    external_views = [  # noqa: RUF012 - Airflow's own form
        {
            "name": NAME,
            "href": page_path(""),
            "destination": "nav",
            "url_route": ROUTE,
            "icon": page_path("static", "icon.svg"),
            "nav_top_level": True,
        },
        {
            "name": NAME,
            "href": f"{page_path('run')}?dag_id={{DAG_ID}}&run_id={{RUN_ID}}",
            "destination": "dag_run",
            "url_route": f"{ROUTE}-run",
        },
    ]

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Made when the API server asks: every other component loads plugins too, and needs none of it."""
        from dags.page.app import make_app

        return [{"app": make_app(), "url_prefix": PREFIX, "name": NAME}]
