"""Everything that the ranks of a head say to each other before its loss: one small exchange of counts and status, one of the payload.

    rank r:  embeddings [N_r, D], labels [N_r] (or [N_r, L] with label_weights [N_r, L]), sample_weights [N_r]
       status (Status) int64  ── all-gather ──>  the same table on every host: counts, and what is wrong where
       payload (bytes)        ── all-gather ──>  embeddings [N, D], labels [N] ... in the order of the ranks, N = sum of N_r
       gradient [N, D]        ── reduce-scatter ──>  gradient [N_r, D], summed over the ranks' classes

The status is read on the host, which has to learn the counts anyway, so that judging it costs no further synchronisation and a bad
input on one rank raises the same error on all of them. On a 2-D mesh (replicas x shards) embeddings travel within a replica only;
labels and status are also exchanged over the replicas, one more small collective each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# torch 2.13 renamed them
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

NO_LABEL = 2**62  # in the place of a smallest or largest label where there is none


class NonFiniteError(ValueError, RuntimeError):
    """A NaN or infinity in the embeddings: a bad value, met while running."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a head: `world` shards, repeated in `replicas` replicas of a 2-D mesh."""

    rank: int = 0
    world: int = 1
    replica: int = 0
    replicas: int = 1
    group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, group: Group) -> Ranks:
        """Of a process group, a 1-D or 2-D (replicate, shard) mesh, or None: all ranks if there is a group, else this process."""
        if group is None:
            if not dist.is_initialized():
                return cls()
            group = dist.group.WORLD
        if isinstance(group, DeviceMesh):
            if group.ndim not in (1, 2):
                raise ValueError(f"group is a {group.ndim}-D mesh; a head takes a 1-D (shard) or 2-D (replicate, shard) one")
            shard = group.get_group(group.ndim - 1)
            replicate = group.get_group(0) if group.ndim == 2 else None
            return cls(*_place(shard), *(_place(replicate) if replicate else (0, 1)), shard, replicate, group)
        if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
            raise ValueError(f"group must be a ProcessGroup that holds this rank, a DeviceMesh or None, not {group!r}")
        return cls(*_place(group), group=group)

    @property
    def total(self) -> int:
        """Ranks in all, over which an engine averages the backbone's gradients."""
        return self.world * self.replicas

    def name(self, flat: int) -> str:
        """What an error calls the `flat`-th rank of the mesh (a global rank where there is a group)."""
        if self.mesh is not None:
            return f"rank {int(self.mesh.mesh.flatten()[flat])}"
        return f"rank {flat if self.group is None else dist.get_global_rank(self.group, flat)}"

    def same_as(self, other: Ranks) -> bool:
        return (self.group, self.replica_group) == (other.group, other.replica_group)

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        return self  # immutable, and process groups cannot be copied


def _place(group: dist.ProcessGroup) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`[world, *tensor.shape]`: the tensor of every rank of `group`; of this process alone without a group."""
    tensor = tensor.contiguous()
    if group is None:
        return tensor[None]
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    _all_gather_single(out.view(-1), tensor.view(-1), group=group)
    return out


def all_gather_mesh(tensor: Tensor, ranks: Ranks) -> Tensor:
    """`[replicas * world, *tensor.shape]`, in the order of the mesh."""
    gathered = all_gather(tensor, ranks.group)
    return all_gather(gathered, ranks.replica_group).flatten(0, 1) if ranks.replica_group else gathered


@dataclass(frozen=True)
class Status:
    """What one rank tells all others about its local batch, before anything large is sent."""

    samples: int
    width: int
    dtype: int  # index into DTYPES, -1 for any other
    labels_each: int  # L of labels [N_r, L]; 0 for labels [N_r]
    weights: int  # bit 0: label weights, bit 1: sample weights
    problem: int  # index into PROBLEMS
    first: int  # two numbers for the problem's message
    second: int
    # the two smallest and two largest distinct labels, so that a head can set its own ignore_index aside; NO_LABEL where there is none
    smallest: int = NO_LABEL
    smallest_at: int = 0
    second_smallest: int = NO_LABEL
    second_smallest_at: int = 0
    largest: int = NO_LABEL
    largest_at: int = 0
    second_largest: int = NO_LABEL
    second_largest_at: int = 0
    nonfinite_at: int = -1
    nonfinite_label: int = NO_LABEL
    wants_grad: int = 0  # whether its embeddings take part in backward: if any rank's do, all must

    def extremes(self) -> tuple[tuple[int, int], ...]:
        """(label, flat index) of the smallest and largest labels that there are."""
        pairs = (
            (self.smallest, self.smallest_at),
            (self.second_smallest, self.second_smallest_at),
            (self.largest, self.largest_at),
            (self.second_largest, self.second_largest_at),
        )
        return tuple((label, at) for label, at in pairs if label != NO_LABEL)


PROBLEMS = (
    "",
    "embeddings must be [N, D], but have {first} dimensions",
    "embeddings must be float32, float64, bfloat16 or float16",
    "labels must be an int64 tensor",
    "labels must be [N] or [N, L] with L at least 1, but have {first} dimensions",
    "labels are for {first} samples, embeddings for {second}",
    "labels and embeddings are on different devices",
    "label_weights must have the shape of labels, [N, L]",
    "sample_weights must be [N]",
    "the head is on {head}, embeddings on another device",
)
DEVICE_PROBLEM = len(PROBLEMS) - 1


@dataclass
class GlobalBatch:
    """One batch of all ranks (of this replica), in the order of the ranks: what heads and center losses take.

    embeddings [N, D], connected to this rank's part in backward; labels [N] or [N, L]; label_weights [N, L] or None;
    sample_weights [N] or None; counts: samples of each rank. mesh_labels and mesh_sample_weights cover all replicas.
    """

    embeddings: Tensor
    labels: Tensor
    label_weights: Tensor | None
    sample_weights: Tensor | None
    counts: tuple[int, ...]
    mesh_labels: Tensor
    mesh_sample_weights: Tensor | None
    status: tuple[Status, ...] = field(repr=False)
    ranks: Ranks = field(repr=False)

    @property
    def local(self) -> slice:
        """Where this rank's samples are."""
        start = sum(self.counts[: self.ranks.rank])
        return slice(start, start + self.counts[self.ranks.rank])


