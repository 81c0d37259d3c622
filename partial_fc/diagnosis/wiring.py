"""How a model, a head and their optimizers hang together, looked at from outside: nothing runs, nothing is sent.

    model        the backbone, bare or wrapped by DDP, FSDP2, DeepSpeed, torch.compile; `bare` is what is inside
    head         a PartialFC, found inside whatever it was given in
    optimizers   who holds which parameter: each of the backbone's and of the head's is to be in exactly one

Engines are known by the names of their classes, so that none need be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partial_fc.head import PartialFC
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.shards import local_part


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ok: True, False, or None where it could not be; words: what was found; mend: what to do."""

    name: str
    ok: bool | None
    words: str
    mend: str = ""


DDP, FSDP2, FSDP1 = "DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"
DEEPSPEED, COMPILED, PARALLEL = "DeepSpeedEngine", "OptimizedModule", "DataParallel"
INSIDE = {DDP: "module", FSDP1: "module", DEEPSPEED: "module", COMPILED: "_orig_mod", PARALLEL: "module"}
FOREIGN = {
    DDP: "DistributedDataParallel",
    FSDP1: "FSDP",
    FSDP2: "FSDP2",
    DEEPSPEED: "a DeepSpeed engine",
    PARALLEL: "DataParallel",
}
OUTSIDE = "leave the head outside: wrap or prepare the backbone alone, and call head(model(x), labels)"


def kind(thing: object) -> str | None:
    """Which engine's class a module is, None for a plain one."""
    names = [cls.__name__ for cls in type(thing).__mro__]
    return next((name for name in (DDP, FSDP2, FSDP1, DEEPSPEED, COMPILED, PARALLEL) if name in names), None)


