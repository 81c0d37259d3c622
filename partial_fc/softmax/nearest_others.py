"""The inter-top-k penalty: the k nearest other classes of a sample count as nearer than they are, by an angle.

    tiles of cosines, targets left out   [N, T]      a product of their own, before the one that is summed
    the k + 1 largest so far             [N, k + 1]  ── all-gather ──>  those of all ranks; of many ranks by all-to-all
    near                                 [N, 1]      half-way between the k-th and the next: what is above is penalised
    Rule (ruled.py)                      cos θ_j  ->  cos(θ_j − penalty), below an angle of 0 continued monotonically

Of selected classes, after the inter-class filter, and before a margin's own rule for other classes; of several
sub-centers the nearest counts. Half-way, so that a cosine that is computed again and differs in its last digits falls
on the same side. Of classes that are exactly as near as the k-th, all are penalised.

Zhao et al., "Multi-Query Multi-Head Attention Pooling and Inter-topK Penalty for Speaker Verification", ICASSP 2022,
arXiv 2110.05042, section 3.2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from partial_fc.distributed.ranks import MOST_GATHERED, Ranks, all_gather
from partial_fc.distributed.sums import shared_out
from partial_fc.softmax.inputs import LossOptions, Selection
from partial_fc.softmax.row_tiles import RowTiles, TargetRows
from partial_fc.softmax.ruled import Rule, mask_targets
from partial_fc.softmax.tiles import new_tile, tile_logits

SEARCH = "the search for the nearest other classes"


def with_penalty(
    rule: Rule | None,
    x: Tensor,
    rows: RowTiles,
    targets: TargetRows,
    selection: Selection,
    options: LossOptions,
    product: torch.dtype,
    tile: int,
) -> Rule:
    """Return the rule with the penalty before it; collectives of N · (k + 1) numbers.

    x `[N, D]`: unit embeddings. rule: the margin's own, or None. product: dtype of matrix products. tile: rows of a
    tile, the same as in the forward and backward.
    """
    k, centers = options.inter_topk, options.margin.centers
    scaled, scratch = x.to(product), x.new_empty(len(x) * tile)
    best = x.new_full((len(x), k + 1), -torch.inf)
    for a, b in rows.tiles(tile):
        memory = new_tile(scratch, 0, len(x), tile, b - a)
        # through the statistics' dtype, as label smoothing takes tiles, where it is on
        w = rows.directions(a, b, x.dtype if options.label_smoothing else product).to(product)
        cosines = tile_logits(scaled, w, None, memory)
        mask_targets(cosines, targets, a, centers)
        if centers > 1:
            cosines = cosines.reshape(len(x), (b - a) // centers, centers).amax(2)
        if options.interclass_filter is not None:
            cosines = cosines.masked_fill(cosines > options.interclass_filter, -torch.inf)
        best = torch.cat((best, cosines), 1).topk(k + 1, dim=1).values
    rows.lengths_known = True
    near = _over_ranks(best, selection.ranks)
    if rule is None:  # a margin without a rule leaves cosines as they are
        rule = Rule(options.margin.frozen(), near)
    return replace(rule, near=near, penalty=options.inter_topk_penalty)


def _over_ranks(best: Tensor, ranks: Ranks) -> Tensor:
    """Return `[N, 1]`, half-way between the last two of the k + 1 largest of all ranks, of which each has `[N, k + 1]`.

    Of many ranks each looks at its share of the samples.
    """
    if ranks.group is None or best.nbytes * ranks.world <= MOST_GATHERED:
        return _half_way(all_gather(best, ranks.group, SEARCH))
    padded = torch.nn.functional.pad(best, (0, 0, 0, -len(best) % ranks.world))
    mine = _half_way(shared_out(padded, ranks.group, SEARCH))
    return all_gather(mine, ranks.group, SEARCH).flatten(0, 1)[: len(best)]


def _half_way(everyone: Tensor) -> Tensor:
    """everyone: `[ranks, n, k + 1]`."""
    last = everyone.transpose(0, 1).flatten(1).topk(everyone.shape[2], dim=1).values[:, -2:]
    return last.mean(1, keepdim=True)
