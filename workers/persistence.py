"""Persistence: transactions that are worth waiting for, such as the commit of a chunk that took minutes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event
from typing import Concatenate, ParamSpec, TypeVar

import structlog
from sqlalchemy import Connection, Engine, text
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_when_event_set,
    wait_random_exponential,
)

from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.transitions import complete
from virnucpro_core.ledger.work import Claim
from workers.stages import Outcome

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")

LONGEST_PAUSE = 5.0  # seconds between attempts to reach the database
PUBLISH_SECONDS = 600  # that publishing may take where files cannot be linked: the job is locked meanwhile


class Persistence:
    """Runs transactions on a ledger again while it is away, until the process closes.

    Attributes:
        held: lease tokens of what was claimed, until the ledger is told how it ended.
    """

    def __init__(self, ledger: Engine, closing: Event) -> None:
        self.ledger = ledger
        self.closing = closing
        self.held: set[int] = set()

    def __call__(
        self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """What `function(connection, ...)` returns.

        Raises:
            ServiceError: the process closes, and the database is still away.
        """

        def warn(state: RetryCallState) -> None:
            reason = state.outcome.exception() if state.outcome else None
            log.warning(
                "ledger_away", step=function.__name__, attempts=state.attempt_number, reason=str(reason)
            )

        retrying = Retrying(
            retry=retry_if_exception_type(ServiceError),
            wait=wait_random_exponential(multiplier=0.1, max=LONGEST_PAUSE),
            stop=stop_when_event_set(self.closing),
            before_sleep=warn,
            reraise=True,
        )
        return retrying(partial(in_transaction, self.ledger, function), *args, **kwargs)

    def end(
        self,
        function: Callable[Concatenate[Connection, Claim, P], T],
        claimed: Claim,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """The same, of a function that ends an attempt: from then on its chunk is not held any more."""
        told = self(function, claimed, *args, **kwargs)
        self.held.discard(claimed.token)
        return told


def commit(tx: Connection, claimed: Claim, outcome: Outcome) -> str:
    """Complete a chunk and publish what it made, both or neither as far as readers of the ledger can tell.

    Completing comes first: it checks the lease and locks the job, so that nothing of an older generation is
    published over a newer one.
    """
    state = complete(tx, claimed, outcome.result)
    if outcome.publications:
        tx.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{PUBLISH_SECONDS}s'"))
    for publication in outcome.publications:
        publication.publish()
    return state
