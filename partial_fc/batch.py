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

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from partial_fc.distributed.missing import introduce, naming_the_missing

Group = dist.ProcessGroup | DeviceMesh | None
GatherValidate = Literal["always", "never"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# torch 2.13 renamed them
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# what a `RankMissing` calls them
STATUS, PAYLOAD = "the exchange of counts and status of a batch", "the exchange of embeddings and labels"
IN_BACKWARD = "the sum of the embeddings' gradients in backward"

NO_LABEL = 2**62  # in the place of a smallest or largest label where there is none
SUM_TOLERANCE = 1e-3  # how far from 1 the weights of a sample's labels may add up to


class NonFiniteError(ValueError, RuntimeError):
    """A NaN or infinity in embeddings, losses or gradients: a bad value, met while running."""


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
        introduce()
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


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None, what: str = "an exchange") -> Tensor:
    """`[world, *tensor.shape]`: the tensor of every rank of `group`; of this process alone without a group. what: in a `RankMissing`."""
    tensor = tensor.contiguous()
    if group is None:
        return tensor[None]
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    with naming_the_missing(what, group):
        _all_gather_single(out.view(-1), tensor.view(-1), group=group)
    return out


def all_gather_mesh(tensor: Tensor, ranks: Ranks, what: str = "an exchange") -> Tensor:
    """`[replicas * world, *tensor.shape]`, in the order of the mesh."""
    gathered = all_gather(tensor, ranks.group, what)
    return all_gather(gathered, ranks.replica_group, what).flatten(0, 1) if ranks.replica_group else gathered


@dataclass(frozen=True)
class Status:
    """What one rank tells all others about its local batch and one label set of it, before anything large is sent."""

    samples: int
    width: int
    dtype: int  # index into DTYPES
    labels_each: int  # L of labels [N_r, L]; 0 for labels [N_r]
    weights: int  # bit 0: label weights, bit 1: sample weights
    wants_grad: int  # whether its embeddings take part in backward: if any rank's do, all must
    names: int  # digest of the names of all label sets; 0 for labels without a name
    problem: int  # whether it has a batch that cannot be exchanged; then nothing else here counts
    # the two smallest and two largest distinct labels, so that a head can set its own ignore_index aside; NO_LABEL where there is none
    smallest: int
    smallest_at: int
    second_smallest: int
    second_smallest_at: int
    largest: int
    largest_at: int
    second_largest: int
    second_largest_at: int
    nonfinite_at: int
    nonfinite_label: int
    bad_weight: int  # NO_WEIGHT, LABEL_WEIGHT, LABEL_SUM or SAMPLE_WEIGHT: what the next two are about
    bad_weight_at: int  # flat index
    bad_weight_bits: int  # of its value, a float64

    def extremes(self) -> tuple[tuple[int, int], ...]:
        """(label, flat index) of the smallest and largest labels that there are."""
        pairs = (
            (self.smallest, self.smallest_at),
            (self.second_smallest, self.second_smallest_at),
            (self.largest, self.largest_at),
            (self.second_largest, self.second_largest_at),
        )
        return tuple((label, at) for label, at in pairs if label != NO_LABEL)


NO_WEIGHT, LABEL_WEIGHT, LABEL_SUM, SAMPLE_WEIGHT = range(4)
NO_COUNTS = [0] * 7  # what stands before `problem`
NO_FINDINGS = [NO_LABEL, 0] * 4 + [-1, NO_LABEL] + [NO_WEIGHT, 0, 0]


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


def as_matrix(labels: Tensor) -> Tensor:
    """Labels `[N]` or `[N, L]` as `[N, L]`."""
    return labels if labels.ndim == 2 else labels[:, None]


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
        raise ValueError(f'validate of gather must be "always" or "never", not {validate!r}; for the first batch alone say it there')
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
    return _exchange(embeddings, [_LabelSet(None, labels, label_weights, sample_weights)], "", ranks, inspect=inspect, device=device)[0]


