"""Class rows from the means of embeddings, over a whole data set that no rank holds.

    each batch      embeddings, labels of every rank ── gather ──> global batch ── own classes ──>
                    sums [C_local, D], counts [C_local]
    at the end      sums / counts ── direction, length, sub-centers ──> rows [C_local, ...], block by block

Where a loss normalizes rows, the length of a row has no effect on the loss, but its gradient is proportional to
1 / length, so an optimizer step turns it by an angle proportional to 1 / length². The means are therefore scaled to the
usual length of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from partial_fc.batch.exchange import exchange
from partial_fc.batch.status import LabelSet
from partial_fc.batch.targets import check_batch
from partial_fc.classes.interface import Changeable
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.ranks import naming_the_missing
from partial_fc.distributed.shards import ClassShards, local_part
from partial_fc.optim.row_state import MASTER
from partial_fc.sampling import mix
from partial_fc.tiers.initial import initial_rows

Batches = Iterable[tuple[Tensor, Tensor]]
NewRows = Callable[[int, int], Tensor]  # (a, b) -> rows of the class ids [a, b)

CENTER_OFFSETS = 0x61706172  # key of these draws; must never change, or a seed would give other rows
SPREAD = 0.1  # distance of the other centers of a class from its mean, relative to the length of the mean
ROW_BLOCK = 1024  # rows made or summed at a time
TINY = 1e-12  # a shorter vector has no direction


@torch.no_grad()
def init_from_embeddings(loss: Changeable, batches: Batches) -> None:
    """See `ChangeableLoss.init_from_embeddings`."""
    lo, hi = loss.class_rows.shards.lo, loss.class_rows.shards.hi
    means, counts = _class_means(loss, batches, lo, hi, range(loss.num_classes))
    parameter = loss.class_rows.main
    optimizer = loss.class_rows.live_optimizer
    loss.class_rows.catch_up()
    weight = local_part(parameter.detach())
    state = {} if optimizer is None or parameter not in optimizer.state else optimizer.state[parameter]
    for a, b in row_blocks(lo, hi):
        here = slice(a - lo, b - lo)
        found = _has_mean(loss, means[here], counts[here])
        lengths = _lengths(weight[here].to(means.dtype)) if loss.normalizes else None
        rows = _rows_from_means(loss, means[here], a, lengths)
        for tensor in (weight, *(local_part(state[key]) for key in (MASTER,) if key in state)):
            tensor[here] = torch.where(_expand_mask(found, tensor), rows.to(tensor.dtype), tensor[here])


def new_rows_from_means(loss: Changeable, batches: Batches, after: ClassShards, fresh: NewRows) -> NewRows:
    """Return the rows of added classes: means of their samples, or `fresh` rows for classes without samples.

    Where a loss normalizes rows, means get the mean length of the existing rows.
    """
    first = loss.num_classes
    lo = max(after.lo, first)
    means, counts = _class_means(loss, batches, lo, max(lo, after.hi), range(first, after.num_classes))
    lengths = _mean_length(loss).to(means.dtype) if loss.normalizes else None

    def rows(a: int, b: int) -> Tensor:
        here = slice(a - lo, b - lo)
        from_means = _rows_from_means(loss, means[here], a, lengths)
        found = _has_mean(loss, means[here], counts[here])
        return torch.where(_expand_mask(found, from_means), from_means, fresh(a, b).to(means))

    return rows


def _class_means(loss: Changeable, batches: Batches, lo: int, hi: int, valid: range) -> tuple[Tensor, Tensor]:
    """Return (means `[hi - lo, D]`, sample counts `[hi - lo]`) of classes [lo, hi) over the batches of all ranks.

    valid: the labels that batches may have.
    """
    weight, ranks, device = weight_rows(loss), loss.class_rows.shards.ranks, loss.class_rows.device
    dtype = torch.promote_types(weight.dtype, torch.float32)
    store = loss.class_rows.store
    if store is None:
        sums = weight.new_zeros(hi - lo, loss.embedding_size, dtype=dtype)
    else:
        sums = store.scratch(hi - lo, (loss.embedding_size,), dtype)
    counts = weight.new_zeros(hi - lo, dtype=torch.int64)
    for embeddings, labels in _equal_batches(loss, batches, sums):
        batch = exchange(embeddings, [LabelSet(None, labels)], ranks, look=True, device=device)[0]
        if check_batch(batch, loss.embedding_size, valid, loss.ignore_index, loss.on_nonfinite):
            continue
        rows = torch.where(batch.labels == loss.ignore_index, -1, batch.labels - lo)
        own = ((rows >= 0) & (rows < hi - lo)).nonzero()[:, 0]
        places = rows[own].to(sums.device)
        sums.index_add_(0, places, batch.embeddings[own].to(sums.device))
        counts.index_add_(0, places, torch.ones_like(places))
    if ranks.replica_group is not None:
        for each in (sums, counts):
            with naming_the_missing("the sum of class means", ranks.replica_group):
                dist.all_reduce(each, group=ranks.replica_group)
    return sums.div_(counts.clamp(min=1)[:, None]), counts


def _equal_batches(loss: Changeable, batches: Batches, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's batches in the dtype of `like`, then empty ones until every rank has reached its end.

    If one rank's iterator raises, that rank raises the exception, and the others raise a RuntimeError that names it.
    """
    ranks, device = loss.class_rows.shards.ranks, loss.class_rows.device
    empty = like.new_empty(0, loss.embedding_size, device=device), torch.empty(0, dtype=torch.int64, device=device)
    iterator, failure = iter(batches), None
    while True:
        mine = None
        try:
            mine = next(iterator, None)
            if mine is not None:
                embeddings, labels = mine
                mine = (embeddings.to(like.dtype) if embeddings.is_floating_point() else embeddings), labels
        except Exception as error:
            failure = error
        state = 2 if failure is not None else int(mine is not None)  # 2: failed, 1: has a batch, 0: at its end
        everyone = [each for (each,) in meet("init_from_embeddings", ranks, device, (state,))]
        if failure is not None:
            raise failure
        if 2 in everyone:
            raise RuntimeError(
                f"{ranks.name(everyone.index(2))} failed to read its batches; see the error on that rank"
            )
        if 1 not in everyone:
            return
        yield empty if mine is None else mine


