"""Hugging Face `datasets`: Parquet files with a column of images, or a folder that `Dataset.save_to_disk` has left.

    image   datasets.Image: bytes, or a path below the data folder     label   ClassLabel, whole numbers, or strings

The library turns Parquet files into Arrow files in the cache folder, once, which are mapped into memory and read in any order; that
takes as much disk space again. Only files named here are opened: no loading script, no code of a data set, no network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from partial_fc.training.data.dataset import EncodedIdentities, number_labels, refuse
from partial_fc.training.data.formats.file_labels import NAMES, read_names
from partial_fc.training.data.safe_files import cache_folder, read_whole
from partial_fc.training.errors import UserError

LABELS = ("label", "labels", "identity", "identity_id", "class", "cls", "person", "person_id", "target", "fine_label")


class ParquetIdentities(EncodedIdentities):
    """The rows of `paths`: Parquet files, or one folder of `save_to_disk`. Raises UserError if they cannot be read, or if it is not clear
    which columns are meant; rows without a label are left out, or raise UserError, as `on_error` says."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        image_size: int,
        channels: int,
        on_error: str = "skip",
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self._root = self.paths[0] if self.paths[0].is_dir() else self.paths[0].parent
        table = _load(self.paths)
        image, label = _columns(table.features, image_column, label_column, self._root)
        values, kept, problems = _labels(table, label, self.paths[0].name)
        refuse(problems, on_error)
        if not len(kept):
            raise UserError(f"{self._root} has no row with a label in column {label!r}")
        labels, names = number_labels(values)
        classes = getattr(table.features[label], "names", None)
        if classes is not None:
            names = [str(classes[int(name)]) for name in names]
        elif values.__class__ is np.ndarray:
            self.raw_labels = names
            if int(names[0]) >= 0:
                names = read_names(self._root / NAMES, names)
        super().__init__(labels, names, image_size, channels)
        self.left_out = problems
        self._places = kept
        self._chunks = table.data.column(image).chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])[:-1]

    def _name(self, row: int) -> str:
        return f"{self.paths[0].name}#{int(self._places[row])}"

    def _encoded(self, row: int) -> bytes | memoryview:
        place = int(self._places[row])
        chunk = int(np.searchsorted(self._starts, place, side="right")) - 1
        value = self._chunks[chunk][place - int(self._starts[chunk])]
        if not value.is_valid:
            raise ValueError("there is no image")
        import pyarrow

        if not isinstance(value, pyarrow.StructScalar):
            return memoryview(value.as_buffer()).cast("B")
        found = value["bytes"]
        if found.is_valid:
            return memoryview(found.as_buffer()).cast("B")  # signed bytes as they come, which decoders refuse
        path = value["path"].as_py() if value["path"].is_valid else None
        if path is None:
            raise ValueError("there is no image")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path.replace("\\", "/")).parts:
            raise ValueError(f"its path {path!r} leads out of the data folder")
        return read_whole(os.path.join(self._root, path))

    def files(self) -> Iterable[tuple[str, int]]:
        found = sorted(
            each for path in self.paths for each in (path.iterdir() if path.is_dir() else (path,)) if each.is_file()
        )
        for path in found:
            yield path.name, path.stat().st_size


def _load(paths: list[Path]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"Parquet files need the package `datasets` ({error}): pip install 'partial_fc[data]'"
        ) from error
    quiet = datasets.utils.logging
    level, shows = quiet.get_verbosity(), datasets.utils.logging.is_progress_bar_enabled()
    quiet.set_verbosity_error()
    if paths[0].is_dir() or len(paths) < 2:
        quiet.disable_progress_bar()
    try:
        if paths[0].is_dir():
            table = datasets.load_from_disk(str(paths[0]))
        else:
            table = datasets.Dataset.from_parquet(
                [str(path) for path in paths], cache_dir=str(cache_folder() / "datasets")
            )
    except Exception as error:  # of many kinds, of several libraries
        raise UserError(
            f"{paths[0].parent if len(paths) > 1 else paths[0]} cannot be read: {_first_line(error)}"
        ) from error
    finally:
        quiet.set_verbosity(level)
        if shows:
            quiet.enable_progress_bar()
    if isinstance(table, datasets.DatasetDict):
        raise UserError(f"{paths[0]} has several splits ({', '.join(map(str, table))}); name the folder of one of them")
    return table


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _columns(features: Any, image: str | None, label: str | None, where: Path) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    import datasets

    def holds_images(feature: Any) -> bool:
        fields = feature if isinstance(feature, dict) else {}
        return isinstance(feature, datasets.Image) or set(fields) == {"bytes", "path"}

    for wanted, option in ((image, "image_column"), (label, "label_column")):
        if wanted is not None and wanted not in features:
            raise UserError(
                f"{where} has no column {wanted!r}, but {', '.join(features)}; give another --data.{option}"
            )
    if image is None:
        found = [name for name, feature in features.items() if holds_images(feature)]
        found = found or [
            name for name in ("image", "img", "jpg") if str(getattr(features.get(name), "dtype", "")).endswith("binary")
        ]
        if len(found) != 1:
            raise UserError(
                f"{where} has {len(found) or 'no'} columns of images among {', '.join(features)}; name it with --data.image_column"
            )
        image = found[0]
    if label is None:
        label = next((name for name in LABELS if name in features), None)
        if label is None:
            raise UserError(
                f"{where} has no column of labels among {', '.join(features)} (looked for {', '.join(LABELS)}); name it with "
                "--data.label_column"
            )
    return image, label


def _labels(table: Any, column: str, where: str) -> tuple[Any, Any, list[str]]:
    """(labels, the rows that have one int64 [n], what is wrong with others)."""
    import pyarrow

    values = table.data.column(column)
    kind = values.type
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(
            f"the column {column!r} of {where} holds {kind}, and not whole numbers or strings; name another: --data.label_column"
        )
    given = np.asarray(values.is_valid())
    rows = np.flatnonzero(given)
    problems = [f"{where}#{row} (it has no label)" for row in np.flatnonzero(~given).tolist()]
    kept = values.filter(values.is_valid())
    if pyarrow.types.is_integer(kind):
        labels: Any = np.asarray(kept.to_numpy(), dtype=np.int64)
        if isinstance(getattr(table.features[column], "names", None), list):
            known = (labels >= 0) & (labels < len(table.features[column].names))
            problems += [f"{where}#{row} (its label is none of the classes)" for row in rows[~known].tolist()]
            labels, rows = labels[known], rows[known]
        return labels, rows, problems
    return kept.to_pylist(), rows, problems
