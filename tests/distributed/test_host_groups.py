"""What the hosts must know travels between hosts, where the group of a loss exchanges tensors of GPUs alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import message_of
from torch import Tensor

import partial_fc.distributed.ranks as exchanges
from partial_fc import PartialFC, RowOptimizer
from partial_fc.distributed import host_groups
from partial_fc.distributed.groups import ranks_of
from partial_fc.distributed.meeting import meet


class GpusAlone:
    """torch.distributed as `host_group_of` sees it, with groups that have a backend for GPUs alone."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def get_backend_config(self, group: Any = None) -> str:
        return "cuda:nccl"

    def unable(self, *given: Any, **options: Any) -> Any:
        raise RuntimeError("gloo: no interface")


def one_group_beside(rank: int, world: int) -> tuple[bool, bool, list[list[int]], bool]:
    plain = ranks_of(None)
    with mock.patch.object(host_groups, "dist", GpusAlone()):
        first, second = ranks_of(None), ranks_of(None)
    device = torch.device("cpu")
    assert first.host_group is not None
    ranks_beside = dist.get_process_group_ranks(first.host_group)
    return (
        plain.host_group is plain.group,
        first.host_group is second.host_group is not first.group and ranks_beside == list(range(world)),
        meet("check_same", first, device, (rank, 7)),
        first.place_of_counts(torch.device("meta")) == device,
    )


def test_a_group_of_gpus_has_one_for_hosts_beside_it(ranks):
    for own, beside, values, on_host in ranks(2).run(one_group_beside):
        assert own, "a group with a backend for the CPU needs no other"
        assert beside
        assert values == [[0, 7], [1, 7]]
        assert on_host


def groups_of_a_step(rank: int, world: int) -> tuple[list[tuple[str, bool]], float, float]:
    """Of each all-gather of a step: its purpose by size, and whether it went between hosts. Losses with and without."""
    generator = torch.Generator().manual_seed(rank)
    x, labels = torch.randn(5, 8, generator=generator), torch.randint(0, 40, (5,), generator=generator)
    losses = []
    seen: list[tuple[str, bool]] = []
    for module in (dist, GpusAlone()):
        with mock.patch.object(host_groups, "dist", module):
            head = PartialFC(8, 40, device="cpu")
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
        beside = head.shards.ranks.host_group
        gather = exchanges._all_gather_single

        def note(out: Tensor, tensor: Tensor, group: Any = None, gather: Any = gather, beside: Any = beside) -> Any:
            seen.append(("counts" if tensor.nbytes == 192 else "tensors", group is beside))
            return gather(out, tensor, group=group)

        with mock.patch.object(exchanges, "_all_gather_single", note):
            seen.clear()
            loss = head(x.clone().requires_grad_(), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return seen, *losses


def test_counts_go_between_hosts_and_tensors_do_not(ranks):
    for seen, plain, beside in ranks(2).run(groups_of_a_step):
        assert seen == [("counts", True), ("tensors", False), ("tensors", False)]
        assert plain == beside


def without_gloo(rank: int, world: int) -> str:
    """The words where no gloo group can be made."""

    host_groups._beside.clear()
    module = GpusAlone()
    vars(module)["new_group"] = module.unable
    with mock.patch.object(host_groups, "dist", module):
        return message_of(ranks_of, None)


def test_where_no_group_for_hosts_can_be_made_the_way_is_named(ranks):
    for text in ranks(2).run(without_gloo):
        assert (
            text.startswith(f"RuntimeError: {host_groups.NO_GROUP}")
            and "GLOO_SOCKET_IFNAME" in text
            and "no interface" in text
        )
