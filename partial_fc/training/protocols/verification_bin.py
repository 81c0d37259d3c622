"""Verification on listed pairs: the `.bin` files of LFW, CFP-FP, AgeDB-30 and their like.

    file.bin     a pickle of (2P encoded images, P booleans): images 2i and 2i + 1 are of one identity or not; read by `pickled.py`
    images       decoded, resized to the run's size; each embedding is e(x) + e(mirrored x), then of unit length
    pairs [P]    accuracy of ten folds at the thresholds of the literature, TAR at FAR, EER: `pairs.py`

Accuracy: folds are consecutive tenths of the list; the threshold among the squared distances 0, 0.01, ..., 3.99 is the best on nine of
them and is tested on the tenth (Huang et al. 2007, the protocol of LFW; the grid is that of the code that published figures come from).
TAR at FAR: over all pairs at once, at the lowest threshold at which at most that share of the impostor pairs is accepted, in the
histograms of `evaluation.py`. A FAR of fewer than one pair has no figure; with 3,000 impostor pairs 1e-3 rests on three of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from partial_fc.training.data import IdentityDataset, UnreadableImage, decode_picture
from partial_fc.training.errors import UserError
from partial_fc.training.protocols.pairs import BLOCK, LEAST_FALSE_ACCEPTS, Pairs, folds_of, hardest_of, score_pairs
from partial_fc.training.protocols.pickled import load_pairs
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tiling import Reduce, unit_rows

FARS = {"1e-1": 1e-1, "1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4}
SHOWN = 12  # hardest pairs of either kind that are kept


class PairImages(IdentityDataset):
    """The 2P images of a `.bin` file, in its order; `same` bool `[P]` says which pairs are of one identity."""

    def __init__(
        self, name: str, images: list[bytes | None], same: list[bool], image_shape: tuple[int, int, int]
    ) -> None:
        self.name, self._images, self.image_shape = name, images, image_shape
        self.same = torch.tensor(same, dtype=torch.bool)
        self.labels = torch.arange(len(same)).repeat_interleave(2)
        self.identity_names = [f"pair {i}" for i in range(len(same))]

    def name_of(self, index: int) -> str:
        return f"{self.name} image {index}"

    def load(self, index: int) -> Tensor:
        encoded = self._images[index]
        if encoded is None:
            raise UnreadableImage(self.name_of(index), "neither bytes nor an array of bytes")
        return decode_picture(bytes(encoded), self.image_shape, self.name_of(index))


def read_pair_images(path: str | Path, image_shape: tuple[int, int, int]) -> PairImages:
    """The pairs in the file `path`, its images to be resized to `image_shape` (C, H, W) when loaded.

    Nothing in the file is run (`pickled.py`). UserError for a file that cannot be read, is truncated, asks for anything but images and
    booleans, has not two images a boolean, or has no pair of either kind.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"the pairs {path} cannot be read: {error.strerror}") from error
    try:
        images, same = load_pairs(data)
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
    if len(set(same)) < 2:
        lacking = "of two identities" if any(same) else "of one identity"
        raise UserError(f"{path} has no pair {lacking}, so there is nothing to tell apart; give a file with both kinds")
    return PairImages(Path(path).stem, images, same, image_shape)


def verify_embeddings(
    embeddings: Tensor,
    same: Tensor,
    *,
    name: str,
    readable: Tensor | None = None,
    block: int = BLOCK,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce | None = None,
) -> Result:
    """Figures of the pairs (`embeddings[2i]`, `embeddings[2i + 1]`), `[2P, D]`; `same` bool `[P]`: whether each is of one identity.

    readable: bool `[2P]`; a pair of which an image is not is left out and counted, the others stay in their folds. Embeddings need not be
    normalised. `block` pairs are compared at a time; three calls of `reduce`.

    Figures: "accuracy" and "accuracy_std" (None with fewer than ten pairs), "tar@FAR" (None where that share of the impostor pairs is
    less than one), "eer". Raises UserError for shapes that do not match, embeddings that are not finite, or no pair of either kind.
    """
    if same.ndim != 1 or len(embeddings) != 2 * len(same):
        raise UserError(
            f"{name}: {len(embeddings)} embeddings and {len(same)} booleans; there must be two embeddings for each"
        )
    known = torch.ones(len(embeddings), dtype=torch.bool) if readable is None else readable.cpu()
    unit = unit_rows(torch.where(known[:, None].to(embeddings.device), embeddings, 0.0), name, dtype=torch.float64)
    kept = known.view(-1, 2).all(1).nonzero().flatten()
    pairs = Pairs(2 * kept, 2 * kept + 1, same.cpu().bool()[kept], folds_of(len(same))[kept])
    pairs.check(name)
    found = score_pairs(unit, pairs, keep_scores=True, block=block, rank=rank, world=world, reduce=reduce)
    histograms, accuracy = found.histograms, found.grid.accuracy() or (None, None)
    genuine, left_out = int(pairs.same.sum()), len(same) - len(kept)
    return Result(
        protocol="verification",
        name=name,
        counts={"pairs": len(kept), "genuine": genuine, "impostor": len(kept) - genuine, "left out": left_out},
        figures={
            "accuracy": accuracy[0],
            "accuracy_std": accuracy[1],
            **{f"tar@{key}": histograms.tar_at_far(far, LEAST_FALSE_ACCEPTS) for key, far in FARS.items()},
            "eer": histograms.eer(),
        },
        thresholds={f"tar@{key}": histograms.threshold_at_far(far, LEAST_FALSE_ACCEPTS) for key, far in FARS.items()},
        notes=[f"{left_out} pairs with an image that cannot be read were left out"] if left_out else [],
        curves={"roc": histograms.roc()},
        histograms=histograms.curves(),
        hardest=hardest_of(found, pairs, SHOWN),
    )
