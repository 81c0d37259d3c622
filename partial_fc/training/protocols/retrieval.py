"""Retrieval: queries against a gallery with many images per identity: products, or persons seen by several cameras.

    queries [q, D], labels [q]     and cameras [q], optional
    gallery [g, D], labels [g]     and cameras [g], optional
      relevant       gallery images with the query's label; if cameras are given, only those from another camera
      ignored        gallery images with the query's label from the query's own camera (Market-1501's convention, Zheng
                     et al. 2015); the query itself, if the queries are the gallery; labels below 0 (Market-1501's junk)
      irrelevant     all others
    for the R relevant images of a query, highest score first, r = 1..R:
      place(r)       r + the number of irrelevant images that score as high or higher

    CMC@k            share of queries with place(1) <= k             (metric learning calls it Recall@k)
    AP               mean over r of r / place(r), not interpolated;  mAP: its mean over queries
    Recall@k         share of a query's relevant images with place(r) <= k, averaged over queries
    R-precision      Recall@R;   mAP@R: sum of r / place(r) over those with place(r) <= R, over R (Musgrave et al. 2020)

At equal scores (a difference below 1e-6) irrelevant images come first. A query without a relevant image has no figure:
it is excluded from the means, counted and listed. Blocks of queries are assigned to the ranks. For each block, the
scores of the relevant images are computed and sorted once; then the gallery is visited in tiles, counting how many
irrelevant images pass each relevant one. No ranking is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import cosine_tile
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.tiling import (
    TIE,
    Reduce,
    RowValues,
    check_labels,
    check_tile,
    rank_blocks,
    unit_rows,
)

KS = (1, 5, 10)
CURVE = 100  # the CMC curve is given for k up to this


class _SortedGallery:
    """The gallery sorted by label, without junk; `position` is the index of each image in the original order."""

    def __init__(self, unit: Tensor, labels: Tensor, cameras: Tensor | None) -> None:
        order = labels.argsort(stable=True)
        order = order[labels[order] >= 0]
        self.unit = unit[order]
        self.labels = labels[order]
        self.cameras = None if cameras is None else cameras[order]
        self.position = order


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
    """Search `queries` `[q, D]` in `gallery` `[g, D]`; without a gallery, each query in the other queries.

    Labels and cameras are integers, one per image; cameras are given for both sets or for neither. At most `tile`
    queries and gallery images are compared at a time. Calls `reduce` once, with a few numbers per query. Embeddings
    need not be normalised. device: where tiles are computed, by default the device of the embeddings.

    Figures: "mAP", "cmc@k" and "recall@k" for k in `ks`, "R-precision", "mAP@R". Counts: queries with a relevant image,
    queries without one (the positions of the first ten are in `notes`), gallery images, junk.
    Raises UserError for shapes that do not match, embeddings that are not finite, or if no query has a relevant image.
    """
    check_tile(tile)
    own_gallery = gallery is None
    if gallery is None:
        gallery = queries
        gallery_labels = query_labels
        gallery_cameras = query_cameras
    if gallery_labels is None or (query_cameras is None) != (gallery_cameras is None):
        raise UserError(f"{name}: give labels of the gallery too, and cameras of queries and gallery, or of neither")
    unit = unit_rows(queries, "query")
    labels = check_labels(query_labels, len(queries), "query").cpu()
    cameras = None if query_cameras is None else check_labels(query_cameras, len(queries), "query camera").cpu()
    searched = _SortedGallery(
        unit_rows(gallery, "gallery", unit.shape[1]),
        check_labels(gallery_labels, len(gallery), "gallery").cpu(),
        None if gallery_cameras is None else check_labels(gallery_cameras, len(gallery), "gallery camera").cpu(),
    )
    measured = RowValues(len(unit), 5 + len(ks), dtype=torch.float64)
    for rows in rank_blocks(len(unit), tile, rank, world, "queries", progress):
        for part, relevant in _with_relevant(rows, labels, cameras, searched, own_gallery, tile):
            block = unit[part].to(device or unit.device)
            measured[part] = _measure(block, labels[part], relevant, searched, ks, tile)
    junk = len(gallery) - len(searched.labels)
    return _figures(name, measured.sum_over_ranks(reduce), ks, len(gallery), junk)


def _with_relevant(
    rows: Tensor, labels: Tensor, cameras: Tensor | None, gallery: _SortedGallery, own_gallery: bool, tile: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield parts of the queries `rows`, `[b]`, with the indices of the relevant images of each query.

    A part is so small that the relevant scores, padded to the same length, are at most tile x tile numbers.
    """
    lo = torch.searchsorted(gallery.labels, labels[rows])
    hi = torch.searchsorted(gallery.labels, labels[rows], right=True)
    relevant: list[Tensor] = []
    longest = 0
    start = 0
    for at, row in enumerate(rows.tolist()):
        found = torch.arange(int(lo[at]), int(hi[at]))
        if own_gallery:
            found = found[gallery.position[found] != row]
        if cameras is not None and gallery.cameras is not None:
            found = found[gallery.cameras[found] != cameras[row]]
        if relevant and max(longest, len(found)) * (len(relevant) + 1) > max(tile * tile, 1):
            yield rows[start:at], relevant
            longest = 0
            start = at
            relevant = []
        longest = max(longest, len(found))
        relevant.append(found)
    if relevant:
        yield rows[start:], relevant


