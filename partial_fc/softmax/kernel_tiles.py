"""Sums over logits, and gradients from them, by kernels; where they do not serve, or fail, as without them.

    KernelSums      forward       tile kernel: a tile's product, exponentials and sums in one launch, exponentials to
                                  memory only where they are kept
                                  stream kernel: the same sums, and the embeddings' gradient but for one number a sample
    KernelTiles     backward      exponentials that were not kept, from the tile kernel; or after the stream kernel the
                                  gradient of rows from another, with no logit in memory

`partial_fc.kernels.choice` says which serve. Labels, corrections of sampling, biases and pads reach a kernel as one
position a label, and as one number a row that is added to its logits: -inf for a pad.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from partial_fc.kernels.choice import Kernels
from partial_fc.kernels.logits import LOG2E, Operands, Sums, is_aligned
from partial_fc.softmax.backward import Derivatives
from partial_fc.softmax.biases import biases_of
from partial_fc.softmax.forward import ForwardState, SavedTensors
from partial_fc.softmax.further_sums import FurtherSums
from partial_fc.softmax.other_sums import OtherSums
from partial_fc.softmax.other_tiles import OtherTiles
from partial_fc.softmax.tiles import new_tile, tile_rows

STREAM_BYTES = 64 << 20  # of the float32 gradient of the rows of one launch
MOST_LABELS = 8  # a sample: each is compared with every row
LN2 = math.log(2)


class KernelSums(OtherSums):
    """As `OtherSums`. streams: whether there will be a backward, for which the stream kernel does half of the work."""

    def __init__(self, x: Tensor, state: ForwardState, keep: bool, in_place: bool, streams: bool) -> None:
        self.given, self.finished = (x, state, keep, in_place), False
        kernels = state.selection.kernels
        # replicas sum the gradients of rows that move in backward tile by tile: all must have the same tiles
        shared = state.sink.begin_update is not None and state.selection.ranks.replica_group is not None
        self.stream = streams and not keep and kernels is not None and kernels.stream and not shared
        self.served = serves(kernels, x, state) and kernels is not None and (self.stream or kernels.tiles)
        if not self.served:
            self._be_plain()
            return
        if self.stream:
            state = replace(state, tile_size=stream_tile(x.shape[1]))
        options, rows = state.options, state.row_tiles
        self.state, self.stats, self.samples, self.keep = state, x.dtype, len(x), keep
        self.total, self.streamed, self.kept = x.new_zeros(len(x), 1), x.new_empty(0), x.new_empty(0)
        tiles = -(-rows.count // state.tile_size)
        if keep:
            size = len(x) * state.tile_size * tiles
            self.kept = rows.workspace.get(f"{rows.prefix}logits", (size,), state.product_dtype, x.device)
        self.operands = operands_of(x, state)
        self.largest = x  # [N] of the logits so far, in powers of two, where anybody asks for it
        self.further = None
        if options.metrics or state.smoothing is not None or not state.bounded:
            of_others = None, state.smoothing, None, state.bounded
            self.further = FurtherSums(x, options, state.target_rows, *of_others, kept=tiles if keep else 0)

    def add(self, t: int, a: int, b: int) -> None:
        if not self.served:
            super().add(t, a, b)
            return
        if self.finished:
            return
        rows = self.state.row_tiles
        w = rows.directions(a, b, self.state.product_dtype)
        column = column_of(self.state, a, b)
        found = self.operands.stream(w, a, column) if self.stream else self._tile(t, a, b, w, column)
        if found is None:
            self._start_again()
        else:
            self._take(t, found)
            if self.further is not None and self.further.smoothing is not None:
                bias = None if rows.bias is None else biases_of(rows, slice(a, b))
                self.further.smoothing.add_rows(rows.directions(a, b, self.stats), bias, a, b)

    def _tile(self, t: int, a: int, b: int, w: Tensor, column: Tensor | None) -> Sums | None:
        """Return the sums of a tile; its exponentials go to what is kept, relative to the largest logit so far."""
        if not self.keep:
            return self.operands.tile(w, a, column, None)
        kept = new_tile(self.kept, t, self.samples, self.state.tile_size, b - a)
        # rows of a CPU's tile may begin anywhere
        e = kept if is_aligned(kept) else exponentials_like(kept, self.samples, b - a, kept.dtype)
        blocks, width = self.operands.blocks_of(b - a)
        maxima = w.new_empty((blocks, self.samples) if self.operands.online else (0,), dtype=torch.float32)
        found = self.operands.tile(w, a, column, e, maxima=maxima)
        if found is not None and found.largest is not None and self.operands.online:
            most = found.largest if t == 0 else torch.maximum(found.largest, self.largest)
            smaller, whole = (maxima - most).exp2_().t(), (b - a) // width
            e[:, : whole * width].unflatten(1, (whole, width)).mul_(smaller[:, :whole, None])
            e[:, whole * width :].mul_(smaller[:, whole : whole + 1])
        if found is not None and e is not kept:
            kept.copy_(e)
        return found

    def _take(self, t: int, found: Sums) -> None:
        """Add what was found in a tile."""
        total, weighted = found.total[:, None], found.weighted
        if found.largest is not None:
            most = found.largest if t == 0 else torch.maximum(found.largest, self.largest)
            if self.operands.online:
                smaller = (found.largest - most).exp2_()[:, None]
                total, weighted = total * smaller, None if weighted is None else weighted * smaller
                if t:
                    before = (self.largest - most).exp2_()[:, None]
                    self.total.mul_(before)
                    self.streamed = self.streamed * before if self.stream else self.streamed
            self.largest = most
            self._note_largest(t)
        self.total.add_(total)
        if weighted is not None:
            self.streamed = weighted if t == 0 else self.streamed.add_(weighted)

    def _note_largest(self, t: int) -> None:
        assert self.further is not None
        natural = self.largest * LN2
        if self.operands.hardest:
            self.further.hardest = natural / self.state.options.scale
        if self.operands.online:
            self.further.maximum = natural[:, None]
            if self.stream:
                self.further.maxima = self.further.maximum[None]
            elif self.keep:
                self.further.maxima[t] = self.further.maximum

    def _start_again(self) -> None:
        """A kernel has failed: sum up all rows without it."""
        self.finished = True
        self._be_plain()
        for t, (a, b) in enumerate(self.state.row_tiles.tiles(self.state.tile_size)):
            super().add(t, a, b)

    def _be_plain(self) -> None:
        x, state, keep, in_place = self.given
        self.kept = x.new_empty(0)
        super().__init__(x, with_places(state, state.tile_size, apart=in_place), keep, in_place)


class KernelTiles(OtherTiles):
    """As `OtherTiles`, after a forward that kernels have served, or may have."""

    def __init__(
        self, d: Derivatives, weight: Tensor, bias: Tensor | None, saved: SavedTensors, state: ForwardState
    ) -> None:
        super().__init__(d, weight, bias, saved, state)
        kernels = state.selection.kernels
        self.streams = saved.streamed.numel() > 0
        self.served = serves(kernels, saved.x, state) and (self.streams or (kernels is not None and kernels.tiles))
        self.served = self.served and not saved.kept.numel()
        self.e: Tensor | None = None
        self.shift = None if state.bounded else saved.lse * LOG2E
        self.factor = d.d_total if state.bounded else d.d_lse
        if self.served:
            self.operands = operands_of(saved.x, state)

    def run(self, want_x: bool, want_rows: bool) -> tuple[Tensor, list[Tensor]]:
        if not self.streams:
            return super().run(want_x, want_rows)
        saved, rows, scale = self.saved, self.state.row_tiles, self.state.options.scale
        dx = saved.x.new_empty(len(saved.x), 0)
        if want_x:
            factor = self.factor if self.state.bounded else self.d.d_lse * (saved.maxima[0] - saved.lse[:, None]).exp()
            dx = saved.streamed * (factor * scale)
            self.finish_embeddings(dx)
        if not want_rows:
            return dx, []
        self.begin_rows()
        for a, b in rows.tiles(self.state.tile_size):
            self._stream_rows(a, b)
        return dx, self.finish_rows()

    def exponentials(self, t: int, a: int, b: int, w: Tensor) -> tuple[Tensor, Tensor]:
        if not self.served:
            if not (self.saved.kept.numel() or self.state.places.numel()):
                self.state = with_places(self.state, self.state.tile_size, apart=False)
            return super().exponentials(t, a, b, w)
        if self.e is None:
            rows = min(self.state.tile_size, self.state.row_tiles.count)
            self.e = exponentials_like(w, len(self.saved.x), rows, self.state.product_dtype)
        e = self.e[:, : b - a]
        if self.operands.tile(w, a, column_of(self.state, a, b), e, shift=self.shift, sums=False) is None:
            self.served = False
            return self.exponentials(t, a, b, w)
        return e, self.factor

    def _stream_rows(self, a: int, b: int) -> None:
        """Add rows a to b, but for the targets' share."""
        rows = self.state.row_tiles
        w = rows.directions(a, b, self.state.product_dtype)
        dw, db = self.places_of(a, b)
        # the directions are needed until the gradient has gone through the lengths
        apart = rows.overlaps or dw.dtype != self.stats
        grad = w.new_empty(w.shape, dtype=self.stats) if apart else dw
        column = column_of(self.state, a, b)
        if not self.operands.stream_rows(w, a, column, self.shift, self.factor, grad, db):
            self._plain_rows(w, a, b, grad, db)
        if self.shares is not None:
            self.shares.add_to_rows(grad, a, b)
            if db is not None:
                db += self.shares.of_biases(a, b)
        if db is None and self.moved_at_once(grad, a, b):
            return
        rows.through_lengths(grad, w, a, b, dw)
        self.update_rows(dw, db, a, b)

    def _plain_rows(self, w: Tensor, a: int, b: int, grad: Tensor, db: Tensor | None) -> None:
        """Do what the kernel, which has failed, would have done: in tiles as small as plain PyTorch's."""
        saved = self.saved
        size = min(self.state.tile_size, power_of_two(tile_rows(len(saved.x), saved.x.shape[1], saved.x.device.type)))
        self.state, whole = with_places(self.state, size, apart=False), self.state
        weighted = None
        for start in range(a, b, size):
            part = slice(start - a, min(start + size, b) - a)
            e, factor = super().exponentials(start // size, start, min(start + size, b), w[part])
            if weighted is None:
                weighted = (saved.x * (factor * whole.options.scale)).to(self.weighted_dtype)
            grad[part] = torch.mm(e.t(), weighted)
            if db is not None:
                db[part] = torch.mv(e.t().to(self.stats), factor[:, 0])
        self.state = whole


def serves(kernels: Kernels | None, x: Tensor, state: ForwardState) -> bool:
    """Return whether kernels can serve this batch of a head that they serve."""
    labels = len(state.target_rows.sample) // max(len(x), 1)
    return kernels is not None and bool(len(x) and state.row_tiles.count) and labels <= MOST_LABELS


def operands_of(x: Tensor, state: ForwardState) -> Operands:
    first = torch.where(state.target_rows.own, state.target_rows.first, -1)
    looks = {"online": not state.bounded, "hardest": state.options.metrics}
    return Operands(x, state.product_dtype, first, state.options.scale, **looks)


def column_of(state: ForwardState, a: int, b: int) -> Tensor | None:
    """Return what is added to the logits of rows a to b, `[T]`; None if nothing is."""
    selection, rows = state.selection, state.row_tiles
    column = None if rows.bias is None else biases_of(rows, slice(a, b))
    if selection.correction is not None:
        column = selection.correction.with_bias(column, a, b)
    if selection.slots is None or selection.slots.window >= b:
        return column
    column = rows.weight.new_zeros(b - a, dtype=rows.dtype) if column is None else column.to(rows.dtype, copy=True)
    selection.slots.mask(column[None], a, b)
    return column


def with_places(state: ForwardState, tile: int, *, apart: bool) -> ForwardState:
    """Return a state for plain PyTorch: with tiles of another size, and where the targets stand in them."""
    if state.options.ruled:
        return replace(state, tile_size=tile)
    return replace(state, tile_size=tile, places=state.target_rows.places(state.row_tiles.count, tile, apart=apart))


def stream_tile(width: int) -> int:
    """Return the rows of a launch of the stream kernels: a power of two."""
    return power_of_two(max(64, STREAM_BYTES // (4 * width)))


def power_of_two(number: int) -> int:
    """Return the largest power of two up to a number."""
    return 1 << (number.bit_length() - 1)


def exponentials_like(x: Tensor, samples: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Return memory `[N, T]` whose rows stand at multiples of 16 bytes."""
    size = -(-rows // 8) * 8
    return new_tile(x.new_empty(samples * size, dtype=dtype), 0, samples, size, rows)
