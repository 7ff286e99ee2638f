"""The application behind the page, as Airflow mounts it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast
from urllib.parse import urlencode

import structlog
from fastapi import FastAPI, Request, Response, status
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from dags.links import base_path
from dags.page import actions, views
from dags.page.rendering import FOLDER, show
from dags.page.security import add_headers
from dags.page.verifying import Verifier
from virnucpro_core.errors import JobError, ServiceError, SettingsError, VirnucproError

log = structlog.get_logger()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.verifier.close()


def make_app() -> FastAPI:
    """The application. Airflow's own, around it, renews logins; ours asks who may do what."""
    app = FastAPI(title="VirNucPro", lifespan=lifespan, openapi_url=None)
    app.state.verifier = Verifier()
    app.middleware("http")(add_headers)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"))
    app.include_router(views.router)
    app.include_router(actions.router)
    app.add_exception_handler(HTTPException, cast("Any", refuse))
    app.add_exception_handler(RequestValidationError, cast("Any", misunderstand))
    app.add_exception_handler(VirnucproError, cast("Any", explain))
    return app


def refuse(request: Request, error: HTTPException) -> Response:
    """Say why a request is refused, be it by Airflow, by us or for want of such a page, and where to log in."""
    login = ""
    if error.status_code == status.HTTP_401_UNAUTHORIZED:
        login = f"{base_path()}/api/v2/auth/login?{urlencode({'next': str(request.url)})}"
    answer = show_error(request, error.status_code, str(error.detail), login=login)
    answer.headers.update(error.headers or {})
    if login:
        answer.headers["HX-Refresh"] = "true"  # a page whose login has expired
    return answer


def misunderstand(request: Request, error: RequestValidationError) -> Response:
    """Say what is wrong with an address."""
    faults = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
    return show_error(request, status.HTTP_422_UNPROCESSABLE_CONTENT, f"This address is wrong. {faults}")


def explain(request: Request, error: VirnucproError) -> Response:
    """Say what our own errors say."""
    if isinstance(error, ServiceError | SettingsError):
        log.error("the page cannot be shown", path=request.url.path, error=str(error))
        return show_error(request, status.HTTP_503_SERVICE_UNAVAILABLE, str(error))
    if isinstance(error, JobError):
        code = status.HTTP_404_NOT_FOUND if request.method == "GET" else status.HTTP_409_CONFLICT
        return show_error(request, code, str(error))
    return show_error(request, status.HTTP_400_BAD_REQUEST, str(error))


def show_error(request: Request, status_code: int, text: str, *, login: str = "") -> Response:
    """A page, or a notice for a part of one."""
    template = "notice.html" if "HX-Request" in request.headers else "error.html"
    return show(template, status_code=status_code, text=text, login=login)
