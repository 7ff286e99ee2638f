"""Publication: what a validated job gives to one submission's readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from virnucpro_core.features.publishing import publish, publish_result


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """Validated files, and the names that a submission's readers will find them under.

    Attributes:
        folder: where they are published.
        stem: what their names begin with.
        exports: the embeddings, in the order of their rows.
        merged: nucleotide and protein features; None without nucleotides.
        failures: the records without an embedding; None if there are none.
        manifest: what says that all this belongs together.
    """

    folder: Path
    stem: str
    exports: Sequence[Path]
    merged: Path | None
    failures: Path | None
    manifest: Path

    def publish(self) -> None:
        """Give the files their names, each in one step, the manifest last. Doing it twice changes nothing.

        Raises:
            ArtifactError: a file is missing, or a name cannot be written.
        """
        failures_target = self.folder / f"{self.stem}.failures.jsonl"
        if self.failures is not None:
            publish(self.failures, failures_target)
        else:
            failures_target.unlink(missing_ok=True)  # of an earlier generation
        if self.merged is not None:
            publish(self.merged, self.folder / f"{self.stem}_merged.pt")
        publish_result(
            self.exports,
            self.folder / f"{self.stem}_ESM.pt",
            self.manifest,
            self.folder / f"{self.stem}.manifest.json",
        )
