"""Forwards that are not steps: what calls a loss a second time in backward, or as a function to be transformed.

    torch.utils.checkpoint     the first call under no_grad (use_reentrant=True) or under hooks that save no tensors,
                               the second in backward
    torch.func                 grad, vmap, jacrev, ...: tensors are stand-ins, which no collective takes

A training forward draws classes, moves statistics of the margin and counts: called again it would do all that twice,
and its backward would be that of other classes. So it is refused at the first call, before it has done anything. The
usual step finds by three calls into torch that there is nothing to look for (`surroundings`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from partial_fc.distributed.callers import callers
from partial_fc.distributed.inside_torch import tells_backward

# what `surroundings` find in a usual step
USUAL: list[Any] = [True, None, -1, None]
CHECKPOINTING = ("torch.utils.checkpoint", "deepspeed.runtime.activation_checkpointing.checkpointing")
WIRING = "\x1e"  # begins a problem of a batch that is no input's: a RuntimeError


@lru_cache
def surroundings() -> tuple[Callable[[], Any], ...]:
    """Return functions that tell whether gradients are recorded, the hooks of saved tensors or None, the number of the
    backward pass that runs or −1, and the transform of torch.func or None.

    All but the first are private ones of torch. Where one is missing or does something else: hooks that are always
    looked at, a backward that is never seen, a transform that is never seen.
    """
    bindings = torch._C
    hooks: Any = getattr(getattr(bindings, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    task: Any = getattr(bindings, "_current_graph_task_id", None)
    transform: Any = getattr(getattr(bindings, "_functorch", None), "peek_interpreter_stack", None)
    looks: list[Callable[[], Any]] = [torch.is_grad_enabled, lambda: (None, None), lambda: -1, lambda: None]
    if works(_sees_hooks, hooks):
        looks[1] = partial(hooks, True)
    if works(_sees_backward, task):
        looks[2] = task
    if works(_sees_transform, transform):
        looks[3] = transform
    return tuple(looks)


def problem_of_forward(owner: str, training: bool) -> str:
    """Return why a forward of this class of loss cannot be a step, "" if it can be.

    In training it is refused inside activation checkpointing, and in any backward pass.
    """
    _, _, task, transform = surroundings()
    if transform() is not None:
        return (
            f"a {owner} cannot be transformed by torch.func (grad, vmap, jacrev, ...), because its "
            "collectives take real tensors. Use torch.autograd.grad(loss, embeddings) for gradients, and transform "
            "the backbone alone"
        )
    if not training:
        return ""
    again = "draws classes, moves statistics and counts once more, so that its gradient is that of other classes"
    way = (
        f"Checkpoint the backbone alone and call the {owner} on its output; its logits need no checkpointing: it "
        "computes them again by itself where they exceed logits_budget"
    )
    if task() >= 0:
        return f"this {owner} in train() is called inside a backward pass, where it {again}. {way}"
    if in_checkpoint():
        return (
            f"this {owner} in train() is called inside activation checkpointing (torch.utils.checkpoint), "
            f"which calls it again in backward, where it {again}. {way}"
        )
    return ""


def in_checkpoint() -> bool:
    """Return whether the caller is inside a checkpointed function, of torch or DeepSpeed."""
    top = surroundings()[1]()
    if top is not None and getattr(top[0], "__module__", "") in CHECKPOINTING:  # the composable one has no frame
        return True
    return any(frame.f_globals.get("__name__") in CHECKPOINTING for frame in callers())


def works(check: Callable[[Any], bool], function: Any) -> bool:
    """Return whether a private function of torch is there and does what the check tries. It is tried in a thread of its
    own, because modes of autograd and transforms are those of a thread, and the caller is in the middle of some."""
    found = []

    def attempt() -> None:
        try:
            found.append(function is not None and check(function))
        except Exception:  # whatever a private function may raise
            found.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return found[0]


def _sees_hooks(hooks: Callable[[bool], Any]) -> bool:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        seen = hooks(True)[0]
    return seen is pack and hooks(True) is None


def _sees_backward(task: Callable[[], int]) -> bool:
    return tells_backward(lambda: task() >= 0)


def _sees_transform(transform: Callable[[], Any]) -> bool:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(transform())
        return x

    torch.func.vmap(function)(torch.zeros(1, device="cpu"))
    return seen[0] is not None and transform() is None
