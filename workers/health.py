"""Health: whether the workers of this host consume, and whether a relay serves the ledger.

python -m workers.health worker --queues extract
python -m workers.health relay
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Collection, Sequence

from celery import Celery

from virnucpro_core.errors import ServiceError, VirnucproError
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.health import find_neglected, is_served, live_nodes
from virnucpro_core.queues import QUEUES
from virnucpro_core.settings import Settings, load_settings
from workers.app import app, check_broker
from workers.relay import RELAY_LOCK

ANSWER_SECONDS = 5.0  # that a Celery node has to answer in
LATE_SECONDS = 60.0  # the relay looks every second; it may pause when a server comes back


def check_workers(settings: Settings, celery: Celery, queues: Collection[str], host: str) -> list[str]:
    """The Celery nodes of a host, of which each consumes its queue, and at least one each of `queues`.

    Raises:
        ServiceError: a queue has no worker with a fresh heartbeat in the ledger, a node does not answer or does
            not consume, or the database or the broker cannot be used.
    """
    ledger = open_ledger(settings.database_url_for("worker"))
    try:
        nodes = in_transaction(ledger, live_nodes, host)
    finally:
        ledger.dispose()
    missing = sorted(set(queues) - set(nodes.values()))
    if missing:
        raise ServiceError(
            f"no worker for {' and '.join(missing)} has a fresh heartbeat", where=host, todo="Read its log."
        )
    check_broker(celery)
    # With a limit it returns as soon as all have answered.
    replies = celery.control.broadcast(
        "active_queues", reply=True, destination=list(nodes), limit=len(nodes), timeout=ANSWER_SECONDS
    )
    answers = {node: queues for reply in replies or () for node, queues in reply.items()}
    for node, queue in nodes.items():
        if node not in answers:
            raise ServiceError("the node does not answer", where=node, todo="Read its log.")
        if queue not in {consumed["name"] for consumed in answers[node]}:
            raise ServiceError(f"the node does not consume {queue}", where=node, todo="Start it again.")
    return list(nodes)


def check_relay(settings: Settings, celery: Celery) -> None:
    """Return if a relay serves the ledger, does what is due, and the broker can be reached.

    Raises:
        ServiceError: if not; also when the database cannot be used.
    """
    ledger = open_ledger(settings.database_url_for("worker"))
    try:
        served = in_transaction(ledger, is_served, RELAY_LOCK)
        neglected = in_transaction(
            ledger, find_neglected, window_per_worker=settings.window_per_worker, seconds=LATE_SECONDS
        )
    finally:
        ledger.dispose()
    if not served:
        raise ServiceError("no relay serves this ledger", todo="Start `virnucpro relay`, or read its log.")
    if neglected:
        raise ServiceError(f"the relay does nothing: {'; '.join(neglected)}", todo="Start it again.")
    check_broker(celery)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="virnucpro health", description="Exit 0 if it does its work.")
    parser.add_argument("what", choices=["worker", "relay"])
    parser.add_argument("--queues", default=",".join(QUEUES), help="extract, finish, or both")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        settings = load_settings()
        if options.what == "relay":
            check_relay(settings, app)
            said = "a relay serves"
        else:
            queues = [queue.strip() for queue in options.queues.split(",")]
            said = f"{', '.join(check_workers(settings, app, queues, socket.gethostname()))}: consuming"
    except VirnucproError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
