"""Which split of a data set its files are of, by their names.

    train-00000-of-00002.parquet  train-000000.tar  imagenet-train_07.tar      train
    test-00000-of-00001-9f1c...   a folder `test` of a DatasetDict             test
    faces-000.tar                                                              faces, which is the name of no split

Files of several splits are never read as one set; files under other names, whatever they are, are one set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from partial_fc.training.errors import UserError

_NAMES = frozenset(("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"))
_NUMBER = re.compile(
    r"([-_.]?\d+)?(-of-\d+)?(-[0-9a-f]{16})?$"
)  # as Hugging Face writes it, with a digest at the end or without


def choose_split(where: Path, paths: Sequence[Path], wanted: str | None) -> list[Path]:
    """Those of `paths` that are of the split `wanted`; without one all, or UserError if they are of several splits."""
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(_split_of(path), []).append(path)
    listed = ", ".join(f"{name} ({len(files)} file{'s' if len(files) > 1 else ''})" for name, files in splits.items())
    if wanted is not None:
        if wanted not in splits:
            raise UserError(f"{where} has no split {wanted!r}, but {listed}; give another --data.split")
        return splits[wanted]
    if len(splits) > 1 and (paths[0].is_dir() or splits.keys() & _NAMES):
        raise UserError(f"{where} has several splits: {listed}; choose one with --data.split")
    return list(paths)


def _split_of(path: Path) -> str:
    """The name of a split that the file's name has in it; else the name without its number."""
    if path.is_dir():
        return path.name
    name = _NUMBER.sub("", path.stem, count=1)
    found = [word for word in re.split(r"[-_.]", name.lower()) if word in _NAMES]
    return found[-1] if found else name or "others"
