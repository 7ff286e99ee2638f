"""The images of a deployment: pulled where a registry can be reached, else stand-ins made of Debian's packages."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

from tests.compose.engine import Engine
from virnucpro_core.stack.processes import LOOPBACK, choose_port

PROJECT = Path(__file__).resolve().parents[2]
DOCKERFILES = Path(__file__).parent / "stand_ins"
STAND_IN = "virnucpro-stand-in"
SUITE = "bookworm"
PACKAGES = "ca-certificates,python3,python3-dev,python3-venv"
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
PULL_SECONDS = 120
INDEX_PORT = 38417  # always the same, where it is free: another URL would have everything installed again
SERVERS = {  # the variable of docker-compose.yml, and our stand-in; for Grafana there is none
    "POSTGRES_IMAGE": "postgres",
    "BROKER_IMAGE": "broker",
    "PROMETHEUS_IMAGE": "prometheus",
}


def default_image(variable: str) -> str:
    """The image that docker-compose.yml takes where a variable names no other."""
    (name,) = set(re.findall(rf"\$\{{{variable}:-(.*?)}}", (PROJECT / "docker-compose.yml").read_text()))
    return str(name)


def can_pull(engine: Engine, image: str) -> bool:
    """Whether an image is there, or a registry gives it."""
    if engine.has_image(image):
        return True
    try:
        done = subprocess.run(
            ["docker", "pull", "--quiet", image],
            env=engine.environment,
            capture_output=True,
            timeout=PULL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def make_debian(engine: Engine) -> str:
    """A Debian with Python, as python:3.11-slim-bookworm is one, that trusts whom this machine trusts."""
    name = f"{STAND_IN}/python:{SUITE}"
    if engine.has_image(name):
        return name
    with tempfile.TemporaryDirectory(prefix="debian-") as folder:
        engine.run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, folder)
        ours = Path("/") / CERTIFICATES
        if ours.exists():
            (Path(folder) / CERTIFICATES).write_bytes(ours.read_bytes())
        engine.run(
            *("sh", "-euc", 'tar -C "$1" -c . | docker import -c "ENV PIP_CERT=/$2" - "$3"', "sh"),
            *(folder, str(CERTIFICATES), name),
        )
    return name


def make_servers(engine: Engine) -> dict[str, str]:
    """The variables of docker-compose.yml that name images of servers, those alone that are stand-ins."""
    stand_ins = {}
    for variable, name in SERVERS.items():
        if can_pull(engine, default_image(variable)):
            continue
        stand_ins[variable] = f"{STAND_IN}/{name}:{SUITE}"
        dockerfile = DOCKERFILES / f"{name}.Dockerfile"
        engine.build(
            stand_ins[variable],
            DOCKERFILES,
            "--build-arg",
            f"BASE={make_debian(engine)}",
            "--file",
            str(dockerfile),
        )
    return stand_ins


@contextmanager
def build_variables(engine: Engine) -> Iterator[dict[str, str]]:
    """The variables of docker-compose.yml that the project's image can be built with here."""
    base = {} if can_pull(engine, default_image("BASE_IMAGE")) else {"BASE_IMAGE": make_debian(engine)}
    torch = {name: os.environ[name] for name in ("TORCH_INDEX",) if name in os.environ}
    with served_indexes() as indexes:
        yield {**base, **torch, **indexes}


@contextmanager
def served_indexes() -> Iterator[dict[str, str]]:
    """Where this machine's pip finds packages, as variables; folders of this machine are served by HTTP."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    values: dict[str, str] = {}
    for line in told.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("index-url", "extra-index-url", "find-links"):
            values[f"PIP_{name.upper().replace('-', '_')}"] = ast.literal_eval(value)
    folders: list[Path] = []

    class Handler(SimpleHTTPRequestHandler):
        """`/k/…` is below the k-th folder."""

        def translate_path(self, path: str) -> str:
            number, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
            folder = folders[int(number)]
            found = (folder / rest).resolve()
            return str(found if found.is_relative_to(folder.resolve()) else folder / "no such file")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((LOOPBACK, choose_port(INDEX_PORT)), Handler)
    Thread(target=server.serve_forever, daemon=True).start()

    def serve(place: str) -> str:
        folder = Path(unquote(urlsplit(place).path)) if place.startswith("file://") else Path(place)
        if "://" in place.removeprefix("file://") or not folder.is_dir():
            return place
        folders.append(folder.parent)  # an index's pages link to files beside it
        return f"http://{LOOPBACK}:{server.server_port}/{len(folders) - 1}/{folder.name}/"

    try:
        yield {name: " ".join(map(serve, value.split())) for name, value in values.items()}
    finally:
        server.shutdown()
        server.server_close()
