"""Rows that start from the means of embeddings, over a whole data set that no rank holds.

    a batch of every rank ── exchange, as in a step ──>  sums [C_local, D], counts [C_local] of own classes; and the next
    sums / counts         ── direction, length, centers apart ──>  rows [C_local, ...], block by block

Where a loss normalises, a row's length has no effect on it, but the gradient of a row goes with 1/length and so its step, in angle, with
1/length²: means are brought to the length that rows have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from partial_fc.batch.exchange import exchange
from partial_fc.batch.status import LabelSet
from partial_fc.classes.interface import Changeable
from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.ranks import all_gather_mesh
from partial_fc.optim.row_state import MASTER
from partial_fc.sampling import mix
from partial_fc.sharded_module import INIT_BLOCK, initial_rows
from partial_fc.shards import ClassShards, local_part
from partial_fc.targets import check_batch

Batches = Iterable[tuple[Tensor, Tensor]]
NewRows = Callable[[int, int], Tensor]  # (a, b) -> rows of the global ids a to b

APART = 0x61706172  # what is drawn; part of the format of a seed, so never to be changed
SPREAD = 0.1  # how far the further centers of a class are from its mean, in lengths of the mean
TINY = 1e-12  # a shorter vector has no direction


@torch.no_grad()
def init_from_embeddings(loss: Changeable, batches: Batches) -> None:
    """What `ChangeableLoss.init_from_embeddings` does."""
    lo, hi = loss.class_rows.shards.lo, loss.class_rows.shards.hi
    means, counts = _class_means(loss, batches, lo, hi, range(loss.num_classes))
    parameter, optimizer = loss.class_rows.main, loss.class_rows.live_optimizer
    weight = local_part(parameter.detach())
    state = {} if optimizer is None or parameter not in optimizer.state else optimizer.state[parameter]
    for a, b in row_blocks(lo, hi):
        here = slice(a - lo, b - lo)
        found = _usable(loss, means[here], counts[here])
        lengths = _lengths(weight[here].to(means.dtype)) if loss.normalizes else None
        rows = _around(loss, means[here], a, lengths)
        for tensor in (weight, *(local_part(state[key]) for key in (MASTER,) if key in state)):
            tensor[here] = torch.where(_as_mask(found, tensor), rows.to(tensor.dtype), tensor[here])


def rows_of_new_means(loss: Changeable, batches: Batches, after: ClassShards, fresh: NewRows) -> NewRows:
    """Means of the samples of classes that are to be added, as long as the rows there are; `fresh` for those without samples."""
    first = loss.num_classes
    lo = max(after.lo, first)
    means, counts = _class_means(loss, batches, lo, max(lo, after.hi), range(first, after.num_classes))
    lengths = _mean_length(loss).to(means.dtype) if loss.normalizes else None

    def rows(a: int, b: int) -> Tensor:
        here = slice(a - lo, b - lo)
        around, drawn = _around(loss, means[here], a, lengths), fresh(a, b).to(means)
        return torch.where(_as_mask(_usable(loss, means[here], counts[here]), around), around, drawn)

    return rows


def _class_means(loss: Changeable, batches: Batches, lo: int, hi: int, valid: range) -> tuple[Tensor, Tensor]:
    """(means `[hi - lo, D]`, number of samples `[hi - lo]`) of the classes lo to hi over the batches of all ranks."""
    weight, ranks = weight_rows(loss), loss.class_rows.shards.ranks
    dtype = torch.promote_types(weight.dtype, torch.float32)
    sums = weight.new_zeros(hi - lo, loss.embedding_size, dtype=dtype)
    counts = weight.new_zeros(hi - lo, dtype=torch.int64)
    for embeddings, labels in _batches_of_all(loss, batches, sums):
        batch = exchange(embeddings, [LabelSet(None, labels)], ranks, look=True, device=weight.device)[0]
        if check_batch(batch, loss.embedding_size, valid, loss.ignore_index, loss.on_nonfinite):
            continue
        rows = torch.where(batch.labels == loss.ignore_index, -1, batch.labels - lo)
        own = ((rows >= 0) & (rows < hi - lo)).nonzero()[:, 0]
        sums.index_add_(0, rows[own], batch.embeddings[own])
        counts.index_add_(0, rows[own], torch.ones_like(own))
    if ranks.replica_group is not None:
        for each in (sums, counts):
            with naming_the_missing("the sum of class means", ranks.replica_group):
                dist.all_reduce(each, group=ranks.replica_group)
    return sums.div_(counts.clamp(min=1)[:, None]), counts


def _batches_of_all(loss: Changeable, batches: Batches, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches in the dtype of `like`, which all ranks know; then empty ones until no rank has any more.

    An exception of one rank's iterator ends all ranks' loops: there it is raised, elsewhere a RuntimeError that names the rank.
    """
    ranks = loss.class_rows.shards.ranks
    nothing = like.new_empty(0, loss.embedding_size), torch.empty(0, dtype=torch.int64, device=like.device)
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
        state = 2 if failure is not None else int(mine is not None)
        everyone = all_gather_mesh(torch.tensor([state], device=like.device), ranks).flatten().tolist()
        if failure is not None:
            raise failure
        if 2 in everyone:
            raise RuntimeError(f"{ranks.name(everyone.index(2))} failed while it read its batches; see its own error")
        if 1 not in everyone:
            return
        yield nothing if mine is None else mine


