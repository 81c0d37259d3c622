"""The exchange of a batch: two collectives after which every rank holds the global batch.

    a rank:  embeddings [N_local, D], labels [N_local] (or [N_local, L] with label_weights), sample_weights [N_local]
       status   int64 [24]   ── all-gather ──>  the same table on every host: counts, and what is wrong on which rank
       payload  bytes        ── all-gather ──>  embeddings [N, D], labels [N], ... in the order of the ranks

On a 2-D mesh (replicas x shards) embeddings travel within a replica only; statuses and labels are gathered across
replicas too, one more small collective each. With several label sets the status collective keeps the size of one set,
so that ranks that disagree about the names do not hang; one more collective brings the statuses of the other sets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.batch import refusals
from partial_fc.batch.facts import Agreed
from partial_fc.batch.problems import examine
from partial_fc.batch.row_sums import of_all_samples
from partial_fc.batch.status import LabelSet, Status, inspect, is_usual
from partial_fc.distributed.meeting import BATCH
from partial_fc.distributed.ranks import Ranks, all_gather, all_gather_mesh

PAYLOAD = "the exchange of embeddings and labels"  # in a `RankMissing`; BATCH is the exchange of statuses


@dataclass
class GlobalBatch:
    """One batch of all ranks (of this replica), in the order of the ranks: the input of heads and center losses.

    mesh_labels, mesh_label_weights and mesh_sample_weights cover all replicas.
    """

    embeddings: Tensor  # [N, D]; from `gather`, connected to this rank's part in backward
    labels: Tensor  # [N] or [N, L]
    label_weights: Tensor | None  # [N, L]
    sample_weights: Tensor | None  # [N]
    counts: tuple[int, ...]  # samples of each rank of this replica
    mesh_labels: Tensor
    mesh_label_weights: Tensor | None
    mesh_sample_weights: Tensor | None
    status: tuple[Status, ...] = field(repr=False)  # of all ranks
    ranks: Ranks = field(repr=False)
    looked: bool  # for bad labels, before anything was computed; else they make the loss NaN
    name: str | None = None  # of the label set, where `gather` was given several
    later: bool = False  # the check of the step is to look at them; a forward outside a step looks at once
    cut_off: bool = False  # gathered inside a checkpoint that does not record, and so of no backbone outside it

    @property
    def local(self) -> slice:
        """The place of this rank's samples."""
        start = sum(self.counts[: self.ranks.rank])
        return slice(start, start + self.counts[self.ranks.rank])

    @property
    def first_sample(self) -> int:
        """The place of this replica's first sample among those of all replicas."""
        return sum(row.samples for row in self.status[: self.ranks.replica * self.ranks.world])

    @property
    def most_samples(self) -> int:
        """N of the largest replica: what is summed over replicas tile by tile needs the same tiles on all of them."""
        world, samples = self.ranks.world, [row.samples for row in self.status]
        return max(sum(samples[i : i + world]) for i in range(0, len(samples), world))


def exchange(
    embeddings: Tensor,
    sets: list[LabelSet],
    ranks: Ranks,
    *,
    look: bool,
    device: torch.device | None = None,
    problem: str = "",
    agreed: Agreed | None = None,
) -> list[GlobalBatch]:
    """Return a batch for each label set, all with the same embeddings, detached.

    look: inspect values (`status.inspect`). device: where the caller's weights are; embeddings must be there too.
    problem: something that is wrong already, which all ranks are to raise. agreed: what all ranks must have alike.
    """
    if not (isinstance(embeddings, Tensor) and all(is_usual(embeddings, each, device) for each in sets)):
        embeddings, problem = examine(embeddings, sets, device, problem)
    wants_grad = embeddings.requires_grad and torch.is_grad_enabled()
    embeddings = embeddings.detach()
    mine = inspect(embeddings, sets, problem, wants_grad, look, agreed)
    if ranks.group is not None:
        mine = mine.to(device or embeddings.device) if ranks.host_group is None else mine.cpu()
    status = _exchange_status(mine, sets, problem, ranks, agreed)
    counts = [row.samples for row in status[0]]
    start = ranks.replica * ranks.world
    own = tuple(counts[start : start + ranks.world])
    parts = [embeddings, *(tensor for each in sets for tensor in each.tensors())]
    gathered = exchange_payload(parts, own, max(counts), ranks.group)
    across = gathered[1:]
    if ranks.replica_group is not None:
        sums = [sum(counts[i * ranks.world : (i + 1) * ranks.world]) for i in range(ranks.replicas)]
        across = exchange_payload(gathered[1:], tuple(sums), max(sums), ranks.replica_group)
    of_replica, of_mesh = iter(gathered[1:]), iter(across)
    return [
        GlobalBatch(gathered[0], *each.unpack(of_replica), own, *each.unpack(of_mesh), statuses, ranks, look, each.name)
        for each, statuses in zip(sets, status, strict=True)
    ]


