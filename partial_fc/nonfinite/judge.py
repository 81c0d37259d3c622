"""Non-finite numbers: what is found where, who hears of it, and what is left out; the same on every rank.

    forward     embeddings: the exchange's status says it to every host, before anything is computed from them
    backward    the losses of the forwards it came from are kept [N] each, and looked at when the step is judged
    judge       once a step, before an optimizer moves: losses, gradients of the heads' rows, gradients of the backbone
                two flags a rank ride on the norm's collective (clip_grad_norm_) or travel alone (check_gradients, RowOptimizer.step,
                center.step); then the host reads them, once
    verdict     "raise": NonFiniteError, before anything has moved
                "skip": gradients are forgotten, so that optimizers that are stepped nevertheless do nothing; counted; a limit
                a GradScaler's: the forward was finite, the scaled gradient was not; left out by both, not counted, no error

What is bad is named in words (rank, sample, label, class row) by collectives that only a bad step takes part in.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.batch import GlobalBatch, NonFiniteError, Ranks, as_matrix, tell
from partial_fc.distributed.missing import naming_the_missing
from partial_fc.rows import ShardedRows
from partial_fc.shards import local_part

log = logging.getLogger("partial_fc")

DEFAULT_MAX_SKIPS = 20
BLOCK_BYTES = 8 << 20
MOST = 64  # backwards of a step whose losses are kept apart
SEPARATOR = "\x1f"  # between the findings of one rank


@dataclass
class _Backward:
    """A forward whose backward has run in this step: losses [N] of the replica's batch, or the reduced loss; d objective / d loss."""

    losses: Tensor
    grad: Tensor
    batch: GlobalBatch


class StepRecord:
    """What one head or center loss knows of the step that is being made, or that was made last.

    A step is the backwards since gradients were last cleared, stepped with or judged; a bad forward whose backward never runs is left
    out alone. skips: steps left out in all; in_a_row: without a good one in between; last: why, in words.
    """

    def __init__(self, max_skips: int | None) -> None:
        self.max_skips = max_skips
        self.skips, self.in_a_row, self.last = 0, 0, ""
        self.bad_forward = False  # the last training forward
        self.bad_step = False  # a forward whose backward has run, or what was judged
        self.over = True  # whether the next forward or backward begins a new step
        self.judged = True  # whether all there is was looked at
        self.counted = False  # the bad step is in `skips`
        self.looked = False  # any step was judged yet
        self.backwards: list[_Backward] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "backwards": []}  # a copy's gradients are others, and groups cannot be copied

    @property
    def skipped(self) -> bool:
        return self.bad_forward or self.bad_step

    def begin(self, over: bool) -> bool:
        """A training forward begins; whether it follows a step that was left out. over: there are no gradients that it could add to."""
        over = over or self.over
        left_out = over and self.bad_step
        if over and not self.skipped:
            self.in_a_row = 0
        if over:
            self._anew()
        self.bad_forward = False
        self.counted = self.counted and self.bad_step
        return left_out

    def _anew(self) -> None:
        self.bad_step, self.over, self.backwards = False, False, []

    def note(self, losses: Tensor, batch: GlobalBatch) -> Callable[[Tensor], None]:
        """A hook of the loss: its backward makes the forward a part of the step."""

        named = replace(batch, embeddings=batch.embeddings.new_empty(0))  # labels and places alone outlive the backward

        def backward(grad: Tensor) -> None:
            self._part()
            if len(self.backwards) == MOST:  # of so many the first is not told apart any more
                first, second = self.backwards[0], self.backwards.pop(1)
                first.losses, first.grad = first.losses.sum() + second.losses.sum(), first.grad.sum() + second.grad.sum()
            self.backwards.append(_Backward(losses, grad, named))

        return backward

    def note_bad(self) -> Callable[[Tensor], None]:
        """The same of a forward that is left out."""

        def backward(grad: Tensor) -> None:
            self._part()
            self.bad_step = True

        return backward

    def _part(self) -> None:
        if self.over:  # gradients were cleared between forward and backward
            self._anew()
        self.judged = False

    def end(self) -> None:
        """Gradients were cleared or used."""
        self.over = True

    def leave_out(self, why: str) -> None:
        """Count the step as skipped, once. NonFiniteError if there were too many in a row."""
        self.last = why
        if self.counted:
            return
        self.counted = True
        self.skips, self.in_a_row = self.skips + 1, self.in_a_row + 1
        if self.max_skips is not None and self.in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row were not finite, and max_skips is {self.max_skips}; the last: {why}. "
                "Lower the learning rate, or go on from a checkpoint before"
            )

    def conclude(self) -> None:
        self.judged, self.over, self.looked, self.backwards = True, True, True, []


class Watched(Protocol):
    """A `PartialFC` or `CenterLoss`."""

    on_nonfinite: Any
    _record: StepRecord
    _rows: ShardedRows

    @property
    def skipped(self) -> bool: ...

    @property
    def _watches(self) -> bool: ...


