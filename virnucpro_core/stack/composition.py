"""What a stack consists of, from the settings: servers of ours or the user's, programs, logins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psycopg
import structlog

from virnucpro_core.errors import ServiceError, SettingsError
from virnucpro_core.gpus import choose_gpus, visible_gpus
from virnucpro_core.settings import PREFIX, DatabaseRole, Settings
from virnucpro_core.stack.airflow import USER as AIRFLOW_USER
from virnucpro_core.stack.airflow import Airflow
from virnucpro_core.stack.description import Description
from virnucpro_core.stack.postgres import LedgerUrls, PostgresServer
from virnucpro_core.stack.processes import LOOPBACK, Secrets, choose_port, write_private
from virnucpro_core.stack.programs import (
    FLOWER_USER,
    METRICS_PORT,
    PROJECT,
    airflow_programs,
    celery_programs,
    common_environment,
    file_environment,
    flower_program,
    metrics_program,
    server_programs,
)
from virnucpro_core.stack.supervisor import Program
from virnucpro_core.stack.valkey import ValkeyServer

PORTS = {"postgres": 55432, "valkey": 56379, "airflow": 8080, "flower": 5555, "metrics": METRICS_PORT}
ROLES: tuple[DatabaseRole, ...] = ("owner", "dag", "worker")
LEDGER_DATABASE = "virnucpro"
AIRFLOW_DATABASE = "airflow"  # its role's name too

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The parts of one stack.

    Attributes:
        postgres, valkey: servers of ours, None where the settings name the user's own.
        ledger_urls: the ledger's URL for each role.
        programs: all that supervisord is to run.
        description: what other processes may know.
    """

    postgres: PostgresServer | None
    valkey: ValkeyServer | None
    airflow: Airflow
    ledger_urls: LedgerUrls
    programs: list[Program]
    description: Description


def compose(settings: Settings, folder: Path, *, gpus: str, fixed_ports: bool) -> Composition:
    """Choose the parts of a stack and write their configuration below `folder`; starts nothing.

    Raises:
        SettingsError: the settings name some servers but not all that belong together, or `gpus` is wrong.
        ExecutionError: a GPU is not there.
    """
    gpus = gpus_or_cpu(gpus)
    ports = {name: choose_port(port if fixed_ports else None) for name, port in PORTS.items()}
    secrets = Secrets(folder / "secrets")
    postgres = None
    if needs_postgres(settings):
        postgres = PostgresServer(folder / "postgres", ports["postgres"], secrets)
    valkey = None
    if settings.broker_url is None:
        valkey = ValkeyServer(folder / "valkey", ports["valkey"], secrets)
    airflow = Airflow(
        folder / "airflow",
        ports["airflow"],
        secrets,
        database_url=choose_airflow_database(settings, postgres),
        dags_folder=PROJECT / "dags",
    )
    airflow.prepare()
    ledger_urls = choose_ledger_urls(settings, postgres)
    flower_url = f"http://{LOOPBACK}:{ports['flower']}"
    metrics_url = f"http://{LOOPBACK}:{ports['metrics']}/metrics"

    common = common_environment(settings, gpus)
    owner, dag, worker = (
        file_environment(secrets, **{f"{role}_database_url": ledger_urls[role]}) for role in ROLES
    )
    broker = file_environment(secrets, broker_url=valkey.url() if valkey else settings.require_broker_url())
    notices = file_environment(secrets, notifier_options=json.dumps(settings.notifier_options))
    programs = [
        *server_programs(postgres, valkey),
        *airflow_programs(airflow, common | dag | notices),
        *celery_programs(gpus, common | worker | broker),
        flower_program(folder, ports["flower"], secrets, common | broker),
        metrics_program(ports["metrics"], common | dag),
    ]
    description = Description(
        urls={"Airflow": airflow.url, "Flower": flower_url, "Metrics": metrics_url},
        logins=str(write_logins(folder, secrets, airflow.url, flower_url)),
        environment=common | owner | dag | worker | broker,
    )
    return Composition(
        postgres=postgres,
        valkey=valkey,
        airflow=airflow,
        ledger_urls=ledger_urls,
        programs=programs,
        description=description,
    )


def has_ledger(settings: Settings) -> bool:
    """Whether the settings name a ledger of the user's own."""
    return any(
        (
            settings.database_url,
            settings.owner_database_url,
            settings.dag_database_url,
            settings.worker_database_url,
        )
    )


def needs_postgres(settings: Settings) -> bool:
    """Whether a PostgreSQL of ours has to run.

    Raises:
        SettingsError: the ledger is elsewhere, and nothing says where Airflow's own database is.
    """
    if not has_ledger(settings):
        return True
    if settings.airflow_database_url is None:
        raise SettingsError(
            "the ledger is on a server of yours, but no database is named for Airflow's own tables",
            where=f"{PREFIX}AIRFLOW_DATABASE_URL",
            todo="Set it to the URL of another, empty database (Airflow must not share the ledger's).",
        )
    return False


def choose_ledger_urls(settings: Settings, postgres: PostgresServer | None) -> LedgerUrls:
    """The ledger's URL for each role, on the user's server or on ours."""
    if has_ledger(settings) or postgres is None:
        return {role: settings.database_url_for(role) for role in ROLES}
    return postgres.ledger_urls(LEDGER_DATABASE)


def choose_airflow_database(settings: Settings, postgres: PostgresServer | None) -> str:
    """The URL of Airflow's metadata database."""
    if settings.airflow_database_url is not None:
        return settings.airflow_database_url.get_secret_value()
    assert postgres is not None, "needs_postgres starts one where no URL is set"
    return postgres.url(AIRFLOW_DATABASE, AIRFLOW_DATABASE)


def provision(postgres: PostgresServer) -> None:
    """Make the databases and roles of the ledger and of Airflow on our running server, where missing.

    Raises:
        ServiceError: it cannot; its disk may be full.
    """
    try:
        postgres.create_ledger_database(LEDGER_DATABASE)
        postgres.create_role(AIRFLOW_DATABASE)
        postgres.create_database(AIRFLOW_DATABASE, owner=AIRFLOW_DATABASE)
    except psycopg.Error as error:
        raise ServiceError(
            f"the databases cannot be made: {str(error).splitlines()[0]}",
            where=str(postgres.folder),
            todo="Mend what it says, and try again.",
        ) from error


def gpus_or_cpu(gpus: str) -> str:
    """What `--gpus` of the workers is to be: "none" where all GPUs are asked for and none is visible.

    Raises:
        SettingsError: the workers would refuse it.
        ExecutionError: it names a GPU that is not there.
    """
    visible = visible_gpus()
    if gpus == "all" and not visible:
        log.warning("no NVIDIA GPU is visible: the CPU computes, in float32")
        return "none"
    choose_gpus(gpus, visible)
    return gpus


def write_logins(folder: Path, secrets: Secrets, airflow_url: str, flower_url: str) -> Path:
    """The file that tells a person how to log in."""
    path = folder / "logins"
    write_private(
        path,
        f"Airflow  {airflow_url}  user {AIRFLOW_USER}  password {secrets.read('airflow-admin')}\n"
        f"Flower   {flower_url}  user {FLOWER_USER}  password {secrets.read('flower-admin')}\n",
    )
    return path
