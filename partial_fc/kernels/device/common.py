"""What kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wide(i):
    """Return a number in 64 bits. The interpreter gives loop variables as plain ints, which have no `to`."""
    return tl.full((), 0, tl.int64) + i


@triton.jit
def dot(a, b, acc):
    """Return a @ b + acc in float32.

    The interpreter multiplies the bits of bfloat16, and a library for CPUs adds in an order that depends on which
    operand is the first. So there it is float64, rounded once: a card's bits do not depend on that either.
    """
    if INTERPRETED:
        wide_acc = acc.to(tl.float64)
        acc = tl.dot(a.to(tl.float64), b.to(tl.float64), wide_acc, out_dtype=tl.float64).to(tl.float32)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """Return float32 numbers in another dtype, rounded to the nearest. The interpreter cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        v = tl.where(v == v, (bits & -65536).to(tl.float32, bitcast=True), v)
    return v.to(dtype)


@triton.jit
def counted(out, n):
    """Store n, counted by a loop whose bounds are tensors: some versions of NumPy cannot be joined with it."""
    total = tl.load(out)
    first = tl.program_id(0)
    for _ in range(first, first + n):
        total += 1.0
    tl.store(out, total)
