"""Values per class other than rows, when classes change: class weights, and margins with a value per class."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.classes.interface import Change
from partial_fc.distributed.ranks import local_part
from partial_fc.margins.base import Margin


def checked_class_weights(weights: Tensor | None, num_classes: int, device: torch.device) -> Tensor | None:
    """Return class weights `[C]` on `device`, at least float32. ValueError unless they are finite and at least 0."""
    if weights is None:
        return None
    weights = torch.as_tensor(weights, device="cpu")
    if weights.requires_grad:
        raise ValueError(
            "class_weights require grad, but the loss has no gradient by them: pass class_weights.detach()"
        )
    if weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must have one number for each of {num_classes} classes, not {list(weights.shape)}"
        )
    bad = (~weights.double().isfinite() | (weights < 0)).nonzero()
    if len(bad):
        raise ValueError(
            f"class_weights[{int(bad[0])}] is {weights[int(bad[0])].item()}; a weight must be finite and at least 0"
        )
    return weights.to(device, torch.promote_types(weights.dtype, torch.float32))


def changed_class_weights(old: Tensor | None, change: Change) -> Tensor | None:
    """Return the class weights after a change. ValueError if those of added classes are missing, or not expected."""
    given = change.class_weights
    if old is None:
        if given is not None:
            raise ValueError("class_weights are only for heads that were built with class_weights; this one has none")
        return None
    if not change.added:
        return change.moves.of_all(old).to(old)
    if given is None:
        raise ValueError(f"this head has class_weights: pass class_weights for the {change.added} new classes")
    new = checked_class_weights(given, change.added, old.device)
    assert new is not None
    return torch.cat((old, new.to(old.dtype)))


def changed_margin(margin: Margin, change: Change, drawn: int, device: torch.device) -> Margin:
    """Return the margin after a change. ValueError if a new one is missing or does not fit.

    drawn: the number of classes that a step samples after the change.
    """
    name, number = type(margin).__name__, change.num_classes
    if not margin.by_class:
        if change.margin is not None:
            raise ValueError(
                f"margin is only for margins with one number per class (AdaptiveMargin); this head keeps its {name}"
            )
        trial = margin.frozen()
        trial.prepare(number, drawn)
        for (buffer, before), after in zip(margin.named_buffers(), trial.buffers(), strict=True):
            if before.shape != after.shape:
                raise ValueError(
                    f"{name}.{buffer} changes its shape with the number of classes: {name} must set by_class = True"
                )
        return margin
    if change.margin is None:
        raise ValueError(
            f"{name} has one number per class: pass margin={name}(...) for the {number} classes after the change"
        )
    if type(change.margin) is not type(margin) or change.margin.centers != margin.centers:
        raise ValueError(f"margin must be a {name} with the same number of centers, not {change.margin!r}")
    change.margin.prepare(number, drawn)
    for parameter, value in margin.named_parameters():
        setattr(change.margin, parameter, value)
    return change.margin.to(device).train(margin.training)


def prepare_anew(margin: Margin, num_classes: int, drawn: int) -> None:
    """Prepare a margin for another number of classes, and keep its state."""
    tensors = [local_part(t.detach()) for t in (*margin.buffers(), *margin.parameters())]
    state = [tensor.clone() for tensor in tensors]
    margin.prepare(num_classes, drawn)
    after = [local_part(t.detach()) for t in (*margin.buffers(), *margin.parameters())]
    for tensor, value in zip(after, state, strict=True):
        tensor.copy_(value)


def check_same_structure(before: Margin, after: Margin) -> None:
    """ValueError unless the parameters of a head with the first margin are also those of one with the second."""
    for name in ("normalize", "bias", "centers"):
        mine, theirs = getattr(before, name), getattr(after, name)
        if mine != theirs:
            raise ValueError(
                f"this head was built for {name}={mine}, and {type(after).__name__} has {name}={theirs}: build another "
                "head with this margin, and start it from the class weights (export_weights, import_weights)"
            )
    if (before.binary is None) != (after.binary is None):
        binary = before if before.binary is not None else after
        raise ValueError(
            f"{type(after).__name__} cannot replace {type(before).__name__} in a head that is built: only "
            f"{type(binary).__name__} takes classes for binary decisions, with a parameter of its own; build "
            "another head"
        )