@dataclass
class Wiring:
    """What belongs together. layers: the model and what is inside it, from the outside in."""

    model: nn.Module
    given_head: nn.Module
    head: PartialFC
    optimizers: Sequence[torch.optim.Optimizer]
    accelerator: Any = None
    layers: list[nn.Module] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: nn.Module, head: nn.Module, optimizers: Sequence[torch.optim.Optimizer], accelerator: Any
    ) -> Wiring:
        found = [m for m in head.modules() if isinstance(m, PartialFC)]
        if len(found) != 1:
            raise TypeError(f"head must be a PartialFC, not {type(head).__name__} with {len(found)} of them inside")
        return cls(model, head, found[0], optimizers, accelerator, _layers(model))

    @property
    def bare(self) -> nn.Module:
        """The model without its wrappers."""
        return self.layers[-1]

    @property
    def inside(self) -> bool:
        """Whether the head is a part of the model."""
        return any(m is self.head for m in self.bare.modules())

    @property
    def engine(self) -> str | None:
        """Which engine the model is in."""
        return next((k for k in map(kind, self.layers) if k not in (None, COMPILED)), None)

    @property
    def backbone(self) -> dict[str, nn.Parameter]:
        """The backbone's trainable parameters by name, without those of the head."""
        own = {id(p) for p in self.head.parameters()}
        return {name: p for name, p in self.bare.named_parameters() if p.requires_grad and id(p) not in own}

    @property
    def refuses_to_step(self) -> bool:
        """Whether the head or a RowOptimizer itself raises in the second step: no optimizer takes the rows, or two do."""
        untaken = self.head.sample_rate < 1 and self.head.class_rows.live_optimizer is None
        return untaken or len(self._row_optimizers()) > 1

    def checks(self) -> list[Check]:
        """What is seen on this rank."""
        return [self._group(), self._wrapping(), self._device(), self._head_optimizer(), self._backbone_optimizer()]

    # ------------------------------------------------------------------------------------------------ where the head is

    def head_ranks(self) -> list[int]:
        """Global ranks over which the head is split or repeated."""
        ranks = self.head.class_rows.shards.ranks
        if ranks.mesh is not None:
            return sorted(ranks.mesh.mesh.flatten().tolist())
        return [0] if ranks.group is None else sorted(dist.get_process_group_ranks(ranks.group))

    def _model_ranks(self) -> list[int] | None:
        """Global ranks over which the backbone's gradients are averaged; None if nothing says."""
        for layer in self.layers:
            if kind(layer) in (DDP, FSDP1):
                return sorted(dist.get_process_group_ranks(layer.process_group))  # type: ignore[arg-type]
        meshes = [p.device_mesh for p in self.backbone.values() if isinstance(p, DTensor)]
        return sorted(meshes[0].mesh.flatten().tolist()) if meshes else None

    def _group(self) -> Check:
        name = "group"
        if self.head.class_rows.shards.ranks.group is None and dist.is_initialized():
            return Check(
                name,
                False,
                "the head was built before the process group: every rank would train a copy of its own",
                "build it after torch.distributed.init_process_group (or Accelerator(), deepspeed.init_distributed())",
            )
        head, model = self.head_ranks(), self._model_ranks()
        if model is not None and model != head:
            return Check(
                name,
                False,
                f"the head is over ranks {head}, the backbone's gradients are averaged over ranks {model}",
                "give both the same group: PartialFC(..., group=...) and DistributedDataParallel(..., process_group=...)",
            )
        ranks = "1 rank" if len(head) == 1 else f"{len(head)} ranks"
        return Check(
            name, True, f"head and backbone are over the same {ranks}" if model else f"the head is over {ranks}"
        )

    def _wrapping(self) -> Check:
        name, inside = "wrapping", self._wrapped_by()
        if inside:
            return Check(
                name,
                False,
                f"the head is in {inside}, which broadcasts, averages or splits its rows as if they were copies",
                OUTSIDE,
            )
        where = (
            "inside the model, and left out by its engine"
            if self.inside and self.engine
            else "outside of every wrapper"
        )
        return Check(name, True, f"the head is {where}")

    def _wrapped_by(self) -> str:
        head = self.head
        around = next((k for m in self.given_head.modules() if (k := kind(m)) in FOREIGN), None)
        if around is not None:
            return FOREIGN[around]
        prepared = [_layers(m)[-1] for m in getattr(self.accelerator, "_models", [])]
        if "_original_forward" in vars(head) or any(m is head for m in prepared):
            return "what accelerator.prepare was given"
        prepared_optimizers = [bare(o) for o in getattr(self.accelerator, "_optimizers", [])]
        if any(bare(o) is not o or bare(o) in prepared_optimizers for o in self._row_optimizers()):
            return "an optimizer that accelerator.prepare was given"
        if any(hasattr(p, "ds_id") for p in head.parameters()):
            return FOREIGN[DEEPSPEED]
        if any(head._parameters.get(name) is not p for name, p in head.class_rows.parameters.items()):
            return f"{FOREIGN[FSDP2]}, which put parameters of its own in the place of the head's"
        if not self.inside or self.engine in (None, FSDP2):
            return ""
        ignored: set[str] = set()
        for layer in self.layers:
            if kind(layer) == DDP:
                ignored = set(layer.parameters_to_ignore)  # type: ignore[arg-type]
        own = {id(p) for p in head.parameters()}
        names = {name for name, p in self.layers[-1].named_parameters() if id(p) in own}
        return "" if names <= ignored else FOREIGN[self.engine]

    def _device(self) -> Check:
        head = local_part(self.head.weight).device
        others = {local_part(p).device for p in self.backbone.values()} - {head}
        if others:
            there = str(min(others, key=str))
            return Check(
                "device",
                False,
                f"the head is on {head}, the backbone on {there}",
                f'head.to("{there}"), or PartialFC(..., device=...)',
            )
        return Check("device", True, f"head and backbone are on {head}" if self.backbone else f"the head is on {head}")

    # ------------------------------------------------------------------------------------------------ who holds what

    def _row_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of those given, what are RowOptimizers of this head."""
        rows = self.head.class_rows
        return [o for o in self.optimizers if getattr(bare(o), "class_rows", None) is rows]

    def _head_optimizer(self) -> Check:
        name, head = "head optimizer", self.head
        trainable = {n: p for n, p in head.named_parameters() if p.requires_grad}
        by_rows, sampled = self._row_optimizers(), head.sample_rate < 1
        others = [o for o in self.optimizers if not isinstance(bare(o), RowOptimizer)]
        plain = {n: [o for o in others if any(p is q for q in _parameters(o))] for n, p in trainable.items()}
        holders = list({id(o): o for each in plain.values() for o in each}.values())
        right = "RowOptimizer(torch.optim.SGD, head, ...)"
        if not trainable:
            return Check(name, True, "the head is frozen")
        if (by_rows and holders) or len(by_rows) > 1 or any(len(each) > 1 for each in plain.values()):
            count = len(by_rows) + len(holders)
            words = (
                f"the head's parameters are in {count} optimizers ({_names([*by_rows, *holders])}), which all move them"
            )
            return Check(
                name, False, words, f"keep them in one: {right}, and leave head.parameters() out of the others"
            )
        if by_rows:
            return Check(name, True, f"a RowOptimizer ({type(bare(by_rows[0]).inner).__name__}) moves the head's rows")  # type: ignore[attr-defined]
        if holders and sampled:
            words = (
                f"the sampled head's parameters are in {_names(holders)}, which never sees the gradients of its rows"
            )
            return Check(name, False, words, f"use {right} instead")
        missing = [n for n, each in plain.items() if not each]
        if missing:
            words = f"no optimizer that was given holds the head's {', '.join(missing)}: it would never train"
            if head.class_rows.live_optimizer is not None:
                words = "the head's RowOptimizer is not among the optimizers that were given: who steps it?"
            return Check(name, False, words, f"build {right}, and step it")
        return Check(name, True, f"{_names(holders)} holds the head's parameters, which it may without sampling")

    def _backbone_optimizer(self) -> Check:
        name = "backbone optimizer"
        if not self.backbone:
            return Check(name, True, "the backbone has nothing to train")
        if self.engine == DEEPSPEED:
            return Check(name, None, "not checked: the engine's optimizer holds parts of its own")
        held = {
            n: [o for o in self.optimizers if any(p is q for q in _parameters(o))] for n, p in self.backbone.items()
        }
        missing, twice = [n for n, each in held.items() if not each], [n for n, each in held.items() if len(each) > 1]
        if missing:
            words = f"{len(missing)} of {len(held)} parameters are in no optimizer: {_listed(missing)}"
            return Check(
                name,
                False,
                words,
                "give the optimizer model.parameters(), after the last move, wrap or change of the model",
            )
        if twice:
            words = f"{len(twice)} of {len(held)} parameters are in two optimizers: {_listed(twice)}"
            return Check(name, False, words, "keep each parameter in one optimizer")
        return Check(name, True, f"all {len(held)} parameters are in one optimizer each")


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What Accelerate's wrapper steps, another optimizer as it is."""
    inside = getattr(optimizer, "optimizer", None)
    return (
        bare(inside)
        if type(optimizer).__name__ == "AcceleratedOptimizer" and isinstance(inside, torch.optim.Optimizer)
        else optimizer
    )


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = [model]
    while (inside := INSIDE.get(kind(layers[-1]) or "")) is not None:
        layers.append(getattr(layers[-1], inside))
    return layers


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    return ", ".join(type(bare(o)).__name__ for o in optimizers)


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
