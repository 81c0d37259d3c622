"""Images sorted by identity: the embedded glyphs, or a folder with a sub-folder an identity.

Data's story: a data set is n images with `labels` int64 [n] in 0..num_identities-1, each loaded as uint8 [C, H, W].

    glyphs   16 designs x 1300 characters, 32 x 32, grey; a character is an identity, a design (typeface) a sample
               train  characters    0..999,  designs  0..9     10,000 images
               seen   characters 1000..1299, designs  0..9      3,000 images: new identities
               new    characters 1000..1299, designs 10..15     1,800 images: new identities in designs never trained on
    folder   root/identity/image.jpg, decoded when loaded; identities may be held out of training, drawn by the seed
    packed   one memory-mapped file of many small images, such as `partial-fc data glyphs` makes: packed.py

`open_data` turns a DataConfig into the training set and the sets to evaluate on. Their order depends on names and
seed alone, so every rank sees the same. `loader.BatchLoader` makes batches of them.
"""

import functools
import io
import lzma
import os
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from partial_fc.training.augment import stream_key
from partial_fc.training.errors import UserError
from partial_fc.training.labels import LabelMap, with_enough_images
from partial_fc.training.mixed_set import MixedSet, check_mix
from partial_fc.training.samplers import SamplerName, check_settings

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
GlyphSplit = Literal["train", "seen", "new"]

_GLYPHS = Path(__file__).parent / "assets" / "glyphs1300.npz.xz"
_TRAIN_DESIGNS = 10


