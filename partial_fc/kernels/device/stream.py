"""The device's part of logits that are in no memory: sums and the embeddings' gradient, then the gradient of rows.

    stream_forward      Σ_c e_nc  [splits, N], and o_n = Σ_c e_nc w_c  [splits, N, D]     two products
    stream_backward     g_c = scale Σ_n p_nc x_n  [T, D], and Σ_n p_nc  [T]               two products

Names, operands and what is asked for are those of tile.py; X and W have blocks as wide as DP, the power of two
from D on. forward is attention with W as keys and values (arXiv 2205.14135): dX of all but the targets is o times one
number a sample, which is known only when all ranks have combined their sums. backward owns rows: each is written once,
by one program that reads all samples in order, so nothing is added by several programs and no atomics are needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from partial_fc.kernels.device.common import dot, wide
from partial_fc.kernels.device.tile import LOWEST, described, left_out  # noqa: F401


@triton.jit(do_not_specialize=["N", "T", "a", "scale2", "per_split"])
def stream_forward(
    X, W, first, column, partial, partial_o, largest, N, T, a, scale2, per_split,
    D: tl.constexpr, DP: tl.constexpr, LABELS: tl.constexpr, COLUMN: tl.constexpr, ONLINE: tl.constexpr,
    HARDEST: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid [N / BN, splits]: a program keeps BN samples and reads per_split rows, a multiple of BC.

    ONLINE: sums are Σ exp2(z − largest).
    """
    n = tl.program_id(0) * BN
    samples = n + tl.arange(0, BN)
    inside = samples < N
    x = X.load([n, 0])
    total = tl.zeros((BN,), tl.float32)
    top = tl.full((BN,), LOWEST, tl.float32)
    o = tl.zeros((BN, DP), tl.float32)
    start = tl.program_id(1) * per_split
    for c in range(start, tl.minimum(start + per_split, T), BC):
        classes = c + tl.arange(0, BC)
        w = W.load([c, 0])
        z = dot(x, w.T, tl.zeros((BN, BC), tl.float32)) * scale2
        if COLUMN:
            z += tl.load(column + classes, mask=classes < T, other=0.0)[None, :]
        if ONLINE or HARDEST:
            z = left_out(z, classes[None, :], first, samples[:, None], N, a, T, LABELS, float("-inf"))
            higher = tl.maximum(top, tl.max(z, 1))
            if ONLINE:
                smaller = tl.exp2(top - higher)
                total *= smaller
                o *= smaller[:, None]
                z -= higher[:, None]
            top = higher
            e = tl.exp2(z)
        else:
            e = left_out(tl.exp2(z), classes[None, :], first, samples[:, None], N, a, T, LABELS, 0.0)
        total += tl.sum(e, 1)
        o = dot(e.to(W.dtype), w, o)
    where = wide(tl.program_id(1)) * N + samples
    tl.store(partial + where, total, mask=inside)
    if ONLINE or HARDEST:
        tl.store(largest + where, top, mask=inside)
    d = tl.arange(0, DP)[None, :]
    tl.store(partial_o + where[:, None] * D + d, o, mask=inside[:, None] & (d < D))


@triton.jit(do_not_specialize=["N", "T", "a", "scale", "scale2"])
def stream_backward(
    X, W, first, column, shift, factor, out, out_sums, N, T, a, stride, scale, scale2,
    D: tl.constexpr, DP: tl.constexpr, LABELS: tl.constexpr, COLUMN: tl.constexpr, SHIFTED: tl.constexpr,
    SUMS: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid [T / BC]: a program keeps BC rows and reads all samples, in order.

    p_nc = ∂L/∂logit = factor_n exp2(z_nc − shift_n), 0 for the targets; shift is 0 without SHIFTED. out `[T, D]`, its
    rows `stride` numbers apart, may be the memory of W's own rows: a program writes the rows that it has read, when it
    is done with them. out_sums `[T]`, with SUMS: Σ_n p_nc.
    """
    c = tl.program_id(0) * BC
    classes = c + tl.arange(0, BC)
    here = classes < T
    w = W.load([c, 0])
    g = tl.zeros((BC, DP), tl.float32)
    sums = tl.zeros((BC,), tl.float32)
    for n in range(0, N, BN):
        samples = n + tl.arange(0, BN)
        inside = samples < N
        x = X.load([n, 0])
        z = dot(w, x.T, tl.zeros((BC, BN), tl.float32)) * scale2
        if COLUMN:
            z += tl.load(column + classes, mask=here, other=0.0)[:, None]
        if SHIFTED:
            z -= tl.load(shift + samples, mask=inside, other=0.0)[None, :]
        p = tl.exp2(z) * tl.load(factor + samples, mask=inside, other=0.0)[None, :]
        p = left_out(p, classes[:, None], first, samples[None, :], N, a, T, LABELS, 0.0)
        if SUMS:
            sums += tl.sum(p, 1)
        g = dot(p.to(X.dtype), x, g)
    d = tl.arange(0, DP)[None, :]
    # by pointer: a store by descriptor makes ptxas serialise every wgmma of the loop (C7515)
    where = (wide(c) + tl.arange(0, BC))[:, None] * stride + d
    tl.store(out + where, (g * scale).to(out.dtype.element_ty), mask=here[:, None] & (d < D))
    if SUMS:
        tl.store(out_sums + classes, sums, mask=here)
