"""Small problems for kernels, and what plain PyTorch makes of them in float64, on the device of the kernels.

    of_rows     gather_rows, project_rows
    of_moves    catch_up_rows
    of_step     step_rows
    of_tiles    tile_exponentials: exponentials kept, not kept, and in backward
    of_stream   stream_forward, stream_backward

Each returns what was compared, with errors that are on the device: nobody has waited for them. D, dtypes and options
are those of a head or a step, so that the code that is tried is the code that will run. The last block is not full, and
what stands behind a result must stay. Numbers come from a generator of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc.kernels.choice import Case
from partial_fc.kernels.logits import LOG2E, SMALL, STREAM, STREAM_ROWS, TILE, Operands, Sums
from partial_fc.kernels.rows import Blocks, catch_up_rows, gather_rows, project_rows
from partial_fc.kernels.update import Memory, Numbers, Through, step_rows
from partial_fc.permutation import keyed_below

SEED = 1904
GUARD = 7.0  # stands where nothing is to be written
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 1.1 * 2.0**-8, torch.float16: 2.0**-10}  # of what is rounded once
# of sums of exponentials, which stay in float32; of exponentials in these dtypes, and products with them
SUM_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-4}
PRODUCT_LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
WIDEST = 2048  # D of a product: beyond, there are more turns of one loop
PROGRAMS = 10  # two splits: each program has several blocks of rows


class Compared(NamedTuple):
    kernel: str
    what: str
    error: Tensor  # [] float64; infinite or NaN where a number is
    limit: float


@dataclass(frozen=True)
class MovesCase:
    """What `catch_up_rows` is compiled for. stored: dtypes of rows and their state; directions: None if there are none;
    rows: the dtype that directions are of."""

    device: torch.device
    width: int
    stored: tuple[torch.dtype, ...]
    directions: torch.dtype | None
    rows: torch.dtype


@dataclass(frozen=True)
class StepCase:
    """What `step_rows` is compiled for. stored: dtypes of rows and their state; taken: of copies that they start from;
    low: of rows beside them; numbers: those that are tried, which are on the card if `on_card`."""

    device: torch.device
    width: int
    grad: torch.dtype
    stored: tuple[torch.dtype, ...]
    taken: tuple[torch.dtype, ...]
    low: torch.dtype | None
    gather: bool
    stochastic: bool
    through: bool
    on_card: bool
    numbers: Numbers

    @classmethod
    def of(
        cls, grad: Tensor, memory: Memory, numbers: Numbers, *, gather: bool, stochastic: bool, through: bool
    ) -> StepCase:
        some: dict[str, Any] = {"lr": 0.3, "a": 0.9, "b": 0.7, "decay": 0.1 if numbers.decay else 0.0}
        if numbers.adam:
            some |= {"a": 0.1, "b": 0.99, "eps": 1e-3, "by_rate": 0.3, "by_root": 1.7}
        low = None if memory.low is None else memory.low.dtype
        stored = tuple(each.dtype for each in (memory.rows, *memory.state))
        taken = tuple(each.dtype for each in memory.taken)
        return cls(
            memory.rows.device, grad.shape[1], grad.dtype, stored, taken, low, gather, stochastic, through,
            numbers.factors is not None, replace(numbers, factors=None, **some),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ rows


def of_rows(case: Case) -> list[Compared]:
    draw, width = Draw(case.device), case.width
    n = _rows_of(width)
    v, index = draw.rows(n + 2, width).to(case.rows), draw.index(n, n + 2)
    found: list[Compared] = []
    for picked in (None, index):
        source = v[:n] if picked is None else v[picked]
        for dtype in dict.fromkeys((case.product, case.stats if case.smoothing else case.product)):
            if case.normalize or (picked is not None and dtype != v.dtype):  # else nobody asks for it
                found += _gathered(v, picked, source, dtype, case.normalize)
        if case.normalize:
            # of a product of its own, or in the memory that it goes to
            g = draw(n, width).to(case.product if picked is None else case.stats)
            found += _projected(g, v, picked, source, in_place=picked is not None and g.dtype == v.dtype)
    return found


def _gathered(v: Tensor, index: Tensor | None, source: Tensor, dtype: torch.dtype, normalise: bool) -> list[Compared]:
    name, n, width = "gather_rows", len(source), source.shape[1]
    out, outside = _guarded(n, width, 2 * width, dtype, v.device)
    inverse = v.new_full((n, 1), math.nan, dtype=torch.float32) if normalise else None
    if not gather_rows(v, index, out, inverse):
        return []
    want, want_inverse = directions(source)
    if inverse is None:
        return [compared(name, "rows", out, source.double(), LIMITS[dtype]), outside(name)]
    return [
        compared(name, "directions", out, want, LIMITS[dtype]),
        compared(name, "inverse lengths", inverse, want_inverse, LIMITS[torch.float32], each=True),
        outside(name),
    ]


def _projected(g: Tensor, v: Tensor, index: Tensor | None, source: Tensor, *, in_place: bool) -> list[Compared]:
    name, (n, width) = "project_rows", source.shape
    unit, inverse = directions(source)
    wide, length = g.double(), torch.where(inverse > 0, 1 / inverse, 1.0)
    out, outside = _guarded(n, width, width, v.dtype, v.device)
    if in_place:
        out.copy_(g)
    if not project_rows(out if in_place else g, v, index, inverse.float(), out):
        return []
    want = tangent(wide, unit, inverse)
    # short rows have large gradients: all are compared at the size of g, which may be along the row altogether
    error = ((out.double() - want) * length).abs().max() / wide.abs().max()
    return [Compared(name, "gradients", error, LIMITS[v.dtype]), outside(name)]


def of_moves(case: MovesCase) -> list[Compared]:
    name, draw, width = "catch_up_rows", Draw(case.device), case.width
    n = _rows_of(width)
    tensors = [draw.rows(n + 2, width).to(case.stored[0])]
    tensors += [draw(n + 2, width).to(dtype) for dtype in case.stored[1:]]
    index, factors = draw.index(n, n + 2), draw(n, 4 if len(tensors) > 1 else 1)
    outs, outsides = zip(*(_guarded(n, width, width, torch.float32, case.device) for _ in tensors), strict=True)
    made, of_made = None, []
    if case.directions is not None:
        unit, outside = _guarded(n, width, width, case.directions, case.device)
        made, of_made = (unit, factors.new_full((n, 1), math.nan)), [outside]
    if not catch_up_rows(tensors, index, factors, list(outs), made, case.rows):
        return []
    f, (v, *m) = factors.double()[:, :, None], [t[index].double() for t in tensors]
    want = [f[:, 0] * v + f[:, 1] * m[0], f[:, 2] * v + f[:, 3] * m[0]] if m else [f[:, 0] * v]
    limit = LIMITS[torch.float32]
    found = [compared(name, "moved rows", a, b, limit) for a, b in zip(outs, want, strict=True)]
    if made is not None:
        of_moved = directions(outs[0].to(case.rows))
        found.append(compared(name, "directions", made[0], of_moved[0], LIMITS[made[0].dtype]))
        found.append(compared(name, "inverse lengths", made[1], of_moved[1], limit, each=True))
    return found + [outside(name) for outside in (*outsides, *of_made)]


# ------------------------------------------------------------------------------------------------ step


def of_step(case: StepCase) -> list[Compared]:
    found = _stepped(case)
    return found + (_rounded(case) if case.stochastic else [])


def _stepped(case: StepCase) -> list[Compared]:
    """Step some rows of a table; the others must stay as they are."""
    name, draw, width, numbers = "step_rows", Draw(case.device), case.width, case.numbers
    n, start = _rows_of(width), 1
    rows, *state = [(draw(n + 3, width).abs() + 0.5).to(dtype) for dtype in case.stored]
    taken = tuple((draw(n, width).abs() + 0.5).to(dtype) for dtype in case.taken)
    low = None if case.low is None else rows.to(case.low)
    g, index, where = draw(n, width).to(case.grad), None, torch.arange(start, start + n, device=case.device)
    kept = torch.arange(n, device=case.device)
    if case.gather:
        where = torch.randperm(n + 3, generator=draw.generator, device="cpu")[:n].to(case.device)
        index, kept = where.clone(), kept[1:]
        index[0] = -1
        where = where[1:]
    before = [t[kept].double() for t in taken] or [t[where].double() for t in (rows, *state)]
    wanted, wide = [t.double() for t in (rows, *state)], g[kept].double()
    through = None
    if case.through:
        unit, inverse = directions(taken[0] if taken else rows[index if case.gather else where])
        slot = torch.full((n,), 3, device=case.device)
        slot[1], slot[n - 1] = 2, 0
        through = Through(inverse.float(), slot, draw(3, width))
        extra = torch.cat((through.extra.double(), wide.new_zeros(1, width)))
        wide = tangent(wide + extra[slot[kept]], unit[kept], inverse[kept])
    if case.on_card:
        factors = torch.tensor([numbers.by_rate, numbers.by_root], dtype=torch.float32, device=case.device)
        given = replace(numbers, factors=factors, by_rate=math.nan, by_root=math.nan)
    rounding = (17, 0x1234567890ABCDEF) if case.stochastic else None
    memory = Memory(rows, tuple(state), taken, low)
    if not step_rows(g, memory, given if case.on_card else numbers, index, start, rounding, through):
        return []
    for whole, part in zip(wanted, step_of(numbers, wide, *before), strict=True):
        whole[where] = part
    of_rows = LIMITS[rows.dtype] * (2 if case.stochastic else 1)  # up or down
    found = [compared(name, "stepped rows", rows, wanted[0], of_rows)]
    for got, want in zip(state, wanted[1:], strict=True):
        found.append(compared(name, "stepped state", got, want, LIMITS[got.dtype]))
    return found + ([] if low is None else [compared(name, "narrowed rows", low, wanted[0], LIMITS[low.dtype])])


def _rounded(case: StepCase) -> list[Compared]:
    """Compare the bits of a step that float32 has exactly, rounded at random."""
    draw, width, first, key = Draw(case.device), case.width, (1 << 40) + 7, 0x1234567890ABCDEF
    n = _rows_of(width)
    v, g = draw.integers(-255, 256, n, width) / 128, draw.integers(-128, 128, n, width) / 4
    rows = v.to(case.stored[0])
    moved = (v - 2.0**-14 * g).float().view(torch.int32)
    index = torch.arange(n, device=case.device).flip(0) if case.gather else None
    ids = first + torch.arange(n, device=case.device)
    places = ids[:, None] * width + torch.arange(width, device=case.device)
    bits = (moved + keyed_below(places, key, 1 << 16).int()) & -65536
    given = (g if index is None else g.flip(0)).to(case.grad), Memory(rows, ()), Numbers(2.0**-14, 0.0, 1.0, 0.0)
    if not step_rows(*given, index, 0, (first, key)):
        return []
    return [compared("step_rows", "bits of rounded rows", rows, bits.view(torch.float32).double(), 0.0)]


def step_of(numbers: Numbers, g: Tensor, v: Tensor, *state: Tensor) -> list[Tensor]:
    """Return rows `[n, D]` and their state after a step of SGD, Adam or AdamW."""
    g = -g if numbers.maximize else g
    if numbers.decay and not numbers.decoupled:
        g = g + numbers.decay * v
    if numbers.adam:
        v = v * (1 - numbers.lr * numbers.decay) if numbers.decoupled else v
        m, s = state
        m, s = m.lerp(g, numbers.a), numbers.b * s + (1 - numbers.b) * g.square()
        return [v - numbers.by_rate * m / (s.sqrt() * numbers.by_root + numbers.eps), m, s]
    if not state:
        return [v - numbers.lr * g]
    m = numbers.a * state[0] + numbers.b * g
    return [v - numbers.lr * (g + numbers.a * m if numbers.nesterov else m), m]


# ------------------------------------------------------------------------------------------------ logits


class Logits:
    """Operands of the kernels of logits, and what they are to find. first row: `a`; one row is a pad if there is a
    column. Cosines are multiplied by √D, so that each logit counts for something."""

    a = 5

    def __init__(self, case: Case, samples: int, rows: int) -> None:
        draw, width = Draw(case.device), min(case.width, WIDEST + case.width % 64)
        self.dtype, self.rows, self.online = case.product, rows, not case.bounded
        x, w = (directions(draw(count, width))[0].float() for count in (samples, rows))
        self.w, scale = w.to(self.dtype), math.sqrt(width)
        targets = draw.integers(-1, rows, samples)
        targets[0] = rows - 1
        first = torch.where(targets >= 0, targets + self.a, -1)
        self.column = draw(rows) if case.bias or case.correction or case.sampled else None
        self.d, self.biased = draw(samples), case.bias
        self.operands = Operands(
            x, self.dtype, first, scale, online=self.online, hardest=case.metrics, programs=PROGRAMS
        )
        z = scale * (x.to(self.dtype).double() @ self.w.double().t())
        if self.column is not None:
            self.column[rows // 3] = -math.inf
            z += self.column
        z = z.masked_fill(torch.arange(rows, device=case.device) == targets[:, None], -math.inf)
        self.largest, self.lse = z.amax(1), z.logsumexp(1)
        self.e = (z - (self.largest[:, None] if self.online else 0.0)).exp()
        # relative to what backward's exponentials are
        self.of_backward = (z - (self.lse[:, None] if self.online else 0.0)).exp()
        self.shift = (self.lse * LOG2E).float() if self.online else None
        self.x, self.scale = x, scale

    def sums(self, name: str, found: Sums) -> list[Compared]:
        limit = SUM_LIMITS[self.dtype]
        out = [compared(name, "sums of exponentials", found.total, self.e.sum(1), limit, each=True)]
        if found.largest is not None:
            out.append(compared(name, "largest logits", found.largest / LOG2E, self.largest, limit))
        if found.weighted is not None:
            want = self.e @ self.w.double()
            out.append(compared(name, "weighted rows", found.weighted, want, PRODUCT_LIMITS[self.dtype]))
        return out


def of_tiles(case: Case) -> list[Compared]:
    name, blocks = "tile_exponentials", SMALL if case.device.type == "cpu" else TILE
    n, rows = 2 * blocks.samples + 5, 3 * blocks.rows + blocks.rows // 3
    given = Logits(case, n, rows)
    operands, limit = given.operands, PRODUCT_LIMITS[given.dtype]
    unit = -(-rows // 8) * 8  # rows of e stand at multiples of 16 bytes: nobody reads what is between
    e, outside = _guarded(n, rows, unit + 8, given.dtype, case.device, unit)
    count, columns = operands.blocks_of(rows)
    maxima = given.w.new_full((count if given.online else 0, n), math.nan, dtype=torch.float32)
    kept = operands.tile(given.w, given.a, given.column, e, maxima=maxima)
    if kept is None:
        return []
    found, wide = given.sums(name, kept), e.double()
    if given.online and kept.largest is not None:
        smaller = (maxima.double() - kept.largest.double()).exp2()
        wide = wide * smaller.t().repeat_interleave(columns, 1)[:, :rows]
    found += [compared(name, "kept exponentials", wide, given.e, limit, each=True), outside(name)]
    alone = operands.tile(given.w, given.a, given.column, None)
    e.fill_(math.nan)
    again = operands.tile(given.w, given.a, given.column, e, shift=given.shift, sums=False)
    if alone is None or again is None:
        return found
    found += given.sums(name, alone)
    return [*found, compared(name, "exponentials", e, given.of_backward, limit, each=True), outside(name)]


def of_stream(case: Case) -> list[Compared]:
    name, small = "stream_backward", case.device.type == "cpu"
    tables = [SMALL] if small else [*STREAM.values(), *STREAM_ROWS.values()]
    most = max(each.rows for each in tables)
    # more blocks than are on their way at a time
    n, rows = 4 * max(each.samples for each in tables) + 5, 7 * most + most // 3
    given = Logits(case, n, rows)
    streamed = given.operands.stream(given.w, given.a, given.column)
    found = [] if streamed is None else given.sums("stream_forward", streamed)
    factor = given.d if given.online else (given.d * (-given.lse).exp()).float()
    out, outside = _guarded(rows, given.w.shape[1], given.w.shape[1], case.stats, case.device)
    sums = factor.new_full((rows,), math.nan) if given.biased else None
    if not given.operands.stream_rows(given.w, given.a, given.column, given.shift, factor, out, sums):
        return found
    p = given.of_backward * factor.double()[:, None]
    want = given.scale * (p.t() @ given.x.to(given.dtype).double())
    found += [compared(name, "gradients of rows", out, want, PRODUCT_LIMITS[given.dtype]), outside(name)]
    return found if sums is None else [*found, compared(name, "sums", sums, p.sum(0), SUM_LIMITS[given.dtype])]


# ------------------------------------------------------------------------------------------------ both


class Draw:
    """Numbers for a device, the same on each: normal ones, whole ones, rows, places in a table."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(SEED)

    def __call__(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, device="cpu", dtype=torch.float32)
        return drawn.to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device="cpu", dtype=torch.int64).to(
            self.device
        )

    def rows(self, count: int, width: int) -> Tensor:
        """Return rows `[count, width]`, of which one has no direction and another is short."""
        v = self(count, width)
        v[1], v[2] = 0.0, v[2] * 1e-3
        return v

    def index(self, count: int, rows: int) -> Tensor:
        """Return places `[count]` in a table: the last row, one twice, no order."""
        index = self.integers(0, rows, count)
        index[0], index[2], index[-1] = rows - 1, 1, index[1]
        return index


