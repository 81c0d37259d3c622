"""The size of a backbone: its parameters, and the operations of a forward pass per image, from shapes alone.

weights and one image on the meta device ── forward, eval mode ──> operations per kernel ── sum ──> Counts

A multiplication and an addition are two operations. Only matrix products are counted (convolutions, linear layers,
attention), which are nearly all of the work. The backward pass takes about twice as many.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Counts:
    """The result of `count_backbone`."""

    parameters: int
    """Number of parameters, trained or frozen; without buffers."""
    operations: int | None
    """Floating-point operations of a forward pass of one image; None if the module cannot run on shapes alone."""

    def __str__(self) -> str:
        work = "operations not counted" if self.operations is None else f"{self.operations / 1e9:.2f} GFLOP per image"
        return f"{self.parameters / 1e6:.2f} M parameters, {work}"


def count_backbone(backbone: nn.Module, image_shape: tuple[int, int, int]) -> Counts:
    """Count parameters and operations of `backbone`, on any device, for images of `image_shape` (C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode  # brings Triton, which takes half a second

    parameters = sum(p.numel() for p in backbone.parameters())
    # A copy of the module with all tensors on the meta device: entries of `memo` are used in place of the originals.
    memo: dict[int, torch.Tensor] = {id(p): nn.Parameter(p.detach().to("meta")) for p in backbone.parameters()}
    memo |= {id(b): b.detach().to("meta") for b in backbone.buffers()}
    try:
        shadow = copy.deepcopy(backbone, memo).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shadow(torch.empty(1, *image_shape, device="meta"))
        return Counts(parameters, int(counter.get_total_flops()))
    except Exception:  # the module's code may need values, and can raise anything
        return Counts(parameters, None)


def table(names: Iterable[str], image_shape: tuple[int, int, int], embedding_size: int) -> str:
    """Return lines of name, parameters in millions and GFLOP per image; the backbones are built on the meta device."""
    from partial_fc.training.backbones import build_backbone

    lines = [f"{'name':<16}{'parameters':>12}{'GFLOP per image':>17}"]
    for name in names:
        with torch.device("meta"):
            counts = count_backbone(
                build_backbone(name, image_shape=image_shape, embedding_size=embedding_size), image_shape
            )
        assert counts.operations is not None, "all registered backbones can run on shapes"
        lines.append(f"{name:<16}{counts.parameters / 1e6:>10.2f} M{counts.operations / 1e9:>17.2f}")
    return "\n".join(lines)
