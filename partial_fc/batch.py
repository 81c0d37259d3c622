"""Everything that the ranks of a head say to each other before its loss: one small exchange of counts and status, one of the payload.

    rank r:  embeddings [N_r, D], labels [N_r] (or [N_r, L] with label_weights [N_r, L]), sample_weights [N_r]; or such labels by name
       status (Status) int64  ── all-gather ──>  the same table on every host: counts, and what is wrong where
       payload (bytes)        ── all-gather ──>  embeddings [N, D], labels [N] ... in the order of the ranks, N = sum of N_r
       gradient [N, D]        ── reduce-scatter ──>  gradient [N_r, D], summed over the ranks' classes

The status is read on the host, which has to learn the counts anyway, so that judging it costs no further synchronisation and a bad
input on one rank raises the same error on all of them. On a 2-D mesh (replicas x shards) embeddings travel within a replica only;
labels and status are also exchanged over the replicas, one more small collective each.

Several heads with label spaces of their own take one batch: labels by name, a `Status` for each. Ranks may disagree about the names, so
the first exchange has the same size whatever they are, with the first set's status and a digest of the names; once the digests are seen
to agree, one more small exchange brings the status of the other sets. What went wrong is told in words, after a status that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.batch_status import (
    EMBEDDINGS_AGREED,
    LABELS_AGREED,
    Status,
    _agree,
    _inspect,
    _judge_weights,
    _label_sets,
    _LabelSet,
    _listed,
    _of_set,
    _problem_of,
)
from partial_fc.distributed.ranks import Group, Ranks, all_gather, all_gather_mesh, start_reduce_scatter, tell

GatherValidate = Literal["always", "never"]


# what a `RankMissing` calls them
STATUS, PAYLOAD = "the exchange of counts and status of a batch", "the exchange of embeddings and labels"


@dataclass
class GlobalBatch:
    """One batch of all ranks (of this replica), in the order of the ranks: what heads and center losses take.

    embeddings [N, D], connected to this rank's part in backward; labels [N] or [N, L]; label_weights [N, L] or None;
    sample_weights [N] or None; counts: samples of each rank. mesh_labels, mesh_label_weights and mesh_sample_weights cover all replicas.
    name: of the label set, where `gather` was given several.
    """

    embeddings: Tensor
    labels: Tensor
    label_weights: Tensor | None
    sample_weights: Tensor | None
    counts: tuple[int, ...]
    mesh_labels: Tensor
    mesh_label_weights: Tensor | None
    mesh_sample_weights: Tensor | None
    status: tuple[Status, ...] = field(repr=False)
    ranks: Ranks = field(repr=False)
    name: str | None = None

    @property
    def local(self) -> slice:
        """Where this rank's samples are."""
        start = sum(self.counts[: self.ranks.rank])
        return slice(start, start + self.counts[self.ranks.rank])

    def origin(self, flat: int) -> str:
        """What an error calls the `flat`-th rank's part of the batch."""
        return self.ranks.name(flat) + _of_set(self.name)


@overload
def gather(
    embeddings: Tensor,
    labels: Tensor,
    *,
    label_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    group: Group = None,
    validate: GatherValidate = "always",
) -> GlobalBatch: ...


@overload
def gather(
    embeddings: Tensor,
    labels: Mapping[str, Tensor],
    *,
    label_weights: Mapping[str, Tensor] | None = None,
    sample_weights: Tensor | Mapping[str, Tensor] | None = None,
    group: Group = None,
    validate: GatherValidate = "always",
) -> dict[str, GlobalBatch]: ...


