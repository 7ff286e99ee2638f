"""The memory of a GPU: what says that it is full, and what to do then."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from virnucpro_core.errors import ExecutionError

CUDA_NO_MEMORY = 2  # cudaErrorMemoryAllocation

# Of torch and Triton (seen with torch 2.11, Triton 3.6): they raise these as plain RuntimeErrors.
NO_MEMORY_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory")

FREE_MEMORY = "End what else uses this GPU (nvidia-smi lists it), or use another one."


def is_full(error: BaseException) -> bool:
    """Whether an error says that the GPU's memory is full, whatever part of CUDA noticed it.

    Beside torch's allocator that may be CUDA itself, which needs room for its context and for each kernel's code,
    and cuBLAS, for its workspace.
    """
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == CUDA_NO_MEMORY
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY_TEXTS)
    )


@contextmanager
def explained_memory(device: torch.device) -> Iterator[None]:
    """Says in words that a model did not fit, and frees what was loaded of it.

    Any other error of a GPU is raised as it is: it may stick to the process, which should end of it.

    Raises:
        ExecutionError: the memory is full.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_full(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors for as long as the error lives
        torch.cuda.empty_cache()
        raise ExecutionError(
            f"there is no memory for the model: {str(error).partition(chr(10))[0]}",
            where=str(device),
            todo=FREE_MEMORY,
        ) from error
