"""The same work done by others, for comparison: each with torch.optim.SGD over dense gradients, as its users run it.

    textbook          Partial FC as it is commonly written: gathers, indexes `weight[index]`, materialises logits and a
                      one-hot of them
    loss_parallel     torch's DTensor classifier: rows of the weight sharded, F.cross_entropy under `loss_parallel`; no
                      margin
    metric learning   pytorch_metric_learning's ArcFaceLoss in DDP: the whole weight on every rank, each its share of
                      the samples
    linear CE         torch.nn.functional.linear_cross_entropy in DDP: the whole weight on every rank; no margin. Its
                      chunked form is for
                      more samples a rank than D (torch's own advice) and took eight times as long here, so it is left
                      out

Where classes are sampled, SGD over a dense gradient moves every row by its momentum in every step. Ours moves rows
alike, those that a step does not select later (`skipped_rows="dense"`, what RowOptimizer does by itself): nobody takes
fewer steps than the others.

Those without a margin do not normalise either: they have less to do. All have the same number of logits a rank, N · C /
world. Those that cannot sample classes take part at r = 1 alone.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import LEARNING_RATE, MOMENTUM, Trained, Work, batch, floor, memory, ours, trained
from ranks import interleaved
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def of_rank(work: Work) -> tuple[Tensor, Tensor]:
    return batch(work, dist.get_world_size(), dist.get_rank())


# -------------------------------------------------------------------------------------------------- textbook Partial FC


class Gather(torch.autograd.Function):
    """[N_local, D] of every rank -> [N, D]; backward sums over ranks."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


class ShardedSoftmax(torch.autograd.Function):
    """Mean cross-entropy of logits [N, S] whose columns are split over ranks; labels are columns, -1 where another rank
    has them."""

    @staticmethod
    def forward(ctx, logits, labels):  # type: ignore[no-untyped-def]
        largest = logits.amax(1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        probability = (logits - largest).exp()
        total = probability.sum(1, keepdim=True)
        dist.all_reduce(total)
        probability = probability / total
        rows = (labels >= 0).nonzero()[:, 0]
        of_target = logits.new_zeros(len(logits))
        of_target[rows] = logits[rows, labels[rows]]
        dist.all_reduce(of_target)
        ctx.save_for_backward(probability, rows, labels)
        return ((total.log() + largest)[:, 0] - of_target).mean()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        probability, rows, labels = ctx.saved_tensors
        one_hot = torch.zeros_like(probability)
        one_hot[rows, labels[rows]] = 1
        return (probability - one_hot) / len(probability) * grad, None


class TextbookPartialFC(nn.Module):
    """ArcFace over class rows that are split over ranks, with sampled negatives; the number of classes is divisible by
    the ranks."""

    def __init__(
        self, embedding_size: int, num_classes: int, sample_rate: float, scale: float = 64.0, margin: float = 0.5
    ) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        self.local = num_classes // dist.get_world_size()
        self.count = int(sample_rate * self.local)
        self.weight = nn.Parameter(torch.randn(self.local, embedding_size) * 0.01)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = Gather.apply(x)
        everyone = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, labels)
        labels = torch.cat(everyone) - dist.get_rank() * self.local
        own = (labels >= 0) & (labels < self.local)
        labels = torch.where(own, labels, -1)
        weight = self.weight
        if self.count < self.local:
            index = self.sample(labels[own])
            labels[own] = torch.searchsorted(index, labels[own])
            weight = self.weight[index]
        cosines = F.linear(F.normalize(x), F.normalize(weight)).clamp(-1 + 1e-7, 1 - 1e-7)
        one_hot = torch.zeros_like(cosines)
        one_hot[own, labels[own]] = 1
        with_margin = cosines * math.cos(self.margin) - (1 - cosines**2).sqrt() * math.sin(self.margin)
        return ShardedSoftmax.apply((one_hot * with_margin + (1 - one_hot) * cosines) * self.scale, labels)

    def sample(self, positives: Tensor) -> Tensor:
        score = torch.rand(self.local)
        score[positives] = 2.0
        return score.topk(max(self.count, len(positives.unique())))[1].sort()[0]


def textbook(work: Work) -> Trained:
    head = TextbookPartialFC(work.D, work.C, work.r)
    return trained(head, *of_rank(work), sgd(head), head.parameters)


# ---------------------------------------------------------------------------------------------------- from libraries


def with_loss_parallel(work: Work) -> Trained:
    mesh = init_device_mesh(torch.empty(0).device.type, (dist.get_world_size(),))
    local = torch.randn(work.C // dist.get_world_size(), work.D) * 0.01
    weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
    x, labels = of_rank(work)
    optimizer = torch.optim.SGD([weight], lr=LEARNING_RATE, momentum=MOMENTUM)
    made = trained(lambda x, labels: x.sum(), x, labels, optimizer, lambda: [weight])

    def update() -> None:
        with loss_parallel():  # backward too must run inside
            everyone = DTensor.from_local(x, mesh, [Shard(0)]).redistribute(mesh, [Replicate()])
            targets = DTensor.from_local(labels, mesh, [Shard(0)]).redistribute(mesh, [Replicate()])
            F.cross_entropy(F.linear(everyone, weight), targets).backward()
        optimizer.step()

    made.update = update
    return made


def metric_learning(work: Work) -> Trained:
    from pytorch_metric_learning.losses import ArcFaceLoss

    head = DistributedDataParallel(
        ArcFaceLoss(work.C, work.D, margin=math.degrees(0.5), scale=64).to(torch.empty(0).device)
    )
    return trained(head, *of_rank(work), sgd(head), head.parameters)


class LinearCrossEntropy(nn.Module):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(work.C, work.D) * 0.01)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, self.weight, labels)


def linear_cross_entropy(work: Work) -> Trained:
    head = DistributedDataParallel(LinearCrossEntropy(work))
    return trained(head, *of_rank(work), sgd(head), head.parameters)


def ours_tiled(work: Work) -> Trained:
    return ours(Work(work.N, work.C, work.D, work.r, tiled=True))[0]


BUILDERS: dict[str, Callable[[Work], Trained]] = {
    "partial_fc": lambda work: ours(work)[0],
    "partial_fc, tiled": ours_tiled,
    "textbook Partial FC": textbook,
    "loss_parallel (no margin)": with_loss_parallel,
    "pytorch_metric_learning ArcFaceLoss": metric_learning,
    "linear_cross_entropy (no margin)": linear_cross_entropy,
}
SAMPLING = ("partial_fc", "partial_fc, tiled", "textbook Partial FC")


def missing(name: str) -> bool:
    """Whether what a peer needs is not installed."""
    if name.startswith("pytorch_metric_learning"):
        return importlib.util.find_spec("pytorch_metric_learning") is None
    return name.startswith("linear_cross_entropy") and not hasattr(F, "linear_cross_entropy")


# ---------------------------------------------------------------------------------------------------- on a rank


def time_peers(work: Work, names: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Steps of all of them and the floor, in turn."""
    things: dict[str, Callable[[], Any]] = {name: BUILDERS[name](work).step for name in names}
    rows = int(work.r * work.C) // dist.get_world_size()
    things["floor"] = floor(work.N, rows, work.D)
    return interleaved(things, work.repetitions, warm_up=1)


def memory_of_peer(work: Work, name: str) -> dict[str, Any]:
    return memory(BUILDERS[name], work)
