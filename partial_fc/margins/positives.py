"""What a margin may know about the targets of a batch besides their cosines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.ranks import all_gather
from partial_fc.permutation import keyed_below


@dataclass
class Positives:
    """What a margin may know of the P targets besides their cosines.

    label: `[P]` global class ids, -1 where there is no target. sample: `[P]` which sample of the global batch, counted
    over all ranks.
    norm: `[P]` lengths of the embeddings as they came, differentiable. exists: `[P]` where there is a target.
    draw: an integer that differs from forward to forward and is the same on every rank, to key random numbers with.
    """

    label: Tensor
    sample: Tensor
    norm: Tensor
    exists: Tensor
    draw: int
    replicas: dist.ProcessGroup | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values [P]` over the targets of the whole global batch (0-d, without gradient); NaN if there are
        none.

        The values must be known on every rank: lengths and labels are, cosines where the margin `sees_all`.
        """
        total = torch.where(self.exists, values.detach(), 0.0).sum()
        return all_gather(total, self.replicas).sum(0) / self.count()

    def count(self) -> Tensor:
        """How many targets the global batch has (0-d)."""
        return all_gather(self.exists.sum(), self.replicas).sum(0)

    def of_all_replicas(self, values: Tensor) -> tuple[Tensor, slice]:
        """(`values` of all replicas of a 2-D mesh, one after another; where this one's are). With replicas it waits for
        the host."""
        if self.replicas is None:
            return values, slice(0, len(values))
        counts = all_gather(torch.tensor([len(values)], device=values.device), self.replicas).flatten().tolist()
        padded = values.new_zeros(max(counts))
        padded[: len(values)] = values
        rows = all_gather(padded, self.replicas)
        start = sum(counts[: dist.get_rank(self.replicas)])
        return torch.cat([row[:n] for row, n in zip(rows, counts, strict=True)]), slice(start, start + len(values))

    def uniform(self, stream: int) -> Tensor:
        """`[P]` in (0, 1], float32: keyed by step and sample, so the same at every world size; another for every
        `stream`."""
        return (keyed_below(self.sample, self.draw + 0x9E3779B1 * stream, 1 << 31).float() + 0.5) / (1 << 31)
