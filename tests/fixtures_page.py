"""The page VirNucPro as Airflow mounts it, with Airflow's own logins: `pytest_plugins = ["tests.fixtures_page"]`.

def test_something(visit):
    assert visit("viewer").get("/virnucpro/").status_code == 200
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from airflow import settings
from airflow.api_fastapi.app import init_auth_manager, purge_cached_app
from airflow.api_fastapi.auth.managers.base_auth_manager import COOKIE_NAME_JWT_TOKEN
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.models import import_all_models
from airflow.models.base import Base
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dags.connections import share_ledger
from dags.page.plugin import VirnucproPlugin

AUTH_MANAGER = "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager"

Visit = Callable[[str | None], TestClient]
TokenOf = Callable[[TestClient], dict[str, str]]


@pytest.fixture(scope="session")
def airflow_tables() -> None:
    """Airflow's own tables, empty, in the SQLite file of the session's home."""
    import_all_models()
    Base.metadata.create_all(settings.engine)


@pytest.fixture
def visit(
    airflow_tables: None, settings_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Visit]:
    """Makes a browser of somebody's: of a user with that role ("viewer", "user"), or of a stranger (None)."""
    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", AUTH_MANAGER)
    monkeypatch.setenv("AIRFLOW__API_AUTH__JWT_SECRET", "j" * 64)
    monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", "s" * 64)
    manager = init_auth_manager()
    [mounted] = VirnucproPlugin().fastapi_apps
    airflow = FastAPI()
    airflow.mount(mounted["url_prefix"], mounted["app"])

    def make_client(role: str | None) -> TestClient:
        client = TestClient(airflow, raise_server_exceptions=True)
        if role is not None:
            user = SimpleAuthManagerUser(username=f"a {role}", role=role.upper())
            client.cookies.set(COOKIE_NAME_JWT_TOKEN, manager.generate_jwt(user))
        return client

    yield make_client
    mounted["app"].state.verifier.close()
    if share_ledger.cache_info().currsize:
        share_ledger().dispose()
        share_ledger.cache_clear()
    purge_cached_app()


@pytest.fixture
def token_of() -> TokenOf:
    """The headers that a page which this browser was given sends along."""

    def read(client: TestClient) -> dict[str, str]:
        html = client.get("/virnucpro/").text
        found = re.search(r"""hx-headers='\{"(X-CSRF-Token)": "([0-9a-f]{64})"\}'""", html)
        assert found
        return {found[1]: found[2]}

    return read
