"""`workers.tasks` with a device that breaks once: `celery -A tests.breaking_worker worker`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery.signals import worker_process_init

from workers.tasks import app

__all__ = ["app"]


@worker_process_init.connect
def break_once(**_: Any) -> None:
    from virnucpro_core.embedding import extraction

    embed = extraction.embed
    broken = Path(os.environ["BROKEN_ONCE"])

    def embed_or_break(*arguments: Any, **options: Any) -> Any:
        if broken.exists():
            return embed(*arguments, **options)
        broken.touch()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    extraction.embed = embed_or_break
