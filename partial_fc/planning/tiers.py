"""Rows that are kept elsewhere (`storage=`): how much there is of them, and what a step moves.

stored   rows and state of a rank, when every row has been touched
moved    those of the rows of a step, read and written back
parts    in how many places of each tensor they stand: single rows, or blocks of neighbouring classes
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from partial_fc.planning.costs import Sizes

Kept = Literal["host", "files"]


@dataclass(frozen=True)
class Tier:
    """Bytes of one rank. seconds: a step's reading and writing at the disk's bandwidth, None where none was given; it
    is hidden where a step takes longer, but for the rows of the batch's labels. bus: of a step, between host and GPU in
    each direction: rows there, their gradient back; 0 on a CPU."""

    kind: Kept
    stored: int
    moved: int
    parts: int
    part_bytes: int
    seconds: float | None
    bus: int


def tier_of(z: Sizes, kind: Kept, block: int, disk: int | None) -> Tier:
    """Return what is kept and moved. block: `sample_block`. disk: bytes per second that all ranks together read or
    write."""
    row = z.D * (z.w + z.states * z.q + 4 * (z.wide == "master"))
    moved = z.S * row
    selected = z.S / z.centers
    drawn = z.window * z.C_local / z.C if z.window else selected  # at r = 1 rows follow each other
    parts = math.ceil(drawn / block + selected - min(selected, drawn)) if z.window else 1
    seconds = None if disk is None else 2 * moved * z.world / disk
    bus = 0 if z.cpu else z.S * z.D * z.w
    return Tier(kind, z.rows_local * row, moved, parts, block * z.centers * z.D * z.w, seconds, bus)


def tier_lines(made: Tier) -> list[str]:
    """Return it in words."""
    place = {"host": "host memory", "files": "files"}[made.kind]
    where = f"in {made.parts:,} places of each tensor, of at most {made.part_bytes:,} bytes"
    lines = [
        "",
        f"rows in {place}, per rank",
        f"  {'when every row was touched':32}{made.stored / 2**30:>8.2f} GiB",
        f"  {'read, and written, in a step':32}{made.moved / 2**20:>8.2f} MiB, {where}",
    ]
    if made.bus:
        lines.append(f"  {'to the GPU, and back, in a step':32}{made.bus / 2**20:>8.2f} MiB")
    if made.seconds is not None:
        lines.append(f"  {'at that bandwidth':32}{made.seconds:>8.3f} s of a step, hidden if it takes longer")
    return lines
