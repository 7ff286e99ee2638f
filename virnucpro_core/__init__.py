"""FastESM2 protein features for VirNucPro. Public names load on first use, and with them torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virnucpro_core.embedding.extraction import extract
    from virnucpro_core.embedding.fast_esm import extract_fast_esm
    from virnucpro_core.embedding.loading import load_fast_esm
    from virnucpro_core.embedding.packing import get_batch_indices
    from virnucpro_core.features.merging import merge_data
    from virnucpro_core.features.validation import validate_embeddings

__all__ = [
    "extract",
    "extract_fast_esm",
    "get_batch_indices",
    "load_fast_esm",
    "merge_data",
    "validate_embeddings",
]

_HOMES = {
    "extract": "embedding.extraction",
    "extract_fast_esm": "embedding.fast_esm",
    "get_batch_indices": "embedding.packing",
    "load_fast_esm": "embedding.loading",
    "merge_data": "features.merging",
    "validate_embeddings": "features.validation",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