def directions(v: Tensor) -> tuple[Tensor, Tensor]:
    """Return (directions `[n, D]`, 1/length `[n, 1]`; 0 for rows without a direction) in float64."""
    length = torch.linalg.vector_norm(v.double(), dim=1, keepdim=True)
    inverse = torch.where(length > 1e-12, 1 / length, 0.0)
    return v.double() * inverse, inverse


def tangent(g: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient by rows from that by their directions."""
    return (g - (g * unit).sum(1, keepdim=True) * unit) * inverse


def compared(kernel: str, what: str, got: Tensor, want: Tensor, limit: float, *, each: bool = False) -> Compared:
    """Compare with float64 numbers. The error is relative to the largest of them, or to each."""
    size = want.abs() if each else want.abs().max()
    return Compared(kernel, what, ((got.double() - want).abs() / size.clamp_min(1e-30)).max(), limit)


def _guarded(
    rows: int, width: int, stride: int, dtype: torch.dtype, device: torch.device, free: int = 0
) -> tuple[Tensor, Callable[[str], Compared]]:
    """Return memory `[rows, width]` of NaN, and what compares the memory around it afterwards, from column `free` on if
    that is behind its own."""
    memory = torch.full((rows + 1, stride), GUARD, dtype=dtype, device=device)
    inner = memory[:rows, :width].fill_(math.nan)

    def outside(kernel: str) -> Compared:
        around = torch.cat((memory[rows], memory[:rows, max(width, free) :].flatten())).double()
        return compared(kernel, "numbers beside its own", around, torch.full_like(around, GUARD), 0.0)

    return inner, outside


def _rows_of(width: int) -> int:
    """Return so many rows that the last of three programs is not full, if a program has more than one."""
    return 2 * Blocks.of(width).BR + 3
