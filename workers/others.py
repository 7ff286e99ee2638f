"""Others: the workers that get a chunk which this process cannot run at all."""

from __future__ import annotations

from collections import Counter
from threading import Event

import structlog
from sqlalchemy import Engine

from virnucpro_core.errors import VirnucproError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.outbox import send_again
from virnucpro_core.ledger.queries import live_workers
from virnucpro_core.ledger.work import Work
from virnucpro_core.settings import Settings

log = structlog.get_logger()

OFFER_AGAIN_SECONDS = 10.0
GIVE_WAY_SECONDS = OFFER_AGAIN_SECONDS + 2.0  # until somebody else who waits for messages has that one


class Others:
    """The other live workers of a process's queue.

    Args:
        queue: the queue that this process takes messages from.
        closing: set when this process is to end.
    """

    def __init__(self, ledger: Engine, settings: Settings, queue: str, closing: Event) -> None:
        self.ledger = ledger
        self.settings = settings
        self.queue = queue
        self.closing = closing
        self.found_idle: Counter[int] = Counter()  # by chunk, how often in a row

    def take(self, work: Work, worker_id: int, error: VirnucproError) -> bool:
        """Have a chunk that this process cannot run sent again for another worker; False if no other can take it.

        A busy worker may come to it. One that is idle may still be loading the model; but if all others have been
        found idle as often as a chunk has attempts, they cannot run it either. Meanwhile this process, which would
        idle with them, gives way.
        """
        same = [one for one in in_transaction(self.ledger, live_workers) if one.queue == self.queue]
        others = [one for one in same if one.id != worker_id]
        busy = any(other.chunk_id is not None for other in others)
        if busy:
            del self.found_idle[work.chunk_id]
        else:
            self.found_idle[work.chunk_id] += 1
        if not others or self.found_idle[work.chunk_id] > self.settings.max_attempts:
            return False
        in_transaction(
            self.ledger,
            send_again,
            work.chunk_id,
            delay=OFFER_AGAIN_SECONDS,
            reason=f"a worker said: {error}",
        )
        log.error("chunk_left_to_others", others=len(others), reason=str(error))
        if not busy:
            # Not for so long that this process would count as stuck.
            self.closing.wait(min(GIVE_WAY_SECONDS, self.settings.stuck_seconds / 2))
        return True
