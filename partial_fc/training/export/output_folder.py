"""An output folder that is written as a whole or not at all.

check_free       the folder must not exist, and it must be possible to create it
work_folder      a folder in a hidden one on the same disk, to write into; deleted at the end unless it was published.
                 The hidden one is locked while its process lives: the next call deletes what a killed one has left
publish          renames the hidden folder to the output folder
"""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from partial_fc.checkpoint.locks import FolderLock
from partial_fc.checkpoint.manifest import remove_tree
from partial_fc.training.errors import UserError
from partial_fc.training.files import naming


def check_free(out: Path) -> Path:
    """Return the nearest parent of `out` that exists. Raises UserError if `out` exists or cannot be created."""
    try:
        if os.path.lexists(out):
            raise UserError(f"{out} already exists; name another folder with --output, or remove it")
        parent = next(path for path in out.absolute().parents if path.exists())
    except OSError as error:
        raise UserError(f"the output folder {out} cannot be used: {error.strerror}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"the output folder {out} cannot be created: {parent} is not a folder that can be written to")
    return parent


@contextmanager
def work_folder(out: Path, parent: Path) -> Iterator[Path]:
    """Yield a new folder below `parent`; it is deleted at the end unless `publish` has renamed it.

    OSError that names `out` or a file in it.
    """
    _delete_left(out, parent)
    try:
        hidden = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    except OSError as error:
        raise UserError(f"the output folder {out} cannot be created: {error.strerror}") from error
    lock = FolderLock(hidden)
    try:
        with naming(out):
            lock.acquire()
            work = hidden / "files"
            work.mkdir()
            yield work
    finally:
        lock.release()
        remove_tree(hidden)


def _delete_left(out: Path, parent: Path) -> None:
    """Delete the hidden folders for `out` of processes that were killed."""
    for left in parent.glob(f".{glob.escape(out.name)}-????????"):
        lock = FolderLock(left)
        with contextlib.suppress(OSError):  # another process is writing there
            lock.acquire()
            remove_tree(left)
        lock.release()


def publish(work: Path, out: Path) -> None:
    """Rename `work` to `out`, with the permissions of a new folder. Raises UserError if `out` exists by now."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    work.chmod(0o777 & ~mask)
    check_free(out)
    os.rename(work, out)
