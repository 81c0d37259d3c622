"""A folder with a sub-folder for each identity: root/identity/image.jpg, in the order of the names."""

import bisect
import itertools
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from partial_fc.training.data.dataset import EncodedIdentities, raise_if_skipped
from partial_fc.training.data.decode import IMAGE_SUFFIXES
from partial_fc.training.data.safe_files import read_whole
from partial_fc.training.errors import UserError


class FolderIdentities(EncodedIdentities):
    """The images root/identity/image of the folder `root`, sorted by name.

    Sub-folders without an image are skipped and named in `skipped`, or raise UserError, as `on_error` says. Files whose
    names do not end like those of images are counted in `notes`.
    """

    def __init__(self, root: str | Path, image_size: int, channels: int, on_error: str = "skip") -> None:
        self.root = Path(root)
        self.files_of, skipped, others = scan_folder(self.root)
        raise_if_skipped(skipped, on_error)
        self._folders = list(self.files_of)
        counts = torch.tensor([len(names) for names in self.files_of.values()], dtype=torch.int64)
        self._first = (counts.cumsum(0) - counts).tolist()  # position of the first image of each folder
        labels = torch.arange(len(counts)).repeat_interleave(counts)
        super().__init__(labels, list(self._folders), image_size, channels)
        self.skipped = skipped
        if others:
            kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
            self.notes = [
                f"{others.total():,} files in sub-folders are not read, because their names do not end as those of "
                f"images ({', '.join(sorted(IMAGE_SUFFIXES))}): {kinds}"
            ]

    def name_at(self, position: int) -> str:
        number = bisect.bisect_right(self._first, position) - 1
        folder = self._folders[number]
        return f"{folder}/{self.files_of[folder][position - self._first[number]]}"

    def path_of(self, index: int) -> Path:
        return self.root / self.name_of(index)

    def encoded_at(self, position: int) -> bytes:
        return read_whole(os.path.join(self.root, self.name_at(position)))

    def files(self) -> Iterable[tuple[str, int]]:
        for index in range(len(self)):
            name = self.name_of(index)
            try:
                yield name, os.stat(os.path.join(self.root, name)).st_size
            except OSError:
                yield name, -1


def scan_folder(root: str | Path) -> tuple[dict[str, list[str]], list[str], Counter[str]]:
    """Return ({identity: its image files}, [sub-folders without an image, each as "name (reason)"], {suffix: number of
    files that are not read}), sorted by name.

    Hidden entries are ignored. Raises UserError if `root` is missing, is not a folder, cannot
    be read, or has no sub-folder with an image.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"the data folder {root} does not exist; check --data.folder")
    if not root.is_dir():
        raise UserError(
            f"the data folder {root} is a file; --data.folder needs a folder with a sub-folder for each identity"
        )
    try:
        others: Counter[str] = Counter()
        files = {name: image_files(root / name, others) for name in _folders(root)}
        empty = [name for name, images in files.items() if not images]
        nested = [name for name in empty if _has_images_below(root / name)]
    except OSError as error:
        raise UserError(f"the data folder {root} cannot be read: {error}") from error
    if not files:
        raise UserError(
            f"the data folder {root} has no sub-folders; put the images of each identity into its own sub-folder"
        )
    if nested and len(empty) == len(files):
        choices = " or ".join(str(root / name) for name in nested[:4])
        raise UserError(f"the images of the data folder {root} are one level deeper; give {choices}")
    if len(empty) == len(files):
        raise UserError(f"no sub-folder of the data folder {root} has an image; the first is {empty[0]}")
    reasons = {name: f"its images are one level deeper: give {root / name} to use them" for name in nested}
    skipped = [f"{name} ({reasons.get(name, 'there is no image in it')})" for name in empty]
    return {name: images for name, images in files.items() if images}, skipped, others


def image_files(folder: Path, others: Counter[str] | None = None) -> list[str]:
    """Return the names of the image files in `folder`, sorted; hidden files are ignored. others: gets the number of
    other files by their suffixes."""
    images = []
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in IMAGE_SUFFIXES and not entry.name.startswith("."):
                images.append(entry.name)
            elif others is not None and entry.is_file() and not entry.name.startswith("."):
                others[suffix or "without a suffix"] += 1
    return sorted(images)


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _has_images_below(folder: Path) -> bool:
    """Return whether one of the first ten sub-folders has an image."""
    return any(image_files(folder / name) for name in itertools.islice(_folders(folder), 10))
