"""One optimizer step of one parameter, block of rows by block of rows.

    rows of weight and state  ──>  a small dense parameter  ──  class.step()  ──>  written back

Blocks bound the memory of temporaries. All blocks start from the same scalar state, so it counts one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from partial_fc.optim.optimizer_class import fused_moves, is_row_state
from partial_fc.sampling import keyed_below, mix
from partial_fc.shards import local_part

if TYPE_CHECKING:
    from partial_fc.optim.row_state import RowState

BLOCK_BYTES = 8 << 20
HALF = (torch.bfloat16, torch.float16)
MASTER = "master_weight"  # state of this package's own, beside that of the wrapped class
COUNT = "rounding_step"


def row_blocks(count: int, weight: Tensor) -> Iterator[tuple[int, int]]:
    """Yield row blocks (a, b) of bounded size; one empty block without rows, so that scalar state counts as on other ranks."""
    size = max(1, BLOCK_BYTES // max(1, weight[:1].nbytes if len(weight) else 1))
    for a in range(0, max(count, 1), size):
        yield a, min(a + size, count)


class RowUpdate:
    """One step of `parameter`; call `apply` for each block of rows."""

    def __init__(self, optimizer: RowState, parameter: nn.Parameter) -> None:
        self.optimizer = optimizer
        self.parameter = parameter
        self.weight = local_part(parameter.detach())
        self.state = optimizer.state[parameter]
        self.wide = optimizer.low_precision if self.weight.dtype in HALF else None
        if self.wide == "master" and MASTER not in self.state:
            self.state[MASTER] = optimizer.allocate(parameter, torch.float32, MASTER)
        self.before = {k: v for k, v in self.state.items() if k not in (MASTER, COUNT)}
        group = optimizer.inner.param_groups[0]
        group.update({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
        if group.get("fused") and not self.wide and self.weight.dtype in HALF and self.weight.device.type == "cpu":
            group["fused"] = fused_moves(type(optimizer.inner), self.weight.dtype)  # type: ignore[arg-type]
        if self.wide == "stochastic":
            self.state[COUNT] = self.state.get(COUNT, 0) + 1

    def apply(self, index: Tensor | None, a: int, b: int, grad: Tensor) -> None:
        """Step the local rows `index`, or a to b, by `grad`; views are stepped in place."""
        inner = self.optimizer.inner
        source = local_part(self.state[MASTER]) if self.wide == "master" else self.weight
        rows = _take(source, index, a, b)
        block = nn.Parameter(rows.float() if self.wide else rows)
        block.grad = grad.to(block.dtype)
        inner.param_groups[0]["params"] = [block]
        inner.state.clear()
        if self.before:
            inner.state[block] = {key: _of_rows(value, index, a, b) for key, value in self.before.items()}
        inner.step()
        self._put_back(block.detach(), index, a, b)
        for key, value in inner.state[block].items():
            if not is_row_state(value, block):
                self.state[key] = value
                continue
            if key not in self.state:
                self.state[key] = self.optimizer.allocate(self.parameter, value.dtype, key)
            _put(local_part(self.state[key]), value, index, a, b)
        inner.state.clear()
        inner.param_groups[0]["params"] = []

    def _put_back(self, block: Tensor, index: Tensor | None, a: int, b: int) -> None:
        if self.wide == "master":
            _put(local_part(self.state[MASTER]), block, index, a, b)
        if self.wide == "stochastic":
            rows = self.optimizer.class_rows
            ids = rows.shards.lo + (torch.arange(a, b, device=block.device) if index is None else index)
            block = round_at_random(block, ids, mix(rows.seed, self.state[COUNT]))
        _put(self.weight, block.to(self.weight.dtype), index, a, b)


def round_at_random(values: Tensor, ids: Tensor, key: int) -> Tensor:
    """Round float32 rows `[n, ...]` to bfloat16's grid, up or down so that the mean stays; keyed by class id and place.

    bfloat16 is the upper half of a float32: a uniform 16-bit number is added to the lower half, which is then cut off.
    """
    flat = values.reshape(len(values), math.prod(values.shape[1:]))  # -1 cannot be inferred where there are no rows
    places = ids[:, None] * flat.shape[1] + torch.arange(flat.shape[1], device=values.device)
    noise = keyed_below(places, key, 1 << 16).int()
    rounded = (flat.contiguous().view(torch.int32) + noise) & -65536
    return torch.where(flat.isfinite(), rounded.view(torch.float32), flat).view(values.shape)


def _take(tensor: Tensor, index: Tensor | None, a: int, b: int) -> Tensor:
    return tensor[a:b] if index is None else tensor.index_select(0, index)


def _put(tensor: Tensor, values: Tensor, index: Tensor | None, a: int, b: int) -> None:
    if index is not None:
        tensor.index_copy_(0, index, values)
    elif tensor[a:b].data_ptr() != values.data_ptr():  # else the class worked in place, on a view
        tensor[a:b] = values


def _of_rows(value: Any, index: Tensor | None, a: int, b: int) -> Any:
    """Return the rows of row state; a copy of scalar state, because the step of each block advances it."""
    if isinstance(value, Tensor) and value.ndim:
        return _take(local_part(value), index, a, b)
    return value.clone() if isinstance(value, Tensor) else value
