"""The device's part of a tile: product, targets left out, exponentials, their sums, in one launch.

    X [N, D] unit embeddings, W [T, D] rows a to a + T of this rank's, both in the dtype of the products and given as
    descriptors of the host (TMA): what is read beyond the last row or column is 0, what is written there is dropped

    z_nc = X_n · W_c scale2 + column_c − shift_n      logits in powers of two: scale2 = scale log2(e), the others alike
    e_nc = exp2(z_nc − m_n)                           0 for the sample's targets and beyond the last row
    E, Σ_c e_nc, max_c z_nc                           [N, T], [splits, N], [splits, N], each where it is asked for

m is 0 where no sum of exponentials can leave float32 (BOUNDED or SHIFTED); else the maximum that a program has seen so
far (ONLINE, as in attention: arXiv 2205.14135), which is stored for each block of E.

A program does BN samples and `per_split` rows. What several programs add to goes to [splits, N], which the host adds in
one fixed order: the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from partial_fc.kernels.device.common import dot, wide

described = TensorDescriptor.from_tensor

LOWEST = tl.constexpr(-3.0e38)  # finite: a block without a single logit must not make NaN of -inf - -inf


@triton.jit
def left_out(values, classes, first, samples, N, a, T, LABELS: tl.constexpr, FILL: tl.constexpr):
    """`values`, with FILL for the targets and beyond the last row. classes and samples broadcast to its shape."""
    inside = samples < N
    out = classes >= T
    for label in tl.static_range(LABELS):
        target = tl.load(first + samples * LABELS + label, mask=inside, other=-1)
        out = out | (classes + a == target)
    return tl.where(out, FILL, values)


@triton.jit(do_not_specialize=["N", "T", "a", "scale2", "per_split"])
def tile_exponentials(
    X, W, E, first, column, shift, partial, largest, maxima, N, T, a, scale2, per_split,
    D: tl.constexpr, LABELS: tl.constexpr, COLUMN: tl.constexpr, SHIFTED: tl.constexpr, ONLINE: tl.constexpr,
    SUMS: tl.constexpr, HARDEST: tl.constexpr, STORE: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid [N / BN, splits]. Blocks of X, W and E: [BN, BD], [BC, BD], [BN, BC / 2]; per_split is a multiple of BC.

    first `[N, LABELS]` int32: positions of the targets among all rows, -1 where they are elsewhere. column `[T]`, shift
    `[N]`. partial, largest `[splits, N]`. maxima `[2 T / BC, N]`: m of each half block of E, with ONLINE and STORE.
    What is not asked for is not looked at.
    """
    n = tl.program_id(0) * BN
    samples = n + tl.arange(0, BN)
    inside = samples < N
    HALF: tl.constexpr = BC // 2
    total = tl.zeros((BN,), tl.float32)
    top = tl.full((BN,), LOWEST, tl.float32)
    start = tl.program_id(1) * per_split
    # flatten: one loop over (c, d), so that the next operands are on their way while exponentials are made
    for c in tl.range(start, tl.minimum(start + per_split, T), BC, flatten=True):
        products = tl.zeros((BN, BC), tl.float32)
        for d in range(0, D, BD):
            products = dot(X.load([n, d]), W.load([c, d]).T, products)
        # by halves: fewer registers and less staging memory
        left, right = products.reshape(BN, 2, HALF).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            at = c + half * HALF
            classes = at + tl.arange(0, HALF)
            z = (left if half == 0 else right) * scale2
            if COLUMN:
                z += tl.load(column + classes, mask=classes < T, other=0.0)[None, :]
            if SHIFTED:
                z -= tl.load(shift + samples, mask=inside, other=0.0)[:, None]
            if ONLINE or HARDEST:
                z = left_out(z, classes[None, :], first, samples[:, None], N, a, T, LABELS, float("-inf"))
                higher = tl.maximum(top, tl.max(z, 1))
                if ONLINE:
                    total *= tl.exp2(top - higher)
                    z -= higher[:, None]
                top = higher
                e = tl.exp2(z)
            else:
                e = left_out(tl.exp2(z), classes[None, :], first, samples[:, None], N, a, T, LABELS, 0.0)
            if SUMS:
                total += tl.sum(e, 1)
            if STORE:
                E.store([n, at], e.to(E.dtype))
            if STORE and ONLINE:
                tl.store(maxima + wide(at // HALF) * N + samples, top, mask=inside)
    where = wide(tl.program_id(1)) * N + samples
    if SUMS:
        tl.store(partial + where, total, mask=inside)
    if ONLINE or HARDEST:
        tl.store(largest + where, top, mask=inside)
