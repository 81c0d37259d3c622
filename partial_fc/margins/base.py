"""`Margin`: what every margin may define. A margin of your own is a subclass (docs/margins.md)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from partial_fc.distributed.given import plain, real
from partial_fc.distributed.ranks import local_part
from partial_fc.margins.arguments import Given, describe, given_of, remembering, remembering_classes, set_argument
from partial_fc.margins.positives import Positives


class Margin(nn.Module):
    """Base of all margins. A margin of your own defines `target`; see docs/margins.md.

    The arguments of the constructor are attributes. Setting one validates it as the constructor does, and has the
    effect of a margin that was built so; running statistics stay. What a head's parameters are made for (`centers`,
    `bias`) cannot change.

    Attributes:
        normalize: take embeddings and class weights at unit length, so that logits are cosines; else as they are.
        normalize_embeddings: where `normalize` is, False leaves embeddings as they are and normalises class weights
            alone: what stands for a cosine is then ‖x‖ cos θ everywhere.
        bias: whether the head adds a bias a class (only where nothing is normalised).
        centers: K rows a class, of which the nearest to a sample counts.
        sees_all: `target` gets the cosines of all targets on every rank (one more small collective), not only those of
            the rank's own classes (0 elsewhere). Always so where `negative` is defined.
        binary: (a, b) if every class is a binary decision instead of one softmax over all: the loss is then
            a · softplus(−z_y) + b · Σ softplus(z_j) over the other selected classes, z the logits.
        has_rule: whether it defines `negative`; set by itself.
        has_penalty: whether it defines `penalty`; set by itself.
        by_class: whether it holds a number for each class, so that other classes need another instance
            (`PartialFC.expand`, `remap`).
        scale: factor s of all logits.
    """

    normalize: bool = True
    normalize_embeddings: bool = True
    bias: bool = False
    centers: int = 1
    sees_all: bool = False
    binary: tuple[float, float] | None = None
    by_class: bool = False
    has_rule: bool = False
    has_penalty: bool = False
    _given: Any = Given({}, {}, {}, {})  # of one that was made without its constructor
    other_names: ClassVar[Mapping[str, str]] = {}  # of attributes that are an argument under another name

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.has_rule = cls.negative is not Margin.negative
        cls.has_penalty = cls.penalty is not Margin.penalty
        cls.__init__ = remembering(cls.__init__)  # type: ignore[method-assign]
        if "prepare" in vars(cls):
            cls.prepare = remembering_classes(cls.prepare)  # type: ignore[method-assign]

    @remembering
    def __init__(self, scale: float = 64.0) -> None:
        super().__init__()
        scale = real("scale", scale)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a positive number, not {scale}")
        self.scale = scale

    def __setattr__(self, name: str, value: Any) -> None:
        if not set_argument(self, name, value):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # an argument that the constructor keeps under another name
            given = given_of(self)
            if given is None or name not in given.known:
                raise
            return given.known[name]

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

    @property
    def takes_cosines(self) -> bool:
        """Whether embeddings and class weights are both normalised."""
        return self.normalize and self.normalize_embeddings

    def inference(self, cosine: Tensor) -> Tensor:
        """Logits before scaling `[n, k]` of cosines where no class is the target, for `PartialFC.predict`; elementwise,
        and never falling with the cosine."""
        return cosine

    def penalty(self, norm: Tensor) -> Tensor | None:
        """What is added to each sample's loss `[N]`, of embedding lengths `[N]`; differentiable. None for nothing."""
        return None

    @remembering_classes
    def prepare(self, num_classes: int, selected: int) -> None:
        """Called by the head that takes this margin, with its number of classes and how many of them a step selects,
        or stands for (`sampling_correction`).

        Raise ValueError if this margin is not for so many.
        """

    def reset(self) -> None:
        """Set buffers to what they are at the start."""

    def describe(self) -> str:
        """Its name and its settings now, "ArcFace(scale=64.0, m1=1.0, m2=0.5, ...)": what must be the same on all
        ranks. Equal values have one spelling: numbers are floats."""
        return describe(self)

    def frozen(self) -> Margin:
        """This margin with buffers of its own, which later steps do not move."""
        frozen: Margin = _with_tensors_of_its_own(self)
        return frozen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Margin:
        """Running statistics move between devices, but keep their dtype: half precision would swallow what a step
        adds."""
        before = [(each, name, b) for each in self.modules() for name, b in each._buffers.items() if b is not None]
        super()._apply(fn, recurse)
        for holder, name, buffer in before:
            now = holder._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                holder._buffers[name] = buffer.to(now.device)
        return self


def _with_tensors_of_its_own(module: Any) -> Any:
    """Return a copy of a module, and of those in it, whose buffers and parameters no other one moves."""
    other = copy.copy(module)
    other._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    other._parameters = {
        name: None if p is None else nn.Parameter(local_part(p.detach()).clone())
        for name, p in module._parameters.items()
    }
    for name, inner in module.named_children():
        other._modules = {**other._modules, name: _with_tensors_of_its_own(inner)}  # noqa: SLF001
    return other


def require(what: str, value: Any, valid: bool) -> None:
    if not valid:
        raise ValueError(f"{what}, not {value}")


def angle(name: str, value: Any, below: float = math.pi, words: str = "pi") -> float:
    """Return an angle in radians as a float. ValueError, naming the argument, unless it is in [0, below)."""
    value = real(name, value)
    require(f"{name} is an angle in radians in [0, {words})", value, 0 <= value < below)
    return value


def at_least(least: float, what: str, value: Any) -> float:
    """Return a number as a float. ValueError unless it is finite and at least `least`. what: begins with its name."""
    value = real(what.split()[0].rstrip(","), value)
    require(f"{what} must be at least {least:g}", value, least <= value < math.inf)
    return value


def above_zero(name: str, what: str, value: Any) -> float:
    """Return a number as a float. ValueError unless it is finite and above 0."""
    value = real(name, value)
    require(f"{what} must be a positive number", value, 0 < value < math.inf)
    return value


def momentum_of(value: Any) -> float:
    """Return the weight of the new batch in a running statistic. ValueError unless it is in (0, 1]."""
    value = real("momentum", value)
    require("momentum is the weight of the new batch, in (0, 1]", value, 0 < value <= 1)
    return value


def flag(name: str, value: Any) -> bool:
    """Return a bool. ValueError, naming the argument, for anything else."""
    value = plain(value)
    require(f"{name} must be True or False", repr(value), isinstance(value, bool))
    return bool(value)
