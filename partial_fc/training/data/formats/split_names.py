"""Which split of a data set a file belongs to, by its name.

    train-00000-of-00002.parquet  train-000000.tar  imagenet-train_07.tar      train
    test-00000-of-00001-9f1c...   a folder `test` of a DatasetDict             test
    faces-000.tar                                                              faces, which is not a usual split name

Files of several splits are never read as one data set. Files whose names contain no usual split name are one data set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from partial_fc.training.errors import UserError

_SPLIT_NAMES = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
)
# -00000-of-00002 as Hugging Face writes it, with a digest of 16 digits after it or not
_NUMBER = re.compile(r"([-_.]?\d+)?(-of-\d+)?(-[0-9a-f]{16})?$")


def choose_split(where: Path, paths: Sequence[Path], wanted: str | None) -> list[Path]:
    """Return those of `paths` that belong to the split `wanted`.

    If `wanted` is None, return all, or raise UserError if they belong to several splits. `where` is for the message.
    """
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(_split_of(path), []).append(path)
    listed = ", ".join(f"{name} ({len(files)} file{'s' if len(files) > 1 else ''})" for name, files in splits.items())
    if wanted is not None:
        if wanted not in splits:
            raise UserError(f"{where} has no split {wanted!r}, only {listed}; give another --data.split")
        return splits[wanted]
    if len(splits) > 1 and (paths[0].is_dir() or splits.keys() & _SPLIT_NAMES):
        raise UserError(f"{where} has several splits: {listed}; choose one with --data.split")
    return list(paths)


def _split_of(path: Path) -> str:
    """Return the last usual split name in a file's name; if there is none, the name without its number."""
    if path.is_dir():
        return path.name
    name = _NUMBER.sub("", path.stem, count=1)
    found = [word for word in re.split(r"[-_.]", name.lower()) if word in _SPLIT_NAMES]
    return found[-1] if found else name or "others"
