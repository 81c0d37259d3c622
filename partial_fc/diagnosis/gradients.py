"""Do gradients reach head and backbone, and is the backbone's the gradient that one process with the global batch has?

    .grad after backward()    through the model as the loop wraps it; DDP has averaged it across ranks
    reference                 through the bare model; the shares of all ranks summed (`Trial` computes it)

Both must be equal. If they differ by a factor, gradients are averaged where they should be summed, or the other way
round. If they differ by more, nothing reduces them across ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from partial_fc.diagnosis.checks import RESULTS, Check
from partial_fc.distributed.objects import gather_objects
from partial_fc.distributed.shards import local_part
from partial_fc.head import PartialFC

TOLERANCE, HALF_TOLERANCE = 1e-2, 1e-1  # relative; a mistake changes gradients by a factor


def reach_checks(head: PartialFC, backbone: dict[str, nn.Parameter], backbone_runs: bool) -> list[Check]:
    """Return the checks "head gradient" and "backbone gradient".

    backbone_runs: whether the backbone's forward is part of the loss.
    """
    return [_reaches_head(head), _reaches_backbone(backbone, backbone_runs)]


def _reaches_head(head: PartialFC) -> Check:
    name = "head gradient"
    if head.row_grad is not None:
        grads = [head.row_grad[1]]
    else:
        grads = [local_part(p.grad) for p in head.parameters() if p.grad is not None]
    reached = any(gather_objects(any(bool(g.any()) for g in grads), RESULTS))
    if not any(p.requires_grad for p in head.parameters()):
        return Check(name, True, "the head is frozen")
    if reached:
        return Check(name, True, "gradients reach the head's rows")
    mend = "the loss on which backward() is called must contain head(embeddings, labels)"
    return Check(name, False, "no gradient reaches the head's rows", mend)


def _reaches_backbone(backbone: dict[str, nn.Parameter], runs: bool) -> Check:
    name = "backbone gradient"
    if not backbone:
        return Check(name, True, "the backbone has no trainable parameters")
    if not runs:
        return Check(name, None, "not checked: give batch=(inputs, labels) or input_shape=")
    without = [n for n, p in backbone.items() if p.grad is None or not bool(local_part(p.grad).any())]
    if len(without) == len(backbone):
        mend = "the model must return embeddings with their graph: no detach(), no_grad() or inference mode"
        return Check(name, False, "no gradient reaches the backbone's parameters", mend)
    left = f", except {len(without)} of {len(backbone)}: {', '.join(without[:3])}" if without else ""
    return Check(name, True, f"gradients reach the backbone's parameters{left}")


def scale_check(backbone: dict[str, nn.Parameter], reference: list[Tensor], half_precision: bool, world: int) -> Check:
    """Return the check "gradient scale": each parameter's `.grad` against its reference gradient (float64).

    half_precision: whether parameters or embeddings are in half precision. world: ranks that gradients are averaged
    over.
    """
    name = "gradient scale"
    grads = [
        torch.zeros_like(r) if p.grad is None else p.grad.double()
        for p, r in zip(backbone.values(), reference, strict=True)
    ]
    square = sum(float(r.square().sum()) for r in reference)
    if not square:
        return Check(name, None, "not checked: the gradient is zero")
    # the factor by which the reference comes nearest to the gradient, and the distances without and with that factor
    ratio = sum(float((g * r).sum()) for g, r in zip(grads, reference, strict=True)) / square
    error = _distance(grads, reference, 1.0) / square**0.5
    error_when_scaled = _distance(grads, reference, ratio) / square**0.5
    all_ranks = gather_objects((ratio, error, error_when_scaled), RESULTS)
    tolerance = HALF_TOLERANCE if half_precision else TOLERANCE
    if all(e <= tolerance for _, e, _ in all_ranks):
        largest = max(e for _, e, _ in all_ranks)
        words = (
            f"the backbone's gradient equals that of one process with the global batch, to {max(largest, 1e-16):.0e}"
        )
        return Check(name, True, words)
    if any(e > tolerance * max(1.0, abs(r)) for r, _, e in all_ranks):
        words = f"the backbone's gradient has a relative error of {error:.2g}"
        if world > 1:
            words = "the backbone's gradients differ between ranks: nothing averages them"
        return Check(name, False, words, "wrap the backbone in DistributedDataParallel (or accelerator.prepare it)")
    words = f"the backbone's gradient is {ratio:.4g} times that of one process with the global batch"
    if ratio > 1:
        mend = "gradients are summed across ranks, not averaged: build the head with scale_embedding_grad=False"
    else:
        mend = (
            f"gradients are averaged across ranks, so the head must scale them by {world}: "
            "build it with scale_embedding_grad=True"
        )
    return Check(name, False, words, mend)


def _distance(grads: list[Tensor], reference: list[Tensor], factor: float) -> float:
    squares = (float((g - factor * r).square().sum()) for g, r in zip(grads, reference, strict=True))
    return sum(squares) ** 0.5
