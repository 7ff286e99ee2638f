"""Queues: what messages lie in, and workers consume."""

from __future__ import annotations

EXTRACT_QUEUE, FINISH_QUEUE = "extract", "finish"
"""In the one lie chunks to embed, in the other jobs to merge and to validate."""

QUEUES = (EXTRACT_QUEUE, FINISH_QUEUE)
