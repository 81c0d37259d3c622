"""How large a backbone is: parameters, and operations of a forward an image, counted on shapes alone.

weights and one image on the meta device ── forward, in eval mode ──> floating-point operations by kernel ── sum ──> Counts

A multiplication and the addition after it are two operations; only products (convolutions, linear layers, attention) are counted,
which are nearly all of them. The backward takes about twice as many.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Counts:
    """What `count_backbone` found."""

    parameters: int
    """Numbers that are trained or fixed, without buffers."""
    operations: int | None
    """Floating-point operations of a forward of one image; None where the module's code cannot run on shapes alone."""

    def __str__(self) -> str:
        work = "operations not counted" if self.operations is None else f"{self.operations / 1e9:.2f} GFLOP an image"
        return f"{self.parameters / 1e6:.2f} M parameters, {work}"


def count_backbone(backbone: nn.Module, image_shape: tuple[int, int, int]) -> Counts:
    """Count `backbone`, wherever its weights are, for images of `image_shape` (C, H, W); it is left as it is."""
    parameters = sum(p.numel() for p in backbone.parameters())
    shapes: dict[int, torch.Tensor] = {id(p): nn.Parameter(p.detach().to("meta")) for p in backbone.parameters()}
    shapes |= {id(b): b.detach().to("meta") for b in backbone.buffers()}
    try:
        shadow = copy.deepcopy(backbone, shapes).eval()  # the module around shapes: no weight is copied
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shadow(torch.empty(1, *image_shape, device="meta"))
        return Counts(parameters, int(counter.get_total_flops()))
    except Exception:  # a module's own code may need values, and then raises whatever it likes
        return Counts(parameters, None)


def table(names: Iterable[str], image_shape: tuple[int, int, int], embedding_size: int) -> str:
    """Lines of name, parameters in millions and GFLOP an image, of backbones built without memory."""
    from partial_fc.training.backbones import build_backbone

    lines = [f"{'name':<16}{'parameters':>12}{'GFLOP an image':>17}"]
    for name in names:
        with torch.device("meta"):
            counts = count_backbone(
                build_backbone(name, image_shape=image_shape, embedding_size=embedding_size), image_shape
            )
        assert counts.operations is not None, "the backbones here run on shapes"
        lines.append(f"{name:<16}{counts.parameters / 1e6:>10.2f} M{counts.operations / 1e9:>17.2f}")
    return "\n".join(lines)