def as_matrix(labels: Tensor) -> Tensor:
    """Labels `[N]` or `[N, L]` as `[N, L]`."""
    return labels if labels.ndim == 2 else labels[:, None]


def gather(
    embeddings: Tensor,
    labels: Tensor,
    *,
    label_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    group: Group = None,
) -> GlobalBatch:
    """Gather this rank's embeddings [N_local, D] and labels [N_local] from all ranks, once for any number of heads.

    Every rank of the group must call it; N_local may differ between ranks and be 0. Labels may be `[N_local, L]` with label_weights of
    that shape (soft or several labels); sample_weights `[N_local]` weigh samples in a mean. In backward the gradients of all heads are
    summed and reduce-scattered once.

    Raises ValueError, the same on every rank, if shapes, dtypes, widths or devices are wrong on any of them.
    """
    ranks = Ranks.of(group)
    batch = exchange(embeddings, labels, label_weights, sample_weights, ranks, inspect=True)
    batch.embeddings = _Gathered.apply(joining(embeddings, batch.status), batch.embeddings, ranks, batch.counts)
    return batch


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

    `inspect`: look for extreme labels and non-finite embeddings. `device`: where the caller's weights are.
    """
    wants_grad = embeddings.requires_grad and torch.is_grad_enabled()
    embeddings = embeddings.detach()
    labels = labels.detach() if isinstance(labels, Tensor) else torch.empty(0)  # not int64: a problem that all ranks hear of
    mine = _inspect(embeddings, labels, label_weights, sample_weights, inspect, device)
    mine[-1] = wants_grad
    table = all_gather_mesh(mine.to(device or embeddings.device), ranks).tolist()
    status = tuple(Status(*row) for row in table)
    _agree(status, ranks, device)
    counts = [row.samples for row in status]
    parts = [embeddings, labels]
    if label_weights is not None:
        parts.append(label_weights.detach().double())
    if sample_weights is not None:
        parts.append(sample_weights.detach().double())
    start = ranks.replica * ranks.world
    own = tuple(counts[start : start + ranks.world])
    gathered = _exchange_payload(parts, own, max(counts), ranks.group)
    across = gathered[1:]
    if ranks.replica_group is not None:
        sums = [sum(counts[i * ranks.world : (i + 1) * ranks.world]) for i in range(ranks.replicas)]
        across = _exchange_payload(gathered[1:], tuple(sums), max(sums), ranks.replica_group)
    weights = gathered[2] if label_weights is not None else None
    return GlobalBatch(
        embeddings=gathered[0],
        labels=gathered[1],
        label_weights=weights,
        sample_weights=gathered[-1] if sample_weights is not None else None,
        counts=own,
        mesh_labels=across[0],
        mesh_sample_weights=across[-1] if sample_weights is not None else None,
        status=status,
        ranks=ranks,
    )


def _exchange_payload(parts: list[Tensor], counts: tuple[int, ...], longest: int, group: dist.ProcessGroup | None) -> list[Tensor]:
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
    everyone = all_gather(buffer, group)
    out = []
    for part, offset in zip(parts, offsets, strict=True):
        row = part[:0].new_empty(1, *part.shape[1:]).nbytes
        rows = [everyone[r, offset : offset + n * row] for r, n in enumerate(counts)]
        out.append(torch.cat(rows).view(part.dtype).view(sum(counts), *part.shape[1:]))
    return out


def _inspect(
    embeddings: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    sample_weights: Tensor | None,
    inspect: bool,
    device: torch.device | None,
) -> Tensor:
    """This rank's `Status` as an int64 tensor; never raises, because the others are waiting for it."""
    samples = embeddings.shape[0] if embeddings.ndim else 0
    problem, first, second = 0, 0, 0
    if embeddings.ndim != 2:
        problem, first = 1, embeddings.ndim
    elif embeddings.dtype not in DTYPES:
        problem = 2
    elif labels.dtype != torch.int64:
        problem = 3
    elif labels.ndim not in (1, 2) or (labels.ndim == 2 and not labels.shape[1]):
        problem, first = 4, labels.ndim
    elif labels.shape[0] != samples:
        problem, first, second = 5, labels.shape[0], samples
    elif labels.device != embeddings.device:
        problem = 6
    elif (labels.ndim == 2) != (label_weights is not None) or (label_weights is not None and label_weights.shape != labels.shape):
        problem = 7
    elif sample_weights is not None and sample_weights.shape != (samples,):
        problem = 8
    elif device is not None and embeddings.device != device:
        problem = DEVICE_PROBLEM
    counts = torch.tensor(
        [
            samples,
            embeddings.shape[1] if embeddings.ndim == 2 else 0,
            DTYPES.index(embeddings.dtype) if embeddings.dtype in DTYPES else -1,
            labels.shape[1] if labels.ndim == 2 else 0,
            (label_weights is not None) + 2 * (sample_weights is not None),
            problem,
            first,
            second,
        ]
    )
    findings = torch.tensor([NO_LABEL, 0] * 4 + [-1, NO_LABEL])
    if inspect and not problem and labels.numel():
        findings = torch.cat((_extremes(labels.reshape(-1)), _nonfinite(embeddings, as_matrix(labels)[:, 0])))
    return torch.cat((counts.to(findings.device), findings, torch.zeros_like(findings[:1])))


