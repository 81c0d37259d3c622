"""The manifest of a checkpoint: it names the complete data folder and the sizes of its files.

    manifest.json    {"format": 1, "data": "data-0007", "files": {name: bytes}, "names": [...], ...}
                     format 2 has "parts" of the data folder as well, and which class rows they have (increments.py)

It is replaced atomically after everything else is on the disk, so it never names an incomplete data folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partial_fc.checkpoint.safe_reader import SafeReader, cannot_be_read, is_plain_name

FORMAT, WITH_PARTS = 1, 2
MANIFEST = "manifest.json"
PART = re.compile(r"part-\d{4}")
DATA = re.compile(r"data-\d{4,}")  # other folders named data-... belong to the user and stay
VISIBLE_SECONDS = 10.0  # how long a shared file system may take to show rank 0 the files of other ranks


@contextlib.contextmanager
def naming_the_checkpoint(folder: Path) -> Iterator[None]:
    """Add to an OSError which checkpoint cannot be written."""
    try:
        yield
    except BlockingIOError:
        raise  # the message of a lock is complete
    except OSError as error:
        if str(error).startswith("checkpoint "):
            raise
        raise type(error)(f"checkpoint {folder} cannot be written: {error.strerror or error}") from error


def new_data_folder(folder: Path) -> str:
    """Create the next data folder of a checkpoint and return its name."""
    with naming_the_checkpoint(folder):
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(p.name.removeprefix("data-")) for p in folder.glob("data-*") if DATA.fullmatch(p.name)]
        name = f"data-{max(numbers, default=0) + 1:04d}"
        (folder / name).mkdir()
        return name


def remove_tree(folder: Path) -> None:
    """Remove a folder, as far as the disk allows. (rmtree's ignore_errors does not cover the closing of a folder.)"""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, data: Path, note: dict[str, Any]) -> None:
    """Make `data` the data folder of the checkpoint, atomically. Then remove the previous one."""
    with naming_the_checkpoint(folder):
        manifest = {"format": FORMAT, "data": data.name, "files": _files(data), **note}  # which may have a format
        temporary = folder / f"{MANIFEST}.tmp"
        with temporary.open("w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
    for old in folder.glob("data-*"):
        if old.name != data.name and DATA.fullmatch(old.name) and old.is_dir():
            remove_tree(old)  # the new one is complete, so a failure here does not matter


def discard(folder: Path, data: Path) -> None:
    """Remove the data folder of a failed save, to free disk space, unless it has been published.

    A rank can be lost after `publish` and before all ranks have agreed on its success. The data are then the current
    checkpoint and possibly the only one.
    """
    try:
        published = json.loads((folder / MANIFEST).read_text())["data"] == data.name
    except FileNotFoundError:
        published = False
    except (OSError, ValueError, KeyError, TypeError):
        published = True  # unknown: keep the data
    if not published:
        remove_tree(data)
        with contextlib.suppress(OSError):  # not empty: it holds an earlier checkpoint
            folder.rmdir()


def _files(data: Path) -> dict[str, int]:
    """Return the size of each file of a data folder. OSError if rank 0 cannot see the file of another rank."""
    metadata = SafeReader(data).read_metadata()
    wanted = {info.relative_path for info in metadata.storage_data.values()}  # type: ignore[union-attr]
    deadline = time.monotonic() + VISIBLE_SECONDS
    while missing := sorted(name for name in wanted if not (data / name).is_file()):
        if time.monotonic() > deadline:
            raise OSError(
                f"checkpoint {data.parent} cannot be written: rank 0 does not see {missing[0]}, which another rank "
                "wrote; give a folder on a file system that all ranks share"
            )
        time.sleep(0.1)
    own = {file.name: file for file in sorted(data.iterdir()) if file.is_file()}
    for part in sorted(folder for folder in data.iterdir() if PART.fullmatch(folder.name)):
        own |= {f"{part.name}/{file.name}": file for file in sorted(part.iterdir())}
    return {name: file.stat().st_size for name, file in own.items()}


def part_name(number: int) -> str:
    return f"part-{number:04d}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete checkpoint.

    FileNotFoundError if there is none, ValueError if it is damaged, OSError that names it if the disk cannot read it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        data, names = manifest["data"], manifest["names"]
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no complete checkpoint at {folder} (it has no {MANIFEST})") from None
    except OSError as error:
        raise cannot_be_read(folder / MANIFEST, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST} is damaged: it is not a JSON object")
    if manifest.get("format") not in (FORMAT, WITH_PARTS):
        raise ValueError(
            f"checkpoint {folder} has format {manifest.get('format')}, this version reads {FORMAT} and {WITH_PARTS}"
        )
    if not isinstance(data, str) or not DATA.fullmatch(data) or not (folder / data).is_dir():
        raise ValueError(f"{folder / MANIFEST} names {data!r}, which is not a folder next to it")
    if (
        not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
        or not isinstance(manifest.get("files", {}), dict)
    ):
        raise ValueError(f"{folder / MANIFEST} is damaged: its names or files have the wrong type")
    if manifest["format"] == WITH_PARTS:
        parts = manifest.get("parts")
        if not isinstance(parts, list) or not isinstance(manifest.get("rows"), dict):
            raise ValueError(f"{folder / MANIFEST} is damaged: it does not say which rows its parts have")
        for part in parts:
            if not isinstance(part, str) or not PART.fullmatch(part) or not (folder / data / part).is_dir():
                raise ValueError(f"{folder / MANIFEST} names {part!r}, which is no part of its data folder")
    return dict(manifest)


def find_damage(folder: Path, manifest: dict[str, Any]) -> OSError | ValueError | None:
    """Return an error if a file named in the manifest is missing or has another size, else None. Reads no file."""
    for name, size in manifest.get("files", {}).items():
        if not is_plain_name(name.split("/", 1)[1] if PART.match(name) and name[9:10] == "/" else name):
            return ValueError(
                f"{folder / MANIFEST} names {name!r}, which is not a file in its data folder; "
                "do not trust this checkpoint"
            )
        path = folder / manifest["data"] / name
        if not path.is_file():
            return FileNotFoundError(
                f"checkpoint {folder} is incomplete: {path} is missing; copy it again or load another checkpoint"
            )
        found = path.stat().st_size
        if found != size:
            return ValueError(
                f"checkpoint {folder} is incomplete: {path} has {found} bytes of {size}; "
                "copy it again or load another checkpoint"
            )
    return None
