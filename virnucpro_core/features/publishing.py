"""Publishing: a validated artifact gets the name that people read, in one atomic replace."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path

import structlog

from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.exports import export_names
from virnucpro_core.features.files import (
    lock_file,
    make_folder,
    new_file,
    open_artifact,
    read_blocks,
    sync_folder,
    temporary_name,
    write_error,
)

log = structlog.get_logger()

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems answer that cannot link from there to here."""


def publish(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`; no reader finds it missing or half-written.

    A hard link where the file system has one (no second copy on disk: whoever edits `target` in place alters
    the artifact), else a copy, which is logged. A `target` from before is replaced.

    Raises:
        ArtifactError: the source is missing, or the target cannot be written.
    """
    with open_artifact(source) as file:
        # Shared by all names of the file: it keeps `remove_abandoned` off the temporary one.
        lock_file(file, fcntl.LOCK_SH)
        temporary = temporary_name(target.parent)
        try:
            make_folder(target.parent)
            try:
                os.link(source.resolve(), temporary)
                temporary.replace(target)
            finally:
                # Replacing a name by another of the same file does nothing, and leaves both.
                temporary.unlink(missing_ok=True)
            sync_folder(target.parent)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise write_error(error, target) from error
            log.info("published_as_copy", source=str(source), target=str(target), reason=error.strerror)
        else:
            return
        with new_file(target) as copy:
            for block in read_blocks(file, os.fstat(file.fileno()).st_size, source):
                copy.write(block)


def publish_result(
    exports: Sequence[Path], target: Path, manifest: Path, manifest_target: Path
) -> list[Path]:
    """Publishes a result: its exports, then the manifest that names them; then removes what it replaces.

    Each file is replaced in one step; of several shards, the manifest says which belong together.

    Args:
        exports: the export's files, in the order of their rows.
        target: the published name of an export in one file; shards are numbered from it.
        manifest: the manifest's file.
        manifest_target: its published name.

    Returns:
        The published names of `exports`.

    Raises:
        ArtifactError: a source is missing, or a target cannot be written.
    """
    names = export_names(target, len(exports))
    for source, name in zip(exports, names, strict=True):
        publish(source, name)
    publish(manifest, manifest_target)
    for old in _exports_of(target):
        if old not in names:
            log.info("replaced_export_removed", path=str(old))
            remove_replaced(old)
    return names


def remove_replaced(path: Path) -> None:
    """Removes a published file that the newer result does not have, if it is there.

    Raises:
        ArtifactError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        what = f"a file of the result before cannot be removed: {error.strerror}"
        raise ArtifactError(what, where=str(path), todo="Remove it.") from error


def _exports_of(target: Path) -> list[Path]:
    """All files in the folder that are exports of this name, in one file or in any number of shards."""
    shards = rf"{re.escape(target.stem)}(\.\d{{5,}}-of-\d{{5,}})?{re.escape(target.suffix)}"
    return [path for path in target.parent.iterdir() if re.fullmatch(shards, path.name)]