def gather(
    embeddings: Tensor,
    labels: Tensor | Mapping[str, Tensor],
    *,
    label_weights: Tensor | Mapping[str, Tensor] | None = None,
    sample_weights: Tensor | Mapping[str, Tensor] | None = None,
    group: Group = None,
    validate: GatherValidate = "always",
) -> GlobalBatch | dict[str, GlobalBatch]:
    """Gather this rank's embeddings [N_local, D] and labels [N_local] from all ranks, once for any number of heads.

    Every rank of the group must call it; N_local may differ between ranks and be 0. Labels may be `[N_local, L]` with label_weights of
    that shape (soft or several labels), each at least 0 and together 1 in a sample (that has a label of at least 0; the weights of others
    are not added up). sample_weights `[N_local]`, each at least 0, weigh samples in a mean. In backward the gradients of all heads are
    summed and reduce-scattered once.

    Heads with label spaces of their own: `labels` is a dict, and so is what is returned, a batch for each name with the same embeddings:

        batch = gather(x, {"faces": a, "plates": b})
        loss = faces(batch["faces"]) + plates(batch["plates"])

    A sample that is not of a head has that head's ignore_index among its labels. label_weights is then a dict with the names that have
    some; sample_weights are for all names, or a dict as well. All ranks must bring the same names, in any order.

    validate: "always" looks for labels out of range, NaN, infinities and bad weights, "never" does not. What it finds every head judges by
    its own classes and `on_nonfinite`, whatever its own validate, which is about batches that it exchanges itself. There is no "first",
    since nothing is remembered between two calls.

    Raises ValueError, the same on every rank, if names, shapes, dtypes, widths, devices or weights are wrong on any of them.
    """
    if validate not in ("always", "never"):
        raise ValueError(
            f'validate of gather must be "always" or "never", not {validate!r}; for the first batch alone say it there'
        )
    ranks = Ranks.of(group)
    sets, problem = _label_sets(labels, label_weights, sample_weights)
    batches = _exchange(embeddings, sets, problem, ranks, inspect=validate == "always")
    first = batches[0]
    everyone = _Gathered.apply(joining(embeddings, first.status), first.embeddings, ranks, first.counts)
    for batch in batches:
        batch.embeddings = everyone
    if not isinstance(labels, Mapping):
        return first
    by_name = {batch.name: batch for batch in batches}
    return {name: by_name[name] for name in labels}


def joining(embeddings: Tensor, status: tuple[Status, ...]) -> Tensor:
    """Embeddings that take part in backward if any rank's do (an empty tensor of a rank without data does not by itself), so that no
    rank is missing from the collective there."""
    if torch.is_grad_enabled() and not embeddings.requires_grad and any(row.wants_grad for row in status):
        return embeddings.detach().requires_grad_()
    return embeddings


def exchange(
    embeddings: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    sample_weights: Tensor | None,
    ranks: Ranks,
    *,
    inspect: bool,
    device: torch.device | None = None,
) -> GlobalBatch:
    """`gather` without its place in the autograd graph: two collectives (four on a 2-D mesh).

    `inspect`: look for extreme labels, non-finite embeddings and bad weights. `device`: where the caller's weights are.
    """
    return _exchange(
        embeddings, [_LabelSet(None, labels, label_weights, sample_weights)], "", ranks, inspect=inspect, device=device
    )[0]


def _exchange(
    embeddings: Tensor,
    sets: list[_LabelSet],
    problem: str,
    ranks: Ranks,
    *,
    inspect: bool,
    device: torch.device | None = None,
) -> list[GlobalBatch]:
    """A batch for each label set, all with the same embeddings. problem: what is wrong already, of which all ranks are to hear."""
    if not isinstance(embeddings, Tensor):  # the others wait to hear of it
        problem = problem or f": embeddings must be a tensor [N, D], not {type(embeddings).__name__}"
        embeddings = torch.empty(
            0, 0, device=device or next((s.labels.device for s in sets if isinstance(s.labels, Tensor)), None)
        )
    wants_grad = embeddings.requires_grad and torch.is_grad_enabled()
    embeddings = embeddings.detach()
    problem = problem or next(filter(None, (_problem_of(embeddings, each, device) for each in sets)), "")
    mine = _inspect(embeddings, sets, problem, wants_grad, inspect).to(device or embeddings.device)
    status = _exchange_status(mine, sets, problem, ranks)
    counts = [row.samples for row in status[0]]
    start = ranks.replica * ranks.world
    own = tuple(counts[start : start + ranks.world])
    parts = [embeddings, *(tensor for each in sets for tensor in each.tensors())]
    gathered = _exchange_payload(parts, own, max(counts), ranks.group)
    across = gathered[1:]
    if ranks.replica_group is not None:
        sums = [sum(counts[i * ranks.world : (i + 1) * ranks.world]) for i in range(ranks.replicas)]
        across = _exchange_payload(gathered[1:], tuple(sums), max(sums), ranks.replica_group)
    of_replica, of_mesh = iter(gathered[1:]), iter(across)
    return [
        GlobalBatch(gathered[0], *each.take(of_replica), own, *each.take(of_mesh), rows, ranks, each.name)
        for each, rows in zip(sets, status, strict=True)
    ]


