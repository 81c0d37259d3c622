"""What to look at after a run: the hardest pairs of each evaluation set and the classes that are nearest to each other, as pictures.

    embeddings [n, D] of a set, on every rank ── tiles of all pairs, dealt to the ranks ──>  the lowest cosine of each identity (genuine)
      and the highest of each two (impostor), the `KEPT` hardest of them ── of all ranks the `SHOWN` hardest ──>  pictures
    head rows ── nearest_classes ──>  the `SHOWN` nearest two classes ──>  a training image of each

Both go to `pictures.json` in the run folder, images as PNG data URIs, for report.html. Memory: one tile of cosines, and what is kept.
Nearest classes cost C · C · D products and are left out beyond `MOST_CLASSES`; `partial-fc audit` looks for them at any size.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from partial_fc import PartialFC
from partial_fc.training.data import IdentityDataset, UnreadableImage

PICTURES = "pictures.json"
KEPT, SHOWN = 256, 12
MOST_CLASSES = 100_000
SIDE = 112  # pixels of a shown picture, at most
Pair = tuple[float, int, int]
"""(cosine, one, other): positions of two images or numbers of two classes, one < other."""


def hardest_pairs(
    embeddings: Tensor, labels: Tensor, *, tile: int = 2048, rank: int = 0, world: int = 1, kept: int = KEPT
) -> tuple[list[Pair], list[Pair]]:
    """(genuine pairs of the lowest, impostor pairs of the highest cosine), the hardest first, of this rank's share of all pairs i < j.

    embeddings `[n, D]`, labels `[n]`. Of the pairs of one identity, and of those of the same two identities, the hardest alone: two people
    that are one would otherwise fill the list. The tiles of the upper triangle are dealt round-robin, as for the histograms. At most `kept`
    of each.
    """
    order = labels.argsort(
        stable=True
    )  # an identity's images together: a tile has few identities, and those of its rows come first
    identity = labels[order].unique_consecutive(return_inverse=True)[1]
    unit = F.normalize(embeddings.float(), dim=1)[order]
    starts = range(0, len(unit), tile)
    genuine = impostor = torch.empty(3, 0, dtype=torch.float64)
    for i, j in islice(combinations_with_replacement(starts, 2), rank, None, world):
        rows, columns = identity[i : i + tile], identity[j : j + tile]
        cosines = unit[i : i + tile] @ unit[j : j + tile].T
        same = rows[:, None] == columns
        once = torch.ones_like(same).triu(1) if i == j else torch.ones_like(same)
        genuine = _merged(genuine, _hardest(-cosines, same & once, rows, columns, kept), i, j, identity, kept)
        impostor = _merged(impostor, _hardest(cosines, ~same & once, rows, columns, kept), i, j, identity, kept)
    return [(-value, a, b) for value, a, b in _listed(genuine, order)], _listed(impostor, order)


def _hardest(hardness: Tensor, wanted: Tensor, rows: Tensor, columns: Tensor, kept: int) -> Tensor:
    """Of the `wanted` pairs of a tile, the hardest of each two identities, for the `kept` hardest two: float64 [3, at least as many].

    rows, columns: the identities, in rising order. A column of the answer is (hardness, row, column); of equals it has all.
    """
    (row_names, row), (column_names, column) = (
        each.unique_consecutive(return_inverse=True) for each in (rows, columns)
    )
    hardness = hardness.masked_fill(~wanted, -torch.inf)
    best = hardness.new_full((len(row_names), len(columns)), -torch.inf)
    best.scatter_reduce_(0, row[:, None].expand_as(hardness), hardness, "amax")
    best = best.new_full((len(row_names), len(column_names)), -torch.inf).scatter_reduce_(
        1, column.expand_as(best), best, "amax"
    )
    values, places = best.flatten().topk(min(kept, best.numel()))
    sought = torch.full_like(best, torch.inf)
    sought.view(-1)[places] = torch.where(values > -torch.inf, values, torch.inf)
    found = (hardness == sought[row][:, column]).nonzero()
    return torch.cat((hardness[found[:, 0], found[:, 1]][None].double(), found.T.double())).cpu()


def _merged(before: Tensor, tile: Tensor, i: int, j: int, identity: Tensor, kept: int) -> Tensor:
    """The `kept` hardest of those before and of a tile whose corner is (i, j), of each two identities one: float64 [3, at most kept]."""
    both = torch.cat((before, tile + torch.tensor([[0], [i], [j]], dtype=torch.float64)), dim=1)
    both = both[:, both[0].argsort(descending=True, stable=True)]
    one, other = identity.cpu()[both[1:].long()]  # numbered from 0 in rising order
    first = np.unique((one * len(identity) + other).numpy(), return_index=True)[1]
    return both[:, torch.from_numpy(np.sort(first))[:kept]]


def _listed(found: Tensor, order: Tensor) -> list[Pair]:
    return [(value, *sorted(order[[int(a), int(b)]].tolist())) for value, a, b in found.T.tolist()]


def spread(pairs: Sequence[Pair], labels: Tensor, shown: int = SHOWN) -> list[Pair]:
    """The first `shown` pairs of which no earlier one is of the same two identities."""
    seen: set[tuple[int, int]] = set()
    found: list[Pair] = []
    for pair in pairs:
        one, other = sorted((int(labels[pair[1]]), int(labels[pair[2]])))
        if (one, other) not in seen and len(found) < shown:
            seen.add((one, other))
            found.append(pair)
    return found


def nearest_class_pairs(head: PartialFC, accelerator: Accelerator) -> list[Pair]:
    """The `SHOWN` nearest two classes, the nearest first, the same on every rank; every rank must call it."""
    near = head.nearest_classes(1)
    first = head.shards.lo  # several replicas name the same pairs
    cosines, order = near.cosines[:, 0].float().cpu().sort(descending=True, stable=True)
    ids = near.ids[:, 0].cpu()
    mine = [
        (float(cosine), *sorted((first + int(row), int(ids[row]))))
        for cosine, row in zip(cosines[:KEPT], order[:KEPT], strict=True)
    ]
    everyone = {(a, b): cosine for cosine, a, b in _gathered(mine, accelerator)}
    return sorted(((cosine, a, b) for (a, b), cosine in everyone.items()), key=lambda pair: (-pair[0], *pair[1:]))[
        :SHOWN
    ]


def _gathered(mine: list[Any], accelerator: Accelerator) -> list[Any]:
    if accelerator.num_processes == 1:
        return mine
    lists: list[list[Any]] = [[] for _ in range(accelerator.num_processes)]
    dist.all_gather_object(lists, mine)
    return [each for of_rank in lists for each in of_rank]


# ------------------------------------------------------------------------------------------------ pictures


def note_hardest(
    folder: Path,
    name: str,
    dataset: IdentityDataset,
    found: tuple[Tensor, Tensor, Tensor],
    tile: int,
    accelerator: Accelerator,
) -> None:
    """Add the hardest pairs of a set to pictures.json; `found`: embeddings, labels and indices in the data set. Every rank must call it."""
    embeddings, labels, indices = found
    mine = hardest_pairs(embeddings, labels, tile=tile, rank=accelerator.process_index, world=accelerator.num_processes)
    genuine, impostor = (_gathered(pairs, accelerator) for pairs in mine)
    if not accelerator.is_main_process:
        return
    chosen = {"genuine": sorted(genuine), "impostor": sorted(impostor, key=lambda pair: (-pair[0], *pair[1:]))}
    shown = {
        kind: [(cosine, int(indices[a]), int(indices[b])) for cosine, a, b in spread(pairs, labels)]
        for kind, pairs in chosen.items()
    }
    note_pairs(folder, name, dataset, shown)


def note_pairs(folder: Path, name: str, dataset: IdentityDataset, pairs: Mapping[str, Sequence[Pair]]) -> None:
    """Add "genuine" and "impostor" pairs of images of a data set to pictures.json; one process calls it."""
    pictures = read_pictures(folder)
    pictures["sets"][name] = {kind: [_pictured(dataset, *pair) for pair in of_kind] for kind, of_kind in pairs.items()}
    (folder / PICTURES).write_text(json.dumps(pictures))


def note_confusions(folder: Path, head: PartialFC, dataset: IdentityDataset, accelerator: Accelerator) -> None:
    """Add the nearest classes to pictures.json, with an image of each. Every rank must call it; nothing is done beyond MOST_CLASSES."""
    if not 1 < head.num_classes <= MOST_CLASSES:
        return
    pairs = nearest_class_pairs(head, accelerator)
    if accelerator.is_main_process:
        pictures = read_pictures(folder)
        labels = dataset.labels
        first = {each: int((labels == each).nonzero()[0]) for pair in pairs for each in pair[1:]}
        pictures["confusions"] = [_pictured(dataset, cosine, first[a], first[b]) for cosine, a, b in pairs]
        (folder / PICTURES).write_text(json.dumps(pictures))


def read_pictures(folder: Path) -> dict[str, Any]:
    """What pictures.json has: `sets`, name -> genuine and impostor pairs, and `confusions`; nothing if there is no such file."""
    path = folder / PICTURES
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"sets": {}, "confusions": []}
    return found


def _pictured(dataset: IdentityDataset, cosine: float, a: int, b: int) -> dict[str, Any]:
    return {
        "cosine": cosine,
        "images": [{"name": dataset.name_of(index), "uri": _uri(dataset, index)} for index in (a, b)],
    }


def _uri(dataset: IdentityDataset, index: int) -> str | None:
    """The image as a PNG data URI, at most `SIDE` pixels wide and high; None if it cannot be read."""
    try:
        image = dataset.load(index)
    except UnreadableImage:
        return None
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
