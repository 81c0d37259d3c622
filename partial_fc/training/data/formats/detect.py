"""Which format a data folder has, and the data set in it.

    .rec and .idx             RecordIO        recordio.py
    *.tar                     WebDataset      tar_files.py
    *.parquet, save_to_disk   Hugging Face    parquet.py
    a text file               a list          list_file.py
    sub-folders of images     a folder        folder.py

If tar or Parquet files belong to several splits, one must be chosen: split_names.py. Packed data sets (packed.py) and
the embedded glyphs (embedded_glyphs.py) have their splits built in; data/open_data.py opens them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from partial_fc.training.data.config import Format
from partial_fc.training.data.dataset import EncodedIdentities
from partial_fc.training.data.formats.folder import FolderIdentities
from partial_fc.training.data.formats.list_file import ListIdentities
from partial_fc.training.data.formats.parquet import ParquetIdentities
from partial_fc.training.data.formats.recordio import RecordIdentities
from partial_fc.training.data.formats.split_names import choose_split
from partial_fc.training.data.formats.tar_files import TarIdentities
from partial_fc.training.errors import UserError

CONVERSION_STATE = ".convert.json"
"""File in the destination in which `partial-fc data convert` notes its progress, and at the end that it is finished."""

_LIST_SUFFIXES = (".txt", ".lst", ".list", ".tsv", ".csv")
_FILE_SUFFIXES = {
    "recordio": (".rec",),
    "webdataset": (".tar",),
    "parquet": (".parquet",),
    "list": _LIST_SUFFIXES,
}
_LOOKED_FOR = {
    "recordio": "train.rec, or one *.rec, with its .idx",
    "webdataset": "*.tar",
    "parquet": "*.parquet here or in data/, or a folder of save_to_disk",
    "list": f"a text file ({', '.join(_LIST_SUFFIXES)}) of lines `path label`, or list.txt",
    "folder": "sub-folders of images, one for each identity",
}
"""format -> what is looked for, in messages"""


def find_format(path: Path, requested: Format = "auto") -> tuple[str, list[Path]]:
    """Return (format, the files or the folder to read) of the data at `path`.

    Raises UserError, saying what was looked for, if there are no data, or none of the requested format.
    """
    if not path.exists():
        raise UserError(f"the data folder {path} does not exist; check --data.folder")
    if path.suffix.lower() == ".bin" and path.is_file():
        raise UserError(
            f"{path} has no known data format; if it holds pairs of images, evaluate on them with "
            f"`partial-fc verify RUN {path}`"
        )
    try:
        found = {name: files for name in _LOOKED_FOR if (files := _files_of_format(path, name))}
    except OSError as error:
        raise UserError(f"the data folder {path} cannot be read: {error}") from error
    if requested == "folder":
        return requested, [path]
    if requested != "auto":
        if requested not in found:
            raise UserError(f"{path} has no {requested} data: looked for {_LOOKED_FOR[requested]}")
        return requested, found[requested]
    # A folder of these may also contain a list.txt or sub-folders, so they come first; two of them are ambiguous.
    unambiguous = [name for name in ("recordio", "webdataset", "parquet") if name in found]
    if len(unambiguous) > 1:
        raise UserError(f"{path} has {' and '.join(unambiguous)} data; choose one with --data.format")
    for name in (*unambiguous, "list", "folder"):
        if name in found:
            return name, found[name]
    looked_for = "; ".join(f"{words} ({name})" for name, words in _LOOKED_FOR.items())
    raise UserError(f"{path} has no known data format; looked for: {looked_for}")


def _files_of_format(path: Path, name: str) -> list[Path]:
    """Return the files (or the folder) at `path` that the format `name` would read; empty if there are none."""
    if path.is_file():
        return [path] if path.suffix.lower() in _FILE_SUFFIXES.get(name, ()) else []
    if name == "recordio":
        return _record_file(path)
    if name == "webdataset":
        return _with_suffix(path, ".tar")
    if name == "parquet":
        return _parquet_files(path)
    if name == "list":
        return [path / "list.txt"] if (path / "list.txt").is_file() else []
    if name == "folder":
        with os.scandir(path) as entries:
            return [path] if any(entry.is_dir() and not entry.name.startswith(".") for entry in entries) else []
    return []


def _record_file(folder: Path) -> list[Path]:
    if (folder / "train.rec").is_file():
        return [folder / "train.rec"]
    found = _with_suffix(folder, ".rec")
    if len(found) > 1:
        raise UserError(
            f"{folder} has {len(found)} .rec files ({found[0].name}, {found[1].name}, ...); give the path of one"
        )
    return found


def _parquet_files(folder: Path) -> list[Path]:
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return [folder]  # Dataset.save_to_disk
    if (folder / "dataset_dict.json").is_file():
        return sorted(each for each in folder.iterdir() if (each / "state.json").is_file())  # DatasetDict: its splits
    if found := _with_suffix(folder, ".parquet"):
        return found
    return _with_suffix(folder / "data", ".parquet") if (folder / "data").is_dir() else []


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    return sorted(
        each
        for each in folder.iterdir()
        if each.suffix.lower() == suffix and not each.name.startswith(".") and each.is_file()
    )


def open_source(
    folder: str | Path,
    image_size: int = 112,
    channels: int = 3,
    *,
    format: Format = "auto",
    on_error: str = "skip",
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    unfinished: bool = False,
) -> EncodedIdentities:
    """Return all images of a data set in any format, or of one of its splits.

    Raises UserError for data that cannot be opened, that have several splits and none is chosen, or that are
    incomplete: the destination of a conversion that has not finished, unless `unfinished` is true.
    """
    if not unfinished:
        _check_conversion_finished(Path(folder))
    kind, paths = find_format(Path(folder), format)
    if kind in ("webdataset", "parquet"):
        paths = choose_split(Path(folder), paths, split)
    elif split is not None:
        raise UserError(f"{folder} has {kind} data, which have no splits; drop --data.split")
    if kind == "recordio":
        return RecordIdentities(paths[0], image_size, channels, on_error)
    if kind == "webdataset":
        return TarIdentities(paths, image_size, channels, on_error)
    if kind == "parquet":
        return ParquetIdentities(paths, image_size, channels, on_error, image_column, label_column)
    if kind == "list":
        return ListIdentities(paths[0], image_size, channels, on_error)
    return FolderIdentities(paths[0], image_size, channels, on_error)


def _check_conversion_finished(path: Path) -> None:
    """Raise UserError if the folder (or the folder of the file) is the destination of an unfinished conversion."""
    folder = path if path.is_dir() else path.parent
    try:
        state = json.loads((folder / CONVERSION_STATE).read_text(encoding="utf-8"))
    except OSError:
        return
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise UserError(
            f"{folder / CONVERSION_STATE}, the state of a conversion, is damaged; remove {folder} and convert again"
        )
    if "finished" not in state:
        raise UserError(
            f"{folder} holds an unfinished conversion to {state.get('format')}; run the same command again to finish "
            "it, or remove the folder"
        )
