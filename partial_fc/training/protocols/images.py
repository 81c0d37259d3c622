"""Images that a protocol names one by one: by files listed in a text file, or by patterns of file names.

root, names [n]     ListedImages: root/name each, decoded when loaded; labels as given
folder, patterns    labelled_images: a folder of identity sub-folders, or a flat one whose file names say identity and camera:
                    0002_c1s1_000451_03.jpg of Market-1501 by label "^(-?\\d+)" and camera "c(\\d+)"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partial_fc.training.data import FolderIdentities, IdentityDataset, _image_files, decode_picture
from partial_fc.training.errors import UserError


class ListedImages(IdentityDataset):
    """The images `root`/name for each of `names`, of the identities `labels` `[n]` with `identity_names`."""

    def __init__(
        self, root: str | Path, names: Sequence[str], labels: Tensor, identity_names: list[str], image_shape: tuple[int, int, int]
    ) -> None:
        self.root, self.names, self.labels, self.identity_names = Path(root), names, labels, identity_names
        self.image_shape = image_shape

    def name_of(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Tensor:
        return decode_picture(self.root / self.names[index], self.image_shape, self.names[index])


@dataclass
class Labelled:
    """Images with the name of each one's identity, and the camera of each where there is one."""

    images: IdentityDataset
    names: list[str]
    cameras: list[str] | None


def labelled_images(
    folder: str | Path, image_shape: tuple[int, int, int], *, label: str | None = None, camera: str | None = None
) -> Labelled:
    """The images of `folder`: of identity sub-folders, or, with a pattern `label`, those in the folder itself.

    `label` and `camera` are regular expressions; what their first group (or all of them) matches in a file's name is its identity, or its
    camera. UserError for a folder that is missing or has no images, and a file name that a pattern does not match.
    """
    root = Path(folder)
    if label is None:
        images: IdentityDataset = _folder(root, image_shape)
        names = [images.identity_names[i] for i in images.labels.tolist()]
    else:
        try:
            files = _image_files(root)
        except OSError as error:
            raise UserError(f"the image folder {root} cannot be read: {error.strerror}") from error
        if not files:
            raise UserError(f"the image folder {root} has no image; with a label pattern its files lie in it, without sub-folders")
        names = [_match(label, file, "label") for file in files]
        unique = sorted(set(names))
        numbers = {name: i for i, name in enumerate(unique)}
        images = ListedImages(root, files, torch.tensor([numbers[name] for name in names]), unique, image_shape)
    cameras = None
    if camera is not None:
        cameras = [_match(camera, Path(images.name_of(i)).name, "camera") for i in range(len(images))]
    return Labelled(images, names, cameras)


def numbers_of(*lists: Sequence[str]) -> list[Tensor]:
    """One int64 tensor for each list of names: the same number for the same name in all of them."""
    known: dict[str, int] = {}
    return [torch.tensor([known.setdefault(name, len(known)) for name in names], dtype=torch.int64) for names in lists]


def _folder(root: Path, image_shape: tuple[int, int, int]) -> FolderIdentities:
    try:
        return FolderIdentities(root, image_shape[1], image_shape[0])
    except UserError as error:
        raise UserError(str(error).replace("data folder", "image folder").replace("; check --data.folder", "")) from error


def _match(pattern: str, file: str, what: str) -> str:
    try:
        found = re.search(pattern, file)
    except re.error as error:
        raise UserError(f"the {what} pattern {pattern!r} is no regular expression: {error}") from error
    if found is None:
        raise UserError(f"the {what} pattern {pattern!r} does not match the file name {file!r}")
    return found[1] if found.re.groups else found[0]
