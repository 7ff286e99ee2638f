"""Publication: what a validated job gives to one submission's readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.publishing import publish, publish_result, remove_replaced
from virnucpro_core.ledger.work import FAILURES, MANIFEST, MERGED, REPORT, SUFFIXES

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """Validated files, and the names that a submission's readers will find them under.

    Attributes:
        folder: where they are published.
        stem: what their names begin with.
        exports: the embeddings, in the order of their rows.
        merged: nucleotide and protein features; None without nucleotides, or where they were not merged.
        merged_is_stale: whether what was merged before does not belong to these exports, and is to go.
        failures: the records without an embedding; None if there are none.
        report: the page for people; None if it could not be made.
        manifest: what says that all this belongs together.
    """

    folder: Path
    stem: str
    exports: Sequence[Path]
    merged: Path | None
    merged_is_stale: bool
    failures: Path | None
    report: Path | None
    manifest: Path

    def publish(self) -> None:
        """Give the files their names, each in one step, the manifest last. Doing it twice changes nothing.

        Raises:
            ArtifactError: a file is missing, or a name cannot be written.
        """
        self._publish_or_remove(self.failures, self.stem + SUFFIXES[FAILURES])
        try:
            self._publish_or_remove(self.report, self.stem + SUFFIXES[REPORT])
        except (ArtifactError, OSError) as error:
            # What it tells of is sound, and `verify` says that it is missing.
            log.warning("report_not_published", folder=str(self.folder), reason=str(error))
        if self.merged is not None or self.merged_is_stale:
            self._publish_or_remove(self.merged, self.stem + SUFFIXES[MERGED])
        publish_result(
            self.exports,
            self.folder / f"{self.stem}_ESM.pt",
            self.manifest,
            self.folder / (self.stem + SUFFIXES[MANIFEST]),
        )

    def _publish_or_remove(self, source: Path | None, name: str) -> None:
        """Give a file its name; without one, remove what an earlier generation left under that name."""
        if source is not None:
            publish(source, self.folder / name)
        else:
            remove_replaced(self.folder / name)
