"""A folder with a sub-folder an identity: root/identity/image.jpg, in the order of the names."""

import bisect
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from partial_fc.training.data.dataset import EncodedIdentities, refuse
from partial_fc.training.data.decode import IMAGE_SUFFIXES
from partial_fc.training.data.safe_files import read_whole
from partial_fc.training.errors import UserError


class FolderIdentities(EncodedIdentities):
    """Images under `root`/identity/, in the order of the names, decoded whenever they are loaded.

    They are converted to grey (`channels` 1) or colour (3) and resized, bilinear, to `image_size` x `image_size`
    pixels. Sub-folders without an image are left out, or raise UserError, as `on_error` says.
    """

    def __init__(self, root: str | Path, image_size: int, channels: int, on_error: str = "skip") -> None:
        self.root = Path(root)
        self.files_of, problems = scan_folder(self.root)
        refuse(problems, on_error)
        self._folders = list(self.files_of)
        counts = torch.tensor([len(names) for names in self.files_of.values()], dtype=torch.int64)
        self._first = (counts.cumsum(0) - counts).tolist()
        super().__init__(torch.arange(len(counts)).repeat_interleave(counts), list(self._folders), image_size, channels)
        self.left_out = problems

    def _name(self, row: int) -> str:
        place = bisect.bisect_right(self._first, row) - 1
        folder = self._folders[place]
        return f"{folder}/{self.files_of[folder][row - self._first[place]]}"

    def _encoded(self, row: int) -> bytes:
        return read_whole(os.path.join(self.root, self._name(row)))

    def files(self) -> Iterable[tuple[str, int]]:
        for index in range(len(self)):
            name = self.name_of(index)
            try:
                yield name, os.stat(os.path.join(self.root, name)).st_size
            except OSError:
                yield name, -1


def scan_folder(root: str | Path) -> tuple[dict[str, list[str]], list[str]]:
    """(identities and their image files, both sorted by name; sub-folders without any, and why). Hidden entries, and files of other kinds,
    are passed over.

    Raises UserError when `root` is missing, is no folder, cannot be read, or no sub-folder has an image.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"the data folder {root} does not exist; check --data.folder")
    if not root.is_dir():
        raise UserError(f"the data folder {root} is a file; --data.folder needs a folder with a sub-folder an identity")
    try:
        files = {name: image_files(root / name) for name in _folders(root)}
        empty = [name for name, images in files.items() if not images]
        deeper = [name for name in empty if _has_images_below(root / name)]
    except OSError as error:
        raise UserError(f"the data folder {root} cannot be read: {error}") from error
    if not files:
        raise UserError(
            f"the data folder {root} has no sub-folders; put each identity's images into a sub-folder of its own"
        )
    if deeper and len(empty) == len(files):
        raise UserError(
            f"images of the data folder {root} lie a level deeper; name {' or '.join(str(root / name) for name in deeper[:4])}"
        )
    if len(empty) == len(files):
        raise UserError(f"no sub-folder of the data folder {root} has an image; the first is {empty[0]}")
    why = {name: f"its images lie a level deeper: name {root / name} for them" for name in deeper}
    problems = [f"{name} ({why.get(name, 'there is no image in it')})" for name in empty]
    return {name: images for name, images in files.items() if images}, problems


def image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".")]
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _has_images_below(folder: Path) -> bool:
    return any(image_files(folder / name) for name in itertools.islice(_folders(folder), 10))
