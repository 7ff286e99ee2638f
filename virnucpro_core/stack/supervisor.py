"""supervisord: starts, watches and stops the stack's processes; asked over a private unix socket."""

from __future__ import annotations

import math
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable, Mapping
from configparser import RawConfigParser
from contextlib import suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import structlog
from supervisor.xmlrpc import SupervisorTransport

from virnucpro_core.errors import ServiceError, SettingsError
from virnucpro_core.stack.description import SOCKET
from virnucpro_core.stack.processes import (
    POLL_SECONDS,
    SUPERVISORD_PID,
    inherited_environment,
    read_tail,
    tied_to_parent,
    wait_until,
    write_private,
)

LONGEST_SOCKET_NAME = 96  # bytes; the kernel takes 107, and supervisord appends its process id for a moment
ENDED = ("FATAL", "EXITED", "STOPPED", "UNKNOWN")
START_RETRIES = 1_000_000  # supervisord's default of 3 would end a service for good in an outage of 15 s
FIRST_START_SECONDS = 5.0  # beyond its `settle_seconds`; what four tries of a program take that ends at once

UCRED = struct.Struct("3i")  # what the kernel tells of who listens on a unix socket: process, user, group

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process of the stack.

    Attributes:
        group: programs of one group stop together; the group "servers" stops last.
        stop_seconds: after the stop signal, before SIGKILL to the whole process group.
        signal_children: whether its children get the stop signal too, rather than from their parent.
        settle_seconds: one that ends sooner after its start waits before it is started again, a second longer
            each time.
    """

    name: str
    group: str
    argv: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: int = 30
    signal_children: bool = False
    settle_seconds: int = 10


class Supervisor:
    """The supervisord below `folder`: at most one, found by its socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.configuration = self.folder / "supervisord.conf"
        self.socket = self.folder / SOCKET
        self.groups: dict[str, str] = {}
        self.settle_seconds: dict[str, int] = {}
        self.first_start_ends: dict[str, float] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def log_of(self, program: str) -> Path:
        """The log file of a program, or of supervisord itself."""
        return self.folder / "logs" / f"{program}.log"

    def launch(self, programs: Iterable[Program], *, working_folder: Path, detached: bool) -> None:
        """Start supervisord, and none of the programs yet.

        Args:
            programs: what it is to run.
            working_folder: the programs' current directory; they import its packages, installed or not.
            detached: it outlives this process; otherwise it stops all when this process dies, however.

        Raises:
            SettingsError: the folder's name is too long for a unix socket.
            ServiceError: supervisord did not start.
        """
        if len(bytes(self.socket)) > LONGEST_SOCKET_NAME:
            raise SettingsError(
                "the state folder's name is too long for a unix socket",
                where=str(self.folder),
                todo="Move the project, or name a state folder nearer to the root.",
            )
        programs = list(programs)
        self.settle_seconds = {program.name: program.settle_seconds for program in programs}
        self.log_of("supervisord").parent.mkdir(exist_ok=True)
        write_private(self.configuration, self._describe(programs, working_folder))
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.configuration)]
        argv = ["sh", "-c", f'export {SUPERVISORD_PID}=$$; exec "$@"', "supervisord", *command]
        with self.log_of("supervisord").open("ab") as output:
            self.process = process = subprocess.Popen(
                argv if detached else tied_to_parent(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=inherited_environment(),
                start_new_session=True,  # a terminal's Ctrl-C is for us alone: we stop it in order
            )
        try:
            wait_until(
                self.is_running,
                name="supervisord",
                log=self.log_of("supervisord"),
                seconds=30,
                alive=lambda: process.poll() is None,
            )
        except BaseException:
            process.terminate()
            process.wait()
            raise

    def is_running(self) -> bool:
        """Whether a supervisord listens on the socket; also one that is ending, and answers no question any more."""
        return self._find() is not None

    def start(self, program: str) -> None:
        """Start a program; `states` tells what became of it."""
        wait = False
        self._ask("startProcess", self._full_name(program), wait)
        seconds = self.settle_seconds[program] + FIRST_START_SECONDS
        self.first_start_ends[program] = time.monotonic() + seconds

    def states(self) -> dict[str, str]:
        """Each program's state: STOPPED, STARTING, RUNNING, BACKOFF, STOPPING, EXITED, FATAL, UNKNOWN."""
        return {info["name"]: info["statename"] for info in self._ask("getAllProcessInfo")}

    def is_alive(self, program: str) -> bool:
        """Whether a program runs or is being started.

        One that we started, and that still fails when `FIRST_START_SECONDS` are over, counts as ended: whoever
        waits for it gives it up. supervisord itself tries for ever, so that what was up once outlives an outage.
        """
        state = self.states()[program]
        if state == "BACKOFF":
            return time.monotonic() < self.first_start_ends.get(program, math.inf)
        return state not in ENDED

    def pid(self, program: str) -> int:
        """The process id of a program, 0 where it does not run."""
        return int(self._ask("getProcessInfo", self._full_name(program))["pid"])

    def shutdown(self, seconds: float = 120.0) -> None:
        """Stop every program and supervisord, if it runs; returns when no process of theirs is left."""
        supervisord = self._find()
        if supervisord is None:
            return
        family = [supervisord, *children_of(supervisord)]
        with suppress(psutil.NoSuchProcess):
            supervisord.terminate()
        deadline = time.monotonic() + seconds
        while is_alive(supervisord) and time.monotonic() < deadline:
            # A program may start processes while it stops: they are ours to see gone too.
            family += [child for child in children_of(supervisord) if child not in family]
            time.sleep(POLL_SECONDS)
        for process in filter(is_alive, family):
            log.warning("process outlived its stop and is killed", pid=process.pid, command=name_of(process))
            kill(process)
        if self.process is not None:
            self.process.wait()
        psutil.wait_procs(family, timeout=10)

    def _find(self) -> psutil.Process | None:
        """The supervisord that listens on the socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
                credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
                return psutil.Process(UCRED.unpack(credentials)[0])
            except (OSError, psutil.NoSuchProcess):
                return None

    def _full_name(self, program: str) -> str:
        if not self.groups:
            self.groups = {info["name"]: info["group"] for info in self._ask("getAllProcessInfo")}
        return f"{self.groups[program]}:{program}"

    def _ask(self, method: str, *arguments: object) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport)
        try:
            return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as fault:
            raise ServiceError(
                f"supervisord refused {method} {' '.join(map(str, arguments))}: {fault.faultString}",
                where=str(self.socket),
                todo=f"Its log ends:\n{read_tail(self.log_of('supervisord'))}",
            ) from fault
        except OSError as error:
            raise ServiceError(
                f"supervisord does not answer: {error.strerror or error}",
                where=str(self.socket),
                todo="Start the stack with `make up`.",
            ) from error
        finally:
            transport.close()

    def _describe(self, programs: list[Program], working_folder: Path) -> str:
        parser = RawConfigParser()
        parser["unix_http_server"] = {"file": escape(str(self.socket)), "chmod": "0700"}
        parser["rpcinterface:supervisor"] = {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        }
        parser["supervisord"] = {
            "nodaemon": "true",
            "silent": "true",
            "logfile": escape(str(self.log_of("supervisord"))),
            "pidfile": escape(str(self.folder / "supervisord.pid")),
            "childlogdir": escape(str(self.folder / "logs")),
            "umask": "027",
            "environment": escape(escape(f"PYTHONPATH={quote(str(working_folder))}")),  # it is expanded twice
        }
        for program in programs:
            pairs = [f"{name}={quote(value)}" for name, value in program.environment.items()]
            parser[f"program:{program.name}"] = {
                "command": escape(shlex.join(program.argv)),
                "directory": escape(str(working_folder)),
                "environment": escape(",".join(pairs)),
                "autostart": "false",
                "autorestart": "true",
                "startsecs": str(program.settle_seconds),
                "startretries": str(START_RETRIES),
                "stopsignal": program.stop_signal.name.removeprefix("SIG"),
                "stopwaitsecs": str(program.stop_seconds),
                "stopasgroup": str(program.signal_children).lower(),
                "killasgroup": "true",
                "redirect_stderr": "true",
                "stdout_logfile": escape(escape(str(self.log_of(program.name)))),  # so is this
                "stdout_logfile_maxbytes": "20MB",
                "stdout_logfile_backups": "2",
            }
        for group in sorted({program.group for program in programs}):
            parser[f"group:{group}"] = {
                "programs": ",".join(program.name for program in programs if program.group == group),
                # supervisord stops the groups of the highest number first.
                "priority": "1" if group == "servers" else "2",
            }
        text = StringIO()
        parser.write(text)
        return text.getvalue()


def escape(text: str) -> str:
    """A value as supervisord's configuration wants it: it expands %(name)s."""
    return text.replace("%", "%%")


def quote(text: str) -> str:
    """A value in supervisord's `environment`, whose lexer knows quotes but no way to escape them.

    Raises:
        SettingsError: the configuration has no way to write it.
    """
    if '"' in text or "\n" in text or " ;" in text or " #" in text or text.strip("'") != text:
        raise SettingsError(
            "supervisord's configuration cannot hold this value",
            where=text,
            todo="Avoid double quotes, ' ;' and ' #' in the names of folders.",
        )
    return f'"{text}"'


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie, whom only its parent can remove, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(process: psutil.Process) -> None:
    """SIGKILL, unless the process ended by itself in this moment."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """All processes below a process, or none if it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def name_of(process: psutil.Process) -> str:
    """A process's command line, for a log."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "(ended)"
