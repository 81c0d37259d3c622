"""Class rows `[S, D]` by kernels. Each function returns whether its kernel ran; if not, nothing was written.

gather_rows     rows, picked or not  ──>  directions, 1/length
project_rows    gradient by directions  ──>  gradient by rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.kernels.launch import device_code, ran

NUMBERS = 2048  # of all rows of a program, if one row has not more


class Blocks(NamedTuple):
    """How a program takes rows: BR at once, of BD numbers, the power of two from D on."""

    BR: int
    BD: int
    num_warps: int

    @classmethod
    def of(cls, width: int) -> Blocks:
        BD = max(16, 1 << (width - 1).bit_length())
        return cls(max(1, NUMBERS // BD), BD, 4 if BD <= NUMBERS else 8 if BD <= 2 * NUMBERS else 16)


def gather_rows(rows: Tensor, index: Tensor | None, out: Tensor, inverse: Tensor | None) -> bool:
    """Write rows to `out [n, D]`, in its dtype: their directions if there is memory for 1/length, else as they are.

    rows: `[C, D]`, of which index `[n]` are taken, or None for all. inverse: `[n, 1]` float32, 0 without a direction.
    """
    count, width = out.shape
    how = Blocks.of(width)

    def launch() -> None:
        kernel = device_code("rows").gather_rows[(-(-count // how.BR),)]
        lengths = out if inverse is None else inverse
        kernel(
            rows, index if index is not None else out, out, lengths, count, width, rows.stride(0), out.stride(0),
            GATHER=index is not None, NORMALISE=inverse is not None, **how._asdict(),
        )  # fmt: skip

    return count == 0 or ran("gather_rows", launch, out)


def project_rows(grad: Tensor, rows: Tensor, index: Tensor | None, inverse: Tensor, out: Tensor) -> bool:
    """Write `(g − (g·u) u) / length` to `out [n, D]`, for gradients `[n, D]` by the directions u; both may be one
    memory. rows, index and inverse: as of `gather_rows`."""
    count, width = out.shape
    how, grad = Blocks.of(width), grad if grad.stride(1) == 1 else grad.contiguous()

    def launch() -> None:
        kernel = device_code("rows").project_rows[(-(-count // how.BR),)]
        kernel(
            grad, rows, index if index is not None else out, inverse, out, count, width, grad.stride(0), rows.stride(0),
            out.stride(0), GATHER=index is not None, **how._asdict(),
        )  # fmt: skip

    return count == 0 or ran("project_rows", launch, out)


def catch_up_rows(
    tensors: list[Tensor],
    index: Tensor,
    coefficients: Tensor,
    outs: list[Tensor],
    directions: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> bool:
    """Write to `outs` (float32 `[n, D]` each) the rows `index [n]` of `tensors`, rows `[C, D]` and at most one piece of
    their state, multiplied by their matrix in `coefficients [n, 1 or 4]` (to · from). directions: memory `[n, D]` and
    `[n, 1]` for directions and 1/length of the moved rows, as they are in `dtype`; or None."""
    count, width = outs[0].shape
    how, out = Blocks.of(width), outs[0]
    of_directions, inverse = directions or (out, out)

    def launch() -> None:
        kernel = device_code("rows").catch_up_rows[(-(-count // how.BR),)]
        kernel(
            tensors[0], tensors[-1], index, coefficients, out, outs[-1], of_directions, inverse, count, width,
            STATE=len(tensors) > 1, NORMALISE=directions is not None,
            BFLOAT16=dtype == torch.bfloat16, FLOAT16=dtype == torch.float16, **how._asdict(),
        )  # fmt: skip

    return count == 0 or ran("catch_up_rows", launch, out)
