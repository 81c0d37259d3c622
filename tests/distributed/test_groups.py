"""Which devices a group can exchange, asked of groups that have several backends, or a GPU's alone.

No GPU is needed: the configuration of the group, and which GPU is the current one, are said to be others.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from partial_fc import PreemptionGuard
from partial_fc.distributed.groups import backends_of, device_of
from partial_fc.distributed.ranks import Ranks
from partial_fc.planning.measure_comms import comms

GROUP: Any = object()


def configured(backends: str, current: int = 0) -> Any:
    """As if every group had these backends, and this GPU were the current one."""
    return mock.patch.multiple(
        dist, get_backend_config=lambda group=None: backends, get_backend=mock.Mock(side_effect=AssertionError)
    ), mock.patch.object(torch.cuda, "current_device", return_value=current)


@pytest.mark.parametrize(
    ("backends", "device"),
    [
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu"),  # what torch takes where none is named, depending on its version
        ("cuda:nccl,cpu:gloo", "cpu"),  # Accelerate's, under FSDP with offloading
        ("cuda:nccl", "cuda:3"),
    ],
)
def test_the_configuration_of_a_group_says_what_it_exchanges(backends, device):
    group, gpu = configured(backends, current=3)
    with group, gpu:
        assert device_of(Ranks(world=2, group=GROUP)) == torch.device(device)
        assert device_of(Ranks()) == torch.device("cpu")


def test_another_accelerator_is_asked_for_its_current_device():
    group, _ = configured("xpu:xccl")
    with group, mock.patch.object(torch.xpu, "current_device", return_value=2):
        assert device_of(Ranks(world=2, group=GROUP)) == torch.device("xpu", 2)
        assert backends_of(None) == {"xpu": "xccl"}


def measured_backend(rank: int, world: int) -> str:
    group, gpu = configured("cpu:gloo,cuda:nccl")
    with group, gpu:
        return comms(8, 4, 4, repeats=1).backend


def test_the_measurement_names_the_backend_of_its_device(ranks):
    assert set(ranks(2).run(measured_backend)) == {"gloo"}


def sent(rank: int, world: int) -> str:
    """The device of what the guard sends in a group of NCCL alone; the meta device stands for a GPU."""
    group, _ = configured("cuda:nccl")
    seen: list[str] = []
    with (
        group,
        mock.patch("partial_fc.distributed.groups.current_device", return_value=torch.device("meta")),
        mock.patch.object(dist, "all_reduce", side_effect=lambda tensor, **_: seen.append(tensor.device.type)),
        contextlib.suppress(RuntimeError),  # it has no value
    ):
        PreemptionGuard().requested()
    return seen[0]


def test_a_request_to_stop_travels_on_the_device_of_the_group(ranks):
    assert ranks(2).run(sent) == ["meta", "meta"]
