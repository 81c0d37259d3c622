"""A folder with a sub-folder an identity: root/identity/image.jpg, in the order of the names."""

import bisect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from partial_fc.training.data.dataset import EncodedIdentities
from partial_fc.training.data.decode import IMAGE_SUFFIXES
from partial_fc.training.data.files import read_whole
from partial_fc.training.errors import UserError


class FolderIdentities(EncodedIdentities):
    """Images under `root`/identity/, in the order of the names, decoded whenever they are loaded.

    They are converted to grey (`channels` 1) or colour (3) and resized, bilinear, to `image_size` x `image_size`
    pixels. `files_of`, identity to file names, is what `scan_folder(root)` finds, or a part of it.
    """

    def __init__(self, root: str | Path, image_size: int, channels: int, files_of: Mapping[str, Sequence[str]] | None = None) -> None:
        self.root = Path(root)
        self.files_of = scan_folder(self.root) if files_of is None else files_of
        self._folders = list(self.files_of)
        counts = torch.tensor([len(names) for names in self.files_of.values()], dtype=torch.int64)
        self._first = (counts.cumsum(0) - counts).tolist()
        super().__init__(torch.arange(len(counts)).repeat_interleave(counts), list(self._folders), image_size, channels)

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


def scan_folder(root: str | Path) -> dict[str, list[str]]:
    """Identities and their image files, both sorted by name; hidden entries, and files of other kinds, are passed over.

    Raises UserError when `root` is missing, is no folder, cannot be read, or has no identities; and when an identity
    has no image.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"the data folder {root} does not exist; check --data.folder")
    if not root.is_dir():
        raise UserError(f"the data folder {root} is a file; --data.folder needs a folder with a sub-folder an identity")
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        files = {name: image_files(root / name) for name in names}
    except OSError as error:
        raise UserError(f"the data folder {root} cannot be read: {error}") from error
    if not files:
        raise UserError(f"the data folder {root} has no sub-folders; put each identity's images into a sub-folder of its own")
    empty = [name for name, images in files.items() if not images]
    if empty:
        others = f" (and {len(empty) - 1} more like it)" if len(empty) > 1 else ""
        raise UserError(f"the identity {empty[0]!r} in {root} has no image{others}; add images or remove the sub-folder")
    return files


def image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".")]
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
