"""From settings to data sets: which format lies there, the sets to train and to evaluate on.

    .rec and .idx           RecordIO        recordio.py
    *.tar                   WebDataset      tar_shards.py
    *.parquet, save_to_disk Hugging Face    hugging_face.py     of files that are of several splits, those of one: splits.py
    a text file             a list          list_file.py
    sub-folders of images   a folder        folder.py
    packed.json             a packed set    packed.py: what `partial-fc data glyphs` makes

`open_data` turns a DataConfig into the training set and the sets to evaluate on. Their order depends on names and seed alone, so every rank
sees the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from partial_fc.training.data.augment import stream_key
from partial_fc.training.data.config import Format
from partial_fc.training.data.dataset import DataConfig, DataSplits, EncodedIdentities, IdentityDataset, enough
from partial_fc.training.data.formats.embedded_glyphs import GlyphIdentities
from partial_fc.training.data.formats.folder import FolderIdentities
from partial_fc.training.data.formats.list_file import ListIdentities
from partial_fc.training.data.formats.packed import is_packed, open_packed
from partial_fc.training.data.formats.parquet import ParquetIdentities
from partial_fc.training.data.formats.recordio import RecordIdentities
from partial_fc.training.data.formats.split_names import choose_split
from partial_fc.training.data.formats.tar_files import TarIdentities
from partial_fc.training.data.labels import LabelMap, with_enough_images
from partial_fc.training.errors import UserError

STATE = ".convert.json"
"""What `convert` notes in its destination: how far it has come, and in the end that it is finished, and with what."""
LIST_SUFFIXES = (".txt", ".lst", ".list", ".tsv", ".csv")
_LOOKED_FOR = {
    "recordio": "train.rec, or one *.rec, with its .idx",
    "webdataset": "*.tar",
    "parquet": "*.parquet here or in data/, or a folder of save_to_disk",
    "list": f"a text file ({', '.join(LIST_SUFFIXES)}) of lines `path label`, or list.txt",
    "folder": "sub-folders of images, one an identity",
}


def find_format(path: Path, asked: Format = "auto") -> tuple[str, list[Path]]:
    """(format, the files or the folder to read) of what lies at `path`; UserError, saying what was looked for, if it is not there."""
    if not path.exists():
        raise UserError(f"the data folder {path} does not exist; check --data.folder")
    if path.suffix.lower() == ".bin" and path.is_file():
        raise UserError(
            f"{path} holds no data that is known; if it holds pairs of images, partial-fc verify RUN {path} measures on them"
        )
    try:
        found = {name: files for name in _LOOKED_FOR if (files := _candidates(path, name))}
    except OSError as error:
        raise UserError(f"the data folder {path} cannot be read: {error}") from error
    if asked != "auto":
        if asked == "folder":
            return asked, [path]
        if asked not in found:
            raise UserError(f"{path} holds no {asked} data: looked for {_LOOKED_FOR[asked]}")
        return asked, found[asked]
    packed = [name for name in ("recordio", "webdataset", "parquet") if name in found]
    if len(packed) > 1:
        raise UserError(f"{path} holds {' and '.join(packed)} data; say which with --data.format")
    for name in (*packed, "list", "folder"):
        if name in found:
            return name, found[name]
    looked = "; ".join(f"{words} ({name})" for name, words in _LOOKED_FOR.items())
    raise UserError(f"{path} holds no data that is known; looked for: {looked}")


def _candidates(path: Path, name: str) -> list[Path]:
    """What there is to read of that format."""
    if path.is_file():
        suffixes = {
            "recordio": (".rec",),
            "webdataset": (".tar",),
            "parquet": (".parquet",),
            "list": LIST_SUFFIXES,
        }.get(name, ())
        return [path] if path.suffix.lower() in suffixes else []
    if name == "recordio":
        whole = path / "train.rec"
        several = [whole] if whole.is_file() else _with_suffix(path, ".rec")
        if len(several) > 1:
            raise UserError(
                f"{path} has {len(several)} .rec files ({several[0].name}, {several[1].name}, ...); name one of them"
            )
        return several
    if name == "webdataset":
        return _with_suffix(path, ".tar")
    if name == "parquet":
        if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
            return [path]
        if (path / "dataset_dict.json").is_file():
            return sorted(each for each in path.iterdir() if (each / "state.json").is_file())
        return _with_suffix(path, ".parquet") or (
            _with_suffix(path / "data", ".parquet") if (path / "data").is_dir() else []
        )
    if name == "list":
        return [path / "list.txt"] if (path / "list.txt").is_file() else []
    if name == "folder":
        with os.scandir(path) as entries:
            return [path] if any(entry.is_dir() and not entry.name.startswith(".") for entry in entries) else []
    return []


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
    """All images of a data set in any format, or of one of its splits; UserError for one that cannot be opened, or has several splits, or
    is half of one: what a conversion was writing when it was ended, unless `unfinished` ones are wanted."""
    if not unfinished:
        _refuse_unfinished(Path(folder))
    kind, paths = find_format(Path(folder), format)
    if kind in ("webdataset", "parquet"):
        paths = choose_split(Path(folder), paths, split)
    elif split is not None:
        raise UserError(f"{folder} holds {kind} data, which have no splits; drop --data.split")
    if kind == "recordio":
        return RecordIdentities(paths[0], image_size, channels, on_error)
    if kind == "webdataset":
        return TarIdentities(paths, image_size, channels, on_error)
    if kind == "parquet":
        return ParquetIdentities(paths, image_size, channels, on_error, image_column, label_column)
    if kind == "list":
        return ListIdentities(paths[0], image_size, channels, on_error)
    return FolderIdentities(paths[0], image_size, channels, on_error)


def _refuse_unfinished(path: Path) -> None:
    """UserError if a conversion was begun in the folder, or in that of the file, and is not finished."""
    folder = path if path.is_dir() else path.parent
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except OSError:
        return
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise UserError(f"{folder / STATE}, the note of a conversion, is damaged; remove {folder} and convert again")
    if "finished" not in state:
        raise UserError(
            f"a conversion to {state.get('format')} was begun in {folder} and is not finished; run the same command again, or remove it"
        )


def split_identities(count: int, holdout: int, seed: int) -> tuple[list[int], list[int]]:
    """(training, held-out) identities, each in rising order: `holdout` of `count`, drawn by `seed` alone."""
    if holdout >= count > 0:
        raise UserError(f"holding out {holdout} of {count} identities leaves none; lower --data.holdout_identities")
    rng = np.random.Generator(np.random.Philox(key=stream_key(seed)))
    held = np.zeros(count, dtype=bool)
    held[rng.permutation(count)[:holdout]] = True
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def open_data(config: DataConfig, seed: int) -> DataSplits:
    """Open what `config` names; `seed` draws the identities held out. Raises UserError for what cannot be had."""
    if config.folder is None:
        if config.image_size not in (None, 32) or config.channels not in (None, 1):
            raise UserError("the embedded glyphs are grey, 32 pixels wide; drop --data.image_size and --data.channels")
        if config.holdout_identities:
            raise UserError("the embedded glyphs have their own held-out identities; drop --data.holdout_identities")
        if config.split is not None:
            raise UserError("the embedded glyphs have no splits to choose; drop --data.split")
        train = GlyphIdentities("train", config.identities)
        with_enough_images(
            range(train.num_identities), train.labels, config.min_images
        )  # all have as many: all or none
        return DataSplits(train, {"seen": GlyphIdentities("seen"), "new": GlyphIdentities("new")})

    if is_packed(config.folder):
        return open_packed(config)
    whole = open_source(
        config.folder,
        config.image_size or 112,
        config.channels or 3,
        format=config.format,
        on_error=config.on_error,
        image_column=config.image_column,
        label_column=config.label_column,
        split=config.split,
    )
    kept, held = split_identities(whole.num_identities, config.holdout_identities, seed)
    kept = with_enough_images(kept, whole.labels, config.min_images)
    beside = f"beside those held out{' or with too few images' if config.min_images > 1 else ''}"
    kept = kept[: enough(config.identities, len(kept), f"the data folder {config.folder}, {beside}")]
    evaluation: dict[str, IdentityDataset] = {"holdout": whole.select(held)} if held else {}
    return DataSplits(whole.select(kept), evaluation, LabelMap.of(whole.identity_names, whole.labels, kept))
