"""The host's part of the kernels of logits: operands as descriptors, blocks and splits, launches, sums of their parts.

    Operands.tile           e [N, T] and sums over the rows of a tile           device/tile.py
    Operands.stream         sums and Σ_c e_nc w_c of a tile's rows, no e        device/stream.py
    Operands.stream_rows    the gradient [T, D] of the rows' directions         device/stream.py

Each returns what it found, or None, once its kernel has failed (launch.py). Blocks are in a table and never chosen by
time, and splits come from sizes and a constant, not from the card that is there: either would change the order in which
numbers are added, and so their last bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc.kernels.launch import device_code, ran

LOG2E = math.log2(math.e)
PROGRAMS = 132  # at work at a time: the multiprocessors of an H100
ALIGNED = 16  # bytes: TMA asks it of addresses, and of the distance of two rows
PIECE = 64  # of D, in a product


class Blocks(NamedTuple):
    """samples, rows: of a block. depth: of the pieces of D that are multiplied at a time; 0 for all of D."""

    samples: int
    rows: int
    depth: int
    warps: int
    stages: int


TILE = Blocks(128, 256, PIECE, 8, 3)
STREAM = {  # by D, rounded up
    64: Blocks(128, 128, 0, 8, 3),
    128: Blocks(128, 128, 0, 8, 2),
    256: Blocks(128, 64, 0, 8, 2),
    512: Blocks(64, 32, 0, 8, 3),
}
STREAM_ROWS = {
    64: Blocks(128, 128, 0, 8, 3),
    128: Blocks(64, 128, 0, 8, 3),
    256: Blocks(64, 128, 0, 8, 2),
    512: Blocks(32, 64, 0, 8, 3),
}
SMALL = Blocks(16, 32, 16, 4, 1)  # in the interpreter, so that small tests have many blocks


Matrix = tuple[Tensor, int, int]  # and the sides of its blocks


class Sums(NamedTuple):
    """Of a tile's rows. largest: of the logits, in powers of two; total and weighted are relative to it if `online`."""

    total: Tensor  # [N]
    largest: Tensor | None  # [N]
    weighted: Tensor | None  # [N, D] Σ_c e_nc w_c