def local_flags(heads: Sequence[Watched], bad_gradient: Iterable[Tensor]) -> Tensor:
    """float64 `[2]` on the heads' device: whether a gradient, and whether a loss, is not finite as far as this rank knows.

    bad_gradient: 0-d bools. Waits for no device.
    """
    device = rows_device(heads[0])
    losses = [backward.losses.detach().sum() for head in heads for backward in head._record.backwards]
    flags = []
    for found in (list(bad_gradient), [~loss.isfinite() for loss in losses]):
        flags.append(torch.stack([each.to(device) for each in found]).any() if found else torch.zeros((), dtype=torch.bool, device=device))
    return torch.stack(flags).double()


def rows_device(head: Watched) -> torch.device:
    return local_part(next(iter(head._rows.parameters.values()))).device


def not_finite(tensor: Tensor) -> Tensor:
    """0-d bool: whether anything in it is a NaN or infinity, or its sum overflows. One pass without a temporary."""
    tensor = local_part(tensor.detach())
    if tensor.dtype in (torch.float16, torch.bfloat16) and tensor.numel():  # a sum in float32 would make a float32 copy on a CPU
        return ~torch.stack(torch.aminmax(tensor)).isfinite().all()
    return ~tensor.sum().isfinite()


def over_ranks(flags: Tensor, ranks: Ranks) -> Tensor:
    """The largest of every flag over all ranks: one small collective, two on a 2-D mesh."""
    for group in (ranks.group, ranks.replica_group):
        if group is not None:
            with naming_the_missing("the agreement on a step", group):
                dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return flags


def judge(heads: Sequence[Watched], parameters: Sequence[Tensor], scaler: Any = None) -> bool:
    """Look at losses and gradients, agree, and decide: whether the step may be taken. parameters: of the backbone."""
    grads = [p.grad for p in parameters if p.grad is not None]
    grads += [p.grad for head in heads for p in (*head._rows.carriers, *head._rows.shared.values()) if p.grad is not None]
    return decide(heads, over_all(local_flags(heads, [not_finite(grad) for grad in grads]), heads), parameters, scaler)


def over_all(flags: Tensor, heads: Sequence[Watched]) -> Tensor:
    """`over_ranks` over the ranks of all heads, which are the same as a rule."""
    seen: list[Ranks] = []
    for head in heads:
        ranks = head._rows.shards.ranks
        if not any(ranks.same_as(other) for other in seen):
            seen.append(ranks)
            flags = over_ranks(flags, ranks)
    return flags


def decide(heads: Sequence[Watched], flags: Tensor, parameters: Sequence[Tensor], scaler: Any = None) -> bool:
    """What is done about agreed `flags` (gradient, loss): whether the step may be taken. One wait for the device.

    Raises NonFiniteError, on every rank alike, if a head wants that, or if too many steps in a row were left out.
    """
    of_gradient, of_loss = (value != 0 for value in flags.tolist())
    found = any(head.skipped for head in heads)  # the exchange has found it, or an earlier look at this step
    watching = [head for head in heads if head._watches]
    if not (found or of_gradient or of_loss):
        for head in heads:
            head._record.conclude()
        return True
    why = next((head._record.last for head in heads if head.skipped and head._record.last), "")
    scalers = scalers_at_work(scaler, heads)
    by_scale = not of_loss and (not why if found else bool(scalers))
    if not by_scale and not why:
        why = explain(heads, parameters)
    for head in heads:
        head._record.conclude()
        head._record.bad_step, head._record.last = True, why
    if not by_scale:
        if any(head.on_nonfinite == "raise" for head in watching):
            raise NonFiniteError(why)
        if not found:
            log.warning("%s; the step is skipped", why)
        for head in heads:
            head._record.leave_out(why)
    if scalers:
        for each in scalers:
            _tell_scaler(each)
    else:
        forget(heads, parameters)
    return False


def forget(heads: Sequence[Watched], parameters: Sequence[Tensor]) -> None:
    """No gradients: an optimizer's step then changes neither weights nor state."""
    for parameter in parameters:
        parameter.grad = None
    for head in heads:
        head._rows.clear()


# ---------------------------------------------------------------------------------------------------- scalers


def scalers_at_work(scaler: Any, heads: Sequence[Watched]) -> list[Any]:
    """The GradScalers between unscale_() and update(): the given one, or those that there are.

    Nothing tells a gradient that it was scaled, so the process's objects are searched, which a bad step alone has to wait for.
    """
    if scaler is not None:
        return [scaler] if scaler.is_enabled() else []
    kind = torch.amp.GradScaler
    # type() and not isinstance(), which would ask lazy modules and proxies for their class
    found = [each for each in gc.get_objects() if issubclass(type(each), kind)]
    return [each for each in found if each.is_enabled() and len(each._per_optimizer_states)]


def _tell_scaler(scaler: Any) -> None:
    """All optimizers that were unscaled find an infinity, so that they skip together."""
    for state in scaler._per_optimizer_states.values():
        for found in state["found_inf_per_device"].values():
            local_part(found).fill_(1.0)


# ---------------------------------------------------------------------------------------------------- in words


