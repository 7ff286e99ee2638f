"""The bare extraction in a process pinned to one GPU, so that several can run at once."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.bare import extract_chunks
from virnucpro_core.errors import ExecutionError
from virnucpro_core.gpus import MASK

LOAD_SECONDS = 90.0  # to import torch and load the model
PASS_SECONDS = 120.0  # to pass over a file once
SPAWN = multiprocessing.get_context("spawn")  # a forked process could not use the GPU


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over a file.

    Attributes:
        residues: in the file.
        chunks: it was cut into.
        seconds: from the first read to the last artifact on disk.
        embed_seconds: of these, those in which a chunk was embedded.
    """

    residues: int
    chunks: int
    seconds: float
    embed_seconds: float


class BareProcess:
    """A process that has loaded a model, and extracts a file whenever it is told to.

    Args:
        device: its CUDA_VISIBLE_DEVICES; empty for the CPU.
        checkpoint: the model's folder.
    """

    def __init__(self, device: str, checkpoint: Path) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs, device, checkpoint), daemon=True)
        self.process.start()
        theirs.close()

    def wait_until_loaded(self) -> None:
        """Returns when the model is loaded.

        Raises:
            ExecutionError: the process has died (its traceback is on stderr), or takes too long.
        """
        self._receive(LOAD_SECONDS)

    def begin(self, fasta: Path, folder: Path, chunk_tokens: int) -> None:
        """Has it extract a file into a folder."""
        self.pipe.send((fasta, folder, chunk_tokens))

    def finish(self) -> Pass:
        """What came of it; raises as `wait_until_loaded` does."""
        done: Pass = self._receive(PASS_SECONDS)
        return done

    def close(self) -> None:
        """Stops it; returns when it is gone."""
        self.pipe.close()
        self.process.join(10)
        self.process.kill()
        self.process.join()

    def _receive(self, seconds: float) -> Any:
        if not self.pipe.poll(seconds):
            raise ExecutionError(f"the bare extraction took longer than {seconds:.0f} s")
        try:
            return self.pipe.recv()
        except EOFError as error:
            raise ExecutionError("the bare extraction has died", todo="Read its traceback above.") from error


def serve(pipe: Connection[Any, Any], device: str, checkpoint: Path) -> None:
    """The life of a `BareProcess`: it says that the model is loaded, then sends a `Pass` for each file."""
    os.environ[MASK] = device
    from virnucpro_core.embedding.extraction import Extraction, embed
    from virnucpro_core.embedding.loading import load_fast_esm
    from virnucpro_core.sequences.fasta import RecordBatch

    model = load_fast_esm(checkpoint)
    embedded: list[float] = []

    def embed_chunk(batch: RecordBatch) -> Extraction:
        extraction = embed(model, batch)
        embedded.append(extraction.seconds)
        return extraction

    pipe.send(str(model.execution()))
    while True:
        try:
            fasta, folder, chunk_tokens = pipe.recv()
        except EOFError:
            return
        embedded.clear()
        result = extract_chunks(fasta, folder, embed_chunk, chunk_tokens=chunk_tokens)
        # The pipeline scans a file before it claims the first chunk, so this is not counted here either.
        seconds = result.seconds - result.scan_seconds
        pipe.send(Pass(result.residues, len(embedded), seconds, sum(embedded)))
