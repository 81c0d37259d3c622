"""The embedded glyphs: a small data set of 1,300 characters that comes with the package.

16 designs x 1300 characters, 32 x 32 pixels, grey. A character is an identity; each design (typeface) is a sample of
it.

    train  characters    0..999,  designs  0..9     10,000 images
    seen   characters 1000..1299, designs  0..9      3,000 images: new identities
    new    characters 1000..1299, designs 10..15     1,800 images: new identities in designs that are never trained on

The larger set that `partial-fc data glyphs` draws from installed fonts is made in fonts/, and read by packed.py.
"""

import functools
import io
import lzma
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from partial_fc.training.data.dataset import IdentityDataset, identity_count
from partial_fc.training.errors import UserError

GlyphSplit = Literal["train", "seen", "new"]

_GLYPHS = Path(__file__).parents[2] / "assets" / "glyphs1300.npz.xz"
_TRAIN_DESIGNS = 10


class GlyphIdentities(IdentityDataset):
    """The embedded glyphs (white on black), sorted by character and then by design; see assets/ATTRIBUTION.md.

    `identities` keeps only the first characters of the split. Raises UserError if there are fewer.
    """

    in_memory = True

    def __init__(self, split: GlyphSplit = "train", identities: int | None = None) -> None:
        packed, code_points, num_train = _read_glyphs()
        if split not in ("train", "seen", "new"):
            raise ValueError(f"split is {split!r}; it must be 'train', 'seen' or 'new'")
        designs = range(_TRAIN_DESIGNS, len(packed)) if split == "new" else range(_TRAIN_DESIGNS)
        characters = range(num_train) if split == "train" else range(num_train, len(code_points))
        count = identity_count(identities, len(characters), f"the embedded glyphs ({split})")
        chosen = packed[designs.start : designs.stop, characters.start : characters.start + count]
        # Two pixels per byte, 4 bits each; 17 = 255 / 15 scales them to 0..255.
        pixels = np.stack([chosen >> 4, chosen & 15], axis=-1).reshape(len(designs), count, 1, 32, 32) * np.uint8(17)
        self._images = torch.from_numpy(pixels.swapaxes(0, 1).reshape(-1, 1, 32, 32))
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
    """Return (pixels uint8 [16, 1300, 32, 16], code points uint32 [1300], how many characters are for training)."""
    try:
        with np.load(io.BytesIO(lzma.decompress(_GLYPHS.read_bytes())), allow_pickle=False) as arrays:
            return arrays["packed"], arrays["cps"], int(arrays["ntrain"])
    except (OSError, lzma.LZMAError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise UserError(f"the embedded glyphs {_GLYPHS} cannot be read ({error}); reinstall the package") from error
