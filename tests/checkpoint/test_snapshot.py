"""Copies for asynchronous saves: complete when they are returned, and no more than one block of pinned memory.

A tensor that says it is on a GPU stands for one that is; whether memory is pinned is noted, and then left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from partial_fc import Checkpointer, load_checkpoint
from partial_fc.checkpoint import snapshot

BLOCK = 1 << 16


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def on_gpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnGpu)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of every tensor that is made in pinned memory."""
    sizes: list[int] = []
    empty = torch.empty

    def noting(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        made = empty(*size, **options)
        if pin_memory:
            sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(snapshot, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(snapshot, "SMALL_BYTES", 256)
    with mock.patch.object(torch, "empty", noting):
        yield sizes


class Rows:
    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state


def test_a_save_pins_one_block_whatever_the_size_of_the_state(tmp_path, pinned):
    """Twice, with other values: the second copy is in the memory of the first, and both are of their moment."""
    whole = torch.randn(5, BLOCK // 16)  # 1.25 blocks
    small, odd = torch.tensor(3.0), torch.randn(300, 7, dtype=torch.float64)[:, :5]
    state = Rows(whole=on_gpu(whole), small=on_gpu(small), odd=on_gpu(odd), host=whole[0].clone())
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    for step in (1, 2):
        expected = {name: torch.as_tensor(each).as_subclass(Tensor).clone() for name, each in state.tensors.items()}
        checkpointer.save(step, state=state)
        for each in (whole, small, odd):  # at once: the copy does not depend on them any more
            each.add_(1.0)
        checkpointer.wait()
        loaded = Rows(**{name: torch.zeros_like(each) for name, each in expected.items()})
        load_checkpoint(checkpointer.path(step), state=loaded)
        for name, each in expected.items():
            assert torch.equal(loaded.tensors[name], each), (step, name)
    assert pinned == [BLOCK]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool])
def test_blocks_that_do_not_divide_a_tensor_leave_nothing_out(pinned, dtype):
    copies = snapshot.Snapshots()
    tensor = torch.randint(0, 2, (BLOCK + 3,)).to(dtype)
    copy = copies.copy("rows", on_gpu(tensor))
    assert copy.dtype == dtype and torch.equal(copy, tensor)
    assert copies.copy("rows", on_gpu(~tensor if dtype == torch.bool else tensor + 1)).data_ptr() == copy.data_ptr()
    assert not torch.equal(copy, tensor) and copies.copy("rows", on_gpu(tensor[:9])).shape == (9,)
    assert pinned == [BLOCK]
