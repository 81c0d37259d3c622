"""A 2-D mesh whose replicas hold batches of other sizes: the same collectives on all ranks, the same weights."""

from __future__ import annotations

import pytest
import torch
from near import near
from shards import local
from torch.distributed.device_mesh import init_device_mesh

import partial_fc.softmax.backward as backward
import partial_fc.softmax.cross_entropy as cross_entropy
from partial_fc import ArcFace, PartialFC, RowOptimizer
from partial_fc.softmax import tiles

D, CLASSES = 6, 301


def trained(rank: int, world: int, update_in_backward: bool, budget: int | None) -> torch.Tensor:
    """The weights of this rank's shard after three steps, by replicas with 40 and 90 samples a rank."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    before, tiles.TILE_BYTES["cpu"] = tiles.TILE_BYTES["cpu"], 1 << 15  # so many rows a tile depend on the samples
    try:
        head = PartialFC(D, CLASSES, ArcFace(8.0), group=mesh, dtype=torch.float64, init_std=1.0, logits_budget=budget)
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, update_in_backward=update_in_backward)
        for step in range(3):
            generator = torch.Generator().manual_seed(10 * step + rank)
            samples = 40 if rank < world // 2 else 90
            x = torch.randn(samples, D, generator=generator, dtype=torch.float64, requires_grad=True)
            head(x, torch.randint(0, CLASSES, (samples,), generator=generator)).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        tiles.TILE_BYTES["cpu"] = before
    return local(head.weight).detach().clone()


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_of_uneven_batches_update_in_backward(ranks, world, budget):
    late = ranks(world).run(trained, False, budget)
    early = ranks(world).run(trained, True, budget)
    for a, b in zip(late, early, strict=True):
        near(a, b)
    for a, b in zip(early[: world // 2], early[world // 2 :], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def overlapped(rank: int, world: int, replicas: int) -> list[str]:
    """The order of what backward does over ranks, with kept logits: "sent" and "arrived", and sums over replicas."""
    group = None
    if replicas > 1:
        group = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    head = PartialFC(D, CLASSES, group=group)
    events: list[str] = []
    start, summed = cross_entropy.start_reduce_scatter, backward.sum_over_replicas

    def send(*given: object) -> object:
        events.append("sent")
        wait = start(*given)  # type: ignore[arg-type]

        def arrive() -> torch.Tensor:
            events.append("arrived")
            return wait()

        return arrive

    def add(tensor: torch.Tensor, ranks: object, what: str) -> torch.Tensor:
        events.append("replicas")
        return summed(tensor, ranks, what)  # type: ignore[arg-type]

    cross_entropy.start_reduce_scatter, backward.sum_over_replicas = send, add  # type: ignore[assignment]
    try:
        head(torch.randn(4, D, requires_grad=True), torch.arange(4)).backward()
    finally:
        cross_entropy.start_reduce_scatter, backward.sum_over_replicas = start, summed
    return events


def test_only_one_group_of_a_mesh_is_at_work_at_a_time(ranks):
    """While the embeddings' gradient travels, nothing goes through the other group: NCCL would need an order."""
    assert ranks(2).run(overlapped, 1) == [["sent", "replicas", "arrived"]] * 2  # without replicas nothing is summed
    assert ranks(4).run(overlapped, 2) == [["replicas", "sent", "arrived"]] * 4
