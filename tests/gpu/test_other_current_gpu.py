"""A rank whose current GPU is not that of its head: `device=f"cuda:{LOCAL_RANK}"` without `torch.cuda.set_device`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pretend_gpu
import pytest
import torch
import torch.distributed as dist
from runner import Ranks

from partial_fc import Progress, RandomState, load_checkpoint, save_checkpoint
from partial_fc.arriving import Arriving
from partial_fc.diagnosis.checks import Check, agreed
from partial_fc.distributed.agreement import check_same, on_every_rank, on_first_rank

Pools = Callable[[int], Ranks]


def test_the_host_waits_for_the_stream_that_copies(monkeypatch: pytest.MonkeyPatch):
    """An event is recorded on a stream of the current device where none is given: one that has no copy to wait for."""
    recorded: list[object] = []
    event = SimpleNamespace(record=lambda stream=None: recorded.append(stream), query=lambda: True)
    module = SimpleNamespace(Event=lambda: event, current_stream=lambda device=None: ("stream of", device))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    numbers = torch.arange(3)
    assert torch.equal(Arriving(numbers).values(), numbers)
    assert recorded == [("stream of", numbers.device)]


def _fail(rank: int) -> None:
    if rank:
        raise ValueError("of no use")


def _objects(rank: int, world: int, folder: str) -> list[str]:
    """What the device was asked for by collectives of objects."""
    with pretend_gpu.PretendGpu() as gpu:
        check_same("the number", 3)
        assert on_first_rank(lambda: {"found": 7}) == {"found": 7}
        with pytest.raises(ValueError, match="rank 1: of no use"):
            on_every_rank(lambda: _fail(rank))
        assert [check.ok for check in agreed([Check("one", True, "fine"), Check("two", rank == 0, "?")])] == [
            True,
            False,
        ]
        path, progress = Path(folder) / "checkpoint", Progress(epoch=1, step=2)
        save_checkpoint(path, progress=progress, random=RandomState())
        load_checkpoint(path, progress=progress, random=RandomState())
        group = dist.new_group()
        check_same("the number", 4, group)
        return sorted({event.line for event in gpu.counts.events})


def test_objects_travel_between_hosts(gpu_ranks: Pools, tmp_path: Path):
    """NCCL alone would send them by the current GPU, and the host would wait for it."""
    assert gpu_ranks(2).run(_objects, str(tmp_path)) == [[], []]
