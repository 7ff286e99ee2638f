"""Templates: all that comes from inputs and errors is hostile text, and is escaped."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Request, Response, status
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dags.links import page_path
from virnucpro_core.formats import format_bytes, format_duration, format_time

FOLDER = Path(__file__).parent
BUSY_SECONDS, IDLE_SECONDS = 2, 10  # between two questions


@cache
def templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=format_duration, size=format_bytes, time=format_time)
    environment.globals["path"] = page_path
    return environment


def render(template: str, **values: Any) -> str:
    return templates().get_template(template).render(values)


def show(template: str, *, status_code: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(render(template, **values), status_code)


class Live:
    """A part of a page that asks again and again whether it is still true.

    Args:
        template: what is in it.
        url: of the view that answers; it has a query.
        busy: whether what is in it changes by itself: then it asks more often.
        values: for the template.
    """

    def __init__(self, template: str, url: str, *, busy: bool, **values: Any) -> None:
        self.inner = Markup(render(template, **values))  # noqa: S704 - the template has escaped it
        self.digest = hashlib.sha256(self.inner.encode()).hexdigest()[:16]
        self.url = url
        self.seconds = BUSY_SECONDS if busy else IDLE_SECONDS

    def __html__(self) -> str:
        return render("live.html", live=self)

    def answer(self, request: Request) -> Response:
        """The part, or nothing if the browser has it already: what is selected in it or focused stays so."""
        if request.query_params.get("seen") == self.digest:
            return Response(status_code=status.HTTP_204_NO_CONTENT)
        return HTMLResponse(self.__html__())
