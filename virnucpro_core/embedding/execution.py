"""The execution class: how embeddings were computed. Within one class the bytes are the same, always."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from virnucpro_core.recipe import Dtype

if TYPE_CHECKING:
    import torch


class KernelPlan(StrEnum):
    """How sequences go through the device. A change that alters bytes needs a new name."""

    PACKED_FP8 = "packed-fp8"
    PACKED_FUSED = "packed-fused"
    PACKED_VARLEN = "packed-varlen-eager"
    SINGLE_SDPA = "single-sdpa-eager"

    @property
    def packed(self) -> bool:
        """Whether sequences go through the device in packs of fixed size, not one at a time."""
        return self is not KernelPlan.SINGLE_SDPA

    @property
    def fused(self) -> bool:
        """Whether it is made of Triton's kernels."""
        return self in (KernelPlan.PACKED_FP8, KernelPlan.PACKED_FUSED)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionClass:
    """What the bytes of an embedding depend on, besides the recipe and the sequence.

    Attributes:
        torch: its version, with the build's suffix.
        triton: its version, which compiles the fused kernels; empty where the plan does without.
        device: `cpu` or `cuda`.
        hardware: the processor's or GPU's name, with its instruction set or compute capability.
        dtype: precision of the forward pass.
        plan: the kernel plan's name.
        pack_tokens: rows of every pack; 0 where each sequence is computed alone, without padding.
        threads: threads of a CPU's matrix products; 0 on a GPU, where they do not matter.
    """

    torch: str
    triton: str
    device: str
    hardware: str
    dtype: Dtype
    plan: KernelPlan
    pack_tokens: int
    threads: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @property
    def sha256(self) -> str:
        """The class's name: sha256 of its canonical JSON."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __str__(self) -> str:
        shape = f"packs of {self.pack_tokens}" if self.pack_tokens else f"{self.threads} threads"
        versions = f"torch {self.torch}" + (f", triton {self.triton}" if self.triton else "")
        return f"{self.plan}, {self.dtype}, {shape}, {versions}, {self.hardware}"


def describe_execution(
    device: torch.device, dtype: Dtype, plan: KernelPlan, pack_tokens: int
) -> ExecutionClass:
    """The execution class of this process for a device; `pack_tokens` counts only for packed plans."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = f"{properties.name} sm_{properties.major}{properties.minor}"
        threads = 0
    else:
        hardware = f"{_processor_name()} {torch.backends.cpu.get_cpu_capability()}"
        threads = torch.get_num_threads()
    return ExecutionClass(
        torch=str(torch.__version__),
        triton=_triton_version() if plan.fused else "",
        device=device.type,
        hardware=hardware,
        dtype=dtype,
        plan=plan,
        pack_tokens=pack_tokens if plan.packed else 0,
        threads=threads,
    )


def _triton_version() -> str:
    # Its distribution goes by several names, so the metadata do not tell.
    import triton

    return str(triton.__version__)


@cache
def _processor_name() -> str:
    """The processor's model; Python's own answer is empty on most Linux systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
