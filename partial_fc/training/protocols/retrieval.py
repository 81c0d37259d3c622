"""Retrieval: queries against a gallery of many images an identity, as for products, and for persons across cameras.

    queries [q, D], labels [q]     and cameras [q], or none
    gallery [g, D], labels [g]     and cameras [g], or none
      relevant       gallery images with the query's label, from another camera where cameras are known
      passed over    those with its label from its own camera (Market-1501's convention, Zheng et al. 2015); its own image, where the
                     queries are the gallery themselves; and gallery images with a label below 0 (Market-1501's junk)
      irrelevant     all others
    for the R relevant images of a query, highest score first, r = 1..R:
      place(r)       r + how many irrelevant images score as high or higher

    CMC@k            share of queries with place(1) <= k             (metric learning calls it Recall@k)
    AP               mean over r of r / place(r), not interpolated;  mAP: its mean over queries
    Recall@k         share of a query's relevant images with place(r) <= k, meaned over queries
    R-precision      Recall@R;   mAP@R: sum of r / place(r) over those with place(r) <= R, over R (Musgrave et al. 2020)

At equal scores (that differ by less than 1e-6) the irrelevant come first. A query without a relevant image has no figure: it is left out
of the means, counted and named.
Blocks of queries are dealt to the ranks; for each, the scores of its relevant images are sorted once, and the gallery is walked through in
tiles that count how many irrelevant images pass each of them. No ranking is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import cosine_tile
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tiling import TIE, Reduce, Together, check_labels, check_tile, dealt, unit_rows

KS = (1, 5, 10)
CURVE = 100  # k up to which the CMC curve is given


class _Set:
    """The gallery sorted by label, junk left out; `place` is the position of each image in the given order."""

    def __init__(self, unit: Tensor, labels: Tensor, cameras: Tensor | None) -> None:
        order = labels.argsort(stable=True)
        order = order[labels[order] >= 0]
        self.unit, self.labels, self.place = unit[order], labels[order], order
        self.cameras = None if cameras is None else cameras[order]


def retrieve_embeddings(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    name: str,
    query_cameras: Tensor | None = None,
    gallery_cameras: Tensor | None = None,
    ks: Sequence[int] = KS,
    tile: int = 2048,
    rank: int = 0,
    world: int = 1,
    reduce: Reduce | None = None,
    progress: bool = False,
    device: torch.device | None = None,
) -> Result:
    """Figures of `queries` `[q, D]` searched in `gallery` `[g, D]`; without one, each in the others of `queries`.

    Labels and cameras are integers, one an image; cameras are given for both or none. At most `tile` queries and gallery images are
    compared at a time; one call of `reduce`, with a few numbers a query. Embeddings need not be normalised. device: where tiles are
    compared, if not where the embeddings are.

    Figures: "mAP", "cmc@k" and "recall@k" for k in `ks`, "R-precision", "mAP@R". Counts: queries that have an answer, those that have none
    (named in `notes` by position, the first ten), gallery images, junk.
    Raises UserError for shapes that do not match, embeddings that are not finite, or no query with a relevant image.
    """
    check_tile(tile)
    itself = gallery is None
    if gallery is None:  # with the queries' cameras
        gallery, gallery_labels, gallery_cameras = queries, query_labels, query_cameras
    if gallery_labels is None or (query_cameras is None) != (gallery_cameras is None):
        raise UserError(f"{name}: give labels of the gallery too, and cameras of queries and gallery, or of neither")
    unit = unit_rows(queries, "query")
    labels = check_labels(query_labels, len(queries), "query").cpu()
    cameras = None if query_cameras is None else check_labels(query_cameras, len(queries), "query camera").cpu()
    others = None if gallery_cameras is None else check_labels(gallery_cameras, len(gallery), "gallery camera").cpu()
    known = _Set(
        unit_rows(gallery, "gallery", unit.shape[1]),
        check_labels(gallery_labels, len(gallery), "gallery").cpu(),
        others,
    )
    found = Together(len(unit), 5 + len(ks), dtype=torch.float64)
    for rows in dealt(len(unit), tile, rank, world, "queries", progress):
        for part, own in _blocks(rows, labels, cameras, known, itself, tile):
            found[part] = _measure(unit[part].to(device or unit.device), labels[part], own, known, ks, tile)
    return _figures(name, found.everyone(reduce), ks, len(gallery), len(gallery) - len(known.labels))


def _blocks(
    rows: Tensor, labels: Tensor, cameras: Tensor | None, known: _Set, itself: bool, tile: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Queries `[b]` and the relevant images of each, so many that neither padded scores nor a tile is beyond tile x tile."""
    lo = torch.searchsorted(known.labels, labels[rows])
    hi = torch.searchsorted(known.labels, labels[rows], right=True)
    gathered: list[Tensor] = []
    longest = start = 0
    for at, row in enumerate(rows.tolist()):
        same = torch.arange(int(lo[at]), int(hi[at]))
        if itself:
            same = same[known.place[same] != row]
        if cameras is not None and known.cameras is not None:
            same = same[known.cameras[same] != cameras[row]]
        if gathered and max(longest, len(same)) * (len(gathered) + 1) > max(tile * tile, 1):
            yield rows[start:at], gathered
            longest, start, gathered = 0, at, []
        longest = max(longest, len(same))
        gathered.append(same)
    if gathered:
        yield rows[start:], gathered