def _around(loss: Changeable, means: Tensor, first: int, lengths: Tensor | None) -> Tensor:
    """Rows `[n, ...]` at the means `[n, D]` of the classes from `first` on; with K centers a class the others near the first.

    lengths: how long each is to be, `[]`, `[n]` or `[n, K]`; as long as the means if None.
    """
    shape = row_shape(loss)
    rows = means[:, None]
    if len(shape) > 1:
        drawn = initial_rows(
            first, first + len(means), shape, std=1.0, seed=mix(loss.seed, APART, loss.class_changes)
        ).to(means)
        apart = F.normalize(drawn, dim=-1) * (SPREAD * _lengths(means)[:, None, None])
        apart[:, 0] = 0
        rows = rows + apart
    if lengths is not None:
        wanted = torch.where(lengths > TINY, lengths, 1.0)
        wanted = wanted if wanted.ndim == 0 else wanted.reshape(len(means), -1, 1)
        rows = rows / _lengths(rows)[..., None].clamp(min=TINY) * wanted
    return rows.reshape(len(means), *shape)


def _usable(loss: Changeable, means: Tensor, counts: Tensor) -> Tensor:
    """`[n]`: where there is a mean, and a direction where only that counts."""
    return (counts > 0) & (_lengths(means) > TINY) if loss.normalizes else counts > 0


def _mean_length(loss: Changeable) -> Tensor:
    """Mean length of all rows of all ranks, float64 (0-d)."""
    weight, group = weight_rows(loss), loss.class_rows.shards.ranks.group
    total = weight.new_zeros((), dtype=torch.float64)
    for block in weight.split(INIT_BLOCK):
        total += _lengths(block.to(torch.promote_types(block.dtype, torch.float32))).sum(dtype=torch.float64)
    if group is not None:
        with naming_the_missing("the mean length of rows", group):
            dist.all_reduce(total, group=group)
    shape = row_shape(loss)
    return total / (loss.num_classes * (shape[0] if len(shape) > 1 else 1))


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


def _as_mask(found: Tensor, rows: Tensor) -> Tensor:
    return found.view(-1, *[1] * (rows.ndim - 1))


def row_blocks(first: int, end: int) -> Iterator[tuple[int, int]]:
    """The ids first to end, cut where `initial_rows` begins another generator."""
    while first < end:
        b = min(end, (first // INIT_BLOCK + 1) * INIT_BLOCK)
        yield first, b
        first = b


def row_shape(loss: Changeable) -> tuple[int, ...]:
    """`(D,)`, or `(K, D)` with K centers a class."""
    return tuple(loss.class_rows.main.shape[1:])


def weight_rows(loss: Changeable) -> Tensor:
    """The local rows `[C_local, ...]` of the weights or centers."""
    return local_part(loss.class_rows.main.detach())
