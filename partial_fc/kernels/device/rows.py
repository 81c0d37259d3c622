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


@triton.jit
def inverse_length(v):
    """Return 1/length of rows; 0 for a row without a direction."""
    length = tl.sqrt_rn(tl.sum(v * v, 1))
    short = length <= TINY
    return tl.where(short, 0.0, tl.div_rn(1.0, tl.where(short, 1.0, length)))


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
        one_over = inverse_length(v)
        v = v * one_over[:, None]
        tl.store(inverse + at, one_over, mask=here)
    tl.store(out + at[:, None] * out_stride + d, narrow(v, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def catch_up_rows(
    rows, state, index, factors, out_rows, out_state, directions, inverse, count, width,
    BR: tl.constexpr, BD: tl.constexpr, STATE: tl.constexpr, NORMALISE: tl.constexpr,
    BFLOAT16: tl.constexpr, FLOAT16: tl.constexpr,
):  # fmt: skip
    """factors: `[count, 4]`, or `[count, 1]` without STATE. Directions are those of rows in BFLOAT16 or FLOAT16."""
    at, here, row = places(index, count, BR, True)
    d = tl.arange(0, BD)[None, :]
    inside = here[:, None] & (d < width)
    come, to = row[:, None] * width + d, at[:, None] * width + d
    v = tl.load(rows + come, mask=inside, other=0.0).to(tl.float32)
    if STATE:
        m = tl.load(state + come, mask=inside, other=0.0).to(tl.float32)
        of = factors + at * 4
        next_m = tl.load(of + 2, mask=here, other=0.0)[:, None] * v + tl.load(of + 3, mask=here, other=0.0)[:, None] * m
        v = tl.load(of, mask=here, other=0.0)[:, None] * v + tl.load(of + 1, mask=here, other=0.0)[:, None] * m
        tl.store(out_state + to, next_m, mask=inside)
    else:
        v = tl.load(factors + at, mask=here, other=0.0)[:, None] * v
    tl.store(out_rows + to, v, mask=inside)
    if NORMALISE:
        if BFLOAT16:
            v = narrow(v, tl.bfloat16).to(tl.float32)
        if FLOAT16:
            v = v.to(tl.float16).to(tl.float32)
        one_over = inverse_length(v)
        tl.store(inverse + at, one_over, mask=here)
        tl.store(directions + to, narrow(v * one_over[:, None], directions.dtype.element_ty), mask=inside)


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


@triton.jit
def stochastic(v, place, key):
    """Return float32 numbers on bfloat16's grid, rounded up or down as `optim.rounding.round_at_random` does. place:
    64 bits, class id · width + column."""
    # every operand has 64 bits, so that no constant of 32 makes the arithmetic narrower
    h = (place + key) * tl.full((), 0x2545F4914F6CDD1D, tl.int64)
    h ^= h >> 29
    h *= tl.full((), 0x27D4EB2F165667C5, tl.int64)
    h = (h >> 33) & 0x7FFFFFFF
    noise = (h * 65536 >> 31).to(tl.int32)
    rounded = ((v.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(v) < float("inf"), rounded, v)


@triton.jit(do_not_specialize=["count", "start", "first_id", "key", "extras"])
def step_rows(
    grad, source, rows, low, first_from, first, second_from, second, index, factors, inverse, slot, extra, extras,
    count, start, width, grad_stride, lr, a, b, decay, eps, by_rate, by_root, first_id, key,
    BR: tl.constexpr, BD: tl.constexpr, GATHER: tl.constexpr, TAKEN: tl.constexpr, ADAM: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr, FACTORS: tl.constexpr, LOW: tl.constexpr, STOCHASTIC: tl.constexpr,
    THROUGH: tl.constexpr,
):  # fmt: skip
    """Step rows in place. TAKEN: rows and state start from copies `[n, D]`. LOW: rows go to `low` as well, narrowed.
    THROUGH: gradients are those by the rows' directions, and get more at `slot`, if that is below `extras`.

    SGD: a = momentum, b = 1 − dampening. Adam: a = 1 − β1, b = β2, by_rate = lr / (1 − β1^t), by_root =
    1 / √(1 − β2^t), these two from `factors [2]` if FACTORS.
    """
    at, here, row = places(index, count, BR, GATHER)
    if GATHER:
        here = here & (row >= 0)
    else:
        row += start
    d = tl.arange(0, BD)[None, :]
    inside = here[:, None] & (d < width)
    to = row[:, None] * width + d
    if TAKEN:
        come = at[:, None] * width + d
    else:
        come = to
    v = tl.load(source + come, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at[:, None] * grad_stride + d, mask=inside, other=0.0).to(tl.float32)
    if THROUGH:
        some = tl.load(slot + at, mask=here, other=0)
        more = inside & (some < extras)[:, None]
        g += tl.load(extra + some[:, None] * width + d, mask=more, other=0.0)
        g = tangent(g, v, tl.load(inverse + at, mask=here, other=0.0))
    if MAXIMIZE:
        g = -g
    if DECAY and not DECOUPLED:
        g += decay * v
    if ADAM:
        if FACTORS:
            by_rate = tl.load(factors)
            by_root = tl.load(factors + 1)
        if DECAY and DECOUPLED:
            v *= 1.0 - lr * decay
        m = tl.load(first_from + come, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(second_from + come, mask=inside, other=0.0).to(tl.float32)
        m += a * (g - m)
        s = b * s + (1.0 - b) * g * g
        v -= by_rate * m / (tl.sqrt(s) * by_root + eps)
        tl.store(first + to, narrow(m, first.dtype.element_ty), mask=inside)
        tl.store(second + to, narrow(s, second.dtype.element_ty), mask=inside)
    else:
        if MOMENTUM:
            m = a * tl.load(first_from + come, mask=inside, other=0.0).to(tl.float32) + b * g
            tl.store(first + to, narrow(m, first.dtype.element_ty), mask=inside)
            if NESTEROV:
                g += a * m
            else:
                g = m
        v -= lr * g
    if STOCHASTIC:
        v = stochastic(v, (first_id + row)[:, None] * width + d, key)
    tl.store(rows + to, narrow(v, rows.dtype.element_ty), mask=inside)
    if LOW:
        tl.store(low + to, narrow(v, low.dtype.element_ty), mask=inside)
