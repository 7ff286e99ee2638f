"""Health checks of services, for containers and monitors: exit 0 if a service does its work."""

from __future__ import annotations

from typing import Annotated

import typer

from virnucpro_core.cli.services import PANEL, become
from virnucpro_core.errors import ServiceError
from virnucpro_core.queues import QUEUES

health = typer.Typer(no_args_is_help=True, help="Whether a service does its work: exit 0 if so, 5 if not.")


def add_commands(app: typer.Typer) -> None:
    app.add_typer(health, name="health", rich_help_panel=PANEL)


@health.command()
def worker(
    queues: Annotated[
        str, typer.Option(metavar="NAMES", help="The queues that workers of this host must consume.")
    ] = ",".join(QUEUES),
) -> None:
    """Whether this host's workers consume: fresh heartbeats in the ledger, and Celery nodes that answer."""
    become("workers.health", "worker", "--queues", queues)


@health.command()
def relay() -> None:
    """Whether a relay serves the ledger: it holds the lock, nothing due is left, the broker answers."""
    become("workers.health", "relay")


@health.command()
def airflow(
    component: Annotated[
        str, typer.Argument(metavar="NAME", help="api-server, dag-processor, scheduler or triggerer.")
    ],
    url: Annotated[
        str, typer.Option(metavar="URL", help="Where Airflow's API server is.")
    ] = "http://localhost:8080",
) -> None:
    """Whether Airflow's health page calls one of its components healthy, by the component's heartbeat."""
    from virnucpro_core.stack.airflow import HEALTH, is_healthy

    if component not in HEALTH:
        raise typer.BadParameter(f"there is no component {component!r}: name one of {', '.join(HEALTH)}")
    if not is_healthy(url, component):
        raise ServiceError(f"Airflow's {component} is not healthy", where=url, todo="Read its log.")
    print(f"{component}: healthy")
