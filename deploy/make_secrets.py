"""Makes what docker-compose.yml needs before its first start: secrets, and folders for data.

    python3 deploy/make_secrets.py                  what is missing; what is there stays
    python3 deploy/make_secrets.py --rotate all     new ones in place of the old (docs/operations.md says what next)
    python3 deploy/make_secrets.py --rotate worker
    python3 deploy/make_secrets.py --rotate fernet  a new key before the old one, by which kept values are still read
    python3 deploy/make_secrets.py --drop-old-keys  the end of that

Needs nothing but Python. Files have mode 0600 and belong to the user that the containers run as.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import secrets
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template

PROJECT = Path(__file__).resolve().parents[1]
USER = 1000  # of the containers, unless VIRNUCPRO_UID says otherwise
FOLDERS = {"INPUT_FOLDER": "data/input", "OUTPUT_FOLDER": "data/output", "MODELS_FOLDER": "data/models"}
FERNET = "airflow_fernet_key"
PASSWORDS = {  # what may be rotated by itself, and the files that its password is in
    "postgres": ["postgres_password"],
    "owner": ["owner_password", "owner_database_url"],
    "dag": ["dag_password", "dag_database_url"],
    "worker": ["worker_password", "worker_database_url"],
    "airflow": ["airflow_password", "airflow_database_url"],
    "broker": ["broker_password", "broker_url"],
    "sessions": ["airflow_session_key", "airflow_jwt_key"],
    "fernet": [FERNET],
    "logins": ["airflow_logins.json", "flower.conf", "grafana_password"],
}
ALL = [group for group in PASSWORDS if group != "fernet"]  # Airflow must write anew what that key hides
# As Compose reads a line of .env: quotes, or up to a comment.
ASSIGNMENT = re.compile(r"""\s*(?:export\s+)?(\w+)\s*=\s*(?:'([^']*)'|"([^"]*)"|(.*?)(?:\s+\#.*)?\s*$)""")


def make_token() -> str:
    """A secret that fits into URLs and configuration files as it is."""
    return secrets.token_urlsafe(48)


def make_contents(read: Callable[[str], str]) -> Mapping[str, Callable[[], str]]:
    """How each file is made; those below may read those above."""

    def database_url(role: str, database: str, password: str) -> Callable[[], str]:
        return lambda: f"postgresql+psycopg://{role}:{read(password)}@postgres:5432/{database}"

    return {
        **{
            f"{name}_password": make_token
            for name in ("postgres", "owner", "dag", "worker", "airflow", "broker")
        },
        **{
            f"{role}_database_url": database_url(f"virnucpro_{role}", "virnucpro", f"{role}_password")
            for role in ("owner", "dag", "worker")
        },
        "airflow_database_url": database_url("airflow", "airflow", "airflow_password"),
        "broker_url": lambda: f"redis://:{read('broker_password')}@broker:6379/0",
        FERNET: lambda: base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "airflow_session_key": make_token,
        "airflow_jwt_key": make_token,
        "airflow_logins.json": lambda: json.dumps({"admin": make_token()}),
        "flower.conf": lambda: f"address = '0.0.0.0'\nport = 5555\nbasic_auth = ['admin:{make_token()}']\n",
        "grafana_password": make_token,
    }


def write_private(path: Path, text: str, user: tuple[int, int]) -> None:
    """Write a file that only its owner may read. One that exists keeps its inode: containers have it mounted."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        if os.geteuid() == 0:
            os.fchown(descriptor, *user)
        file.write(text)


def make_secrets(folder: Path, user: tuple[int, int], rotate: list[str]) -> list[str]:
    """Write the secrets that are missing or to be rotated; returns their files' names.

    The Fernet key is not replaced: a new one comes before it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    groups = {*rotate, *ALL} - {"all"} if "all" in rotate else rotate
    due = {file for group in groups for file in PASSWORDS[group]}
    written = []
    for name, make in make_contents(lambda name: (folder / name).read_text()).items():
        there = (folder / name).exists() and (folder / name).stat().st_size > 0  # else its disk was full
        if name in due or not there:
            old = f",{(folder / name).read_text()}" if there and name == FERNET else ""
            write_private(folder / name, make() + old, user)
            written.append(name)
    if os.geteuid() == 0:
        os.chown(folder, *user)
    return written


def drop_old_keys(folder: Path, user: tuple[int, int]) -> None:
    """Leave the newest Fernet key alone."""
    newest, _, _ = (folder / FERNET).read_text().partition(",")
    write_private(folder / FERNET, newest, user)


def make_folder(folder: Path, user: tuple[int, int]) -> bool:
    """Make a folder of the containers' user, unless it is there."""
    if folder.exists():
        return False
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(folder, *user)
    return True


def read_variables(file: Path) -> dict[str, str]:
    """The variables of a .env file as Compose reads them, those of the environment before them."""
    variables: dict[str, str] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        if match := ASSIGNMENT.match(line):
            name, literal, quoted, plain = match.groups()
            known = defaultdict(str, variables | dict(os.environ))
            variables[name] = literal or Template(quoted or plain or "").safe_substitute(known)
    return variables | dict(os.environ)


def find_folder(variables: Mapping[str, str], name: str, default: str) -> Path:
    """The folder that a variable names, as Compose finds it: from the project's, and `~` is the home folder."""
    return PROJECT / Path(variables.get(name) or default).expanduser()


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Make the secrets and folders that docker-compose.yml needs."
    )
    parser.add_argument("--rotate", nargs="+", choices=[*PASSWORDS, "all"], default=[], help="replace these")
    parser.add_argument("--drop-old-keys", action="store_true", help="end a rotation of fernet")
    options = parser.parse_args()
    variables = read_variables(PROJECT / ".env")
    user = int(variables.get("VIRNUCPRO_UID") or USER), int(variables.get("VIRNUCPRO_GID") or USER)
    if os.geteuid() not in (0, user[0]):
        sys.stderr.write(
            f"The containers run as user {user[0]}, you are {os.geteuid()}: they could not read your secrets. "
            f"Set VIRNUCPRO_UID={os.geteuid()} and VIRNUCPRO_GID={os.getegid()} in .env, or run this as root.\n"
        )
        return 2
    folder = find_folder(variables, "SECRETS_FOLDER", "secrets")
    for name in make_secrets(folder, user, options.rotate):
        sys.stdout.write(f"written: {folder / name}\n")
    if options.drop_old_keys:
        drop_old_keys(folder, user)
        sys.stdout.write(f"the newest key alone is left: {folder / FERNET}\n")
    for variable, default in FOLDERS.items():
        place = find_folder(variables, variable, default)
        if make_folder(place, user):
            sys.stdout.write(f"made: {place}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
