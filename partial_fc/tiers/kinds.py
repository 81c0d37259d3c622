"""What `PartialFC(..., storage=...)` and `CenterLoss(..., storage=...)` take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


class Storage:
    """Base of `HostRows` and `FileRows`."""


@dataclass(frozen=True)
class HostRows(Storage):
    """Rows and optimizer state in the memory of the host, of which only what a step has touched is taken.

    A row gets its initial values, which depend on seed and class id alone, when it is first looked at. So a head is
    built at once, however many classes it has, and memory grows with the rows that were used.
    """


@dataclass(frozen=True)
class FileRows(Storage):
    """Rows and optimizer state in files: the page cache holds what fits, the disk the rest.

    Args:
        folder: where the files are to be, created if it is not there; best a disk of the machine itself. Each rank has
            files of its own, one for each tensor. They are sparse: rows that nobody has touched take no space. They
            have no name, nobody else can open them, and they are gone when the process ends, however it ends: what is
            to stay is saved as a checkpoint.

    Raises RuntimeError on every rank: when the head is built, if one rank cannot write there; in a forward, if the disk
    is full or fails.
    """

    folder: str | os.PathLike[str]


def checked_storage(storage: Any) -> Storage | None:
    """Return it; TypeError or ValueError for what cannot be."""
    if storage is None:
        return None
    if not isinstance(storage, HostRows | FileRows):
        raise TypeError(f"storage must be HostRows(), FileRows(folder) or None, not {storage!r}")
    if isinstance(storage, FileRows) and not isinstance(storage.folder, str | os.PathLike):
        raise TypeError(f"FileRows takes the path of a folder, not {storage.folder!r}")
    return storage