@dataclass(frozen=True)
class _LabelSet:
    """What one rank brings for one head, as its caller gave it: anything at all until `_problem_of` has looked at it."""

    name: str | None
    labels: Any
    label_weights: Any = None
    sample_weights: Any = None

    def tensors(self) -> list[Tensor]:
        """What of it travels."""
        weights = (self.label_weights, self.sample_weights)
        return [self.labels.detach(), *(w.detach().double() for w in weights if w is not None)]

    def take(self, tensors: Iterator[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Labels, label weights and sample weights, from what has travelled in the order of `tensors`."""
        labels = next(tensors)
        label_weights = None if self.label_weights is None else next(tensors)
        return labels, label_weights, None if self.sample_weights is None else next(tensors)


def _of_set(name: str | None) -> str:
    return "" if name is None else f", {name!r}"


def _label_sets(labels: Any, label_weights: Any, sample_weights: Any) -> tuple[list[_LabelSet], str]:
    """(label sets, sorted by name; what is wrong with the names or "")."""
    weights = {"label_weights": label_weights, "sample_weights": sample_weights}
    named = {what: given for what, given in weights.items() if isinstance(given, Mapping)}
    if not isinstance(labels, Mapping):
        problem = f": {next(iter(named))} are a dict, but labels are not" if named else ""
        return [_LabelSet(None, labels, label_weights, sample_weights)], problem
    if not labels:
        return [], ": labels are an empty dict; it needs a name and labels for each head"
    for name in labels:
        if not isinstance(name, str):
            return [], f": the names of labels must be strings, not {name!r}"
    if label_weights is not None and "label_weights" not in named:
        return [], ": labels are a dict, so label_weights must be one too, with the names that have weights"
    for what, given in named.items():
        for name in given:
            if name not in labels:
                return [], f": {what} are given for {name!r}, labels for {_listed(labels)} only"
    of_labels = label_weights or {}
    of_samples = named.get("sample_weights", dict.fromkeys(labels, sample_weights))
    return [_LabelSet(name, labels[name], of_labels.get(name), of_samples.get(name)) for name in sorted(labels)], ""


def _listed(names: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


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
        embeddings = torch.empty(0, 0, device=device or next((s.labels.device for s in sets if isinstance(s.labels, Tensor)), None))
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


def tell(text: str, ranks: Ranks, device: torch.device) -> list[str]:
    """Every rank's text; two more collectives, on the way to an error."""
    mine = torch.tensor(list(text.encode(errors="replace")), dtype=torch.uint8, device=device)
    lengths = all_gather_mesh(torch.tensor([len(mine)], device=device), ranks).flatten().tolist()
    padded = mine.new_zeros(max(lengths))
    padded[: len(mine)] = mine
    rows = all_gather_mesh(padded, ranks).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


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
    everyone = all_gather(buffer, group, PAYLOAD)
    out = []
    for part, offset in zip(parts, offsets, strict=True):
        row = part[:0].new_empty(1, *part.shape[1:]).nbytes
        rows = [everyone[r, offset : offset + n * row] for r, n in enumerate(counts)]
        out.append(torch.cat(rows).view(part.dtype).view(sum(counts), *part.shape[1:]))
    return out


def _problem_of(embeddings: Tensor, given: _LabelSet, device: torch.device | None) -> str:
    """What is wrong with the types and shapes of a label set or its embeddings, as it is told after the rank's name; "" if nothing is."""
    problem = _embeddings_problem(embeddings)
    if problem:
        return f": {problem}"
    problem = _labels_problem(embeddings, given.labels) or _weights_problem(embeddings, given)
    if problem:
        return f"{_of_set(given.name)}: {problem}"
    if device is not None and embeddings.device != device:
        return f": the head is on {device}, embeddings on {embeddings.device}"
    return ""


def _embeddings_problem(embeddings: Tensor) -> str:
    if embeddings.ndim != 2:
        return f"embeddings must be [N, D], but have {embeddings.ndim} dimensions"
    return "" if embeddings.dtype in DTYPES else f"embeddings must be float32, float64, bfloat16 or float16, not {embeddings.dtype}"


def _labels_problem(embeddings: Tensor, labels: Any) -> str:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        return f"labels must be an int64 tensor, not {labels.dtype if isinstance(labels, Tensor) else type(labels).__name__}"
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and not labels.shape[1]):
        return f"labels must be [N] or [N, L] with L at least 1, but are {list(labels.shape)}"
    if len(labels) != len(embeddings):
        return f"labels are for {len(labels)} samples, embeddings for {len(embeddings)}"
    return "" if labels.device == embeddings.device else f"labels are on {labels.device}, embeddings on {embeddings.device}"


def _weights_problem(embeddings: Tensor, given: _LabelSet) -> str:
    labels, label_weights, sample_weights = given.labels, given.label_weights, given.sample_weights
    for what, weights in (("label_weights", label_weights), ("sample_weights", sample_weights)):
        if weights is not None and not isinstance(weights, Tensor):
            return f"{what} must be a tensor, not {type(weights).__name__}"
        if weights is not None and weights.device != embeddings.device:
            return f"{what} are on {weights.device}, embeddings on {embeddings.device}"
    if labels.ndim == 1 and label_weights is not None:
        return "labels are [N], one a sample, which takes no label_weights; those go with labels [N, L] and have their shape"
    if labels.ndim == 2 and label_weights is None:
        each = labels.shape[1]
        if each == 1:
            return "labels are [N, 1]; squeeze them, or give gather label_weights [N, L] for several labels a sample"
        return f"labels are [N, {each}], {each} a sample; give gather label_weights [N, {each}], or bring one label a sample, [N]"
    if label_weights is not None and label_weights.shape != labels.shape:
        return f"label_weights must have the shape of labels, {list(labels.shape)}, but are {list(label_weights.shape)}"
    if sample_weights is not None and sample_weights.shape != (len(embeddings),):
        return f"sample_weights must be [N], here [{len(embeddings)}], but are {list(sample_weights.shape)}"
    return ""


def _inspect(embeddings: Tensor, sets: list[_LabelSet], problem: str, wants_grad: bool, inspect: bool) -> Tensor:
    """`[sets, numbers]` int64: this rank's `Status` of each label set, or of none in particular if there is a problem.

    Never raises, because the others are waiting for it, and waits for no device.
    """
    if problem:
        return torch.tensor([[*NO_COUNTS, 1, *NO_FINDINGS]])
    samples, width = embeddings.shape
    names = _digest([each.name for each in sets if each.name is not None])
    counts = []
    for each in sets:
        labels_each = each.labels.shape[1] if each.labels.ndim == 2 else 0
        weights = (each.label_weights is not None) + 2 * (each.sample_weights is not None)
        counts.append([samples, width, DTYPES.index(embeddings.dtype), labels_each, weights, int(wants_grad), names, 0])
    if not inspect or not samples:
        return torch.tensor([row + NO_FINDINGS for row in counts])
    bad = (embeddings * 0).sum(1) != 0  # NaN where anything is not finite; a tenth of the time of isfinite().all(1)
    found = [torch.cat((_extremes(s.labels.reshape(-1)), _nonfinite(bad, as_matrix(s.labels)[:, 0]), _bad_weight(s))) for s in sets]
    return torch.cat((torch.tensor(counts).to(embeddings.device), torch.stack(found)), 1)


def _digest(names: list[str]) -> int:
    """A number from 1 to 2**56 for the names; 0 if there are none."""
    return 1 + int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=7).digest(), "big") if names else 0


