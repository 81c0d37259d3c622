"""One tile of logits `[N, T]`: its size, dtype and product, and the memory of all tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from partial_fc.distributed.inside_torch import tells_holders
from partial_fc.softmax.dots import dots_at_once

TILE_BYTES = {"cpu": 4 << 20}  # a tile of logits stays in a core's cache; elsewhere large products matter more
TILE_BYTES_ELSEWHERE = 256 << 20
SLACK = 1.1  # the number of selected rows differs a little from step to step


def tile_rows(samples: int, width: int, device_type: str) -> int:
    """Return T: so many class rows that `[N, T]` and `[T, D]` in float32 fit a tile's bytes; at least 64."""
    budget = TILE_BYTES.get(device_type, TILE_BYTES_ELSEWHERE)
    return max(64, budget // (4 * max(samples, width, 1)) // 64 * 64)


def tile_size(rows: int, most: int, centers: int, device_type: str) -> int:
    """Return the rows of each tile but the last, of at most about `most`: tiles of equal size, whole classes.

    Elsewhere than on a CPU a multiple of 8, so that every line of logits in half precision begins at a multiple of 16
    bytes.
    """
    unit = centers if device_type == "cpu" else math.lcm(8, centers)
    return -(-max(rows, 1) // -(-max(rows, 1) // most) // unit) * unit


def compute_dtypes(embeddings: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of statistics (at least float32) and of products (autocast's, or that of half weights)."""
    if torch.float64 in (embeddings.dtype, weight.dtype):
        return torch.float64, torch.float64
    if torch.is_autocast_enabled(embeddings.device.type):
        return torch.float32, torch.get_autocast_dtype(embeddings.device.type)
    low = weight.dtype in (torch.bfloat16, torch.float16)
    return torch.float32, weight.dtype if low else torch.float32


def logits_bytes(samples: int, rows: int, product: torch.dtype) -> int:
    """Return the size of kept logits `[N, S]`: exponentials in the dtype of the matrix products."""
    return samples * rows * product.itemsize


def tile_logits(scaled: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Return `scaled wᵀ + bias` `[N, T]`, written into `out`; w: in the dtype of `scaled`."""
    if scaled.dtype != out.dtype:
        product = torch.mm(scaled, w.t())
        return out.copy_(product) if bias is None else torch.add(product, bias, out=out)
    return torch.mm(scaled, w.t(), out=out) if bias is None else torch.addmm(bias.to(out.dtype), scaled, w.t(), out=out)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot product of each row of `[n, D]`, `[n, 1]`; elsewhere than on a CPU without a product `[n, D]`."""
    if a.device.type == "cpu":
        return torch.linalg.vecdot(a, b).unsqueeze(1)
    return dots_at_once(a, b)


def tile_of(memory: Tensor, t: int, samples: int, size: int, rows: int) -> Tensor:
    """Return the memory `[N, rows]` of tile t; each has memory for `size` rows."""
    return memory[t * samples * size : (t + 1) * samples * size].view(samples, size)[:, :rows]


def new_tile(memory: Tensor, t: int, samples: int, size: int, rows: int) -> Tensor:
    """Return the memory of tile t, which is to be written."""
    tile = tile_of(memory, t, samples, size, size)
    if rows < size and memory.device.type == "cpu":
        tile[:, rows:].zero_()  # torch's products in bfloat16 take what stands there times 0: of a NaN they make a NaN
    return tile[:, :rows]


class Workspace:
    """Buffers by name; each is given out again in the next step, once nothing holds it any more.

    The first write to fresh memory of the CPU costs far more than the write itself: the kernel maps and clears it by
    pages (44 ms against 3 ms for 100 MB where `benchmarks/head.py` was run). GPU memory comes from torch's caching
    allocator, which does the same. Names that start with "selected" have sizes that change: they get some slack.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised contiguous tensor, of remembered memory if it is free and large enough."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        fits = buffer is not None and buffer.dtype == dtype and size <= buffer.numel() <= SLACK**2 * size
        if buffer is None or not fits or not tells_holders(_held) or _held(buffer):
            # drop the old one first: two at a time would be a higher peak than without this class
            self._buffers.pop(name, None)
            buffer = None
            buffer = torch.empty(int(size * (SLACK if name.startswith("selected") else 1)), dtype=dtype, device=device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def __deepcopy__(self, memo: dict[int, object]) -> Workspace:
        return Workspace()


def _held(buffer: Tensor) -> bool:
    """Return whether another tensor, view or saved variable holds this storage."""
    storage = buffer.untyped_storage()  # one of the holders; without a name it may be gone before they are counted
    return int(torch._C._storage_Use_Count(storage._cdata)) > 2
