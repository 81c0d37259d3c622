"""Steps whose gradients are finite and still not those to use, refused on every rank alike.

    eval()     the loss of a sampled head in eval() is trained: gradients reach the weight, no optimizer moves its rows
    scaler     gradients that a GradScaler scaled and nobody unscaled (scalers.py)

What a rank finds is a text of its `StepRecord`. It travels as a flag of the step's check, so that
every rank hears of it in the collective that it takes part in anyway; then the words are exchanged and raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from partial_fc.distributed.texts import gather_texts
from partial_fc.rows import ClassRows


def follow_in_eval(loss: Tensor, rows: ClassRows, moves: bool | None = None) -> Tensor:
    """Return the loss of a forward in eval(), whose backward makes the step one to refuse.

    moves: whether rows move by forwards in train() and not by this one; by default under sampling, and with
    update_in_backward.

    A gradient by the input alone (torch.autograd.grad) is none of that: it does not reach the leaf that is added here.
    """
    if not (loss.requires_grad and (_only_in_training(rows) if moves is None else moves)):
        return loss
    leaf = torch.zeros((), dtype=loss.dtype, device=loss.device, requires_grad=True)
    reached = leaf * 1

    def note(grad: Tensor) -> None:
        rows.record.untrained = (
            f"the loss of a {rows.owner} in eval() was trained (its backward() was called), but classes do not train "
            f"in eval(): call train() of the {rows.owner} before the forward; or, if that backward was not for "
            "training, zero_grad() of its optimizer (or of itself) after it"
        )

    reached.register_hook(note)
    return loss + reached


def _only_in_training(rows: ClassRows) -> bool:
    early = rows.live_optimizer is not None and rows.live_optimizer.update_in_backward
    return (rows.sampled or early) and any(p.requires_grad for p in rows.parameters.values())


def text_of(rows: ClassRows) -> str:
    """Return why this rank would refuse the step."""
    return rows.record.untrained or rows.record.half_unscaled


def raise_refusal(heads: Sequence[ClassRows]) -> None:
    """Raise RuntimeError on every rank, in the words of the first that has some. Two collectives a loss."""
    for rows in heads:
        ranks = rows.shards.ranks
        texts = gather_texts(text_of(rows), ranks, rows.device)
        rows.record.half_unscaled = ""
        text = next((text for text in texts if text), "")
        if text:
            everyone = all(texts)
            flat = next(flat for flat, each in enumerate(texts) if each)
            raise RuntimeError(text if everyone else f"{ranks.name(flat)}: {text}")
    raise RuntimeError("a head on ranks of another group refused this step; the output of those ranks says why")


def refuse_gradients_elsewhere(rows: ClassRows) -> NoReturn:
    """Raise RuntimeError: a parameter itself has a gradient, where its rows move by those that the loss has left."""
    name = next(name for name, parameter in rows.parameters.items() if parameter.grad is not None)
    raise RuntimeError(
        f"{name} of a {rows.owner} has a gradient that did not come from its loss, such as of a penalty on class "
        "weights. Where rows are sampled, or updated in backward, no step takes it: add such a term at sample_rate=1 "
        "without update_in_backward, or to the rows of a step, before step(), as "
        "optimizer.param_groups[0]['params'][0].grad"
    )


def refuse_alone(heads: Sequence[ClassRows]) -> None:
    """Raise RuntimeError where no loss of the step is watched, so that no flags travel."""
    text = next(filter(None, map(text_of, heads)), "")
    if text and not any(rows.record.watches for rows in heads):
        for rows in heads:
            rows.record.half_unscaled = ""
        raise RuntimeError(text)


def refuse_if(heads: Sequence[ClassRows], flags: Tensor | None) -> None:
    """Raise RuntimeError on every rank if the agreed flags, or this rank alone, say that the step is one to refuse."""
    refuse_alone(heads)
    if flags is not None and bool(flags[2]):
        raise_refusal(heads)
