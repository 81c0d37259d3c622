"""What differs between versions of torch: the private functions that numbers depend on, and the meta device.

docs/versions.md says which versions these tests, and the others, were run with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shards import local
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import partial_fc.classes.change
import partial_fc.softmax.tiles
from partial_fc import CenterLoss, PartialFC, RowOptimizer, Softmax
from partial_fc.checkpoint.layout import rows_of_rank, splits_by_rows
from partial_fc.classes.change import _held_by_a_graph
from partial_fc.distributed.inside_torch import tells_backward, tells_graphs, tells_holders
from partial_fc.distributed.wrapping import DDP, FSDP2
from partial_fc.margins import SphereFace2, SubCenterArcFace
from partial_fc.softmax.tiles import Workspace, _held

D = 6

# ---------------------------------------------------------------------------------------------------- counts of holders


def test_this_torch_tells_who_holds_a_buffer_and_a_parameter():
    """If it does not, results are right, but memory is never used again and classes cannot be changed."""
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        tells_holders.cache_clear()
        tells_graphs.cache_clear()
        with mode():
            assert tells_holders(_held)
            assert tells_graphs(_held_by_a_graph)


def one_too_few(buffer: Tensor) -> bool:
    storage = buffer.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1 > 2


def one_too_many(buffer: Tensor) -> bool:
    storage = buffer.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) + 1 > 2


def test_this_torch_tells_a_backward_pass():
    assert tells_backward(lambda: torch._C._current_graph_task_id() != -1)
    assert not tells_backward(lambda: False)
    assert not tells_backward(lambda: True)


WRONG: list[Callable[[Tensor], bool]] = [lambda _: False, lambda _: True, one_too_few, one_too_many]


@pytest.mark.parametrize("held", WRONG)
def test_a_wrong_count_is_not_believed(held):
    assert not tells_holders(held)
    assert not tells_graphs(lambda parameter: held(parameter.detach()))


def gradients_of_micro_batches() -> list[Tensor]:
    """Two backwards of different rows, the gradient of the first in use while the second is computed."""
    head = PartialFC(D, 40, Softmax(bias=False), 0.2, dtype=torch.float64, init_std=1.0, seed=1)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for first in (0, 20):
        x = torch.randn(8, D, generator=generator, dtype=torch.float64)
        head(x, torch.arange(first, first + 8)).backward()
    assert head.row_grad is not None and optimizer.class_rows is head.class_rows
    return list(head.row_grad)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_where_torch_counts_wrongly_memory_is_never_used_again(monkeypatch, count):
    expected = gradients_of_micro_batches()
    monkeypatch.setattr(torch._C, "_storage_Use_Count", lambda cdata: count)
    tells_holders.cache_clear()
    try:
        for mine, right in zip(gradients_of_micro_batches(), expected, strict=True):
            assert torch.equal(mine, right)
        space = Workspace()
        before = space.get("name", (4,), torch.float32, torch.device("cpu"))
        assert space.get("name", (4,), torch.float32, torch.device("cpu")).data_ptr() != before.data_ptr()
    finally:
        tells_holders.cache_clear()


def expand_where_graphs_are_not_told(rank: int, world: int) -> str:
    head = PartialFC(D, 10)
    tell = partial_fc.classes.change.tells_graphs
    partial_fc.classes.change.tells_graphs = lambda held: rank == 0 and world > 1  # type: ignore[assignment]
    try:
        head.expand(2)
    except RuntimeError as error:
        return str(error)
    finally:
        partial_fc.classes.change.tells_graphs = tell
    return ""


def test_where_graphs_are_not_told_classes_do_not_change(ranks):
    for world in (1, 2):
        for text in ranks(world).run(expand_where_graphs_are_not_told):
            assert f"torch {torch.__version__} does not tell whether a loss still holds the rows" in text
            assert "use a version that docs/versions.md lists" in text


# ---------------------------------------------------------------------------------------------------- names inside torch


def test_wrappers_are_known_by_their_code():
    """Not by names of modules, which differ between versions."""
    assert DDP.code() is DistributedDataParallel.__init__.__code__
    assert FSDP2.code() is inspect.unwrap(fully_shard).__code__


def rows_by_placement(rank: int, world: int) -> None:
    """The rows that a checkpoint writes for a DTensor are those that torch gave to this rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for placements in ([Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)], [Replicate()] * 2):
        for rows in (1, 2, 5, 8, 9):
            whole = torch.arange(rows * 2.0).view(rows, 2)
            tensor = distribute_tensor(whole, mesh, placements)
            lo, hi = rows_of_rank(tensor)
            assert splits_by_rows(tensor)
            assert torch.equal(whole[lo:hi], tensor.to_local())
    assert not splits_by_rows(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1), Shard(0)]))


def test_rows_of_a_checkpoint_are_those_of_the_rank(ranks):
    ranks(4).run(rows_by_placement)


# ---------------------------------------------------------------------------------------------------- the meta device


def heads() -> Iterator[tuple[str, Callable[..., Any]]]:
    yield "full", lambda **o: PartialFC(D, 11, Softmax(), **o)
    yield "sampled", lambda **o: PartialFC(D, 11, SubCenterArcFace(scale=8.0), 0.5, **o)
    yield "shared offset", lambda **o: PartialFC(D, 11, SphereFace2(8.0), **o)
    yield "centers", lambda **o: CenterLoss(D, 11, **o)


def on_meta(rank: int, world: int, two_d: bool) -> None:
    group = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s")) if two_d else None
    for name, build in heads():
        usual = build(group=group)
        with torch.device("meta"):
            in_context = build(group=group)
        moved = build(group=group).to("meta")
        for head in (build(group=group, device="meta"), in_context, moved):
            assert {p.device.type for p in head.parameters()} == {"meta"}, name
            assert [p.shape for p in head.parameters()] == [p.shape for p in usual.parameters()]
            first = next(head.parameters())
            head.to_empty(device="cpu")
            head.reset_parameters()
            assert next(head.parameters()) is first, "the parameter stays the same object"
            for mine, other in zip(head.parameters(), usual.parameters(), strict=True):
                assert torch.equal(local(mine), local(other)), name
                if dist.is_initialized():
                    assert mine.device_mesh.device_type == "cpu"
            x = torch.ones(2, D, requires_grad=True)
            head(x, torch.tensor([rank, 10])).backward()
            assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize(("world", "two_d"), [(1, False), (2, False), (4, True)])
def test_a_head_without_storage_gets_it_later(ranks, world, two_d):
    ranks(world).run(on_meta, two_d)


class Both(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, D, device=device)
        self.head = PartialFC(D, 11, device=device)


def whole_model(rank: int, world: int) -> None:
    model = Both("meta").to_empty(device="cpu")
    model.head.reset_parameters()
    assert torch.equal(local(model.head.weight), local(Both("cpu").head.weight))


def test_a_model_with_a_head_is_built_without_storage(ranks):
    ranks(2).run(whole_model)