def _exchange_status(mine: Tensor, sets: list[_LabelSet], problem: str, ranks: Ranks) -> list[tuple[Status, ...]]:
    """For each label set the status of every rank, from this rank's `mine [sets, numbers]`.

    Raises the same ValueError on every rank if any of them has a batch that cannot be exchanged, or bad weights.
    """
    first = tuple(Status(*row) for row in all_gather_mesh(mine[0], ranks, STATUS).tolist())
    if any(row.problem for row in first):
        told = tell(problem, ranks, mine.device)
        raise ValueError(next(ranks.name(flat) + text for flat, text in enumerate(told) if text))
    if any(row.names != first[0].names for row in first):
        names = [each.name for each in sets if each.name is not None]
        told = tell(f"a dict of {_listed(names)}" if names else "no dict", ranks, mine.device)
        flat = next(flat for flat, row in enumerate(first) if row.names != first[0].names)
        raise ValueError(
            f"ranks disagree: labels are {told[0]} on {ranks.name(0)} and {told[flat]} on {ranks.name(flat)}; "
            "every rank must bring the same names"
        )
    _agree(first, EMBEDDINGS_AGREED, ranks, None)
    status = [first]
    if len(sets) > 1:
        others = all_gather_mesh(mine[1:], ranks, STATUS).transpose(0, 1).tolist()
        status += [tuple(Status(*row) for row in table) for table in others]
    for each, rows in zip(sets, status, strict=True):
        _agree(rows, LABELS_AGREED, ranks, each.name)
        _judge_weights(rows, ranks, each.name)
    return status


def _exchange_payload(
    parts: list[Tensor], counts: tuple[int, ...], longest: int, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """All ranks' rows of several tensors `[N_r, ...]` in one all-gather of bytes, each rank padded to `longest` rows."""
    if group is None:
        return parts
    offsets, total = [], 0
    for part in parts:
        offsets.append(total)
        row = part[:0].new_empty(1, *part.shape[1:]).nbytes
        total += -(-longest * row // 8) * 8  # every section starts where any dtype may be viewed
    buffer = torch.empty(total, dtype=torch.uint8, device=parts[0].device)
    for part, offset in zip(parts, offsets, strict=True):
        if part.numel():
            section = buffer[offset : offset + part.nbytes].view(part.dtype)
            section.copy_(part.reshape(-1))
    everyone = all_gather(buffer, group, PAYLOAD)
    out = []
    for part, offset in zip(parts, offsets, strict=True):
        row = part[:0].new_empty(1, *part.shape[1:]).nbytes
        rows = [everyone[r, offset : offset + n * row] for r, n in enumerate(counts)]
        out.append(torch.cat(rows).view(part.dtype).view(sum(counts), *part.shape[1:]))
    return out


def on_each_loss(grad: Tensor, batch: GlobalBatch, sample_weights: Tensor, reduction: str) -> Tensor:
    """`[N]`: d objective / d loss_i, from the gradient of the reduced loss. sample_weights `[N]`: what each loss counts for in it."""
    if reduction != "none":
        return grad * sample_weights
    # each rank's scalar counts as averaged over the ranks, and each rank knows the gradient of its own samples only
    padded = grad.new_zeros(max(batch.counts))
    padded[: len(grad)] = grad
    everyone = all_gather(padded, batch.ranks.group)
    return (
        torch.cat([row[:n] for row, n in zip(everyone, batch.counts, strict=True)]) * sample_weights / batch.ranks.total
    )


class _Gathered(torch.autograd.Function):
    """forward: [N_local, D] -> [N, D], gathered already;   backward: dL/dx_local = (sum over ranks of dL/dx)[local rows].

    Half precision becomes float32 on arrival, so that gradients of several heads and ranks are summed in float32.
    """

    @staticmethod
    def forward(ctx, local, everyone, ranks, counts):  # type: ignore[no-untyped-def]
        ctx.ranks, ctx.counts, ctx.dtype = ranks, counts, local.dtype
        return everyone.view_as(everyone) if everyone.dtype == torch.float64 else everyone.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return start_reduce_scatter(grad, ctx.ranks, ctx.counts)().to(ctx.dtype), None, None, None
