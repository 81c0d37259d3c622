"""Initial rows: normal numbers that depend on (seed, class id, column) alone, so that any rank draws any row by itself.

    class ids [n]  ──>  counters [n, pairs]  ── SplitMix64 ──>  64 bits  ── Box and Muller ──>  two numbers of a row

Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014 (SplitMix64). Box, Muller: A Note on the
Generation of Random Normal Deviates, 1958; its logarithm, sine and cosine are polynomials here, of operations that are
exactly rounded wherever they run. So a row has the same bits alone, in any block, and with any build of torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from partial_fc.sampling import mix

PAIRS = 1 << 15  # pairs of numbers drawn at a time: ten temporaries of so many stay in a cache
TEMPORARIES = 10  # of 8 bytes a pair (planning/memory.py)
INITIAL = 0x696E6974  # part of the meaning of a seed, so never to be changed, as are all numbers below
_GOLDEN, _FIRST, _SECOND = (
    0x9E3779B97F4A7C15 - (1 << 64),
    0xBF58476D1CE4E5B9 - (1 << 64),
    0x94D049BB133111EB - (1 << 64),
)
_ONE = 1023 << 52  # the bits of 1.0


def initial_rows(lo: int, hi: int, row_shape: tuple[int, ...], *, std: float, seed: int) -> Tensor:
    """Return rows `[lo, hi)` of the initial matrix in host memory, float32 `[hi - lo, *row_shape]`."""
    out = torch.empty(hi - lo, *row_shape, device="cpu", dtype=torch.float32)
    fill_initial_rows(out, lo, std=std, seed=seed)
    return out


def fill_initial_rows(out: Tensor, lo: int, *, std: float, seed: int) -> None:
    """Fill `out [n, ...]`, on any device, with the rows of the initial matrix from class id `lo` on: normal numbers
    with deviation `std`. They are drawn on the CPU, a block at a time."""
    step = rows_at_a_time(math.prod(out.shape[1:]))
    for a in range(0, len(out), step):
        ids = torch.arange(lo + a, lo + min(a + step, len(out)), device="cpu")
        out[a : a + step] = rows_of(ids, tuple(out.shape[1:]), std=std, seed=seed)


def rows_at_a_time(numbers: int) -> int:
    """Return how many rows of so many numbers are drawn at a time."""
    return max(1, PAIRS // max(1, -(-numbers // 2)))


def rows_of(ids: Tensor, row_shape: tuple[int, ...], *, std: float, seed: int) -> Tensor:
    """Return the initial rows of the class ids `[n]` (int64, on the CPU), float32 `[n, *row_shape]`; all at once."""
    numbers = math.prod(row_shape)
    pairs = -(-numbers // 2)
    places = torch.arange(pairs, device="cpu")
    bits = _random_bits(ids[:, None] * pairs + places, mix(seed, INITIAL))
    radius = _logarithm(bits).mul_(-2 * std * std).sqrt_()
    sine, cosine = _circle(bits)
    swapped = (sine - cosine).mul_((bits >> 30).bitwise_and_(1))  # torch.where takes many times as long
    out = torch.empty(len(ids), pairs, 2, device="cpu", dtype=torch.float32)
    out[..., 0] = cosine.add_(swapped).mul_(radius)
    out[..., 1] = sine.sub_(swapped).mul_(radius)
    return out.view(len(ids), 2 * pairs)[:, :numbers].reshape(len(ids), *row_shape)


def _random_bits(counters: Tensor, key: int) -> Tensor:
    """Return 64 random bits for each counter, in its memory."""
    bits = counters.mul_(_GOLDEN).add_(key)
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        # the shift of a signed number repeats its sign, which the mask takes away
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return bits


def _logarithm(bits: Tensor) -> Tensor:
    """Return ln u of u in (0, 1), by the upper 32 bits: of its exponent, and of its mantissa around √2 as 2 artanh."""
    u = (bits >> 32).bitwise_and_(0xFFFFFFFF).to(torch.float64).add_(0.5).mul_(2.0**-32)
    exponent = (u.view(torch.int64) >> 52).sub_(1023).to(torch.float64).add_(0.5).mul_(math.log(2))
    mantissa = u.view(torch.int64).bitwise_and_((1 << 52) - 1).bitwise_or_(_ONE).view(torch.float64)
    s = (mantissa - math.sqrt(2)).div_(mantissa.add_(math.sqrt(2)))
    return _polynomial(s.square(), [2 / k for k in range(1, 15, 2)]).mul_(s).add_(exponent)


def _circle(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sine, cosine) of an angle in (−π/4, π/4), by the lowest 30 bits; the cosine's sign by bit 31."""
    x = (bits & ((1 << 30) - 1)).to(torch.float64).add_(0.5 - 2**29).mul_(math.pi / 2**31)
    square = x.square()
    sine = _polynomial(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(6)]).mul_(x)
    cosine = _polynomial(square, [(-1) ** k / math.factorial(2 * k) for k in range(7)])
    sign = (bits >> 30).bitwise_and_(2).neg_().add_(1)
    return sine, cosine.mul_(sign)


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """Return Σ c_k x^k; each step is a product and a sum, each rounded by itself."""
    total = x * coefficients[-1]
    for c in coefficients[-2:0:-1]:
        total.add_(c).mul_(x)
    return total.add_(coefficients[0])