def _extremes(labels: Tensor) -> Tensor:
    """Smallest, second smallest, largest and second largest distinct labels of `[n]`, each with its index: int64 `[8]`."""
    out = []
    for find, nobody in ((torch.min, NO_LABEL), (torch.max, -NO_LABEL)):
        value, at = find(labels, 0)
        others = torch.where(labels == value, nobody, labels)
        other, other_at = find(others, 0)
        out += [value, at, torch.where(other == nobody, NO_LABEL, other), other_at]
    return torch.stack(out)


def _nonfinite(bad: Tensor, labels: Tensor) -> Tensor:
    """(index of the first of the rows `bad [n]` or -1, its label). `take`, because `labels[at]` would wait for `at` on the host."""
    any_bad, at = bad.max(0)
    return torch.stack((torch.where(any_bad, at, -1), torch.where(any_bad, labels.take(at), NO_LABEL)))


def _bad_weight(given: _LabelSet) -> Tensor:
    """(kind, flat index, bits of the value) of the first weight or sum of weights that is not allowed: int64 `[3]`.

    Labels below 0 can only be somebody's ignore_index, so a sample that has no others is of no class and its weights need not add up.
    """
    found = given.labels.new_zeros(3)  # NO_WEIGHT
    if given.sample_weights is not None:
        values = given.sample_weights.detach().double()
        found = _first_bad(SAMPLE_WEIGHT, ~_is_weight(values), values, found)
    if given.label_weights is not None:
        values = given.label_weights.detach().double()
        sums = values.sum(1)
        off = ((sums - 1).abs() > _tolerance(given.label_weights.dtype)) & (given.labels >= 0).any(1)
        found = _first_bad(LABEL_SUM, off, sums, found)
        found = _first_bad(LABEL_WEIGHT, ~_is_weight(values).reshape(-1), values.reshape(-1), found)
    return found


