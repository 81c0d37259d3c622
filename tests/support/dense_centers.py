"""Center loss by its formulas (Wen et al., ECCV 2016), dense, float64. Shares no code with partial_fc."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def center_losses(x: Tensor, centers: Tensor, share: Tensor) -> Tensor:
    """`[N]`: ½ ‖x_i − c_j‖², summed over the classes j of a sample by their weights; share `[N, C]`."""
    return (share * 0.5 * ((x[:, None] - centers[None]) ** 2).sum(2)).sum(1)


@dataclass
class DenseCenters:
    """The paper's update, c_j ← c_j − α Σ (c_j − x_i) / (1 + n_j), over everything noted since the last step."""

    alpha: float
    noted: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def note(self, x: Tensor, centers: Tensor, weights: Tensor) -> None:
        """weights `[N, C]`: what each sample counts for at each class; the differences are from the centers of now."""
        x, counts = x.detach(), weights.sum(0)
        self.noted.append((counts, counts[:, None] * centers.detach() - weights.T @ x))

    def step(self, centers: Tensor) -> Tensor:
        """Move the centers; the classes that nothing was noted of `[C]`."""
        counts = sum((each for each, _ in self.noted), torch.zeros(len(centers), dtype=torch.float64))
        moves = sum((each for _, each in self.noted), torch.zeros_like(centers))
        centers -= self.alpha * moves / (1 + counts)[:, None]
        self.noted = []
        return counts == 0
