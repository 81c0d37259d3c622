"""Which data folder of a checkpoint is the complete one, and whether its files are as they were written.

    manifest.json    {"format": 1, "data": "data-0007", "files": {name: bytes}, "names": [...], ...}

It is replaced in one move when everything else is on the disk, so that it never names a data folder that is not whole.
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

from partial_fc.checkpoint.layout import SafeReader, is_plain_name

FORMAT = 1
MANIFEST = "manifest.json"
OWN = re.compile(r"data-\d{4,}")  # a user's own data-anything stays
VISIBLE_SECONDS = 10.0  # how long a shared file system may take to show rank 0 what others wrote


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """An OSError says which checkpoint could not be written."""
    try:
        yield
    except BlockingIOError:
        raise  # a lock's words
    except OSError as error:
        if str(error).startswith("checkpoint "):
            raise
        raise type(error)(f"checkpoint {folder} cannot be written: {error.strerror or error}") from error


def new_data_folder(folder: Path) -> str:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        name = (
            f"data-{max((int(p.name[5:]) for p in folder.glob('data-*') if OWN.fullmatch(p.name)), default=0) + 1:04d}"
        )
        (folder / name).mkdir()
        return name


def publish(folder: Path, data: Path, note: dict[str, Any]) -> None:
    """Make `data` the checkpoint, in one atomic move, then remove what it replaces."""
    with writing(folder):
        manifest = {"format": FORMAT, "data": data.name, "files": _files(data), **note}
        temporary = folder / f"{MANIFEST}.tmp"
        with temporary.open("w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
    for old in folder.glob("data-*"):
        if old.name != data.name and OWN.fullmatch(old.name) and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)  # the new one is in place; a busy old one is no failure


def discard(folder: Path, data: Path) -> None:
    """Remove the data of a save that failed, since a full disk wants the space; but not if they have been published: then a rank was lost
    between that and the agreement on it, and they are the checkpoint, the only one there may be."""
    try:
        published = json.loads((folder / MANIFEST).read_text())["data"] == data.name
    except FileNotFoundError:
        published = False
    except (OSError, ValueError, KeyError, TypeError):
        published = True  # nobody knows, and nothing is lost by keeping them
    if not published:
        shutil.rmtree(data, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds an earlier checkpoint
            folder.rmdir()


def _files(data: Path) -> dict[str, int]:
    """The size of each file of a data folder; OSError if another rank has written where this one does not see it."""
    metadata = SafeReader(data).read_metadata()
    wanted = {info.relative_path for info in metadata.storage_data.values()}  # type: ignore[union-attr]
    deadline = time.monotonic() + VISIBLE_SECONDS
    while missing := sorted(name for name in wanted if not (data / name).is_file()):
        if time.monotonic() > deadline:
            raise OSError(
                f"checkpoint {data.parent} cannot be written: rank 0 does not see {missing[0]}, which another rank has written; "
                "give a folder on a file system that all ranks share"
            )
        time.sleep(0.1)
    return {file.name: file.stat().st_size for file in sorted(data.iterdir())}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint; FileNotFoundError if there is none, ValueError if it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        data, names = manifest["data"], manifest["names"]
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no complete checkpoint at {folder} (it has no {MANIFEST})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST} is damaged: it is no table")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"checkpoint {folder} has format {manifest.get('format')}, this version reads {FORMAT}")
    if not isinstance(data, str) or not OWN.fullmatch(data) or not (folder / data).is_dir():
        raise ValueError(f"{folder / MANIFEST} names {data!r}, which is no folder beside it")
    if (
        not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
        or not isinstance(manifest.get("files", {}), dict)
    ):
        raise ValueError(f"{folder / MANIFEST} is damaged: its names or files are of another kind")
    return dict(manifest)


def damage(folder: Path, manifest: dict[str, Any]) -> OSError | ValueError | None:
    """What is wrong with the files that a manifest names, judged by their sizes; nothing is read."""
    for name, size in manifest.get("files", {}).items():
        if not is_plain_name(name):
            return ValueError(
                f"{folder / MANIFEST} names {name!r}, which is no file of its data; the checkpoint is not to be trusted"
            )
        path = folder / manifest["data"] / name
        if not path.is_file():
            return FileNotFoundError(
                f"checkpoint {folder} is not whole: {path} is missing; load another, or copy it again"
            )
        found = path.stat().st_size
        if found != size:
            return ValueError(
                f"checkpoint {folder} is not whole: {path} has {found} bytes of {size}; copy it again or load another checkpoint"
            )
    return None
