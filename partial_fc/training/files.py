"""Files of the application: written so that others see all of one or none of it, read with words for what is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from partial_fc.training.errors import UserError


class Hash(Protocol):
    """A hash object of hashlib."""

    def update(self, data: bytes, /) -> None: ...


@contextmanager
def on_disk(path: Path) -> Iterator[IO[bytes]]:
    """Write a file; it is on the disk afterwards."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that others see all of it or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    with on_disk(temporary) as file:
        file.write(data)
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def add_to_digest(digest: Hash, path: Path) -> None:
    """Add the content of a file to a digest, a MiB at a time."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


@contextmanager
def told(path: Path, *, again: str, missing: str = "") -> Iterator[None]:
    """Read and check a file of ours: what goes wrong becomes a UserError that names it.

    again: what to do about a damaged file. missing: the whole text for a file that is not there.
    """
    try:
        yield
    except OSError as error:
        absent = missing and isinstance(error, FileNotFoundError)
        raise UserError(missing if absent else f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {again}") from error
