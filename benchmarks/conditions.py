"""What a GPU benchmark ran on, and where its results go."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from virnucpro_core.features.manifests import installed_versions


def describe_machine() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": properties.name,
        "gpu_gib": round(properties.total_memory / 2**30, 1),
        "processors": os.cpu_count(),
        "versions": {**installed_versions(), "triton": triton.__version__, "cuda": torch.version.cuda},
    }


def save(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
