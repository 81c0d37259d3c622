"""Move class rows to their new ranks when classes change: from the shards of C classes to those of C', in row blocks.

    ClassMoves            the old ids that stay, sorted by (new id, old id); each rank of the new split takes a
                          contiguous part of this list
    one block per rank    old owners ── all-to-all ──> new owner: rows in the order of the list; single rows are copied
                          bit for bit, merged rows are summed in the order of old ids, whichever rank they come from

Every rank knows the list, so only rows are sent: one all-to-all per block. A block holds at most `BLOCK_BYTES` on every
rank, so the memory beside the old and the new shard does not grow with the number of classes. The list is int64 on the
host.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.classes.mapping import ClassMoves
from partial_fc.distributed.ranks import naming_the_missing
from partial_fc.distributed.shards import ClassShards, shard_bounds

BLOCK_BYTES = 8 << 20


def move_rows(
    local: Tensor, moves: ClassMoves, before: ClassShards, after: ClassShards, out: Tensor | None = None
) -> Tensor:
    """Return this rank's rows `[C'_local, ...]` after `moves`, given its rows `[C_local, ...]`; in the memory of `out`
    if it is given.

    Every rank of the group must call it. Rows of new ids without an old class are not initialised. Merged rows are
    summed in float32 or better.
    """
    if not local.is_floating_point():
        moves = moves.lowest_only()
    out = local.new_empty(after.local, *local.shape[1:]) if out is None else out
    world = after.ranks.world
    rank = after.ranks.rank
    parts = [moves.part(*shard_bounds(after.num_classes, r, world)) for r in range(world)]
    block = max(1, BLOCK_BYTES // max(1, _row_bytes(local)) // world)
    receiver = _RowReceiver(out, moves, after.lo)
    for start in range(0, max(b - a for a, b in parts), block):
        wanted = [(min(a + start, b), min(a + start + block, b)) for a, b in parts]
        rows = _send_rows(local, [moves.old[a:b] for a, b in wanted], before, rank)
        receiver.add(rows, *wanted[rank])
    return out


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1:].numel() * rows.dtype.itemsize


def _send_rows(local: Tensor, wanted: list[Tensor], before: ClassShards, rank: int) -> Tensor:
    """Return the rows of the old ids `wanted[rank]`, in that order. wanted: the old ids that each rank receives."""
    if before.ranks.group is None:
        return local.index_select(0, wanted[rank].to(local.device))
    sent = [ids[(ids >= before.lo) & (ids < before.hi)] - before.lo for ids in wanted]
    chunk = shard_bounds(before.num_classes, 0, len(wanted))[1]
    owners = wanted[rank] // chunk
    counts = torch.bincount(owners, minlength=len(wanted)).tolist()
    rows = local.index_select(0, torch.cat(sent).to(local.device))
    received = rows.new_empty(len(owners), *rows.shape[1:])
    row_bytes = max(1, _row_bytes(rows))
    # sent as bytes, which every backend supports
    with naming_the_missing("the move of class rows", before.ranks.group):
        dist.all_to_all_single(
            received.view(-1).view(torch.uint8),
            rows.view(-1).view(torch.uint8),
            [count * row_bytes for count in counts],
            [len(ids) * row_bytes for ids in sent],
            group=before.ranks.group,
        )
    # received in the order of owners; put them in the order of `wanted`
    return received.index_select(0, owners.argsort(stable=True).argsort().to(local.device))


class _RowReceiver:
    """Writes received rows to their places in `out`. Keeps the partial sum of a class whose rows are not complete."""

    def __init__(self, out: Tensor, moves: ClassMoves, lo: int) -> None:
        self.out = out
        self.moves = moves
        self.lo = lo
        self.partial_sum: Tensor | None = None  # [1, ...] in the dtype of sums

    def add(self, rows: Tensor, a: int, b: int) -> None:
        """Add `rows [b - a, ...]`: those of entries [a, b) of the moves."""
        places = (self.moves.new[a:b] - self.lo).to(rows.device)
        if self.moves.share is None:
            self.out.index_copy_(0, places, rows)
            return
        is_single = self.moves.first[a:b] & self.moves.last[a:b]
        single = is_single.nonzero()[:, 0].to(rows.device)
        self.out.index_copy_(0, places[single], rows.index_select(0, single))
        merged = (~is_single).nonzero()[:, 0]
        if len(merged):
            self._add_merged(rows, places, merged, a)

    def _add_merged(self, rows: Tensor, places: Tensor, merged: Tensor, a: int) -> None:
        """Add the rows at `merged`, positions in `rows`, each by its share in its new class."""
        moves, device = self.moves, rows.device
        assert moves.share is not None
        # number the new classes of this block; the first may continue the last one of the previous block
        first = moves.first[a + merged]
        starts_new = bool(first[0])
        number = first.cumsum(0) - int(starts_new)
        count = int(number[-1]) + 1
        sums = rows.new_zeros(count, *rows.shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32))
        if not starts_new:
            assert self.partial_sum is not None
            sums[:1] = self.partial_sum
        starts = torch.searchsorted(number, torch.arange(count, device=number.device))
        turn = torch.arange(len(merged), device=number.device) - starts[number]
        shares = moves.share[a + merged].to(device, sums.dtype).view(-1, *[1] * (rows.ndim - 1))
        # add the k-th row of each class at a time: no two of one class, so the order of summation is that of the list
        for k in range(int(turn.max()) + 1):
            now = (turn == k).nonzero()[:, 0]
            here = merged[now].to(device)
            weighted = rows.index_select(0, here).to(sums.dtype) * shares[now.to(device)]
            sums.index_add_(0, number[now].to(device), weighted)
        done = count if bool(moves.last[a + merged[-1]]) else count - 1
        self.out.index_copy_(0, places[merged[starts[:done]].to(device)], sums[:done].to(self.out.dtype))
        self.partial_sum = None if done == count else sums[done:]
