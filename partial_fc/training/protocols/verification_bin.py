"""Verification on listed pairs: the `.bin` files of LFW, CFP-FP, AgeDB-30 and similar sets.

    file.bin     pickle of (2P encoded images, P booleans): images 2i, 2i + 1 show one identity or two; see pickled.py
    images       decoded and resized to the run's size; the embedding is e(x) + e(mirrored x), scaled to unit length
    pairs [P]    ten-fold accuracy at the thresholds of the literature, TAR at FAR, EER: see pairs.py

Accuracy: the folds are consecutive tenths of the list. The threshold is the best of the squared distances 0, 0.01, ...,
3.99 on nine folds and is tested on the tenth (LFW's protocol, Huang et al. 2007; the grid is that of the code behind
the published figures).
TAR at FAR: over all pairs, at the lowest threshold that accepts at most that share of the impostor pairs, from the
histograms of evaluation.py. There is no figure where the FAR is less than one impostor pair; with 3,000 impostor pairs,
the figure at 1e-3 rests on three of them.
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
SHOWN = 12  # number of hardest pairs kept of each kind


class PairImages(IdentityDataset):
    """The 2P images of a `.bin` file, in file order; `same` bool `[P]` says which pairs show one identity."""

    def __init__(
        self, name: str, images: list[bytes | None], same: list[bool], image_shape: tuple[int, int, int]
    ) -> None:
        self.name = name
        self.image_shape = image_shape
        self.same = torch.tensor(same, dtype=torch.bool)
        self.labels = torch.arange(len(same)).repeat_interleave(2)
        self.identity_names = [f"pair {i}" for i in range(len(same))]
        self._images = images

    def name_of(self, index: int) -> str:
        return f"{self.name} image {index}"

    def load(self, index: int) -> Tensor:
        encoded = self._images[index]
        if encoded is None:
            raise UnreadableImage(self.name_of(index), "neither bytes nor an array of bytes")
        return decode_picture(bytes(encoded), self.image_shape, self.name_of(index))


def read_pair_images(path: str | Path, image_shape: tuple[int, int, int]) -> PairImages:
    """Read the pairs in the file `path`; images are resized to `image_shape` (C, H, W) when they are loaded.

    No code in the file is run (see pickled.py). Raises UserError for a file that cannot be read, is truncated, asks for
    anything but images and booleans, does not have two images per boolean, or lacks pairs of one kind.
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
        missing = "of two identities" if any(same) else "of one identity"
        raise UserError(f"{path} has no pair {missing}; give a file with both kinds")
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
    device: torch.device | None = None,
) -> Result:
    """Verify the pairs (`embeddings[2i]`, `embeddings[2i + 1]`), `[2P, D]`; `same` bool `[P]`: one identity or two.

    readable: bool `[2P]`. A pair with an unreadable image is skipped and counted; the other pairs stay in their folds.
    Embeddings need not be normalised. `block` pairs are compared at a time, on `device` (default: where the embeddings
    are). Calls `reduce` three times.

    Figures: "accuracy" and "accuracy_std" (None with fewer than ten pairs), "tar@FAR" (None where the FAR is less than
    one impostor pair), "eer". Raises UserError for shapes that do not match, embeddings that are not finite, or if
    pairs of one kind are missing.
    """
    if same.ndim != 1 or len(embeddings) != 2 * len(same):
        raise UserError(
            f"{name}: there are {len(embeddings)} embeddings and {len(same)} booleans; "
            "give two embeddings for each boolean"
        )
    usable = torch.ones(len(embeddings), dtype=torch.bool) if readable is None else readable.cpu()
    unit = unit_rows(torch.where(usable[:, None].to(embeddings.device), embeddings, 0.0), name, dtype=torch.float64)
    kept = usable.view(-1, 2).all(1).nonzero().flatten()
    pairs = Pairs(
        first=2 * kept,
        second=2 * kept + 1,
        same=same.cpu().bool()[kept],
        fold=folds_of(len(same))[kept],
    )
    pairs.check(name)
    how = {"block": block, "rank": rank, "world": world}
    scored = score_pairs(unit, pairs, keep_scores=True, **how, reduce=reduce, device=device)
    histograms = scored.histograms
    accuracy, deviation = scored.grid.accuracy() or (None, None)
    genuine = int(pairs.same.sum())
    skipped = len(same) - len(kept)
    return Result(
        protocol="verification",
        name=name,
        counts={"pairs": len(kept), "genuine": genuine, "impostor": len(kept) - genuine, "left out": skipped},
        figures={
            "accuracy": accuracy,
            "accuracy_std": deviation,
            **{f"tar@{key}": histograms.tar_at_far(far, LEAST_FALSE_ACCEPTS) for key, far in FARS.items()},
            "eer": histograms.eer(),
        },
        thresholds={f"tar@{key}": histograms.threshold_at_far(far, LEAST_FALSE_ACCEPTS) for key, far in FARS.items()},
        notes=[f"{skipped} pairs with an unreadable image were skipped"] if skipped else [],
        curves={"roc": histograms.roc()},
        histograms=histograms.curves(),
        hardest=hardest_of(scored, pairs, SHOWN),
    )
