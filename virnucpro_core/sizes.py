"""Sizes that the library takes, and the pipeline unless its settings say otherwise."""

from __future__ import annotations

CHUNK_TOKENS = 2_000_000
"""Tokens that are read and embedded at a time."""

EXPORT_ROWS = 200_000
"""Rows in one `.pt` file, 1.4 GB of memory to write or read; more are written as numbered shards."""
