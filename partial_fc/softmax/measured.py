"""What a forward measured of the global batch, for `PartialFC.metrics` and `target_angle`."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def by_lengths(self, inverse: Tensor) -> Measured:
        """Return cosines in the place of products of embeddings as they are and unit rows. inverse `[N, 1]`: 1/‖X‖."""
        hardest = None if self.hardest is None else self.hardest * inverse[:, 0]
        return replace(
            self, cosines=self.cosines * inverse, target_logits=self.target_logits * inverse, hardest=hardest
        )

    def angles(self) -> Tensor:
        """Return the angles `[N, L]` in radians to all targets, NaN where there is none."""
        return torch.where(self.exists, torch.acos(self.cosines.clamp(-1, 1)), torch.nan)

    def summary(self, margin: Margin) -> dict[str, Tensor]:
        """Return the figures of `PartialFC.metrics`. Nothing waits for the device."""
        assert self.hardest is not None
        some = self.exists.any(1)
        best = torch.where(self.exists, self.cosines, -torch.inf).amax(1)
        target = torch.where(self.exists, self.target_logits, -torch.inf).amax(1)
        hardest = self.hardest

        def mean(values: Tensor) -> Tensor:
            return torch.where(some, values.to(self.norms.dtype), torch.nan).nanmean()

        found = {
            "accuracy": mean(best > hardest),
            "margin_met": mean(target > (0.0 if margin.binary else hardest * self.scale)),
            "embedding_norm": mean(self.norms),
        }
        if not margin.normalize:
            return found
        angles = self.angles().reshape(-1)
        percentiles = {
            f"target_angle_p{percent}": torch.nanquantile(angles, percent / 100)
            if len(angles)
            else torch.full_like(found["accuracy"], torch.nan)
            for percent in (10, 50, 90)
        }
        hardest_angle = mean(torch.acos(hardest.clamp(-1, 1)))
        return found | {"target_angle": angles.nanmean(), **percentiles, "hardest_angle": hardest_angle}
