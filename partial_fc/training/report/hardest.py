"""Pictures to look at after a run: the hardest pairs of each evaluation set, and the nearest classes.

    embeddings [n, D] of a set, on every rank
      ── tiles of all pairs, assigned round-robin to the ranks ──>
         genuine pairs: the lowest cosine of each identity; impostor pairs: the highest cosine of each two identities
      ── the `KEPT` hardest of each rank, of these the `SHOWN` hardest ──>  pictures
    class rows ── nearest_classes ──>  the `SHOWN` nearest pairs of classes ──>  a training image of each class

Both are written to `pictures.json` in the run folder, with images as PNG data URIs, for report.html. Memory: one tile
of cosines and the pairs kept. Nearest classes need C · C · D products and are skipped beyond `MOST_CLASSES`;
`partial-fc audit` finds them at any size.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from partial_fc import PartialFC
from partial_fc.distributed.objects import gather_objects
from partial_fc.training.all_ranks import run_on_main
from partial_fc.training.data import IdentityDataset, UnreadableImage
from partial_fc.training.files import told, write_atomically
from partial_fc.training.report.page import png_uri

PICTURES = "pictures.json"
KEPT = 256  # pairs of each kind that a rank keeps
SHOWN = 12
MOST_CLASSES = 100_000
SIDE = 112  # pixels of a shown picture, at most
Pair = tuple[float, int, int]
"""(cosine, one, other): indices of two images or ids of two classes, one < other."""


def hardest_pairs(
    embeddings: Tensor,
    labels: Tensor,
    *,
    tile: int = 2048,
    rank: int = 0,
    world: int = 1,
    kept: int = KEPT,
    device: torch.device | None = None,
) -> tuple[list[Pair], list[Pair]]:
    """Return (genuine, impostor): the hardest pairs of this rank's share of all pairs i < j, hardest first.

    embeddings: `[n, D]`; labels: `[n]`. At most `kept` of each kind. Only the hardest pair of each identity, and of
    each two identities, is returned: an identity that is stored twice would fill the list otherwise. The tiles of the
    upper triangle are assigned round-robin, as for the histograms. device: where they are computed, by default the
    device of the embeddings.
    """
    # Sorted by identity, a tile has few identities, and the identity of a row is never after that of its column.
    order = labels.argsort(stable=True)
    identity = labels[order].unique_consecutive(return_inverse=True)[1]
    unit = F.normalize(embeddings.float(), dim=1)[order.to(embeddings.device)]
    device = unit.device if device is None else device
    starts = range(0, len(unit), tile)
    genuine = impostor = torch.empty(3, 0, dtype=torch.float64)
    for i, j in islice(combinations_with_replacement(starts, 2), rank, None, world):
        rows, columns = (identity[at : at + tile].to(device) for at in (i, j))
        cosines = unit[i : i + tile].to(device) @ unit[j : j + tile].to(device).T
        same = rows[:, None] == columns
        once = torch.ones_like(same).triu(1) if i == j else torch.ones_like(same)
        genuine = _merged(genuine, _hardest(-cosines, same & once, rows, columns, kept), i, j, identity, kept)
        impostor = _merged(impostor, _hardest(cosines, ~same & once, rows, columns, kept), i, j, identity, kept)
    return [(-value, a, b) for value, a, b in _listed(genuine, order)], _listed(impostor, order)


def _hardest(hardness: Tensor, wanted: Tensor, rows: Tensor, columns: Tensor, kept: int) -> Tensor:
    """Return the hardest of the `wanted` pairs of a tile for each two identities, for the `kept` hardest of these.

    rows, columns: the identities of the tile's rows and columns, in rising order. The result is float64 `[3, pairs]`
    with columns (hardness, row, column); it has all pairs of equal hardness, so there may be more than `kept`.
    """
    row_identities, row = rows.unique_consecutive(return_inverse=True)
    column_identities, column = columns.unique_consecutive(return_inverse=True)
    hardness = hardness.masked_fill(~wanted, -torch.inf)
    # the maximum over the images of each two identities: first over rows, then over columns
    over_rows = hardness.new_full((len(row_identities), len(columns)), -torch.inf)
    over_rows.scatter_reduce_(0, row[:, None].expand_as(hardness), hardness, "amax")
    best = hardness.new_full((len(row_identities), len(column_identities)), -torch.inf)
    best.scatter_reduce_(1, column.expand_as(over_rows), over_rows, "amax")
    # the pairs that reach the maximum of one of the `kept` hardest two identities
    values, places = best.flatten().topk(min(kept, best.numel()))
    sought = torch.full_like(best, torch.inf)
    sought.view(-1)[places] = torch.where(values > -torch.inf, values, torch.inf)
    found = (hardness == sought[row][:, column]).nonzero()
    return torch.cat((hardness[found[:, 0], found[:, 1]][None].double(), found.T.double())).cpu()


def _merged(before: Tensor, tile: Tensor, i: int, j: int, identity: Tensor, kept: int) -> Tensor:
    """Merge pairs with those of the tile at row i, column j; keep one per two identities, at most `kept`."""
    both = torch.cat((before, tile + torch.tensor([[0], [i], [j]], dtype=torch.float64)), dim=1)
    both = both[:, both[0].argsort(descending=True, stable=True)]
    one, other = identity.cpu()[both[1:].long()]  # numbered from 0 in rising order
    first = np.unique((one * len(identity) + other).numpy(), return_index=True)[1]
    return both[:, torch.from_numpy(np.sort(first))[:kept]]


def _listed(found: Tensor, order: Tensor) -> list[Pair]:
    """Return the columns of `found` `[3, pairs]` as pairs, with the original indices of the images."""
    return [(value, *sorted(order[[int(a), int(b)]].tolist())) for value, a, b in found.T.tolist()]


def one_per_identities(pairs: Sequence[Pair], labels: Tensor, shown: int = SHOWN) -> list[Pair]:
    """Return the first `shown` pairs, skipping pairs whose two identities an earlier pair has."""
    seen: set[tuple[int, int]] = set()
    found: list[Pair] = []
    for pair in pairs:
        one, other = sorted((int(labels[pair[1]]), int(labels[pair[2]])))
        if (one, other) not in seen and len(found) < shown:
            seen.add((one, other))
            found.append(pair)
    return found


def nearest_class_pairs(head: PartialFC) -> list[Pair]:
    """Return the `SHOWN` nearest pairs of classes, nearest first, the same on every rank; every rank must call it."""
    near = head.nearest_classes(1)
    first = head.shards.lo  # several replicas name the same pairs
    cosines, order = near.cosines[:, 0].float().cpu().sort(descending=True, stable=True)
    ids = near.ids[:, 0].cpu()
    mine = [
        (float(cosine), *sorted((first + int(row), int(ids[row]))))
        for cosine, row in zip(cosines[:KEPT], order[:KEPT], strict=True)
    ]
    # a dict, because a pair may come from both of its classes
    cosine_of = {(a, b): cosine for cosine, a, b in _gathered(mine)}
    pairs = [(cosine, a, b) for (a, b), cosine in cosine_of.items()]
    return sorted(pairs, key=_most_similar_first)[:SHOWN]


def _most_similar_first(pair: Pair) -> tuple[float, int, int]:
    """Sort key: falling cosine, then rising indices."""
    cosine, one, other = pair
    return -cosine, one, other


def _gathered(mine: list[Any]) -> list[Any]:
    """Return the lists of all ranks, concatenated."""
    return [each for of_rank in gather_objects(mine, "the gather of the hardest pairs") for each in of_rank]


# ------------------------------------------------------------------------------------------------ pictures


def note_hardest(
    folder: Path,
    name: str,
    dataset: IdentityDataset,
    found: tuple[Tensor, Tensor, Tensor],
    tile: int,
    accelerator: Accelerator,
) -> None:
    """Add the hardest pairs of a set to pictures.json; every rank must call it.

    found: embeddings, labels and indices in the data set.
    """
    embeddings, labels, indices = found
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    mine = hardest_pairs(embeddings, labels, tile=tile, **place, device=accelerator.device)
    genuine, impostor = (_gathered(pairs) for pairs in mine)

    def note() -> None:
        hardest_first = {"genuine": sorted(genuine), "impostor": sorted(impostor, key=_most_similar_first)}
        shown = {
            kind: [(cosine, int(indices[a]), int(indices[b])) for cosine, a, b in one_per_identities(pairs, labels)]
            for kind, pairs in hardest_first.items()
        }
        note_pairs(folder, name, dataset, shown)

    run_on_main(note, accelerator)


def note_pairs(folder: Path, name: str, dataset: IdentityDataset, pairs: Mapping[str, Sequence[Pair]]) -> None:
    """Add "genuine" and "impostor" pairs of images of a data set to pictures.json; only one process may call it."""
    pictures = read_pictures(folder)
    pictures["sets"][name] = {kind: [_pictured(dataset, *pair) for pair in of_kind] for kind, of_kind in pairs.items()}
    write_atomically(folder / PICTURES, json.dumps(pictures))


def note_confusions(folder: Path, head: PartialFC, dataset: IdentityDataset, accelerator: Accelerator) -> None:
    """Add the nearest classes to pictures.json, with an image of each; every rank must call it.

    Does nothing for heads with more than `MOST_CLASSES` classes.
    """
    if not 1 < head.num_classes <= MOST_CLASSES:
        return
    pairs = nearest_class_pairs(head)

    def note() -> None:
        pictures = read_pictures(folder)
        labels = dataset.labels
        first = {each: int((labels == each).nonzero()[0]) for pair in pairs for each in pair[1:]}
        pictures["confusions"] = [_pictured(dataset, cosine, first[a], first[b]) for cosine, a, b in pairs]
        write_atomically(folder / PICTURES, json.dumps(pictures))

    run_on_main(note, accelerator)


def read_pictures(folder: Path) -> dict[str, Any]:
    """Return the content of pictures.json, empty if there is no such file. UserError if it is damaged.

    `sets`: name -> "genuine" and "impostor" -> pairs; `confusions`: pairs of classes.
    """
    path = folder / PICTURES
    if not path.is_file():
        return {"sets": {}, "confusions": []}
    with told(path, again="remove it, and evaluate the run again"):
        found: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(found["sets"], dict) or not isinstance(found["confusions"], list):
            raise ValueError("it does not list pictures")
    return found


def _pictured(dataset: IdentityDataset, cosine: float, a: int, b: int) -> dict[str, Any]:
    """Return the entry of a pair of images in pictures.json."""
    return {
        "cosine": cosine,
        "images": [{"name": dataset.name_of(index), "uri": _uri(dataset, index)} for index in (a, b)],
    }


def _uri(dataset: IdentityDataset, index: int) -> str | None:
    """Return the image as a PNG data URI, at most `SIDE` pixels wide and high; None if it cannot be read."""
    try:
        image = dataset.load(index)
    except UnreadableImage:
        return None
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return png_uri(buffer.getvalue())
