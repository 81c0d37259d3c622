"""An output folder that is written as a whole or not at all.

check_free       the folder must not exist, and it must be possible to create it
work_folder      a hidden folder on the same disk, to write into; deleted at the end unless it was published
publish          renames the hidden folder to the output folder
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from partial_fc.training.errors import UserError


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
    """Yield a new hidden folder in `parent`; it is deleted at the end unless `publish` has renamed it."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    except OSError as error:
        raise UserError(f"the output folder {out} cannot be created: {error.strerror}") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, out: Path) -> None:
    """Rename `work` to `out`, with the permissions of a new folder. Raises UserError if `out` exists by now."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    work.chmod(0o777 & ~mask)
    check_free(out)
    os.rename(work, out)