def explain(heads: Sequence[Watched], parameters: Sequence[Tensor]) -> str:
    """What is not finite, the same text on every rank: of each kind the first that a rank found. Two collectives a head."""
    said: list[str] = []
    for i, head in enumerate(heads):
        ranks = head._rows.shards.ranks
        mine = [_bad_weight(head), _bad_loss(head), _bad_row(head), _bad_parameter(parameters) if i == 0 else ""]
        table = [text.split(SEPARATOR) for text in tell(SEPARATOR.join(mine), ranks, rows_device(head))]
        for kind in range(len(mine)):
            flat = next((flat for flat, texts in enumerate(table) if texts[kind]), None)
            if flat is not None:
                said.append(f"{ranks.name(flat)}: {table[flat][kind]}")
    return "; ".join(said) or "the norm of the gradient overflows"


def _bad_weight(head: Watched) -> str:
    named = ((name, local_part(p.detach())) for name, p in head._rows.parameters.items())
    return _first_row(named, head._rows.shards.lo, None, "{name} of class {row} holds a NaN or infinity")


def _bad_row(head: Watched) -> str:
    rows = head._rows
    named = [(n, local_part(c.grad)) for n, c in zip(rows.parameters, rows.carriers, strict=False) if c.grad is not None]
    text = _first_row(named, rows.shards.lo, rows.rows if rows.sampled else None, "the gradient of {name} of class {row} is not finite")
    shared = [name for name, p in rows.shared.items() if p.grad is not None and bool(not_finite(p.grad))]
    return text or (f"the gradient of {shared[0]} is not finite" if shared else "")


def _first_row(named: Iterable[tuple[str, Tensor]], lo: int, ids: Tensor | None, text: str) -> str:
    for name, tensor in named:
        for start, block in _blocks(tensor):
            bad = (~block.reshape(len(block), -1).isfinite().all(1)).nonzero()
            if len(bad):
                row = start + int(bad[0])
                return text.format(name=name, row=lo + (row if ids is None else int(ids[row])))
    return ""


def _bad_loss(head: Watched) -> str:
    """Said by the rank whose sample it is."""
    for backward in head._record.backwards:
        losses, batch = backward.losses.detach(), backward.batch
        if losses.ndim and len(losses) == len(batch.labels):
            losses = losses[batch.local]
            bad = (~losses.isfinite()).nonzero()
            if len(bad):
                at = int(bad[0])
                labels = as_matrix(batch.labels)[batch.local][at].tolist()
                return f"the loss of embeddings[{at}] (label {', '.join(map(str, labels))}) is {losses[at].item()}"
        elif not bool(losses.isfinite().all()):
            return "the loss is not finite"
    if any(bool(not_finite(backward.grad)) for backward in head._record.backwards):
        return "what the loss is multiplied with is not finite"
    return ""


def _bad_parameter(parameters: Sequence[Tensor]) -> str:
    for i, parameter in enumerate(parameters):
        if parameter.grad is not None and bool(not_finite(parameter.grad)):
            return f"the gradient of parameter {i} {list(parameter.shape)} of those given is not finite"
    return ""


def _blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    size = max(1, BLOCK_BYTES // max(1, tensor[:1].nbytes)) if len(tensor) else 1
    for start in range(0, len(tensor), size):
        yield start, tensor[start : start + size]


# ---------------------------------------------------------------------------------------------------- the public function


def check_gradients(parameters: Iterable[Tensor] | Tensor, *heads: Watched, scaler: Any = None) -> bool:
    """Whether the step may be taken, on every rank alike: no loss of `heads` and no gradient is a NaN or infinity on any rank.

    For loops that do not clip, between backward and the optimizers; `clip_grad_norm_` says the same by its norm. If the answer is no,
    `head.skipped` is True of all `heads`, gradients of all that is given are forgotten, and optimizers that are stepped nevertheless do
    nothing.

    Args:
        parameters: of the backbone; any that belong to `heads` are left out.
        heads: every `PartialFC` and `CenterLoss` of the step.
        scaler: the GradScaler, if there is one, after its unscale_() of every optimizer: a gradient that is not finite though the loss is
            makes all its optimizers skip, is not counted and no error.

    One pass over the gradients, one small collective (two on a 2-D mesh) and one wait for the device; nothing at all, and True, where
    every head has on_nonfinite="log" or looks no more (validate).

    Raises NonFiniteError, the same on every rank, if a head has on_nonfinite="raise", or after more than `max_skips` skips in a row;
    ValueError without a head.
    """
    if not heads:
        raise ValueError("check_gradients needs the heads of the step, whose ranks agree: check_gradients(parameters, head)")
    if not any(head._watches for head in heads):
        return not any(head.skipped for head in heads)
    return judge(heads, others(parameters, heads), scaler)


def others(parameters: Iterable[Tensor] | Tensor, heads: Sequence[Watched]) -> list[Tensor]:
    """Those parameters that are of no head."""
    theirs = {id(p) for head in heads for p in head._rows.everything}
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [p for p in given if id(p) not in theirs]
