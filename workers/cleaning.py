"""Cleaning: what finished jobs no longer need on disk. Nothing here may fail a job."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence

import structlog
from sqlalchemy import Engine

from virnucpro_core.errors import VirnucproError
from virnucpro_core.features.files import remove_abandoned
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import artifacts_of
from virnucpro_core.ledger.retention import expired_jobs, needed_spools, remove_chunks, removed_folder
from virnucpro_core.ledger.tallies import fold_tallies
from virnucpro_core.ledger.transitions import EXTRACT
from virnucpro_core.ledger.work import Work, artifact_folder, job_folder
from virnucpro_core.settings import Settings
from workers.artifacts import output_root
from workers.publication import Publication

log = structlog.get_logger()

LEAST_SPOOL_DAYS = 1.0
"""A copy is there before its job is registered: however short the retention, it stays for as long as that takes."""


def sweep(ledger: Engine, work: Work, publications: Sequence[Publication], settings: Settings) -> None:
    """Remove what a validated job no longer needs: files of dead writers, older generations, unrecorded chunks.

    To be called before the job's last commit: nobody would come back to it after that.
    """
    folder = output_root(settings) / job_folder(work.job_id)
    for place in {folder, *(publication.folder for publication in publications)}:
        removed = remove_abandoned(place)
        if removed:
            log.info("abandoned_files_removed", folder=str(place), files=len(removed))
    for older in range(1, work.generation):
        generation = folder / f"g{older}"
        try:
            shutil.rmtree(generation)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("generation_kept", folder=str(generation), reason=error.strerror)
        else:
            log.info("generation_removed", folder=str(generation))
    remove_unrecorded(ledger, work, settings)


def remove_unrecorded(ledger: Engine, work: Work, settings: Settings) -> None:
    """Remove the files of chunks that were halved after a worker had written them, and died."""
    root = output_root(settings)
    recorded = {root / row.path for row in in_transaction(ledger, artifacts_of, work.job_id, stage=EXTRACT)}
    for path in (root / artifact_folder(work.job_id, work.generation, EXTRACT)).glob("*"):
        if path in recorded:
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("unrecorded_file_kept", path=str(path), reason=error.strerror)
        else:
            log.info("unrecorded_file_removed", path=str(path))


def remove_expired(ledger: Engine, settings: Settings) -> None:
    """Remove the chunk artifacts and spooled inputs of jobs that succeeded longer ago than the settings keep them.

    Workers gone for as long lose their own tallies to the sum.
    """
    try:
        for job in in_transaction(ledger, expired_jobs, keep_days=settings.keep_chunks_days):
            removed = in_transaction(ledger, remove_chunks, job, output_root(settings))
            log.info("chunks_removed", job=job, files=removed)
        empty_removed(settings)
        remove_spools(ledger, settings)
        in_transaction(ledger, fold_tallies, keep_days=settings.keep_chunks_days)
    except (OSError, VirnucproError) as error:
        log.warning("cleaning_stopped", reason=str(error))


def empty_removed(settings: Settings) -> None:
    """Delete what was set aside to be removed, also by those who died before they had deleted it."""
    for folder in removed_folder(output_root(settings)).glob("*"):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue  # another worker deletes it, too
        except OSError as error:
            log.warning("removed_folder_kept", folder=str(folder), reason=error.strerror)


def remove_spools(ledger: Engine, settings: Settings) -> None:
    """Remove spooled copies that no job needs, and what killed scans left beside them."""
    keep_days = max(settings.keep_chunks_days, LEAST_SPOOL_DAYS)
    needed = in_transaction(ledger, needed_spools, keep_days=keep_days)
    oldest = time.time() - keep_days * 86_400
    for path in settings.spool_root.absolute().glob("*"):
        if path.stem not in needed and path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
            log.info("spool_removed", path=str(path))
