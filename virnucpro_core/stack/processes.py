"""Ports, secrets and child processes, as the embedded servers and the stack share them."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from virnucpro_core.errors import ServiceError
from virnucpro_core.features.files import new_file
from virnucpro_core.settings import PREFIX

LOOPBACK = "127.0.0.1"
SECRET_BYTES = 48  # 64 characters, what the signatures of Airflow's tokens want
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SUPERVISORD_PID = "SUPERVISORD_PID"  # of the environment that supervisord hands on
# A parent that died before the tie was made gives no signal: whoever has another parent by then is an orphan.
# No blank before a semicolon: supervisord's configuration would take the rest for a comment.
RUN_UNLESS_ORPHANED = (
    f'test "$PPID" = "$1" || test "$PPID" = "${SUPERVISORD_PID}" || '
    '{ echo "not started: its parent has died" >&2; exit 1; }; shift; exec "$@"'
)
# How they begin; those of Airflow and Flower may be meant for one of the user's own.
SETTINGS = (PREFIX, "AIRFLOW__", "FLOWER_")
STOP_SECONDS = 30.0  # after the stop signal, before SIGKILL
POLL_SECONDS = 0.2


def choose_port(preferred: int | None = None) -> int:
    """A loopback TCP port nobody listens on: `preferred` where it is free, else any.

    As long as this process lives, nobody else who asks here for that port, or for any, gets this one: a server takes
    its time to listen.
    """
    for port in (preferred, 0):
        if port is None or not (port == 0 or claim_port(port)):
            continue
        with socket.socket() as probe:
            # Servers set it too: without it, connections in TIME_WAIT of a stack just stopped would count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            chosen = int(probe.getsockname()[1])
            # Bound and never closed, it keeps the kernel from giving the port to whoever asks for any; as it does not
            # listen, it keeps nobody from listening who names the port.
            probe.detach()
            return chosen
    raise ServiceError("no TCP port is free on the loopback interface", todo="Stop what holds them.")


def claim_port(port: int) -> bool:
    """Keep other stacks that start now from this port; False if one of them has it."""
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            # A name without a file, which the kernel drops with this process.
            claim.bind(f"\0virnucpro-port-{port}")
        except OSError:
            return False
        claim.detach()
        return True


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whatever the umask and whatever lay there before.

    Whoever reads it meanwhile finds the old content or the new.

    Raises:
        ArtifactError: it cannot be written.
    """
    with new_file(path, mode=0o600) as file:
        file.write(text.encode())


def make_private_folder(path: Path) -> Path:
    """Make a folder that only its owner may enter."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


class Secrets:
    """Generated passwords and keys, one file of mode 0600 each; made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_private_folder(folder)

    def path(self, name: str) -> Path:
        """The file of a secret, which exists when this returns."""
        path = self.folder / name
        if not path.exists():
            write_private(path, secrets.token_urlsafe(SECRET_BYTES))
        return path

    def read(self, name: str) -> str:
        """The secret itself."""
        return self.path(name).read_text()

    def write(self, name: str, text: str) -> Path:
        """Keep a secret made elsewhere (a URL with a password in it)."""
        write_private(self.folder / name, text)
        return self.folder / name


def inherited_environment() -> dict[str, str]:
    """This process's environment for the stack's programs: without settings, which each is given its own of.

    Where it names a proxy, they reach each other without it.
    """
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    direct = f"{named},{LOOPBACK}" if named else LOOPBACK
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return kept | {"no_proxy": direct, "NO_PROXY": direct}


def tied_to_parent(argv: Sequence[str], stop_signal: signal.Signals = signal.SIGTERM) -> list[str]:
    """A command line whose process gets `stop_signal` when its parent dies, even by SIGKILL.

    Its parent is this process, or the supervisord that is told to run it.
    """
    tie = ["setpriv", "--pdeathsig", stop_signal.name.removeprefix("SIG")]
    return [*tie, "sh", "-c", RUN_UNLESS_ORPHANED, "tied", str(os.getpid()), *argv]


def die_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGTERM (as `make` sends it when it is stopped) and SIGHUP (its terminal is closed) unwind like Ctrl-C.

    So everything is stopped. A signal that is ignored, as by `nohup`, stays so.
    """
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def read_tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log file, for an error message."""
    if not log.exists():
        return "(no log)"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        return b"\n".join(file.read().splitlines()[-lines:]).decode(errors="replace")


def wait_until(
    ready: Callable[[], bool], *, name: str, log: Path, seconds: float, alive: Callable[[], bool]
) -> None:
    """Ask a service until it answers.

    Raises:
        ServiceError: its process ended or the time is over; carries the end of its log.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if not alive():
            reason = f"{name} ended while starting"
        elif time.monotonic() > deadline:
            reason = f"{name} was not ready within {seconds:.0f} s"
        else:
            time.sleep(POLL_SECONDS)
            continue
        raise ServiceError(
            f"{reason}; its log ends:\n{read_tail(log)}\n", where=str(log), todo="Read its log."
        )


class ServerProcess:
    """A server run directly as a child of this process: no supervisor, for tests and short uses."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        stop_signal: signal.Signals = signal.SIGTERM,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.argv = argv
        self.log = log
        self.stop_signal = stop_signal
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ready: Callable[[], bool], seconds: float = 60.0) -> None:
        """Start it and return when it answers; a server that does not is stopped again.

        Raises:
            ServiceError: as `wait_until`.
        """
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                # Ctrl-C in a terminal reaches the whole foreground group, but we stop our servers in order.
                start_new_session=True,
            )
        self.process = process
        try:
            wait_until(
                ready, name=self.name, log=self.log, seconds=seconds, alive=lambda: process.poll() is None
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it; returns when it is gone."""
        if self.process is None:
            return
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None

    def kill(self) -> None:
        """Kill it without warning, as a fault."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