class Operands:
    """What the kernels of one forward, or of one backward, have in common.

    x `[N, D]`: unit vectors, or as they are. first `[P]`: positions of the targets among this rank's rows, −1 where
    they are elsewhere; P = N · labels. online: logits are not bounded, so sums are relative to the largest. programs:
    for how many the rows are split.
    """

    def __init__(
        self, x: Tensor, product: torch.dtype, first: Tensor, scale: float, *, online: bool, hardest: bool,
        programs: int = PROGRAMS,
    ) -> None:  # fmt: skip
        self.samples, self.width = x.shape
        self.x = aligned(x.to(product))
        self.first = first.to(torch.int32)
        self.labels = len(first) // max(self.samples, 1)
        self.scale = scale
        self.online, self.hardest, self.programs = online, hardest, programs
        self.small = x.device.type == "cpu"

    def tile(
        self, w: Tensor, a: int, column: Tensor | None, e: Tensor | None, *,
        shift: Tensor | None = None, maxima: Tensor | None = None, sums: bool = True,
    ) -> Sums | None:  # fmt: skip
        """Write exp(logit) of rows a, a + 1, ... to `e [N, T]`, None where nobody asks for it; return their sums.

        w: `[T, D]` directions of the rows. column: `[T]` added to their logits, or None. shift: `[N]` taken off, in
        powers of two, or None. maxima: memory of `blocks_of(T)` rows of N, for what each block of e is relative to if
        `online`. sums: whether they are asked for; else they are empty.
        """
        blocks = SMALL if self.small else TILE
        splits, each = splits_of(self.samples, len(w), blocks, self.programs)
        partial = w.new_empty((splits, self.samples) if sums else (0,), dtype=torch.float32)
        largest = w.new_empty((splits, self.samples) if sums and self._looks else (0,), dtype=torch.float32)
        matrices = (self.x, blocks.samples, blocks.depth), (aligned(w), blocks.rows, blocks.depth)
        written = () if e is None else ((e, blocks.samples, blocks.rows // 2),)
        given: tuple[Any, ...] = (
            self.first, _scaled(column), shift, partial, largest, maxima,
            self.samples, len(w), a, self.scale * LOG2E, each,
        )  # fmt: skip
        options = {
            "D": self.width, "LABELS": self.labels, "COLUMN": column is not None, "SHIFTED": shift is not None,
            "ONLINE": self.online and sums, "SUMS": sums, "HARDEST": self.hardest and sums, "STORE": e is not None,
            "BN": blocks.samples, "BC": blocks.rows, "BD": blocks.depth,
        }  # fmt: skip
        grid = (-(-self.samples // blocks.samples), splits)
        given = given if written else (None, *given)
        if not _ran("tile", "tile_exponentials", grid, (*matrices, *written), given, options, blocks):
            return None
        return self._together(partial, largest, None) if sums else Sums(partial, None, None)

    def blocks_of(self, rows: int) -> tuple[int, int]:
        """Return (how many blocks e has side by side, with those that are beyond the last row; columns of each)."""
        blocks = SMALL if self.small else TILE
        return 2 * -(-rows // blocks.rows), blocks.rows // 2

    def stream(self, w: Tensor, a: int, column: Tensor | None) -> Sums | None:
        """Return the sums of `tile`, and Σ exp(logit) w, of rows w `[T, D]`."""
        blocks, wide = self._blocks(STREAM)
        splits, each = splits_of(self.samples, len(w), blocks, self.programs)
        partial = w.new_empty(splits, self.samples, dtype=torch.float32)
        largest = w.new_empty((splits, self.samples) if self._looks else (0,), dtype=torch.float32)
        weighted = w.new_empty(splits, self.samples, self.width, dtype=torch.float32)
        matrices = (self.x, blocks.samples, wide), (aligned(w), blocks.rows, wide)
        given = (
            self.first, _scaled(column), partial, weighted, largest,
            self.samples, len(w), a, self.scale * LOG2E, each,
        )  # fmt: skip
        options = {
            "D": self.width, "DP": wide, "LABELS": self.labels, "COLUMN": column is not None, "ONLINE": self.online,
            "HARDEST": self.hardest, "BN": blocks.samples, "BC": blocks.rows,
        }  # fmt: skip
        grid = (-(-self.samples // blocks.samples), splits)
        if not _ran("stream", "stream_forward", grid, matrices, given, options, blocks):
            return None
        return self._together(partial, largest, weighted)

    def stream_rows(
        self, w: Tensor, a: int, column: Tensor | None, shift: Tensor | None, factor: Tensor, out: Tensor,
        sums: Tensor | None,
    ) -> bool:  # fmt: skip
        """Write the gradient by directions w `[T, D]` to `out`, targets left out; Σ_n ∂L/∂logit to `sums [T]` if it is
        not None. Return whether it was done.

        ∂L/∂logit = factor exp2(logit log2(e) − shift), both `[N]`; None is 0. out: may be the memory that w is in.
        """
        blocks, wide = self._blocks(STREAM_ROWS)
        matrices = (self.x, blocks.samples, wide), (aligned(w), blocks.rows, wide)
        given = (
            self.first, _scaled(column), shift, factor, out, sums,
            self.samples, len(w), a, out.stride(0), self.scale, self.scale * LOG2E,
        )  # fmt: skip
        options = {
            "D": self.width, "DP": wide, "LABELS": self.labels, "COLUMN": column is not None,
            "SHIFTED": shift is not None, "SUMS": sums is not None, "BN": blocks.samples, "BC": blocks.rows,
        }  # fmt: skip
        grid = (-(-len(w) // blocks.rows),)
        return _ran("stream", "stream_backward", grid, matrices, given, options, blocks)

    @property
    def _looks(self) -> bool:
        return self.online or self.hardest

    def _blocks(self, table: dict[int, Blocks]) -> tuple[Blocks, int]:
        """Return the blocks for D, and the width of theirs: a power of two from D on."""
        wide = max(16 if self.small else min(table), 1 << (self.width - 1).bit_length())
        return (SMALL if self.small else table[wide]), wide

    def _together(self, partial: Tensor, largest: Tensor, weighted: Tensor | None) -> Sums:
        """Return what the splits have found."""
        most = largest.amax(0) if self._looks else None
        if self.online and most is not None:
            smaller = (largest - most).exp2_()
            partial = partial.mul_(smaller)
            weighted = None if weighted is None else weighted.mul_(smaller[:, :, None])
        return Sums(partial.sum(0), most, None if weighted is None else weighted.sum(0))


def _ran(
    module: str, kernel: str, grid: tuple[int, ...], matrices: tuple[Matrix, ...], given: tuple[Any, ...],
    options: dict[str, Any], blocks: Blocks,
) -> bool:  # fmt: skip
    """Launch a kernel whose arguments are descriptors of matrices and what is given. Return whether that was done."""

    def launch() -> None:
        code = device_code(module)
        described = (code.described(matrix, [rows, columns]) for matrix, rows, columns in matrices)
        getattr(code, kernel)[grid](*described, *given, **options, num_warps=blocks.warps, num_stages=blocks.stages)

    return ran(kernel, launch, matrices[0][0])


def splits_of(samples: int, rows: int, blocks: Blocks, at_work: int = PROGRAMS) -> tuple[int, int]:
    """Return (into how many parts the rows are split, rows of each part): what keeps all programs at work longest.

    A program costs about two blocks more than those that it does: its first operands, its last stores.
    """
    programs, columns = -(-samples // blocks.samples), max(1, -(-rows // blocks.rows))

    def cost(splits: int) -> tuple[int, int]:
        return -(-programs * splits // at_work) * (-(-columns // splits) + 2), splits

    best = min(range(1, min(columns, at_work) + 1), key=cost)
    each = -(-columns // best)
    return -(-columns // each), each * blocks.rows


def aligned(matrix: Tensor) -> Tensor:
    """Return a matrix that TMA can read: itself, or a copy whose rows have zeros behind them."""
    unit = ALIGNED // matrix.itemsize
    if is_aligned(matrix):
        return matrix
    padded = matrix.new_zeros(len(matrix), -(-matrix.shape[1] // unit) * unit)
    padded[:, : matrix.shape[1]] = matrix
    return padded


def is_aligned(matrix: Tensor) -> bool:
    """Return whether addresses and rows stand at multiples of 16 bytes."""
    numbers = matrix.data_ptr(), matrix.stride(0) * matrix.itemsize
    return matrix.stride(1) == 1 and not any(each % ALIGNED for each in numbers)


def _scaled(column: Tensor | None) -> Tensor | None:
    """Return logits in powers of two."""
    return None if column is None else column.float() * LOG2E