def _rows_from_means(loss: Changeable, means: Tensor, first: int, lengths: Tensor | None) -> Tensor:
    """Return rows `[n, ...]` from the means `[n, D]` of the classes from id `first` on.

    Of K centers per class the first is the mean, the others are near it. lengths: the lengths of the rows, `[]`, `[n]`
    or `[n, K]`; None keeps the lengths of the means.
    """
    shape = row_shape(loss)
    rows = means[:, None]
    if len(shape) > 1:
        drawn = initial_rows(
            first, first + len(means), shape, std=1.0, seed=mix(loss.seed, CENTER_OFFSETS, loss.class_changes)
        ).to(means)
        offsets = F.normalize(drawn, dim=-1) * (SPREAD * _lengths(means)[:, None, None])
        offsets[:, 0] = 0
        rows = rows + offsets
    if lengths is not None:
        wanted = torch.where(lengths > TINY, lengths, 1.0)
        wanted = wanted if wanted.ndim == 0 else wanted.reshape(len(means), -1, 1)
        rows = rows / _lengths(rows)[..., None].clamp(min=TINY) * wanted
    return rows.reshape(len(means), *shape)


def _has_mean(loss: Changeable, means: Tensor, counts: Tensor) -> Tensor:
    """`[n]`: whether a class has samples and, if the loss normalizes rows, its mean a direction."""
    return (counts > 0) & (_lengths(means) > TINY) if loss.normalizes else counts > 0


def _mean_length(loss: Changeable) -> Tensor:
    """Return the mean length of all rows of all ranks, float64 (0-d)."""
    weight, group = weight_rows(loss), loss.class_rows.shards.ranks.group
    total = weight.new_zeros((), dtype=torch.float64)
    for block in weight.split(ROW_BLOCK):
        total += _lengths(block.to(torch.promote_types(block.dtype, torch.float32))).sum(dtype=torch.float64)
    if group is not None:
        with naming_the_missing("the mean length of rows", group):
            dist.all_reduce(total, group=group)
    shape = row_shape(loss)
    return total / (loss.num_classes * (shape[0] if len(shape) > 1 else 1))


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


def _expand_mask(found: Tensor, rows: Tensor) -> Tensor:
    """Return `found [n]` as a mask that broadcasts over `rows [n, ...]`."""
    return found.view(-1, *[1] * (rows.ndim - 1))


def row_blocks(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the ids [first, end) in parts."""
    for a in range(first, end, ROW_BLOCK):
        yield a, min(a + ROW_BLOCK, end)


def row_shape(loss: Changeable) -> tuple[int, ...]:
    """Return `(D,)`, or `(K, D)` with K centers per class."""
    return tuple(loss.class_rows.main.shape[1:])


def weight_rows(loss: Changeable) -> Tensor:
    """Return the local rows `[C_local, ...]` of the weights or centers."""
    return local_part(loss.class_rows.main.detach())