def _measure(
    block: Tensor, labels: Tensor, relevant: list[Tensor], gallery: _SortedGallery, ks: Sequence[int], tile: int
) -> Tensor:
    """Return float64 `[b, 5 + len(ks)]` of a block of queries `[b, D]`; all 0 for a query without a relevant image.

    The columns are R (the number of relevant images), place(1), AP, R-precision, mAP@R, and Recall@k for k in `ks`.
    """
    count = torch.tensor([len(each) for each in relevant])
    scores = _relevant_scores(block, relevant, count, gallery, tile)  # [b, Rmax] rising, padded with +inf
    index = torch.arange(scores.shape[1])
    r = (count[:, None] - index).double()  # the image with the lowest score is the R-th relevant one
    place = r + _irrelevant_ahead(block, labels, scores, gallery, tile)

    exists = index < count[:, None]
    precision = torch.where(exists, r / place, 0.0)
    within = torch.where(exists, place <= count[:, None], False)
    first = torch.where(exists, place, torch.inf).amin(1) if scores.shape[1] else torch.zeros(len(block))
    size = count.clamp(min=1).double()
    figures = [
        count.double(),
        torch.where(count > 0, first, 0.0),
        precision.sum(1) / size,
        within.sum(1) / size,
        (precision * within).sum(1) / size,
        *((exists & (place <= k)).sum(1) / size for k in ks),
    ]
    return torch.stack([figure.double() for figure in figures], 1)


def _irrelevant_ahead(
    block: Tensor, labels: Tensor, relevant_scores: Tensor, gallery: _SortedGallery, tile: int
) -> Tensor:
    """Return how many irrelevant images score as high as each relevant image or higher, `[b, Rmax]` on the CPU.

    relevant_scores: `[b, Rmax]` in rising order.
    """
    # passed[q, i]: number of irrelevant images that score at least as high as exactly i relevant images of query q
    passed = torch.zeros(len(block), relevant_scores.shape[1] + 1, dtype=torch.int64, device=block.device)
    labels = labels.to(block.device)
    for start in range(0, len(gallery.labels), tile):
        scores = cosine_tile(block, gallery.unit[start : start + tile].to(block.device))
        same = labels[:, None] == gallery.labels[start : start + tile].to(block.device)
        scores.masked_fill_(same, -torch.inf)  # relevant or ignored
        number = torch.searchsorted(relevant_scores, scores.add_(TIE), right=True)
        passed.scatter_add_(1, number, torch.ones_like(number))
    # the i-th lowest relevant image is passed by the irrelevant images that pass more than i relevant ones
    return passed.flip(1).cumsum(1).flip(1)[:, 1:].cpu()


def _relevant_scores(
    block: Tensor, relevant: list[Tensor], count: Tensor, gallery: _SortedGallery, tile: int
) -> Tensor:
    """Return the scores of each query's relevant images in rising order, `[b, Rmax]`, padded with +inf."""
    indices = pad_sequence(relevant, batch_first=True, padding_value=-1)
    scores = block.new_full(indices.shape, torch.inf)
    first = last = 0
    if int(count.sum()):
        first = int(indices[indices >= 0].min())
        last = int(indices.max() + 1)
    # the same product as for the irrelevant images, but only over the range of these labels
    for start in range(first, last, tile):
        stop = min(start + tile, last)
        query, place = ((indices >= start) & (indices < stop)).nonzero(as_tuple=True)
        if len(query):
            queries = query.unique()
            searched = block.index_select(0, queries.to(block.device))
            products = cosine_tile(searched, gallery.unit[start:stop].to(block.device))
            row, column = torch.searchsorted(queries, query), indices[query, place] - start
            at, found = ([each.to(block.device) for each in pair] for pair in ((query, place), (row, column)))
            scores[at[0], at[1]] = products[found[0], found[1]]
    return scores.sort(1).values


def _figures(name: str, measured: Tensor, ks: Sequence[int], gallery: int, junk: int) -> Result:
    """Average what `_measure` returned for each query, `[q, 5 + len(ks)]`."""
    answered = measured[:, 0] > 0
    unanswered = (~answered).nonzero().flatten().tolist()
    if not bool(answered.any()):
        raise UserError(f"{name}: no query has a relevant image in the gallery; check labels and cameras")
    rows = measured[answered]
    first = rows[:, 1]
    figures: dict[str, float | None] = {"mAP": float(rows[:, 2].mean())}
    figures |= {f"cmc@{k}": float((first <= k).double().mean()) for k in ks}
    figures |= {f"recall@{k}": float(rows[:, 5 + i].mean()) for i, k in enumerate(ks)}
    figures |= {"R-precision": float(rows[:, 3].mean()), "mAP@R": float(rows[:, 4].mean())}
    notes = []
    if unanswered:
        more = f" and {len(unanswered) - 10} others" if len(unanswered) > 10 else ""
        listed = ", ".join(map(str, unanswered[:10]))
        notes.append(f"no relevant image for the queries {listed}{more}: skipped")
    return Result(
        protocol="retrieval",
        name=name,
        counts={"queries": len(rows), "queries without an answer": len(unanswered), "gallery": gallery, "junk": junk},
        figures=figures,
        notes=notes,
        curves={"cmc": [(float(k), float((first <= k).double().mean())) for k in range(1, min(CURVE, gallery) + 1)]},
    )
