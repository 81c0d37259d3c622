"""What to change so that a head fits into the memory of a rank: `advise` tries changes of the arguments of `plan`.

    1. logits tiled instead of kept
    2. the largest sampling rate that fits
    3. savers: an update in backward, bfloat16 weights, plain SGD, skipped rows that stand still, on a CPU rows in
       files; as few together as are enough
    4. a smaller global batch
    5. more ranks

Changes 2 to 5 keep logits as requested, or tile them if that alone is not enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from partial_fc.optim.row_state import HALF

MAX_WORLD = 1 << 20  # the largest number of ranks that is tried
RATE_DIGITS = 4  # significant digits of a suggested sampling rate, which is rounded down
SAVERS: dict[str, dict[str, Any]] = {
    "update in backward (no clipping, no accumulation)": {"update_in_backward": True},
    "stochastically rounded bfloat16 weights": {"dtype": torch.bfloat16, "low_precision": "stochastic"},
    "plain SGD": {"optimizer": "sgd"},
    "skipped rows that stand still": {"skipped_rows": "still"},
    "rows in files": {"storage": "files"},
    "rows in host memory": {"storage": "host"},
}


@dataclass(frozen=True)
class Change:
    """Arguments of `plan` to replace so that it fits; the others stay as they were."""

    text: str
    arguments: dict[str, Any]
    peak: int


@dataclass(frozen=True)
class Fit:
    """Whether the peak fits into `memory`, the largest sampling rate that fits (or None), and changes that help."""

    memory: int
    fits: bool
    largest_rate: Change | None
    changes: tuple[Change, ...]


def advise(arguments: dict[str, Any], memory: int, peak_of: Callable[[dict[str, Any]], int]) -> Fit:
    """Return whether the plan of these arguments fits into `memory` bytes, and changes that make it fit if not.

    peak_of: returns the peak in bytes of the plan of some arguments.
    """
    return _Search(arguments, memory, peak_of).fit()


@dataclass(frozen=True)
class _Search:
    """Searches arguments that fit, starting from the requested ones."""

    requested: dict[str, Any]
    memory: int
    peak_of: Callable[[dict[str, Any]], int]

    def fit(self) -> Fit:
        rate = self.largest_rate()
        if self.peak_of(self.requested) <= self.memory:
            return Fit(self.memory, True, rate, ())
        lower = rate if rate is not None and rate.arguments["sample_rate"] < self.requested["sample_rate"] else None
        found = [self.change(""), lower, *self.savers(), self.fewer_samples(), self.more_ranks()]
        return Fit(self.memory, False, rate, tuple(change for change in found if change is not None))

    def change(self, text: str, **changes: Any) -> Change | None:
        """Return these changes if they fit, with logits as requested or else tiled; None if neither fits."""
        for tiled in ({}, {"logits_budget": 0}):
            peak = self.peak_of({**self.requested, **changes, **tiled})
            if peak <= self.memory:
                words = [text] * bool(text) + ["tiled logits"] * bool(tiled)
                return Change(", ".join(words), {**changes, **tiled}, peak)
        return None

    def fits(self, **changes: Any) -> bool:
        return self.change("", **changes) is not None

    def largest_rate(self) -> Change | None:
        """Return the largest sampling rate that fits, to `RATE_DIGITS` digits. Below 1, update_in_backward is off."""
        no_more = {"hard_negatives": 0} if self.requested["hard_negatives"] else {}  # all classes are there
        everything = self.change("a sampling rate of 1", sample_rate=1.0, **no_more)
        if everything is not None:
            return everything
        C = self.requested["num_classes"]
        other = {"update_in_backward": False} if self.requested["update_in_backward"] else {}
        window = _largest(C - 1, lambda n: self.fits(sample_rate=n / C, **other))
        if not window:
            return None
        exponent = math.floor(math.log10(window / C)) + 1 - RATE_DIGITS
        rate = math.floor(window / C / 10.0**exponent) / 10.0**-exponent
        return self.change(f"a sampling rate of {rate:.{RATE_DIGITS}g}", sample_rate=rate, **other)

    def savers(self) -> list[Change | None]:
        """Return those of `SAVERS` that fit: single ones, or else combinations of as few as are enough."""
        allowed = {text: changes for text, changes in SAVERS.items() if self._applies(changes)}
        for count in range(1, len(allowed) + 1):
            found = []
            for texts in combinations(allowed, count):
                together = {k: v for text in texts for k, v in allowed[text].items()}
                found.append(self.change(" and ".join(texts), **together))
            if any(found):
                return found
        return []

    def _applies(self, changes: dict[str, Any]) -> bool:
        """Return whether a saver is compatible with the requested arguments and not part of them already."""
        requested = self.requested
        if "update_in_backward" in changes:
            return (
                requested["sample_rate"] == 1
                and requested["autocast"] is not torch.float16
                and not requested["update_in_backward"]
            )
        if "optimizer" in changes:
            return requested["optimizer"] != "sgd"
        if "skipped_rows" in changes:
            return requested["sample_rate"] < 1 and requested["skipped_rows"] != "still"
        if "storage" in changes:
            streams = requested["sample_rate"] < 1 or requested["update_in_backward"]
            of_cpu = requested["device"] == "cpu"
            if changes["storage"] == "host":  # on a CPU that is the memory which is short
                return streams and not of_cpu and requested["storage"] is None
            return streams and of_cpu and requested["storage"] != "files"
        return requested["dtype"] not in HALF

    def fewer_samples(self) -> Change | None:
        world = self.requested["world_size"]
        batch_size = self.requested["batch_size"]
        samples = world * _largest(batch_size // world, lambda n: self.fits(batch_size=n * world))
        if not 0 < samples < batch_size:
            return None
        return self.change(f"a global batch of {samples:,}", batch_size=samples)

    def more_ranks(self) -> Change | None:
        most = min(self.requested["num_classes"], MAX_WORLD)
        ranks = _smallest(self.requested["world_size"], most, lambda n: self.fits(world_size=n))
        return None if ranks is None else self.change(f"{ranks:,} ranks", world_size=ranks)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest n in `[1, most]` that fits, 0 if none does; every number below one that fits must fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _smallest(too_few: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """Return the smallest n in `(too_few, most]` that fits, None if none does.

    Doubles n until it fits and bisects from there, because far larger numbers may not fit again.
    """
    enough = min(2 * too_few, most)
    while too_few < enough and not fits(enough):
        too_few = enough
        enough = min(2 * enough, most)
    if too_few >= enough:
        return None
    return enough - _largest(enough - too_few - 1, lambda fewer: fits(enough - fewer))
