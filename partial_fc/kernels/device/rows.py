"""Class rows: bandwidth alone. A program takes BR whole rows of D numbers, masked up to BD."""

from __future__ import annotations

import triton
import triton.language as tl

from partial_fc.kernels.device.common import narrow

TINY = tl.constexpr(1e-12)


@triton.jit
def places(index, count, BR: tl.constexpr, GATHER: tl.constexpr):
    """Return (positions `[BR]` of this program, whether there is one, the rows there), in 64 bits."""
    at = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    here = at < count
    if GATHER:
        row = tl.load(index + at, mask=here, other=0).to(tl.int64)
    else:
        row = at
    return at, here, row


@triton.jit(do_not_specialize=["count"])
def gather_rows(
    rows, index, out, inverse, count, width, row_stride, out_stride,
    BR: tl.constexpr, BD: tl.constexpr, GATHER: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    at, here, row = places(index, count, BR, GATHER)
    d = tl.arange(0, BD)[None, :]
    inside = here[:, None] & (d < width)
    v = tl.load(rows + row[:, None] * row_stride + d, mask=inside, other=0.0).to(tl.float32)
    if NORMALISE:
        length = tl.sqrt_rn(tl.sum(v * v, 1))
        short = length <= TINY
        one_over = tl.where(short, 0.0, tl.div_rn(1.0, tl.where(short, 1.0, length)))
        v = v * one_over[:, None]
        tl.store(inverse + at, one_over, mask=here)
    tl.store(out + at[:, None] * out_stride + d, narrow(v, out.dtype.element_ty), mask=inside)


@triton.jit
def tangent(g, v, one_over):
    """Return `(g − (g·u) u) / length`, u = v / length; one_over `[BR]`."""
    u = v * one_over[:, None]
    return (g - tl.sum(g * u, 1)[:, None] * u) * one_over[:, None]


@triton.jit(do_not_specialize=["count"])
def project_rows(
    grad, rows, index, inverse, out, count, width, grad_stride, row_stride, out_stride,
    BR: tl.constexpr, BD: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    at, here, row = places(index, count, BR, GATHER)
    d = tl.arange(0, BD)[None, :]
    inside = here[:, None] & (d < width)
    v = tl.load(rows + row[:, None] * row_stride + d, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at[:, None] * grad_stride + d, mask=inside, other=0.0).to(tl.float32)
    g = tangent(g, v, tl.load(inverse + at, mask=here, other=0.0))
    tl.store(out + at[:, None] * out_stride + d, narrow(g, out.dtype.element_ty), mask=inside)
