"""`Margin`: what every margin may define. A margin of your own is a subclass (docs/margins.md)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from partial_fc.distributed.dtensors import local_part
from partial_fc.margins.positives import Positives


class Margin(nn.Module):
    """Base of all margins. A margin of your own defines `target`; see docs/margins.md.

    normalize: take embeddings and class weights at unit length, so that logits are cosines; else as they are.
    bias: whether the head adds a bias a class (only where nothing is normalised).
    centers: K rows a class, of which the nearest to a sample counts.
    sees_all: `target` gets the cosines of all targets on every rank (one more small collective), not only those of the
        rank's own classes (0 elsewhere). Always so where `negative` is defined.
    binary: (a, b) if every class is a binary decision instead of one softmax over all: the loss is then
        a · softplus(−z_y) + b · Σ softplus(z_j) over the other selected classes, z the logits.
    has_rule, has_penalty: whether it defines `negative`, `penalty`; set by themselves.
    by_class: whether it holds a number for each class, so that other classes need another instance (`PartialFC.expand`,
    `remap`).
    scale: factor s of all logits.
    """

    normalize: bool = True
    bias: bool = False
    centers: int = 1
    sees_all: bool = False
    binary: tuple[float, float] | None = None
    by_class: bool = False
    has_rule: bool = False
    has_penalty: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.has_rule = cls.negative is not Margin.negative
        cls.has_penalty = cls.penalty is not Margin.penalty

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number, not {scale}")
        self.scale = scale

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        """Target logits before scaling, `[P]`, of target cosines `[P]`: elementwise, differentiable by cosine and
        `positives.norm`.

        Called once in every forward; buffers that are moved here (in training only) must move alike on every rank.
        """
        raise NotImplementedError(f"{type(self).__name__} must define target(cosine, positives)")

    def negative(self, cosine: Tensor, target: Tensor) -> Tensor:
        """Logits before scaling `[N, T]` of other classes' cosines, given the samples' target logits before scaling
        `[N, 1]`.

        Elementwise and differentiable by `cosine`; no gradient goes to `target`.
        """
        return cosine

    def penalty(self, norm: Tensor) -> Tensor | None:
        """What is added to each sample's loss `[N]`, of embedding lengths `[N]`; differentiable. None for nothing."""
        return None

    def prepare(self, num_classes: int, selected: int) -> None:
        """Called by the head that takes this margin, with its number of classes and how many of them a step selects.

        Raise ValueError if this margin is not for so many.
        """

    def reset(self) -> None:
        """Set buffers to what they are at the start."""

    def describe(self) -> str:
        """Its name and settings, "ArcFace(scale=64.0, m1=1.0, m2=0.5, ...)": what must be the same on all ranks and in
        a checkpoint."""
        plain = (bool, int, float, str, tuple)
        settings = {
            k: v for k, v in vars(self).items() if isinstance(v, plain) and not k.startswith("_") and k != "training"
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"

    def frozen(self) -> Margin:
        """This margin with buffers of its own, which later steps do not move."""
        other = copy.copy(self)
        other._buffers = {name: None if b is None else b.clone() for name, b in self._buffers.items()}
        other._parameters = {
            name: None if p is None else nn.Parameter(local_part(p.detach()).clone())
            for name, p in self._parameters.items()
        }
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Margin:
        """Running statistics move between devices, but keep their dtype: half precision would swallow what a step
        adds."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


def require(what: str, value: Any, valid: bool) -> None:
    if not valid:
        raise ValueError(f"{what}, not {value}")
