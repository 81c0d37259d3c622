"""Keep the k nearest classes of many rows while tiles of cosines arrive.

    tile [rows, m]             cosines of some rows to m consecutive classes
    ── maxima of bins ──>      the largest cosine of each bin of 32 consecutive classes: the only pass over the tile
    ── choose bins ──>         at most k bins whose maximum is above the row's k-th best cosine so far
    ── merge ──>               their members and the best k so far ── sort ──> the new best k

Only a bin whose maximum is above the k-th best so far can hold a better cosine, and the k bins with the largest maxima
hold the best k. Tiles arrive in the order of class ids, and of equal cosines the earlier one stays, so the lower id
comes first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BIN = 32  # consecutive classes of a tile of which selection reads the maximum first
COLUMN_BIN = 16  # the same along the columns of a tile, where the members of a bin are far apart in memory
ROWS_AT_ONCE = 512  # rows that are merged and sorted together


class BestClasses:
    """The k largest cosines of each row so far: values `[rows, k]` and class ids `[rows, k]`; at first -inf and -1."""

    def __init__(self, rows: int, k: int, like: Tensor, elements: int) -> None:
        self.values = like.new_full((rows, k), -torch.inf)
        self.ids = torch.full_like(self.values, -1, dtype=torch.int64)
        self.k = k
        self.budget = elements // 8  # elements of one temporary; there are several of 8 bytes each

    def update(self, rows: slice, tile: Tensor, first: int, *, by_column: bool = False) -> None:
        """Update `rows` with `tile [rows, m]` (`[m, rows]` if by_column): cosines to the m classes from id `first` on.

        These ids must be higher than all ids seen so far.
        """
        values = self.values[rows]
        ids = self.ids[rows]
        cosines, bin_size = (tile.T, COLUMN_BIN) if by_column else (tile, BIN)
        classes = cosines.shape[1]
        # classes [0, binned) are in bins, the rest is always considered; with few classes per k, bins do not pay
        binned = classes // bin_size * bin_size if 2 * self.k * bin_size <= classes else 0
        if by_column:
            maxima = tile[:binned].unflatten(0, (-1, bin_size)).amax(1).T
        else:
            maxima = tile[:, :binned].unflatten(1, (-1, bin_size)).amax(2)
        within = torch.arange(bin_size, device=tile.device)
        rest = torch.arange(binned, classes, device=tile.device)
        for part, bins in self._candidates(values[:, -1], maxima, cosines[:, binned:], bin_size):
            places = (bins[:, :, None] * bin_size + within).flatten(1)
            no_bin = places >= binned
            found = cosines[part[:, None], places.clamp_(max=classes - 1)].masked_fill_(no_bin, -torch.inf)
            places = torch.cat((places, rest.expand(len(part), -1)), 1)
            pool = torch.cat((values[part], found, cosines[part[:, None], rest]), 1)
            top = largest(pool, self.k)
            values[part] = pool.gather(1, top)
            ids[part] = torch.cat((ids[part], places + first), 1).gather(1, top)

    def _candidates(
        self, least: Tensor, maxima: Tensor, rest: Tensor, bin_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, bins `[rows, at most k]`): rows that may have a cosine above `least [rows]`, and where to look.

        maxima `[rows, bins]`: the largest cosine of each bin. rest `[rows, m]`: cosines that are in no bin. Rows with
        about the same number of candidate bins are yielded together; the number of bins stands for "no bin" where a
        row has fewer than the others.
        """
        above = (maxima > least[:, None]).contiguous()
        counts = above.sum(1)
        has_better = counts > 0
        if rest.shape[1]:
            has_better |= rest.amax(1) > least
        chosen = has_better.nonzero()[:, 0]
        if not len(chosen):
            return
        counts, order = counts[chosen].sort()
        chosen = chosen[order]
        most_bins = min(self.k, int(counts[-1]))
        size = max(1, min(ROWS_AT_ONCE, self.budget // (self.k + most_bins * bin_size + rest.shape[1])))
        largest_counts = [*counts[size - 1 :: size].tolist(), int(counts[-1])]
        for part, part_counts, most in zip(chosen.split(size), counts.split(size), largest_counts, strict=False):
            if most > self.k:
                yield part, largest(maxima[part], self.k).sort(1).values
                continue
            row, bin_of_row = above[part].nonzero(as_tuple=True)
            # the position of a bin among the candidate bins of its row
            place = torch.arange(len(row), device=row.device) - (part_counts.cumsum(0) - part_counts)[row]
            bins = row.new_full((len(part), most), maxima.shape[1])
            bins[row, place] = bin_of_row
            yield part, bins


def largest(values: Tensor, k: int) -> Tensor:
    """Return the positions `[rows, k]` of the k largest of `values [rows, n]`, descending; of equal ones the first."""
    count = values.shape[1]
    if values.dtype == torch.float64:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # topk is not stable, so make all keys distinct. High 32 bits: the bits of the float32 as an integer of the same
    # order. Low 32 bits: the position, counted from the end.
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) | torch.arange(count - 1, -1, -1, device=values.device)
    return count - 1 - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