def _extremes(labels: Tensor) -> Tensor:
    """Smallest, second smallest, largest and second largest distinct labels of `[n]`, each with its index: int64 `[8]`."""
    out = []
    for find, nobody in ((torch.min, NO_LABEL), (torch.max, -NO_LABEL)):
        value, at = find(labels, 0)
        others = torch.where(labels == value, nobody, labels)
        other, other_at = find(others, 0)
        out += [value, at, torch.where(other == nobody, NO_LABEL, other), other_at]
    return torch.stack(out)


def _nonfinite(embeddings: Tensor, labels: Tensor) -> Tensor:
    """(index of the first row with a NaN or infinity or -1, its label)."""
    bad = ~embeddings.isfinite().all(dim=1)
    any_bad, at = bad.max(0)
    return torch.stack((torch.where(any_bad, at, -1), torch.where(any_bad, labels[at], NO_LABEL)))


AGREED = {
    "width": "embedding width",
    "dtype": "embedding dtype",
    "labels_each": "labels a sample (0: a plain [N])",
    "weights": "weights (1: label weights, 2: sample weights)",
}


def _agree(status: tuple[Status, ...], ranks: Ranks, device: torch.device | None) -> None:
    """Raise the same ValueError on every rank if any of them has a batch that cannot be exchanged."""
    for flat, row in enumerate(status):
        if row.problem:
            message = PROBLEMS[row.problem].format(first=row.first, second=row.second, head=device)
            raise ValueError(f"{ranks.name(flat)}: {message}")
    first = status[0]
    for flat, row in enumerate(status):
        for what, description in AGREED.items():
            mine, theirs = getattr(first, what), getattr(row, what)
            if mine != theirs:
                if what == "dtype":
                    mine, theirs = DTYPES[mine], DTYPES[theirs]
                raise ValueError(
                    f"ranks disagree: {description} {mine} on {ranks.name(0)} and {theirs} on {ranks.name(flat)}; "
                    "every rank must bring the same"
                )


def start_reduce_scatter(grad: Tensor, ranks: Ranks, counts: tuple[int, ...]) -> Callable[[], Tensor]:
    """Begin to sum `grad [N, D]` over the ranks, each keeping its own rows; call the result to wait and get `[N_local, D]`."""
    if ranks.group is None:
        return lambda: grad
    longest = max(counts)
    if min(counts) == longest:
        padded = grad.contiguous()
    else:
        padded = grad.new_zeros(len(counts), longest, grad.shape[1])
        for row, part in zip(padded, grad.split(counts), strict=True):
            row[: len(part)] = part
    out = grad.new_empty(longest, grad.shape[1])
    work = _reduce_scatter_single(out.view(-1), padded.view(-1), group=ranks.group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return out[: counts[ranks.rank]]

    return finish


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