def _first_bad(kind: int, bad: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """(kind, index, bits of the value) of the first of `values [n]` that is bad, if any is."""
    any_bad, at = bad.max(0)
    return torch.where(any_bad, torch.stack((any_bad * kind, at, values.take(at).view(torch.int64))), otherwise)


def _is_weight(values: Tensor) -> Tensor:
    return values.isfinite() & (values >= 0)


def _tolerance(dtype: torch.dtype) -> float:
    """Weights in half precision are rounded by more than SUM_TOLERANCE."""
    return max(SUM_TOLERANCE, torch.finfo(dtype).eps) if dtype.is_floating_point else SUM_TOLERANCE


EMBEDDINGS_AGREED = {"width": "embedding width", "dtype": "embedding dtype"}
LABELS_AGREED = {
    "labels_each": "labels a sample (0: a plain [N])",
    "weights": "weights (1: label weights, 2: sample weights)",
}


def _agree(status: tuple[Status, ...], agreed: dict[str, str], ranks: Ranks, name: str | None) -> None:
    """Raise the same ValueError on every rank if ranks differ in what must be the same."""
    first = status[0]
    for flat, row in enumerate(status):
        for what, description in agreed.items():
            mine, theirs = getattr(first, what), getattr(row, what)
            if mine != theirs:
                if what == "dtype":
                    mine, theirs = DTYPES[mine], DTYPES[theirs]
                raise ValueError(
                    f"ranks disagree{_of_set(name)}: {description} {mine} on {ranks.name(0)} and {theirs} on {ranks.name(flat)}; "
                    "every rank must bring the same"
                )


def _judge_weights(status: tuple[Status, ...], ranks: Ranks, name: str | None) -> None:
    """Raise the same ValueError on every rank about the first bad weight that a rank has found."""
    for flat, row in enumerate(status):
        if row.bad_weight == NO_WEIGHT:
            continue
        at, (value,) = row.bad_weight_at, struct.unpack("d", struct.pack("q", row.bad_weight_bits))
        rule = "the weights of a sample's labels are a distribution: each at least 0, together 1"
        if row.bad_weight == LABEL_WEIGHT:
            found = f"label_weights[{at // row.labels_each}, {at % row.labels_each}] is {value:.6g}"
        elif row.bad_weight == LABEL_SUM:
            found = f"label_weights[{at}] sums to {value:.6g}"
        else:
            found, rule = f"sample_weights[{at}] is {value:.6g}", "the weight of a sample is finite and at least 0"
        raise ValueError(f"{ranks.name(flat)}{_of_set(name)}: {found}; {rule}")


def on_each_loss(grad: Tensor, batch: GlobalBatch, sample_weights: Tensor, reduction: str) -> Tensor:
    """`[N]`: d objective / d loss_i, from the gradient of the reduced loss. sample_weights `[N]`: what each loss counts for in it."""
    if reduction != "none":
        return grad * sample_weights
    # each rank's scalar counts as averaged over the ranks, and each rank knows the gradient of its own samples only
    padded = grad.new_zeros(max(batch.counts))
    padded[: len(grad)] = grad
    everyone = all_gather(padded, batch.ranks.group)
    return torch.cat([row[:n] for row, n in zip(everyone, batch.counts, strict=True)]) * sample_weights / batch.ranks.total


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
    with naming_the_missing(IN_BACKWARD, ranks.group):
        work = _reduce_scatter_single(out.view(-1), padded.view(-1), group=ranks.group, async_op=True)

    def finish() -> Tensor:
        with naming_the_missing(IN_BACKWARD, ranks.group):
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
