"""The pretend GPU itself: what it counts, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_gpu import Pools
from pretend_gpu import DeviceMistake, PretendGpu

MIB = 1 << 20


def figures(gpu: PretendGpu, action: Callable[[], Any]) -> tuple[int, int, int]:
    """Launches, waits and bytes of it."""
    gpu.clear()
    action()
    return gpu.counts.launches, gpu.counts.waits, gpu.counts.bytes


def counted(rank: int, world: int) -> dict[str, tuple[int, int, int]]:
    with PretendGpu() as gpu:
        x = torch.ones(512, 512, device=gpu.device)  # 1 MiB
        narrow = torch.ones(512, 4, device=gpu.device)
        rows = torch.tensor([3, 5], device=gpu.device)
        two = torch.ones(2, 512, device=gpu.device)
        many = [torch.ones(512, 512, device=gpu.device) for _ in range(65)]
        on_host = torch.ones(512, 512)
        actions: dict[str, Callable[[], Any]] = {
            "an allocation": lambda: torch.empty(512, 512, device=gpu.device),
            "a view": lambda: x.t()[3:].select(1, 0).expand(2, -1),
            "a view that is none": lambda: x.t().reshape(-1),
            "a fill": lambda: x.fill_(1.0),
            "a sum of two": lambda: x + many[0],
            "the same twice": lambda: x * x,
            "in place": lambda: x.mul_(2.0),
            "with an expanded row": lambda: x + two[0].expand(512, 512),
            "a copy": lambda: x.copy_(many[0]),
            "a product": lambda: torch.mm(x, narrow),
            "a product that is written to memory": lambda: torch.mm(x, many[0], out=many[1]),
            "two rows": lambda: x[rows],
            "two rows, written": lambda: x.index_copy_(0, rows, two),
            "two rows, added": lambda: x.index_add_(0, rows, two),
            "many in one": lambda: torch._foreach_mul_(many, 2.0),
            "item": lambda: x[0, 0].item(),
            "tolist": lambda: rows.tolist(),
            "a branch": lambda: bool(x[0, 0] > 0),
            "nonzero": lambda: rows.nonzero(),
            "unique": lambda: rows.unique(),
            "a boolean index": lambda: rows[rows > 3],
            "to the host": lambda: rows.cpu(),
            "to the host, unasked": lambda: rows.to("cpu", non_blocking=True),
            "an upload": lambda: on_host.to(gpu.device),
            "an upload, unasked": lambda: on_host.to(gpu.device, non_blocking=True),
            "an upload from pinned memory": lambda: torch.tensor([1, 2], pin_memory=True).to(
                gpu.device, non_blocking=True
            ),
            "a download to pinned memory": lambda: torch.empty(2, pin_memory=True).copy_(two[:, 0], non_blocking=True),
            "an event": lambda: torch.get_device_module(gpu.device).Event().synchronize(),
            "an upload of a number": lambda: torch.tensor(1.0, device=gpu.device),
            "a number of the CPU": lambda: rows + torch.tensor(1),
            "synchronize": torch.accelerator.synchronize,
        }
        return {name: figures(gpu, action) for name, action in actions.items()}


def test_what_is_counted(gpu_ranks: Pools):
    (found,) = gpu_ranks(1).run(counted)
    row, few = 4 * 512, 4 * 4 * 512
    assert found == {
        "an allocation": (0, 0, 0),
        "a view": (0, 0, 0),
        "a view that is none": (1, 0, 2 * MIB),
        "a fill": (1, 0, MIB),
        "a sum of two": (1, 0, 3 * MIB),
        "the same twice": (1, 0, 2 * MIB),
        "in place": (1, 0, 2 * MIB),
        "with an expanded row": (1, 0, 2 * MIB + row),
        "a copy": (1, 0, 2 * MIB),
        "a product": (1, 0, MIB + 2 * few),
        "a product that is written to memory": (1, 0, 3 * MIB),
        "two rows": (1, 0, 4 * row + 16),
        "two rows, written": (1, 0, 4 * row + 16),
        "two rows, added": (1, 0, 6 * row + 16),
        "many in one": (2, 0, 65 * 2 * MIB),
        "item": (1, 1, 4),
        "tolist": (1, 1, 16),
        "a branch": (2, 1, 6),
        "nonzero": (1, 1, 32),
        "unique": (1, 1, 32),
        "a boolean index": (2, 1, 16 + 2 + 2 + 8 + 8),
        "to the host": (1, 1, 16),
        "to the host, unasked": (1, 0, 16),
        "an upload": (1, 1, MIB),
        "an upload, unasked": (1, 0, MIB),
        "an upload from pinned memory": (1, 0, 16),
        "a download to pinned memory": (1, 0, 8),
        "an event": (0, 1, 0),
        "an upload of a number": (1, 1, 4),
        "a number of the CPU": (1, 0, 32),
        "synchronize": (0, 1, 0),
    }


def refused(rank: int, world: int) -> dict[str, str]:
    """What is said of each mistake, "" where there is none."""
    found: dict[str, str] = {}
    with PretendGpu() as gpu:
        x, on_host, index = torch.ones(4, device=gpu.device), torch.ones(4), torch.tensor([1])
        host_group = dist.new_group(backend="gloo")
        actions: dict[str, Callable[[], Any]] = {
            "a sum": lambda: x + on_host,
            "a concatenation": lambda: torch.cat((x, on_host)),
            "a stack of numbers": lambda: torch.stack((x[0], on_host[0])),
            "a fused optimizer": lambda: torch._fused_sgd_(
                [x], [on_host], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0, nesterov=False,
                maximize=False, is_first_step=True,
            ),
            "an index": lambda: x[index],
            "a collective": lambda: dist.all_reduce(on_host),
            "a collective of the device": lambda: dist.all_reduce(x),
            "a collective of the host": lambda: dist.all_reduce(on_host, group=host_group),
            "a tensor of the device in one of the host": lambda: dist.all_reduce(x, group=host_group),
            "objects": lambda: dist.all_gather_object([None] * world, rank),
            "a barrier": lambda: dist.barrier(),
        }  # fmt: skip
        for name, action in actions.items():
            try:
                action()
                found[name] = ""
            except DeviceMistake as mistake:
                found[name] = str(mistake).split(", at")[0]
        assert x.tolist() == [float(world)] * 4
        assert len(gpu.mistakes) == sum(map(bool, found.values()))
    return found


def test_what_is_refused(gpu_ranks: Pools):
    mixed = "{} of tensors of the device and of the CPU"
    expected = {
        "a sum": mixed.format("add"),
        "a concatenation": mixed.format("cat"),
        "a stack of numbers": mixed.format("stack"),
        "a fused optimizer": mixed.format("_fused_sgd_"),
        "an index": "",
        "a collective": "a tensor of the CPU for c10d.allreduce_.default of a group of the device",
        "a collective of the device": "",
        "a collective of the host": "",
        "a tensor of the device in one of the host": "a tensor of the device for c10d.allreduce_.default of a group of the host",
        "objects": "",
        "a barrier": "",
    }
    assert gpu_ranks(2).run(refused) == [expected, expected]


def by_line(rank: int, world: int) -> tuple[dict[str, int], str]:
    """Launches by line of a forward and backward; the table."""
    from partial_fc import PartialFC

    with PretendGpu() as gpu:
        head = PartialFC(6, 20, device=gpu.device)
        x = torch.randn(4, 6, device=gpu.device).requires_grad_()
        gpu.clear()
        head(x, torch.arange(4, device=gpu.device)).backward()
        return {name: line.launches for name, line in gpu.counts.by_line().items()}, gpu.table()


def test_work_is_told_by_line_also_of_backward(gpu_ranks: Pools):
    ((lines, table),) = gpu_ranks(1).run(by_line)
    files = {line.split(":")[0] for line in lines}
    assert {"softmax/forward.py", "softmax/backward.py", "batch/targets.py", "margins/fixed.py"} <= files
    assert "?" not in files
    of_caller = [line for line in lines if line.endswith("(caller)")]
    assert sum(lines[line] for line in of_caller) <= 2, "backward() itself makes the gradient of the loss"
    assert f"{sum(lines.values()):8}" in table.splitlines()[-1]


def test_this_process_has_no_such_device():
    with pytest.raises(RuntimeError, match="gpu"):
        torch.device("gpu")
