"""What a forward measured of the global batch, for `PartialFC.metrics` and `target_angle`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.margins.base import Margin


@dataclass(frozen=True)
class Measured:
    """Figures of all samples of the global batch: of this replica, and the same on each of its ranks."""

    cosines: Tensor  # [N, L] of the targets, without the margin; plain logits where nothing is normalised
    target_logits: Tensor  # [N, L], with margin and scale
    exists: Tensor  # [N, L]
    norms: Tensor  # [N] lengths of the embeddings
    hardest: Tensor | None  # [N] largest cosine (or plain logit) of another selected class; with metrics only
    scale: float  # of the margin then

    def angles(self) -> Tensor:
        """Return the angles in radians of all existing targets."""
        return torch.acos(self.cosines[self.exists].clamp(-1, 1))

    def summary(self, margin: Margin) -> dict[str, Tensor]:
        """Return the figures of `PartialFC.metrics`."""
        assert self.hardest is not None
        some = self.exists.any(1)
        best = torch.where(self.exists, self.cosines, -torch.inf).amax(1)[some]
        target = torch.where(self.exists, self.target_logits, -torch.inf).amax(1)[some]
        hardest, norms = self.hardest[some], self.norms[some]
        found = {
            "accuracy": (best > hardest).to(norms.dtype).mean(),
            "margin_met": (target > (0.0 if margin.binary else hardest * self.scale)).to(norms.dtype).mean(),
            "embedding_norm": norms.mean(),
        }
        if not margin.normalize:
            return found
        angles = self.angles()
        marks = torch.tensor([0.1, 0.5, 0.9], dtype=angles.dtype, device=angles.device)
        spread = torch.quantile(angles, marks) if len(angles) else torch.full_like(marks, torch.nan)
        percentiles = dict(zip(("target_angle_p10", "target_angle_p50", "target_angle_p90"), spread, strict=True))
        hardest_angle = torch.acos(hardest.clamp(-1, 1)).mean()
        return found | {"target_angle": angles.mean(), **percentiles, "hardest_angle": hardest_angle}