def _exchange_status(
    mine: Tensor, sets: list[LabelSet], problem: str, ranks: Ranks, agreed: Agreed | None
) -> list[tuple[Status, ...]]:
    """Return every rank's status for each label set, from this rank's `mine [sets, 24]`.

    Raises the same ValueError on every rank if any of them has a batch that cannot be gathered, or invalid weights.
    """
    first = tuple(map(Status._make, all_gather_mesh(mine[0], ranks, BATCH).tolist()))
    if any(row.problem or row.together != first[0].together for row in first):
        refusals.raise_problem(first, problem, [each.name for each in sets], agreed, ranks, mine.device)
    status = [first]
    if len(sets) > 1:
        further = all_gather_mesh(mine[1:], ranks, BATCH).transpose(0, 1).tolist()
        status += [tuple(map(Status._make, table)) for table in further]
    for each, statuses in zip(sets, status, strict=True):
        if any(row.bad_weight or row.layout != statuses[0].layout for row in statuses):
            refusals.raise_finding(statuses, ranks, each.name)
    return status


def exchange_payload(
    parts: list[Tensor], counts: tuple[int, ...], longest: int, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Return all ranks' rows of several tensors `[N_local, ...]`, by one all-gather of bytes.

    Each rank's part is padded to `longest` rows, so that all ranks send equally much.
    """
    if group is None:
        return parts
    sizes = [part.itemsize * math.prod(part.shape[1:]) for part in parts]  # bytes of a row
    # every section starts where any dtype may be viewed
    *offsets, total = accumulate((-(-longest * size // 8) * 8 for size in sizes), initial=0)
    buffer = torch.empty(total, dtype=torch.uint8, device=parts[0].device)
    for part, offset in zip(parts, offsets, strict=True):
        if part.numel():
            section = buffer[offset : offset + part.nbytes].view(part.dtype)
            section.copy_(part.reshape(-1))
    everyone = all_gather(buffer, group, PAYLOAD)
    out = []
    for part, offset, size in zip(parts, offsets, sizes, strict=True):
        even = everyone[:, offset : offset + longest * size].reshape(-1)
        if min(counts) < longest:
            even = torch.cat([part[: n * size] for part, n in zip(even.view(len(counts), -1), counts, strict=True)])
        out.append(even.view(part.dtype).view(sum(counts), *part.shape[1:]))
    return out


def require_grad_like_others(embeddings: Tensor, status: tuple[Status, ...]) -> Tensor:
    """Return embeddings that require grad if any rank's do: an empty batch must join the backward's collective, too."""
    if torch.is_grad_enabled() and not embeddings.requires_grad and any(row.wants_grad for row in status):
        return embeddings.detach().requires_grad_()
    return embeddings


def gradient_of_losses(grad: Tensor, batch: GlobalBatch, loss_shares: Tensor, reduction: str) -> Tensor:
    """Return ∂objective/∂(unweighted loss_i) `[N]` from that of the loss, equal on all ranks, or `[N_local]`."""
    if reduction != "none":
        return grad * loss_shares
    # engines average gradients over ranks, so that what one rank makes of its losses counts a share of them
    return of_all_samples(grad, batch.counts, batch.ranks) * loss_shares / batch.ranks.total
