"""Data sets of the protocols: images listed by name, images aligned by five points, labels and cameras from file names.

root, names [n]     ListedImages: the files root/name, decoded when loaded; labels as given
points [n, 5, 2]    AlignedImages: rotated, scaled and shifted so that eyes, nose and mouth are where ArcFace's training
                    images have them
folder, patterns    labelled_images: a folder of identity sub-folders, or a flat folder with identity and camera in the
                    file names: 0002_c1s1_000451_03.jpg of Market-1501, with label "^(-?\\d+)" and camera "c(\\d+)"
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
    """The images `root`/name for each of `names`, with identity `labels` `[n]` that index `identity_names`."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        labels: Tensor,
        identity_names: list[str],
        image_shape: tuple[int, int, int],
    ) -> None:
        self.root = Path(root)
        self.names = names
        self.labels = labels
        self.identity_names = identity_names
        self.image_shape = image_shape

    def name_of(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Tensor:
        return decode_picture(self.root / self.names[index], self.image_shape, self.names[index])


# (x, y) of eyes, tip of the nose and corners of the mouth in an aligned face of 112 x 112 pixels (Deng et al. 2019)
REFERENCE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


class AlignedImages(ListedImages):
    """`ListedImages` of faces, aligned when loaded by the five `points` (x, y) of each `[n, 5, 2]` in pixels."""

    def __init__(
        self, root: str | Path, names: Sequence[str], points: npt.NDArray[np.float64], image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__(root, names, torch.arange(len(names)), list(names), image_shape)
        self.points = points

    def load(self, index: int) -> Tensor:
        _, height, width = self.image_shape
        coefficients = similarity(REFERENCE * (width / 112, height / 112), self.points[index])
        if coefficients is None:
            raise UnreadableImage(self.names[index], "its points are not those of a face")

        def align(picture: Image.Image) -> Image.Image:
            return picture.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)

        return decode_picture(self.root / self.names[index], self.image_shape, self.names[index], align)


def similarity(reference: npt.NDArray[np.float64], points: npt.NDArray[np.float64]) -> tuple[float, ...] | None:
    """Return the similarity transform for `Image.transform`, or None if there is none.

    The result (a, b, c, d, e, f) maps the pixel (x, y) of the aligned image to (a x + b y + c, d x + e y + f) in the
    picture. It is the inverse of the rotation, scale and shift that bring `points` `[5, 2]` closest to `reference` `[5,
    2]` in least squares (Umeyama 1991). With points as complex numbers, that is w = s z + t.
    """
    # Half a pixel more: points are given from the centre of the first pixel, Pillow counts from its corner.
    w = reference[:, 0] + 1j * reference[:, 1] + (0.5 + 0.5j)
    z = points[:, 0] + 1j * points[:, 1] + (0.5 + 0.5j)
    spread = z - z.mean()
    total = float((np.abs(spread) ** 2).sum())
    s = (spread.conj() * (w - w.mean())).sum() / total if total > 0 and np.isfinite(total) else 0
    if abs(s) < 1e-9:
        return None
    inverse = 1 / s
    shift = z.mean() - w.mean() / s
    cos, sin = float(inverse.real), float(inverse.imag)  # times the scale
    return cos, -sin, float(shift.real), sin, cos, float(shift.imag)


@dataclass
class Labelled:
    """Images with the identity name of each and, if there is a camera pattern, the camera of each."""

    images: IdentityDataset
    names: list[str]
    cameras: list[str] | None


def labelled_images(
    folder: str | Path,
    image_shape: tuple[int, int, int],
    *,
    label: str | None = None,
    camera: str | None = None,
    on_error: str = "skip",
) -> Labelled:
    """Open the images of `folder`: in identity sub-folders or, if `label` is given, in the folder itself.

    `label` and `camera` are regular expressions. The identity (the camera) of an image is what the first group of the
    pattern matches in its file name, or the whole pattern if it has no group. on_error: "skip" leaves out sub-folders
    without an image, which the data set then names in `skipped`. Raises UserError for a folder that is missing or has
    no images, and for a file name that a pattern does not match.
    """
    root = Path(folder)
    if label is None:
        images: IdentityDataset = _identity_folder(root, image_shape, on_error)
        names = [images.identity_names[i] for i in images.labels.tolist()]
    else:
        try:
            files = image_files(root)
        except OSError as error:
            raise UserError(f"the image folder {root} cannot be read: {error.strerror}") from error
        if not files:
            raise UserError(
                f"the image folder {root} has no image; with a label pattern, put the files in it, not in sub-folders"
            )
        names = [_match(label, file, "label") for file in files]
        identity_names = sorted(set(names))
        number = {name: i for i, name in enumerate(identity_names)}
        labels = torch.tensor([number[name] for name in names])
        images = ListedImages(root, files, labels, identity_names, image_shape)
    cameras = None
    if camera is not None:
        cameras = [_match(camera, Path(images.name_of(i)).name, "camera") for i in range(len(images))]
    return Labelled(images, names, cameras)


def numbers_of(*lists: Sequence[str]) -> list[Tensor]:
    """Return an int64 tensor for each list of names, with the same number for the same name in all of them."""
    known: dict[str, int] = {}
    return [torch.tensor([known.setdefault(name, len(known)) for name in names], dtype=torch.int64) for names in lists]


def _identity_folder(root: Path, image_shape: tuple[int, int, int], on_error: str) -> FolderIdentities:
    try:
        return FolderIdentities(root, image_shape[1], image_shape[0], on_error)
    except UserError as error:
        # the message is about the training data: name the image folder, drop the settings that do not apply here
        text = str(error).replace("data folder", "image folder").replace("; check --data.folder", "")
        raise UserError(text.replace("--data.on_error", "--on_error")) from error


def _match(pattern: str, file: str, what: str) -> str:
    try:
        found = re.search(pattern, file)
    except re.error as error:
        raise UserError(f"the {what} pattern {pattern!r} is not a regular expression: {error}") from error
    if found is None:
        raise UserError(f"the {what} pattern {pattern!r} does not match the file name {file!r}")
    return found[1] if found.re.groups else found[0]
