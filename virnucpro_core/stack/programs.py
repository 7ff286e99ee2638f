"""The stack's own programs as supervisord runs them, each with the settings it needs and no others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from virnucpro_core.settings import PREFIX, Settings, is_kept_in_file
from virnucpro_core.stack.airflow import Airflow
from virnucpro_core.stack.postgres import PostgresServer
from virnucpro_core.stack.processes import LOOPBACK, Secrets, tied_to_parent, write_private
from virnucpro_core.stack.supervisor import Program
from virnucpro_core.stack.valkey import ValkeyServer

PROJECT = Path(__file__).resolve().parents[2]
SERVERS, SERVICES = "servers", "services"
FOLDERS = ("inbox", "output_root", "model_root")
FLOWER_USER = "admin"
FLOWER_COLUMNS = "args,state,received,started,runtime,worker,uuid"
"""Of its list of tasks. Job, file and chunk are in `args`, which it would not show."""

METRICS_PORT = 9464
WORKER_STOP_SECONDS = 60  # a chunk that takes longer is handed back


def server_programs(postgres: PostgresServer | None, valkey: ValkeyServer | None) -> list[Program]:
    """The embedded servers; None where a server of the user's own takes its place."""
    programs = []
    for name, server in (("postgres", postgres), ("valkey", valkey)):
        if server is not None:
            programs.append(
                Program(
                    name=name,
                    group=SERVERS,
                    argv=server.command(),
                    stop_signal=server.stop_signal,
                    settle_seconds=1,
                )
            )
    return programs


def airflow_programs(airflow: Airflow, environment: dict[str, str]) -> list[Program]:
    """Airflow's components, which reach the ledger as the role "dag"."""
    return [
        Program(
            name=name,
            group=SERVICES,
            argv=argv,
            environment=environment | airflow.environment,
            # Its child would otherwise be told only after ten seconds.
            signal_children=name == "triggerer",
        )
        for name, argv in airflow.commands().items()
    ]


def celery_programs(gpus: str, environment: dict[str, str]) -> list[Program]:
    """The workers and the relay, which reach the ledger as the role "worker"."""
    python = [sys.executable, "-m"]
    return [
        Program(
            name="workers",
            group=SERVICES,
            argv=tied_to_parent([*python, "workers.launcher", "--gpus", gpus]),
            environment=environment,
            stop_seconds=WORKER_STOP_SECONDS,
        ),
        Program(
            name="relay",
            group=SERVICES,
            argv=tied_to_parent([*python, "workers.relay"]),
            environment=environment,
        ),
    ]


def flower_program(folder: Path, port: int, secrets: Secrets, environment: dict[str, str]) -> Program:
    """Flower behind a generated login; its configuration file holds the password."""
    configuration = folder / "flower.conf"
    login = f"{FLOWER_USER}:{secrets.read('flower-admin')}"
    options = {"address": LOOPBACK, "port": port, "basic_auth": [login], "tasks_columns": FLOWER_COLUMNS}
    write_private(configuration, "".join(f"{name} = {value!r}\n" for name, value in options.items()))
    argv = [sys.executable, "-m", "celery", "-A", "workers.app", "flower", f"--conf={configuration}"]
    return Program(name="flower", group=SERVICES, argv=tied_to_parent(argv), environment=environment)


def metrics_program(port: int, environment: dict[str, str]) -> Program:
    """What Prometheus asks, which reads the ledger as the role "dag"."""
    argv = [sys.executable, "-m", "virnucpro_core.cli", "metrics", "--host", LOOPBACK, "--port", str(port)]
    return Program(name="metrics", group=SERVICES, argv=tied_to_parent(argv), environment=environment)


def common_environment(settings: Settings, gpus: str) -> dict[str, str]:
    """The settings that hold no secret, for every program."""
    values = {
        name: str(getattr(settings, name)) for name in settings.model_fields_set if not is_kept_in_file(name)
    }
    # The programs run in another folder.
    values |= {name: str(Path(getattr(settings, name)).absolute()) for name in FOLDERS}
    values["input_roots"] = os.pathsep.join(str(root.absolute()) for root in settings.input_roots)
    if gpus == "none":
        values.setdefault("dtype", "float32")  # all that a CPU computes
    return {f"{PREFIX}{name.upper()}": value for name, value in values.items()}


def file_environment(secrets: Secrets, **values: str) -> dict[str, str]:
    """Settings that hold a secret, or what an environment cannot hold, each as the file that it is kept in."""
    return {f"{PREFIX}{name.upper()}_FILE": str(secrets.write(name, value)) for name, value in values.items()}
