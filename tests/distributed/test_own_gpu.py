"""Every rank has a GPU of its own: it takes the one of its local rank, and heads refuse two ranks on one.

No GPU is needed: how many there are, and which is the current one, is said by functions in the place of torch's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from partial_fc import PartialFC
from partial_fc.distributed.groups import device_of_rows, ranks_of
from partial_fc.distributed.own_gpu import check_own_gpus, take_own_gpu
from partial_fc.engines import mpi

SHARED = "ranks 0 and 1 both use GPU 0 of the 4 that they see: call torch.cuda.set_device(LOCAL_RANK), "


@contextlib.contextmanager
def gpus(count: int, current: int = 0, uuids: list[str] | None = None, backends: str = "cuda:nccl") -> Iterator[Any]:
    """As if this process saw so many GPUs, and the group had these backends."""
    properties = [SimpleNamespace(uuid=each) for each in uuids] if uuids else [SimpleNamespace()] * count
    with (
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: count > 0,
            device_count=lambda: count,
            current_device=lambda: current,
            get_device_properties=lambda index: properties[index],
        ),
        mock.patch.object(torch.cuda, "set_device") as set_device,
        mock.patch.object(dist, "get_backend_config", return_value=backends),
    ):
        yield set_device


# ---------------------------------------------------------------------------------------------------- taking one


@pytest.mark.parametrize(
    ("local_rank", "count", "taken"),
    [("3", 8, [3]), ("5", 4, [1]), ("0", 1, []), ("2", 1, []), ("1", 0, []), ("", 8, [])],
)
def test_the_local_rank_says_which(monkeypatch, local_rank, count, taken):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with gpus(count) as set_device:
        take_own_gpu()
    assert [call.args[0] for call in set_device.call_args_list] == taken


def test_under_mpi_it_is_taken_before_the_group_is_made(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    done: list[str] = []
    with gpus(2) as set_device, mock.patch.object(mpi, "set_rank_variables") as variables:
        variables.side_effect = lambda: done.append("variables")
        set_device.side_effect = lambda index: done.append(f"GPU {index}")
        with mock.patch.object(dist, "init_process_group", lambda backend, **_: done.append(backend)):
            mpi.init_process_group()
    assert done == ["variables", "GPU 1", "nccl"]


# ---------------------------------------------------------------------------------------------------- two ranks on one


def told(rank: int, world: int, current: list[int], **seen: Any) -> str:
    """What a rank is told whose head is on this GPU."""
    with gpus(**{"count": 4, **seen}, current=current[rank]):
        for device in (torch.device("cuda"), torch.device("cuda", current[rank])):
            try:
                check_own_gpus(ranks_of(None), device, "the building of a head")
            except ValueError as error:
                return str(error)
    return ""


@pytest.mark.parametrize(
    ("current", "seen", "refused"),
    [
        ([0, 0], {}, True),
        ([0, 0], {"backends": "cpu:gloo,cuda:nccl"}, True),
        ([0, 1], {}, False),
        ([0, 0], {"count": 1}, False),  # each has been given one
        ([0, 0], {"backends": "cpu:gloo,cuda:gloo"}, False),  # gloo lets them share one
        ([0, 1], {"uuids": ["a", "b", "c", "d"]}, False),
        ([2, 2], {"uuids": ["a", "b", "c", "d"]}, True),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_on_both(ranks, current, seen, refused):
    texts = ranks(2).run(told_again, current, seen)
    assert len(set(texts)) == 1, texts
    expected = SHARED.replace("GPU 0", f"GPU {current[0]}")
    assert texts[0].startswith(expected) if refused else texts[0] == "", texts


def told_again(rank: int, world: int, current: list[int], seen: dict[str, Any]) -> str:
    """A building that was refused leaves nothing behind for the next."""
    first = told(rank, world, current, **seen)
    assert told(rank, world, [0, 1], **{**seen, "backends": "cuda:nccl"}) == ""
    return first


def other_gpus_under_the_same_number(rank: int, world: int) -> str:
    with mock.patch.dict("os.environ", CUDA_VISIBLE_DEVICES="0,1,2,3" if rank else "4,5,6,7"):
        return told(rank, world, [0, 0])


def test_numbers_count_among_the_visible_ones(ranks):
    assert ranks(2).run(other_gpus_under_the_same_number) == ["", ""]


def built(rank: int, world: int) -> list[Any]:
    with mock.patch("partial_fc.batch.building.check_own_gpus") as check:
        PartialFC(4, 6)
    return [call.args[1:] for call in check.call_args_list]


def test_the_building_of_a_head_asks(ranks):
    assert ranks(2).run(built) == [[(torch.device("cpu"), "the building of a head")]] * 2


def on_the_cpu(rank: int, world: int) -> str:
    """A head on the CPU in a group of NCCL alone; the CPU carries what such a group would carry on GPUs."""
    with (
        gpus(4, current=rank),
        mock.patch("partial_fc.distributed.groups.current_device", return_value=torch.device("cpu")),
        pytest.raises(ValueError, match="are on the CPU") as error,
    ):
        PartialFC(4, 6, device="cpu")
    return str(error.value)


def test_rows_that_the_group_cannot_exchange_are_refused(ranks):
    (text,) = set(ranks(2).run(on_the_cpu))
    assert "exchanges tensors of cuda alone" in text and "cpu:gloo,cuda:nccl" in text


def default_device(rank: int, world: int) -> str:
    with gpus(4, current=2):
        return str(device_of_rows(None, ranks_of(None)))


def test_a_head_is_on_the_current_gpu_by_default(ranks):
    assert ranks(2).run(default_device) == ["cuda:2", "cuda:2"]
