"""Functions of torch that take a module's parameters one by one, and are told apart here from those that may.

A sampled head has no gradient of its weights that such a function could find, so that it would leave the row gradients
alone without a word; in a group the rows are DTensors, which cannot be mixed with plain tensors. As an engine
(wrapping.py), the function is known by its frame: it walks the modules of what it is given while it runs. Parameters
that were put into a list before are not seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from partial_fc.distributed.callers import callers

CLIP, SWA = "torch.nn.utils.clip_grad", "torch.optim.swa_utils"
VECTORS = "torch.nn.utils.convert_parameters"

Caller = dict[str, Any]  # local variables of the function


def meet_tool(head: Any, prefix: str) -> None:
    """RuntimeError if a function that cannot work with the parameters of `head` asks for them; `prefix` is its name."""
    for frame in callers():
        meet = TOOLS.get((frame.f_globals.get("__name__"), frame.f_code.co_name))
        if meet is not None:
            problem = meet(head, prefix, frame.f_locals)
            if problem:
                raise RuntimeError(problem)
            return


def _moves_in_backward(rows: Any) -> bool:
    return rows.live_optimizer is not None and rows.live_optimizer.update_in_backward


def _gradient_is_elsewhere(head: Any) -> str:
    rows = head.class_rows
    if rows.sampled:
        return "is sampled: its gradients are those of selected rows, which parameters() does not have"
    if _moves_in_backward(rows):
        return "is updated in backward, before its gradient could be clipped"
    return ""


def _clip(head: Any, prefix: str, caller: Caller) -> str:
    owner, why = type(head).__name__, _gradient_is_elsewhere(head)
    mixed = head.class_rows.shards.ranks.group is not None and prefix
    if not why and not mixed:
        return ""
    if _moves_in_backward(head.class_rows):
        return (
            f"the gradients of this {owner} cannot be clipped: it {why}. Clip those of the backbone alone, or build "
            "its RowOptimizer without update_in_backward"
        )
    why = why or "is split over the ranks, and cannot be clipped together with replicated parameters"
    return (
        f"torch.nn.utils cannot clip the gradients of this {owner}: it {why}. Use partial_fc.clip_grad_norm_("
        "backbone.parameters(), head, max_norm=...); by value, clip those of the backbone, and those of the head by "
        'torch.nn.utils.clip_grad_value_(head_optimizer.param_groups[0]["params"], ...)'
    )


def _vector(head: Any, prefix: str, caller: Caller) -> str:
    if head.class_rows.shards.ranks.group is None:
        return ""
    return (
        f"the parameters of this {type(head).__name__} are split over the ranks and cannot be part of one vector: take "
        "those of the backbone, and the head's own rows as head.weight.to_local(), or write all of them to a file by "
        "partial_fc.export_weights"
    )


def _average(head: Any, prefix: str, caller: Caller) -> str:
    averaged = caller.get("self")
    alone = head is getattr(averaged, "module", None) or head is caller.get("model")
    if head.class_rows.shards.ranks.group is None or alone:
        return ""
    together = getattr(averaged, "multi_avg_fn", None) is not None
    together = together or (getattr(averaged, "avg_fn", None) is None and head.class_rows.device.type != "cpu")
    if not together:
        return ""
    return (
        "AveragedModel would average all parameters in one call, but those of the head are split over the ranks: give "
        "it a function of one parameter, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.999) or get_swa_avg_fn(), "
        "instead of multi_avg_fn"
    )


def _zero_grad(head: Any, prefix: str, caller: Caller) -> str:
    """`zero_grad()` of a model forgets the gradients of rows, too, which parameters() does not have."""
    if head.class_rows.sampled:
        head.class_rows.clear()
    head.class_rows.record.end()
    return ""


def _replicate(head: Any, prefix: str, caller: Caller) -> str:
    return (
        f"DataParallel cannot copy a {type(head).__name__}, which needs the whole batch: wrap the backbone alone, or "
        "start a process for each GPU, with DistributedDataParallel for the backbone"
    )


TOOLS: dict[tuple[Any, str], Callable[[Any, str, Caller], str]] = {
    (CLIP, "clip_grad_norm_"): _clip,
    (CLIP, "clip_grads_with_norm_"): _clip,
    (CLIP, "_clip_grads_with_norm_"): _clip,
    (CLIP, "clip_grad_value_"): _clip,
    (CLIP, "clip_grad_norm"): _clip,
    (VECTORS, "parameters_to_vector"): _vector,
    (VECTORS, "vector_to_parameters"): _vector,
    (SWA, "update_parameters"): _average,
    ("torch.nn.parallel.replicate", "replicate"): _replicate,
    ("torch.nn.modules.module", "zero_grad"): _zero_grad,
}


def drawing_rows(head: Any, fn: Callable[[Any], None], seed: int) -> None:
    """Call `fn(head)`, such as `torch.nn.init` for its parameters, with random numbers that differ between shards.

    Where a group has no random numbers for DTensors (on CPUs), equal seeds on all ranks would give all shards the rows
    of the first. seed: of this shard, the same on all replicas.
    """
    shards = head.class_rows.shards
    if shards.mesh is None or shards.mesh.device_type != "cpu":
        fn(head)
        return
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")
        torch.manual_seed(seed)
        fn(head)
