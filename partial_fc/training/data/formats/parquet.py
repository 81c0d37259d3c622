"""Hugging Face `datasets`: Parquet files with a column of images, or a folder written by `Dataset.save_to_disk`.

    image   datasets.Image: bytes, or a path below the data folder     label   ClassLabel, integers, or strings

The library converts Parquet files once to Arrow files in the cache folder, which take about as much disk space again.
They are memory-mapped and read in any order. Only the files named here are opened: no loading script, no code of a data
set, no network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from partial_fc.training.data.dataset import EncodedIdentities, raise_if_skipped
from partial_fc.training.data.formats.file_labels import NAMES, number_labels, read_names
from partial_fc.training.data.index_cache import cache_folder
from partial_fc.training.data.safe_files import read_whole
from partial_fc.training.errors import UserError

LABEL_COLUMNS = (
    "label", "labels", "identity", "identity_id", "class", "cls", "person", "person_id", "target", "fine_label",
)  # fmt: skip


class ParquetIdentities(EncodedIdentities):
    """The rows of `paths`: Parquet files, or one folder of `save_to_disk`.

    Raises UserError if they cannot be read, or if it is unclear which columns hold images and labels. Rows without a
    label are skipped and named in `skipped`, or raise UserError, as `on_error` says.
    """

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
        values, rows, skipped = _read_labels(table, label, self.paths[0].name)
        raise_if_skipped(skipped, on_error)
        if not len(rows):
            raise UserError(f"{self._root} has no row with a label in column {label!r}")
        labels, names = number_labels(values)
        classes = getattr(table.features[label], "names", None)
        if classes is not None:
            names = [str(classes[int(name)]) for name in names]
        elif isinstance(values, np.ndarray):
            self.raw_labels = names
            if int(names[0]) >= 0:
                names = read_names(self._root / NAMES, names)
        super().__init__(labels, names, image_size, channels)
        self.skipped = skipped
        self._rows = rows
        self._chunks = table.data.column(image).chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])[:-1]  # first row of each chunk

    def name_at(self, position: int) -> str:
        return f"{self.paths[0].name}#{int(self._rows[position])}"

    def encoded_at(self, position: int) -> bytes | memoryview:
        import pyarrow

        row = int(self._rows[position])
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._chunks[chunk][row - int(self._starts[chunk])]
        if not value.is_valid:
            raise ValueError("there is no image")
        if not isinstance(value, pyarrow.StructScalar):
            return _view(value)
        if value["bytes"].is_valid:
            return _view(value["bytes"])
        path = value["path"].as_py() if value["path"].is_valid else None
        if path is None:
            raise ValueError("there is no image")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path.replace("\\", "/")).parts:
            raise ValueError(f"its path {path!r} points outside the data folder")
        return read_whole(os.path.join(self._root, path))

    def files(self) -> Iterable[tuple[str, int]]:
        found = [file for path in self.paths for file in (path.iterdir() if path.is_dir() else (path,))]
        for path in sorted(file for file in found if file.is_file()):
            yield path.name, path.stat().st_size


def _view(value: Any) -> memoryview:
    """Return the bytes of a pyarrow scalar without a copy; unsigned, because decoders refuse pyarrow's signed bytes."""
    return memoryview(value.as_buffer()).cast("B")


def _load(paths: list[Path]) -> Any:
    """Open the files with `datasets`, quietly."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"Parquet files need the package `datasets` ({error}): pip install 'partial_fc[data]'"
        ) from error
    logging = datasets.utils.logging
    level = logging.get_verbosity()
    shows_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if paths[0].is_dir() or len(paths) < 2:
        logging.disable_progress_bar()
    try:
        if paths[0].is_dir():
            table = datasets.load_from_disk(str(paths[0]))
        else:
            table = datasets.Dataset.from_parquet(
                [str(path) for path in paths], cache_dir=str(cache_folder() / "datasets")
            )
    except Exception as error:  # the libraries below raise many kinds
        raise UserError(
            f"{paths[0].parent if len(paths) > 1 else paths[0]} cannot be read: {_first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()
    if isinstance(table, datasets.DatasetDict):
        raise UserError(f"{paths[0]} has several splits ({', '.join(map(str, table))}); give the folder of one of them")
    return table


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _columns(features: Any, image: str | None, label: str | None, where: Path) -> tuple[str, str]:
    """Return the names of the image column and of the label column: `image` and `label` if given, else as found."""
    listed = ", ".join(features)
    for wanted, option in ((image, "image_column"), (label, "label_column")):
        if wanted is not None and wanted not in features:
            raise UserError(f"{where} has no column {wanted!r}, only {listed}; give another --data.{option}")
    if image is None:
        found = [name for name, feature in features.items() if _holds_images(feature)]
        if not found:  # images as plain bytes, under a common name
            found = [
                name
                for name in ("image", "img", "jpg")
                if str(getattr(features.get(name), "dtype", "")).endswith("binary")
            ]
        if len(found) != 1:
            raise UserError(
                f"{where} has {len(found) or 'no'} columns of images among {listed}; choose one with "
                "--data.image_column"
            )
        image = found[0]
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in features), None)
        if label is None:
            raise UserError(
                f"{where} has no column of labels among {listed} (looked for {', '.join(LABEL_COLUMNS)}); choose "
                "one with --data.label_column"
            )
    return image, label


def _holds_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _read_labels(table: Any, column: str, where: str) -> tuple[Any, Any, list[str]]:
    """Return (labels, the rows that have one int64 [n], problems of the other rows)."""
    import pyarrow

    values = table.data.column(column)
    kind = values.type
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(
            f"the column {column!r} of {where} holds {kind}, not integers or strings; choose another with "
            "--data.label_column"
        )
    valid = np.asarray(values.is_valid())
    rows = np.flatnonzero(valid)
    problems = [f"{where}#{row} (it has no label)" for row in np.flatnonzero(~valid).tolist()]
    kept = values.filter(values.is_valid())
    if not pyarrow.types.is_integer(kind):
        return kept.to_pylist(), rows, problems
    labels = np.asarray(kept.to_numpy(), dtype=np.int64)
    classes = getattr(table.features[column], "names", None)
    if isinstance(classes, list):
        known = (labels >= 0) & (labels < len(classes))
        problems += [f"{where}#{row} (its label is none of the classes)" for row in rows[~known].tolist()]
        labels = labels[known]
        rows = rows[known]
    return labels, rows, problems
