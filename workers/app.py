"""The Celery application: its configuration, and how to reach its broker."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from celery import Celery
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES

from virnucpro_core.errors import ServiceError
from virnucpro_core.queues import EXTRACT_QUEUE, QUEUES
from virnucpro_core.settings import Settings, load_settings

EXCHANGE = Exchange("virnucpro", type="direct")  # type: ignore[no-untyped-call]

KEY_PREFIX = "virnucpro:"
"""Before every key in the broker, so that its database may be shared."""

HARD_TIME_LIMIT = 6 * 3600
"""Seconds after which the parent kills its child: the last resort.

Nothing that works takes so long: a chunk takes seconds on a GPU and minutes on a CPU, merging ten million
rows (51 GB) well under an hour. What hangs is found long before, by its missing heartbeat (`lease_seconds`)
or by progress that stands still (`stuck_seconds`); a limit short enough to do their job would kill slow work.
"""

SOFT_TIME_LIMIT = HARD_TIME_LIMIT - 600
"""Seconds after which the child is told, so that it can still write down what happened."""

VISIBILITY_TIMEOUT = 24 * 3600
"""Seconds after which the broker sends an unacknowledged message again. Longer than any task, or it would
send what is still being worked on. Recovery does not wait for it: that goes by the ledger's leases."""

SOCKET_TIMEOUT = 5.0
"""Seconds that a broker may hang before it counts as away: one that is stopped, or behind a dead route, closes
no connection. Above the second within which BRPOP is answered; far below the database's `IDLE_TIMEOUT`, as the
relay publishes inside a transaction."""

VARIABLES_OF_OTHERS = (
    "CELERY_BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_RESULT_BACKEND",
)
"""Variables that Celery heeds before its configuration. Ours has one broker and no results, and they may be meant for
another program: nobody's messages are to be mixed with ours, and what keeps its results need not be installed here."""

TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "workers.transport:Transport"))


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's configuration; takes `VARIABLES_OF_OTHERS` out of this process's environment, which would outdo it.

    Raises:
        SettingsError: if no broker is named.
    """
    for name in VARIABLES_OF_OTHERS:
        os.environ.pop(name, None)
    return {
        "broker_url": settings.require_broker_url(),
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            "global_keyprefix": KEY_PREFIX,
            "visibility_timeout": VISIBILITY_TIMEOUT,
            "socket_keepalive": True,
            "socket_timeout": SOCKET_TIMEOUT,
            "socket_connect_timeout": SOCKET_TIMEOUT,
        },
        "accept_content": ["json"],
        "task_serializer": "json",
        # Whether a chunk is done is the ledger's to say.
        "task_ignore_result": True,
        # A message is acknowledged when its chunk has been dealt with, so that a worker never holds two.
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        # A killed child's message is not sent again by Celery: the ledger does that, and counts the attempts.
        "task_reject_on_worker_lost": False,
        # True would kill a running chunk whenever the broker restarts, and lose its message.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "task_soft_time_limit": SOFT_TIME_LIMIT,
        "task_time_limit": HARD_TIME_LIMIT,
        "task_queues": [
            Queue(name, EXCHANGE, routing_key=name)  # type: ignore[no-untyped-call]
            for name in QUEUES
        ],
        "task_create_missing_queues": False,
        "task_default_queue": EXTRACT_QUEUE,
        # For Flower, which shows how long messages wait and how long they take.
        "task_send_sent_event": True,
        "worker_send_task_events": True,
        # A child that only registers itself needs no 4 seconds, but a busy machine may.
        "worker_proc_alive_timeout": 60.0,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
    }


def make_app(settings: Callable[[], Settings] = load_settings) -> Celery:
    """An application that reads its settings when it first needs them: importing this module needs none."""
    celery = Celery("virnucpro", set_as_current=False)
    celery.add_defaults(lambda: configuration(settings()))
    return celery


def check_broker(celery: Celery) -> None:
    """Refuse a broker that cannot be used, in words.

    Raises:
        ServiceError: if it cannot be reached or refuses us.
    """
    connection: Connection = celery.connection_for_write()
    where = connection.as_uri()  # shows no password
    try:
        with connection:
            connection.ensure_connection(  # type: ignore[no-untyped-call]
                max_retries=1, reraise_as_library_errors=False
            )
    except connection.connection_errors + connection.channel_errors as error:
        refused = any(word in str(error) for word in ("WRONGPASS", "NOAUTH", "AUTH", "password"))
        if refused:
            raise ServiceError(
                "the broker refused the password", where=where, todo="Correct VIRNUCPRO_BROKER_URL."
            ) from error
        raise ServiceError(
            f"the broker cannot be reached: {error}",
            where=where,
            todo="Start Redis or Valkey, or correct VIRNUCPRO_BROKER_URL.",
        ) from error


app = make_app()
