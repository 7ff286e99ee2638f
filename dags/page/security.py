"""Who may see the page and who may act on it, as Airflow's own permissions say; and from where.

Airflow does not guard a plugin's application: without the dependencies here it would be open to everybody.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag
from airflow.configuration import conf
from airflow.models.dag import DagModel
from fastapi import Depends, Header, HTTPException, Request, Response, status

from dags.links import DAG_ID

TOKEN_HEADER = "X-CSRF-Token"  # noqa: S105 - a name

HEADERS = {
    # Everything comes from here, scripts and styles from files of ours; Airflow alone may frame it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}

MAY_READ = Depends(requires_access_dag("GET", param_dag_id=DAG_ID))
"""Whoever may read the DAG."""


def make_token(user: BaseUser) -> str:
    """What proves that a request comes from a page that this user was given."""
    secret = conf.get_mandatory_value("api", "secret_key").encode()
    return hmac.digest(secret, f"virnucpro page {user.get_id()}".encode(), "sha256").hex()


def check_token(user: GetUserDep, token: Annotated[str, Header(alias=TOKEN_HEADER)] = "") -> None:
    """Refuse a request that another site made the user's browser send.

    Raises:
        HTTPException: 403, the token is missing or not this user's.
    """
    if not hmac.compare_digest(token.encode(), make_token(user).encode()):
        raise HTTPException(
            status.HTTP_403_FORBIDDEN, "This request does not come from the page. Load the page again."
        )


MAY_ACT = [Depends(requires_access_dag("POST", DagAccessEntity.RUN, DAG_ID)), Depends(check_token)]
"""Whoever may trigger the DAG, from a page that we gave them."""


def may_act(user: BaseUser) -> bool:
    """Whether a user is shown what `MAY_ACT` guards."""
    details = DagDetails(id=DAG_ID, team_name=DagModel.get_team_name(DAG_ID))
    return get_auth_manager().is_authorized_dag(
        method="POST", access_entity=DagAccessEntity.RUN, details=details, user=user
    )


async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Tell the browser what a page of ours may do, and to keep no copy of it."""
    response = await call_next(request)
    response.headers.update(HEADERS)
    if "/static/" not in request.url.path:
        response.headers["Cache-Control"] = "no-store"
    return response
