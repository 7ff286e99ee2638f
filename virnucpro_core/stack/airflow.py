"""Airflow's part of the stack: its configuration, its four components, and its REST API.

`airflow standalone` is not used: its SIGTERM orphans its children, and it does not restart a dead one.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from configparser import RawConfigParser
from io import StringIO
from pathlib import Path
from typing import Any

import httpx

from virnucpro_core.errors import ServiceError
from virnucpro_core.stack.processes import (
    LOOPBACK,
    Secrets,
    inherited_environment,
    make_private_folder,
    read_tail,
    tied_to_parent,
    write_private,
)

COMPONENTS = {  # two of them serve no logs: these are on this disk, and that server would listen everywhere
    "api-server": [],
    "dag-processor": [],
    "scheduler": ["--skip-serve-logs"],
    "triggerer": ["--skip-serve-logs"],
}
HEALTH = {  # what the health page calls them
    "api-server": "metadatabase",
    "dag-processor": "dag_processor",
    "scheduler": "scheduler",
    "triggerer": "triggerer",
}
USER = "admin"
PARALLELISM = 4  # the default 32 forks as many idle processes; our tasks only register and wait


class Airflow:
    """Airflow with its home below `folder`.

    Args:
        folder: its home: configuration, passwords, task logs.
        port: loopback TCP port of its API and pages.
        secrets: where its keys and its user's password are kept.
        database_url: its own metadata database, never the ledger's.
        dags_folder: the DAG files.
    """

    def __init__(
        self, folder: Path, port: int, secrets: Secrets, *, database_url: str, dags_folder: Path
    ) -> None:
        self.folder = folder.absolute()
        self.url = f"http://{LOOPBACK}:{port}"
        self.port = port
        self.secrets = secrets
        self.database_url = database_url
        self.dags_folder = dags_folder.absolute()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to be part of this Airflow; no secrets."""
        return {"AIRFLOW_HOME": str(self.folder), "AIRFLOW_CONFIG": str(self.folder / "airflow.cfg")}

    def prepare(self) -> None:
        """Write the configuration and the login."""
        make_private_folder(self.folder)
        passwords = self.folder / "passwords.json"
        write_private(passwords, json.dumps({USER: self.secrets.read("airflow-admin")}))
        fernet_key = base64.urlsafe_b64encode(self.secrets.read("airflow-fernet")[:32].encode()).decode()
        parser = RawConfigParser()
        parser.read_dict(
            {
                "core": {
                    "dags_folder": self.dags_folder,
                    "executor": "LocalExecutor",
                    "parallelism": PARALLELISM,
                    "load_examples": False,
                    "dags_are_paused_at_creation": False,
                    "fernet_key": fernet_key,
                    "auth_manager": (
                        "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager"
                    ),
                    "simple_auth_manager_users": f"{USER}:admin",
                    "simple_auth_manager_passwords_file": passwords,
                    "execution_api_server_url": f"{self.url}/execution/",
                },
                "database": {
                    "sql_alchemy_conn": self.database_url,
                    # Airflow would choose asyncpg; psycopg speaks both, and is here already.
                    "sql_alchemy_conn_async": self.database_url,
                },
                "api": {
                    "host": LOOPBACK,
                    "port": self.port,
                    "base_url": self.url,
                    "workers": 1,
                    "secret_key": self.secrets.read("airflow-session"),
                },
                "api_auth": {"jwt_secret": self.secrets.read("airflow-jwt")},
                "dag_processor": {"refresh_interval": 10, "min_file_process_interval": 10},
                # How late Airflow may notice that a task's process has ended.
                "workers": {"min_heartbeat_interval": 1},
                "logging": {"base_log_folder": self.folder / "logs"},
                "usage_data_collection": {"enabled": False},
            }
        )
        text = StringIO()
        parser.write(text)
        # Airflow reads % as the start of a reference.
        write_private(self.folder / "airflow.cfg", text.getvalue().replace("%", "%%"))

    def commands(self) -> dict[str, list[str]]:
        """The command line of each component, by its name."""
        return {
            name: tied_to_parent([sys.executable, "-m", "airflow", name, *flags])
            for name, flags in COMPONENTS.items()
        }

    def migrate(self, log: Path) -> None:
        """Bring the metadata database's schema to this version.

        Raises:
            ServiceError: it failed; carries the end of its log.
        """
        with log.open("ab") as output:
            done = subprocess.run(
                tied_to_parent([sys.executable, "-m", "airflow", "db", "migrate"]),
                env=inherited_environment() | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            raise ServiceError(
                f"Airflow's database could not be migrated; the log ends:\n{read_tail(log)}\n",
                where=str(log),
                todo="Read its log.",
            )

    def is_healthy(self, component: str) -> bool:
        """Whether Airflow's own health page calls a component healthy."""
        return is_healthy(self.url, component)


def is_healthy(url: str, component: str) -> bool:
    """Whether the health page of the Airflow at `url` calls a component healthy."""
    try:
        # `trust_env` would have it asked for by way of a proxy.
        answer = httpx.get(f"{url}/api/v2/monitor/health", timeout=5, trust_env=False)
    except httpx.TransportError:
        return False
    if not answer.is_success:
        return False
    part = answer.json().get(HEALTH[component]) or {}
    return bool(part.get("status") == "healthy")


def log_in(url: str, password: str) -> httpx.Client:
    """A client of an Airflow's REST API (base /api/v2), logged in as the stack's user.

    Raises:
        ServiceError: the login was refused.
    """
    login = {"username": USER, "password": password}
    answer = httpx.post(f"{url}/auth/token", json=login, timeout=30, trust_env=False)
    if answer.is_error:
        raise ServiceError(f"Airflow refused the login ({answer.status_code})", where=url, todo="Restart it.")
    token = answer.json()["access_token"]
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=f"{url}/api/v2", headers=headers, timeout=30, trust_env=False)


def ask(client: httpx.Client, method: str, path: str, **body: Any) -> Any:
    """One call of the REST API.

    Raises:
        ServiceError: Airflow refused it; carries its answer.
    """
    answer = client.request(method, path, json=body or None)
    if answer.is_error:
        raise ServiceError(
            f"Airflow answered {answer.status_code} to {method} {path}: {answer.text[:500]}",
            where=str(client.base_url),
            todo="Read the API server's log.",
        )
    return answer.json()
