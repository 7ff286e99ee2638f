"""The page VirNucPro as Airflow mounts it, with Airflow's own logins: `pytest_plugins = ["tests.fixtures_page"]`.

def test_something(visit):
    assert visit("viewer").get("/virnucpro/").status_code == 200
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
from airflow import settings
from airflow.api_fastapi.app import get_auth_manager, init_auth_manager, purge_cached_app
from airflow.api_fastapi.auth.managers.base_auth_manager import COOKIE_NAME_JWT_TOKEN
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.models import import_all_models
from airflow.models.base import Base
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from uvicorn import Config, Server

from dags.connections import share_ledger
from dags.page.plugin import VirnucproPlugin
from tests import ledger_jobs as jobs
from tests.page_jobs import enter_job, run_job
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.stack.processes import choose_port

if TYPE_CHECKING:
    from tests.fixtures_browser import Browser

AUTH_MANAGER = "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager"

Visit = Callable[[str | None], TestClient]
TokenOf = Callable[[TestClient], dict[str, str]]


@pytest.fixture(scope="session")
def airflow_tables() -> None:
    """Airflow's own tables, empty, in the SQLite file of the session's home."""
    import_all_models()
    Base.metadata.create_all(settings.engine)


@pytest.fixture
def airflow(
    airflow_tables: None, settings_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FastAPI]:
    """An application with ours mounted as Airflow mounts it; ours is its `state.page`."""
    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", AUTH_MANAGER)
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "j" * 64)
    monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", "s" * 64)
    init_auth_manager()
    [mounted] = VirnucproPlugin().fastapi_apps
    airflow = FastAPI()
    airflow.mount(mounted["url_prefix"], mounted["app"])
    airflow.state.page = mounted["app"]
    yield airflow
    mounted["app"].state.verifier.close()
    if share_ledger.cache_info().currsize:
        share_ledger().dispose()
        share_ledger.cache_clear()
    purge_cached_app()


def make_login(role: str) -> str:
    """The cookie's value of a user with that role."""
    user = SimpleAuthManagerUser(username=f"a {role}", role=role.upper())
    return get_auth_manager().generate_jwt(user)


@pytest.fixture
def visit(airflow: FastAPI) -> Visit:
    """Makes a browser of somebody's: of a user with that role ("viewer", "user"), or of a stranger (None)."""

    def make_client(role: str | None) -> TestClient:
        client = TestClient(airflow, raise_server_exceptions=True)
        if role is not None:
            client.cookies.set(COOKIE_NAME_JWT_TOKEN, make_login(role))
        return client

    return make_client


@pytest.fixture
def page_url(airflow: FastAPI) -> Iterator[str]:
    """The page at an address that a real browser can open; `airflow.state.instead` is what it is answered with,
    if that is set: what a proxy says whose server is gone.
    """

    @airflow.middleware("http")
    async def answer(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return getattr(airflow.state, "instead", None) or await call_next(request)

    port = choose_port()
    server = Server(Config(airflow, host="127.0.0.1", port=port, log_level="warning"))
    thread = Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{port}/virnucpro/"
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield url
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def log_in(browser: Browser, page_url: str) -> Callable[[str], None]:
    """Logs the browser in as a user with that role ("viewer", "user")."""

    def set_cookie(role: str) -> None:
        cookie = {"name": COOKIE_NAME_JWT_TOKEN, "value": make_login(role), "url": page_url}
        browser.driver.execute_cdp_cmd("Network.setCookie", cookie)

    return set_cookie


@pytest.fixture
def token_of() -> TokenOf:
    """The headers that a page which this browser was given sends along."""

    def read(client: TestClient) -> dict[str, str]:
        html = client.get("/virnucpro/").text
        found = re.search(r"""hx-headers='\{"(X-CSRF-Token)": "([0-9a-f]{64})"\}'""", html)
        assert found
        return {found[1]: found[2]}

    return read


@pytest.fixture
def page_model(ledger: Engine) -> None:
    """The model "tiny" is in the ledger."""
    in_transaction(ledger, jobs.add_model)


@pytest.fixture
def slow_file(ledger: Engine, page_model: None, settings_environment: Callable[..., None]) -> Iterator[Path]:
    """Files of job 1, one of which is not read to its end before it is released."""
    path = run_job(ledger, enter_job(ledger))[0]
    path.unlink()
    os.mkfifo(path)
    yield path
    if path.exists():
        held = os.open(path, os.O_RDWR)
        path.unlink()  # the next one to read it would wait, too
        os.close(held)