@dataclass
class DataConfig:
    """Which images to train on."""

    folder: str | None = None
    """Folder with one sub-folder of images an identity, or of a packed data set; without it, the embedded glyphs are used."""
    identities: int | None = None
    """How many identities to train on; without it, all of them."""
    holdout_identities: int = 0
    """How many identities of a folder to keep out of training for evaluation, drawn by seed; glyphs have their own."""
    image_size: int | None = None
    """Side of the square images, in pixels: those of a folder are resized to it (112 if not given); glyphs have 32."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour: images of a folder are converted (to 3 if not given); the glyphs have 1."""
    min_images: int = 1
    """Fewest images of an identity to train on; those with fewer are left out, and the others numbered anew (labels.csv of the run)."""
    sampler: SamplerName = "shuffled"
    """Order of an epoch: all images shuffled; pk, identities x images a batch; class_aware, rare classes more often (docs/samplers.md)."""
    images_per_identity: int | None = None
    """Images of an identity in a batch; pk only, 4 if not given."""
    class_exponent: float | None = None
    """Power of a class's number of images that it is drawn by, 0 (all alike) to 1 (as they are); class_aware only, 0.5 if not given."""
    mix: list[MixedSet] = field(default_factory=list)
    """Data sets beside this one, each with a share of every batch and a head of its own: [{name, folder, weight}], see docs/samplers.md."""
    workers: int = 0
    """How many processes a rank starts to load images; 0 loads them in the training process."""
    on_error: Literal["skip", "raise"] = "skip"
    """What to do about an image that cannot be read: leave it out and report it, or stop."""

    def __post_init__(self) -> None:
        for name, least in (("identities", 1), ("holdout_identities", 0), ("image_size", 1), ("workers", 0), ("min_images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--data.{name} is {value}; give at least {least}")
        if self.channels not in (None, 1, 3):
            raise UserError(f"--data.channels is {self.channels}; give 1 (grey) or 3 (colour)")
        check_mix(self.mix)
        check_settings(self.sampler, self.images_per_identity, self.class_exponent)


class UnreadableImage(Exception):
    """An image that cannot be decoded: `path` as the data set names it, `reason` in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


class IdentityDataset(ABC):
    """n images, each of one of `num_identities` identities."""

    labels: torch.Tensor
    """int64 [n], 0..num_identities-1, every number in use."""
    identity_names: list[str]
    """[num_identities], what a label stands for."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of every loaded image."""

    @property
    def num_identities(self) -> int:
        return len(self.identity_names)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name_of(self, index: int) -> str:
        """What to call image `index` in a message."""

    @abstractmethod
    def load(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 [C, H, W]; raises UnreadableImage for a damaged file."""


class GlyphIdentities(IdentityDataset):
    """The embedded glyphs (white on black), by character and then by design; see assets/ATTRIBUTION.md.

    `identities` keeps the first so many characters of the split; more than there are raises UserError.
    """

    def __init__(self, split: GlyphSplit = "train", identities: int | None = None) -> None:
        packed, code_points, num_train = _read_glyphs()
        if split not in ("train", "seen", "new"):
            raise ValueError(f"split is {split!r}; it is one of 'train', 'seen', 'new'")
        designs = range(_TRAIN_DESIGNS, len(packed)) if split == "new" else range(_TRAIN_DESIGNS)
        characters = range(num_train) if split == "train" else range(num_train, len(code_points))
        count = _enough(identities, len(characters), f"the embedded glyphs ({split})")
        chosen = packed[designs.start : designs.stop, characters.start : characters.start + count]
        grey = np.stack([chosen >> 4, chosen & 15], axis=-1).reshape(len(designs), count, 1, 32, 32) * np.uint8(17)
        self._images = torch.from_numpy(grey.swapaxes(0, 1).reshape(-1, 1, 32, 32))
        self._designs = designs
        self.labels = torch.arange(count).repeat_interleave(len(designs))
        self.identity_names = [f"U+{code:04X}" for code in code_points[characters.start :][:count].tolist()]
        self.image_shape = (1, 32, 32)

    def name_of(self, index: int) -> str:
        character, design = divmod(index, len(self._designs))
        return f"glyph {self.identity_names[character]} design {self._designs[design]}"

    def load(self, index: int) -> torch.Tensor:
        return self._images[index]


@functools.lru_cache(maxsize=1)
def _read_glyphs() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32], int]:
    """(packed uint8 [16, 1300, 32, 16], code points uint32 [1300], how many of them are for training)."""
    try:
        with np.load(io.BytesIO(lzma.decompress(_GLYPHS.read_bytes())), allow_pickle=False) as arrays:
            return arrays["packed"], arrays["cps"], int(arrays["ntrain"])
    except (OSError, lzma.LZMAError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise UserError(f"the embedded glyphs {_GLYPHS} cannot be read ({error}); install the package again") from error


def _enough(asked: int | None, available: int, where: str) -> int:
    """How many identities to take: all, or those asked for; UserError if there are fewer."""
    if asked is None:
        return available
    if asked < 1:
        raise UserError(f"{asked} identities were asked for; give at least 1")
    if asked > available:
        raise UserError(f"{asked} identities were asked for, but there are {available} in {where}; lower --data.identities")
    return asked


class FolderIdentities(IdentityDataset):
    """Images under `root`/identity/, in the order of the names, decoded with Pillow whenever they are loaded.

    They are converted to grey (`channels` 1) or colour (3) and resized, bilinear, to `image_size` x `image_size`
    pixels. `files`, identity to file names, is what `scan_folder(root)` finds, or a part of it.
    """

    def __init__(self, root: str | Path, image_size: int, channels: int, files: Mapping[str, Sequence[str]] | None = None) -> None:
        if image_size < 1 or channels not in (1, 3):
            raise UserError(f"images of {image_size} pixels in {channels} channels; give at least 1 pixel, and 1 or 3 channels")
        self.root = Path(root)
        self.files = scan_folder(self.root) if files is None else files
        self.image_shape = (channels, image_size, image_size)
        self.identity_names = list(self.files)
        counts = torch.tensor([len(names) for names in self.files.values()], dtype=torch.int64)
        self.labels = torch.arange(len(counts)).repeat_interleave(counts)
        self._first = (counts.cumsum(0) - counts).tolist()

    def select(self, identities: Sequence[int]) -> "FolderIdentities":
        """The data set of these identities alone, numbered anew in the order given."""
        names = [self.identity_names[identity] for identity in identities]
        return FolderIdentities(self.root, self.image_shape[1], self.image_shape[0], {name: self.files[name] for name in names})

    def name_of(self, index: int) -> str:
        label = int(self.labels[index])
        identity = self.identity_names[label]
        return f"{identity}/{self.files[identity][index - self._first[label]]}"

    def load(self, index: int) -> torch.Tensor:
        name = self.name_of(index)
        return decode_picture(self.root / name, self.image_shape, name)


def decode_picture(
    source: str | Path | BinaryIO,
    image_shape: tuple[int, int, int],
    name: str,
    fit: Callable[[Image.Image], Image.Image] | None = None,
) -> torch.Tensor:
    """An encoded picture as uint8 [C, H, W] of that shape, resized (bilinear) or by `fit`; UnreadableImage, as `name`, for a bad one."""
    channels, height, width = image_shape
    try:
        # Pillow only warns of pictures large enough to fill the memory; they are refused here.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                picture = _eight_bits(image).convert("L" if channels == 1 else "RGB")
        resized = picture.resize((width, height), Image.Resampling.BILINEAR) if fit is None else fit(picture)
    except Exception as error:  # a damaged file makes decoders raise almost anything, not OSError alone
        raise UnreadableImage(name, " ".join(str(error).split()) or type(error).__name__) from error
    return torch.from_numpy(np.array(resized)).view(height, width, channels).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image by its high bytes: Pillow's own conversion would cut everything above 255 to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


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
        files = {name: _image_files(root / name) for name in names}
    except OSError as error:
        raise UserError(f"the data folder {root} cannot be read: {error}") from error
    if not files:
        raise UserError(f"the data folder {root} has no sub-folders; put each identity's images into a sub-folder of its own")
    empty = [name for name, images in files.items() if not images]
    if empty:
        others = f" (and {len(empty) - 1} more like it)" if len(empty) > 1 else ""
        raise UserError(f"the identity {empty[0]!r} in {root} has no image{others}; add images or remove the sub-folder")
    return files


def _image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".")]
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)


def split_identities(count: int, holdout: int, seed: int) -> tuple[list[int], list[int]]:
    """(training, held-out) identities, each in rising order: `holdout` of `count`, drawn by `seed` alone."""
    if holdout >= count > 0:
        raise UserError(f"holding out {holdout} of {count} identities leaves none; lower --data.holdout_identities")
    rng = np.random.Generator(np.random.Philox(key=stream_key(seed)))
    held = np.zeros(count, dtype=bool)
    held[rng.permutation(count)[:holdout]] = True
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


@dataclass
class DataSplits:
    """What a run trains on, and what it is evaluated on; no identity is in both."""

    train: IdentityDataset
    evaluation: dict[str, IdentityDataset] = field(default_factory=dict)
    """By name: "seen" and "new" for the glyphs; "holdout" for a folder, if identities are held out."""
    label_map: LabelMap | None = None
    """What became of each identity; None where every one is trained on as it is."""

    def check_evaluation(self) -> None:
        """Raise UserError, before any training, for held-out sets in which there is no pair to accept or none to reject."""
        for name, dataset in self.evaluation.items():
            if dataset.num_identities < 2:
                raise UserError(f"the {name} set has one identity, so no pair to reject; give --data.holdout_identities at least 2")
            if int(torch.bincount(dataset.labels).max()) < 2:
                raise UserError(f"no identity of the {name} set has two images, so there is no pair to accept; hold out others, or none")


def open_data(config: DataConfig, seed: int) -> DataSplits:
    """Open what `config` names; `seed` draws the identities held out. Raises UserError for what cannot be had."""
    if config.folder is None:
        if config.image_size not in (None, 32) or config.channels not in (None, 1):
            raise UserError("the embedded glyphs are grey, 32 pixels wide; drop --data.image_size and --data.channels")
        if config.holdout_identities:
            raise UserError("the embedded glyphs have their own held-out identities; drop --data.holdout_identities")
        train = GlyphIdentities("train", config.identities)
        with_enough_images(range(train.num_identities), train.labels, config.min_images)  # all have as many: all or none
        return DataSplits(train, {"seen": GlyphIdentities("seen"), "new": GlyphIdentities("new")})
    from partial_fc.training.packed import is_packed, open_packed

    if is_packed(config.folder):
        return open_packed(config)
    folder = FolderIdentities(config.folder, config.image_size or 112, config.channels or 3)
    kept, held = split_identities(folder.num_identities, config.holdout_identities, seed)
    kept = with_enough_images(kept, folder.labels, config.min_images)
    beside = f"beside those held out{' or with too few images' if config.min_images > 1 else ''}"
    kept = kept[: _enough(config.identities, len(kept), f"the data folder {config.folder}, {beside}")]
    evaluation: dict[str, IdentityDataset] = {"holdout": folder.select(held)} if held else {}
    return DataSplits(folder.select(kept), evaluation, LabelMap.of(folder.identity_names, folder.labels, kept))