def _measure(block: Tensor, labels: Tensor, own: list[Tensor], known: _Set, ks: Sequence[int], tile: int) -> Tensor:
    """float64 `[b, 5 + len(ks)]`: relevant images R, place(1), AP, R-precision, mAP@R, Recall@k; 0 where there is none."""
    count = torch.tensor([len(each) for each in own])
    relevant = _relevant_scores(block, own, count, known, tile)  # [b, Rmax] rising, padded with +inf
    passing = torch.zeros(len(block), relevant.shape[1] + 1, dtype=torch.int64, device=block.device)
    labels = labels.to(block.device)
    for start in range(0, len(known.labels), tile):
        scores = cosine_tile(block, known.unit[start : start + tile].to(block.device))
        same = labels[:, None] == known.labels[start : start + tile].to(block.device)
        scores.masked_fill_(same, -torch.inf)  # relevant, or passed over
        above = torch.searchsorted(
            relevant, scores.add_(TIE), right=True
        )  # how many relevant images score as low or lower
        passing.scatter_add_(1, above, torch.ones_like(above))
    # the i-th lowest relevant image is passed by the irrelevant ones that are at or above more than i of them
    ahead = passing.flip(1).cumsum(1).flip(1)[:, 1:]
    exists = torch.arange(relevant.shape[1]) < count[:, None]
    ahead = ahead.cpu()
    order = (count[:, None] - torch.arange(relevant.shape[1])).double()  # r of the i-th lowest
    place = order + ahead
    precision = torch.where(exists, order / place, 0.0)
    within = torch.where(exists, place <= count[:, None], False)
    size = count.clamp(min=1).double()
    best = torch.where(exists, place, torch.inf).amin(1) if relevant.shape[1] else torch.zeros(len(block))
    columns = [
        count.double(),
        torch.where(count > 0, best, 0.0),
        precision.sum(1) / size,
        within.sum(1) / size,
        (precision * within).sum(1) / size,
        *((exists & (place <= k)).sum(1) / size for k in ks),
    ]
    return torch.stack([column.double() for column in columns], 1)


def _relevant_scores(block: Tensor, own: list[Tensor], count: Tensor, known: _Set, tile: int) -> Tensor:
    """Scores of each query's relevant images, rising, `[b, Rmax]`, padded with +inf."""
    places = pad_sequence(own, batch_first=True, padding_value=-1)
    scores = block.new_full(places.shape, torch.inf)
    first, last = (int(each) for each in (places[places >= 0].min(), places.max() + 1)) if int(count.sum()) else (0, 0)
    for start in range(
        first, last, tile
    ):  # the same products as those of other images, and as few of them as the labels span
        here = ((places >= start) & (places < min(start + tile, last))).nonzero()
        if len(here):
            queries = here[:, 0].unique()
            products = cosine_tile(block[queries], known.unit[start : min(start + tile, last)].to(block.device))
            row = torch.searchsorted(queries, here[:, 0])
            scores[here[:, 0], here[:, 1]] = products[row, places[here[:, 0], here[:, 1]] - start]
    return scores.sort(1).values


def _figures(name: str, found: Tensor, ks: Sequence[int], gallery: int, junk: int) -> Result:
    answered = found[:, 0] > 0
    missing = (~answered).nonzero().flatten().tolist()
    if not bool(answered.any()):
        raise UserError(f"{name}: no query has a relevant image in the gallery; check labels and cameras")
    rows = found[answered]
    first = rows[:, 1]
    figures: dict[str, float | None] = {"mAP": float(rows[:, 2].mean())}
    figures |= {f"cmc@{k}": float((first <= k).double().mean()) for k in ks}
    figures |= {f"recall@{k}": float(rows[:, 5 + i].mean()) for i, k in enumerate(ks)}
    figures |= {"R-precision": float(rows[:, 3].mean()), "mAP@R": float(rows[:, 4].mean())}
    more = f" and {len(missing) - 10} others" if len(missing) > 10 else ""
    notes = (
        [f"no relevant image for the queries {', '.join(map(str, missing[:10]))}{more}: left out"] if missing else []
    )
    return Result(
        protocol="retrieval",
        name=name,
        counts={"queries": len(rows), "queries without an answer": len(missing), "gallery": gallery, "junk": junk},
        figures=figures,
        notes=notes,
        curves={"cmc": [(float(k), float((first <= k).double().mean())) for k in range(1, min(CURVE, gallery) + 1)]},
    )
