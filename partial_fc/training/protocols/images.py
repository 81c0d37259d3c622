"""Images that a protocol names one by one: by files listed in a text file, or by patterns of file names.

root, names [n]     ListedImages: root/name each, decoded when loaded; labels as given
points [n, 5, 2]    AlignedImages: turned, scaled and shifted so that eyes, nose and mouth come where ArcFace's training images have them
folder, patterns    labelled_images: a folder of identity sub-folders, or a flat one whose file names say identity and camera:
                    0002_c1s1_000451_03.jpg of Market-1501 by label "^(-?\\d+)" and camera "c(\\d+)"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from partial_fc.training.data import FolderIdentities, IdentityDataset, UnreadableImage, decode_picture, image_files
from partial_fc.training.errors import UserError


class ListedImages(IdentityDataset):
    """The images `root`/name for each of `names`, of the identities `labels` `[n]` with `identity_names`."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        labels: Tensor,
        identity_names: list[str],
        image_shape: tuple[int, int, int],
    ) -> None:
        self.root, self.names, self.labels, self.identity_names = Path(root), names, labels, identity_names
        self.image_shape = image_shape

    def name_of(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Tensor:
        return decode_picture(self.root / self.names[index], self.image_shape, self.names[index])


# eyes, tip of the nose, corners of the mouth in a face of 112 x 112 pixels, x and y: what the field trains on (Deng et al. 2019)
REFERENCE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


class AlignedImages(ListedImages):
    """`ListedImages` of faces that are not aligned, with the five `points` `[n, 5, 2]` of each, in pixels of its own (x, y)."""

    def __init__(
        self, root: str | Path, names: Sequence[str], points: npt.NDArray[np.float64], image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__(root, names, torch.arange(len(names)), list(names), image_shape)
        self.points = points

    def load(self, index: int) -> Tensor:
        _, height, width = self.image_shape
        coefficients = similarity(REFERENCE * (width / 112, height / 112), self.points[index])
        if coefficients is None:
            raise UnreadableImage(self.names[index], "its points are no face")

        def fit(picture: Image.Image) -> Image.Image:
            return picture.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)

        return decode_picture(self.root / self.names[index], self.image_shape, self.names[index], fit)


def similarity(reference: npt.NDArray[np.float64], points: npt.NDArray[np.float64]) -> tuple[float, ...] | None:
    """(a, b, c, d, e, f): where in the picture, (a x + b y + c, d x + e y + f), the aligned image's (x, y) is from; None if nowhere.

    The turn, scale and shift that bring `points` `[5, 2]` nearest to `reference` in least squares (Umeyama 1991). As complex numbers it is
    w = s z + t; points name the middles of pixels, which Pillow counts from their corners, half a pixel farther.
    """
    w, z = (each[:, 0] + 1j * each[:, 1] + (0.5 + 0.5j) for each in (reference, points))
    spread = z - z.mean()
    total = float((np.abs(spread) ** 2).sum())
    s = (spread.conj() * (w - w.mean())).sum() / total if total > 0 and np.isfinite(total) else 0
    if abs(s) < 1e-9:
        return None
    turn, shift = 1 / s, z.mean() - w.mean() / s
    return float(turn.real), float(-turn.imag), float(shift.real), float(turn.imag), float(turn.real), float(shift.imag)


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
            files = image_files(root)
        except OSError as error:
            raise UserError(f"the image folder {root} cannot be read: {error.strerror}") from error
        if not files:
            raise UserError(
                f"the image folder {root} has no image; with a label pattern its files lie in it, without sub-folders"
            )
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
        return FolderIdentities(root, image_shape[1], image_shape[0], on_error="raise")
    except UserError as error:
        text = str(error).replace("data folder", "image folder").replace("; check --data.folder", "")
        raise UserError(text.replace(", or pass --data.on_error skip", "")) from error


def _match(pattern: str, file: str, what: str) -> str:
    try:
        found = re.search(pattern, file)
    except re.error as error:
        raise UserError(f"the {what} pattern {pattern!r} is no regular expression: {error}") from error
    if found is None:
        raise UserError(f"the {what} pattern {pattern!r} does not match the file name {file!r}")
    return found[1] if found.re.groups else found[0]
