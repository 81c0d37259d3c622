"""How a model, a head and their optimizers are connected, seen from outside: nothing runs, nothing is sent.

    model        the backbone, bare or wrapped by DDP, FSDP2, DeepSpeed, torch.compile; `bare` is the module inside
    head         a PartialFC, also if it is given inside a wrapper
    optimizers   each parameter of the backbone and the head must be in exactly one

Engines are recognised by their class names, so that none has to be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partial_fc.diagnosis.checks import Check
from partial_fc.distributed.shards import local_part
from partial_fc.head import PartialFC
from partial_fc.optim.row_optimizer import RowOptimizer

# class names of engines
DDP = "DistributedDataParallel"
FSDP1 = "FullyShardedDataParallel"
FSDP2 = "FSDPModule"
DEEPSPEED = "DeepSpeedEngine"
COMPILED = "OptimizedModule"
PARALLEL = "DataParallel"

# the attribute in which a wrapper keeps the module
INSIDE = {DDP: "module", FSDP1: "module", DEEPSPEED: "module", COMPILED: "_orig_mod", PARALLEL: "module"}

# engines that must not wrap a head, as messages call them
FOREIGN = {
    DDP: "DistributedDataParallel",
    FSDP1: "FSDP",
    FSDP2: "FSDP2",
    DEEPSPEED: "a DeepSpeed engine",
    PARALLEL: "DataParallel",
}
OUTSIDE = "keep the head outside: wrap or prepare the backbone alone, and call head(model(x), labels)"
ROW_OPTIMIZER = "RowOptimizer(torch.optim.SGD, head, ...)"


def kind(thing: object) -> str | None:
    """Return the class name of the engine that a module belongs to; None for an ordinary module."""
    names = [cls.__name__ for cls in type(thing).__mro__]
    return next((name for name in (DDP, FSDP2, FSDP1, DEEPSPEED, COMPILED, PARALLEL) if name in names), None)


@dataclass
class Wiring:
    """A model, its head and their optimizers.

    layers: the model and the modules inside its wrappers, outermost first.
    """

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
        """The class name of the model's engine; None without one."""
        return next((k for k in map(kind, self.layers) if k not in (None, COMPILED)), None)

    @property
    def backbone(self) -> dict[str, nn.Parameter]:
        """The backbone's trainable parameters by name, without those of the head."""
        own = {id(p) for p in self.head.parameters()}
        return {name: p for name, p in self.bare.named_parameters() if p.requires_grad and id(p) not in own}

    @property
    def refuses_to_step(self) -> bool:
        """Whether the second step would raise, because no optimizer uses the row gradients or two do."""
        untaken = self.head.sample_rate < 1 and self.head.class_rows.live_optimizer is None
        return untaken or len(self._row_optimizers()) > 1

    def checks(self) -> list[Check]:
        """Return the checks of this rank."""
        return [self._group(), self._wrapping(), self._device(), self._head_optimizer(), self._backbone_optimizer()]

    # ------------------------------------------------------------------------------------------------ where the head is

    def head_ranks(self) -> list[int]:
        """Return the global ranks of the head, replicas included."""
        ranks = self.head.class_rows.shards.ranks
        if ranks.mesh is not None:
            return sorted(ranks.mesh.mesh.flatten().tolist())
        return [0] if ranks.group is None else sorted(dist.get_process_group_ranks(ranks.group))

    def _model_ranks(self) -> list[int] | None:
        """Return the global ranks that the backbone's gradients are averaged over; None if it cannot be known."""
        for layer in self.layers:
            if kind(layer) in (DDP, FSDP1):
                return sorted(dist.get_process_group_ranks(layer.process_group))  # type: ignore[arg-type]
        meshes = [p.device_mesh for p in self.backbone.values() if isinstance(p, DTensor)]
        return sorted(meshes[0].mesh.flatten().tolist()) if meshes else None

    def _group(self) -> Check:
        name = "group"
        if self.head.class_rows.shards.ranks.group is None and dist.is_initialized():
            words = "the head was built before the process group, so every rank would train its own copy"
            mend = (
                "build it after torch.distributed.init_process_group (or Accelerator(), deepspeed.init_distributed())"
            )
            return Check(name, False, words, mend)
        head, model = self.head_ranks(), self._model_ranks()
        if model is not None and model != head:
            words = f"the head is on ranks {head}, but the backbone's gradients are averaged over ranks {model}"
            mend = (
                "pass both the same group: PartialFC(..., group=...), DistributedDataParallel(..., process_group=...)"
            )
            return Check(name, False, words, mend)
        ranks = "1 rank" if len(head) == 1 else f"{len(head)} ranks"
        words = f"head and backbone are on the same {ranks}" if model else f"the head is on {ranks}"
        return Check(name, True, words)

    def _wrapping(self) -> Check:
        name = "wrapping"
        mistake = self._wrapping_mistake()
        if mistake:
            words = f"{mistake}: its rows would be broadcast, averaged or split as if they were copies"
            return Check(name, False, words, OUTSIDE)
        if self.inside and self.engine:
            return Check(name, True, "the head is inside the model, and its engine ignores it")
        return Check(name, True, "the head is outside every wrapper")

    def _wrapping_mistake(self) -> str:
        """Return what is wrong with the place of the head, "" if nothing is."""
        head = self.head
        around = next((k for m in self.given_head.modules() if (k := kind(m)) in FOREIGN), None)
        if around is not None:
            return f"the head is inside {FOREIGN[around]}"
        prepared = [_layers(m)[-1] for m in getattr(self.accelerator, "_models", [])]
        if "_original_forward" in vars(head) or any(m is head for m in prepared):
            return "the head was passed to accelerator.prepare"
        prepared_optimizers = [bare(o) for o in getattr(self.accelerator, "_optimizers", [])]
        if any(bare(o) is not o or bare(o) in prepared_optimizers for o in self._row_optimizers()):
            return "the head's RowOptimizer was passed to accelerator.prepare"
        if any(hasattr(p, "ds_id") for p in head.parameters()):
            return f"the head is inside {FOREIGN[DEEPSPEED]}"
        if any(head._parameters.get(name) is not p for name, p in head.class_rows.parameters.items()):
            return f"the head is inside {FOREIGN[FSDP2]}, which replaced its parameters"
        if not self.inside or self.engine in (None, FSDP2):
            return ""
        ignored: set[str] = set()
        for layer in self.layers:
            if kind(layer) == DDP:
                ignored = set(layer.parameters_to_ignore)  # type: ignore[arg-type]
        own = {id(p) for p in head.parameters()}
        names = {name for name, p in self.layers[-1].named_parameters() if id(p) in own}
        return "" if names <= ignored else f"the head is inside {FOREIGN[self.engine]}"

    def _device(self) -> Check:
        head = local_part(self.head.weight).device
        others = {local_part(p).device for p in self.backbone.values()} - {head}
        if others:
            other = str(min(others, key=str))
            words = f"the head is on {head}, the backbone on {other}"
            return Check("device", False, words, f'head.to("{other}"), or PartialFC(..., device=...)')
        return Check("device", True, f"head and backbone are on {head}" if self.backbone else f"the head is on {head}")

    # ------------------------------------------------------------------------------------------------ optimizers

    def _row_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the given optimizers that are RowOptimizers of this head."""
        rows = self.head.class_rows
        return [o for o in self.optimizers if getattr(bare(o), "class_rows", None) is rows]

    def _head_optimizer(self) -> Check:
        name = "head optimizer"
        head = self.head
        trainable = {n: p for n, p in head.named_parameters() if p.requires_grad}
        by_rows = self._row_optimizers()
        others = [o for o in self.optimizers if not isinstance(bare(o), RowOptimizer)]
        plain = {n: [o for o in others if any(p is q for q in _parameters(o))] for n, p in trainable.items()}
        holders = list({id(o): o for each in plain.values() for o in each}.values())
        if not trainable:
            return Check(name, True, "the head is frozen")
        if (by_rows and holders) or len(by_rows) > 1 or any(len(each) > 1 for each in plain.values()):
            count = len(by_rows) + len(holders)
            names = _names([*by_rows, *holders])
            words = f"the head's parameters are in {count} optimizers ({names}), which all update them"
            mend = f"use one of them: {ROW_OPTIMIZER}, and remove head.parameters() from the others"
            return Check(name, False, words, mend)
        if by_rows:
            words = f"a RowOptimizer ({type(bare(by_rows[0]).inner).__name__}) updates the head's rows"  # type: ignore[attr-defined]
            return Check(name, True, words)
        if holders and head.sample_rate < 1:
            words = f"the sampled head's parameters are in {_names(holders)}, which never receives row gradients"
            return Check(name, False, words, f"use {ROW_OPTIMIZER} instead")
        missing = [n for n, each in plain.items() if not each]
        if missing:
            words = f"none of the given optimizers holds the head's {', '.join(missing)}, which would never be trained"
            if head.class_rows.live_optimizer is not None:
                words = "the head's RowOptimizer is not among the given optimizers"
            mend = f"build {ROW_OPTIMIZER}, call its step() in the loop, and pass it to doctor"
            return Check(name, False, words, mend)
        return Check(name, True, f"the head's parameters are in {_names(holders)}, which is allowed without sampling")

    def _backbone_optimizer(self) -> Check:
        name = "backbone optimizer"
        if not self.backbone:
            return Check(name, True, "the backbone has no trainable parameters")
        if self.engine == DEEPSPEED:
            return Check(name, None, "not checked: the engine's optimizer holds partitions of its own")
        held = {
            n: [o for o in self.optimizers if any(p is q for q in _parameters(o))] for n, p in self.backbone.items()
        }
        missing = [n for n, each in held.items() if not each]
        twice = [n for n, each in held.items() if len(each) > 1]
        if missing:
            words = f"{len(missing)} of {len(held)} parameters are in no optimizer: {_listed(missing)}"
            mend = "build the optimizer from model.parameters(), after the model was last moved, wrapped or changed"
            return Check(name, False, words, mend)
        if twice:
            words = f"{len(twice)} of {len(held)} parameters are in two optimizers: {_listed(twice)}"
            return Check(name, False, words, "keep each parameter in one optimizer")
        return Check(name, True, f"all {len(held)} parameters are in one optimizer each")


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside Accelerate's wrapper; any other optimizer as it is."""
    inside = getattr(optimizer, "optimizer", None)
    if type(optimizer).__name__ == "AcceleratedOptimizer" and isinstance(inside, torch.optim.Optimizer):
        return bare(inside)
    return optimizer


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the model and the modules inside its wrappers, outermost first."""
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
