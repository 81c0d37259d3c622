"""Will it fit? What a head will need on each rank, before anything is allocated, and what to change if it is too much.

    arguments of a run  ──>  costs      bytes, operations, traffic by `costs`; the peak is the largest sum of bytes over a phase of a step
    memory of a rank    ──>  fit        whether the peak is within it; the largest sampling rate that is; changes that make it fit
    both                ──>  text       a table to read, or a dictionary for programs

docs/cost-model.md says what is counted, and how far it is from what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch

from partial_fc.batch.status import DTYPES
from partial_fc.head import DEFAULT_LOGITS_BUDGET
from partial_fc.optim.optimizer_class import LowPrecision
from partial_fc.optim.row_state import HALF
from partial_fc.planning.costs import (
    OPTIMIZERS,
    PHASES,
    Collective,
    Item,
    collectives,
    items,
    operations,
    sizes,
    traffic,
)

MAX_WORLD = 1 << 20  # no more ranks than this are advised
ADVISED_DIGITS = 4  # of an advised sampling rate, rounded down
SAVERS: dict[str, dict[str, Any]] = {
    "update in backward (no clipping, no accumulation)": {"update_in_backward": True},
    "stochastically rounded bfloat16 weights": {"dtype": torch.bfloat16, "low_precision": "stochastic"},
    "plain SGD": {"optimizer": "sgd"},
}


@dataclass(frozen=True)
class Change:
    """Arguments of `plan` that make it fit, all others as they were."""

    text: str
    arguments: dict[str, Any]
    peak: int


@dataclass(frozen=True)
class Fit:
    """Whether the peak is within `memory`; the largest sampling rate whose peak is (None if none is); changes that make it fit."""

    memory: int
    fits: bool
    largest_rate: Change | None
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Plan:
    """What `plan` answers. Bytes and operations are of one rank, the one with the most classes."""

    arguments: dict[str, Any]
    classes: int  # C_local
    rows: int  # S: all of them, or the expected number under sampling
    tile: int  # T
    mode: str  # "kept" or "tiled"
    logits: int  # bytes that the head compares with logits_budget
    items: tuple[Item, ...]
    operations: dict[str, int]
    traffic: dict[str, int]
    collectives: tuple[Collective, ...]
    fit: Fit | None = None

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each phase of a step."""
        return {phase: sum(item.bytes.get(phase, 0) for item in self.items) for phase in PHASES}

    @property
    def peak_phase(self) -> str:
        phases = self.phases
        return max(phases, key=phases.__getitem__)

    @property
    def peak(self) -> int:
        """Bytes that a rank needs at most."""
        return max(self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: bytes and operations as integers, dtypes and optimizers by name."""
        own = {**asdict(self), "phases": self.phases, "peak_phase": self.peak_phase, "peak": self.peak}
        plain: dict[str, Any] = json.loads(json.dumps(own, default=_name))
        return plain

    def __str__(self) -> str:
        return "\n".join([*_head_lines(self), "", *_memory_lines(self), "", *_step_lines(self), *_fit_lines(self)])


def plan(
    num_classes: int,
    embedding_size: int,
    world_size: int,
    batch_size: int,
    sample_rate: float = 1.0,
    optimizer: str | type[torch.optim.Optimizer] = "sgd-momentum",
    dtype: torch.dtype = torch.float32,
    *,
    memory: int | None = None,
    logits_budget: int | None = None,
    autocast: torch.dtype | None = None,
    update_in_backward: bool = False,
    low_precision: LowPrecision | None = None,
    device: str = "cuda",
) -> Plan:
    """What a head of these sizes needs on each rank.

    Args:
        num_classes, embedding_size, sample_rate, logits_budget, dtype: as of `PartialFC`.
        world_size: ranks that the classes are split over.
        batch_size: N, samples of the global batch.
        optimizer: "sgd", "sgd-momentum", "adam", "adamw", "rmsprop", "adagrad", or a class with its own default options.
        update_in_backward, low_precision: as of `RowOptimizer`.
        autocast: dtype of the matrix products under torch.autocast, None without it.
        memory: bytes that a rank may use for the head; then `fit` says whether that is enough and what to change.
        device: type of device; on "cpu" tiles are smaller, and large buffers are held from step to step.

    Raises ValueError for bad arguments.
    """
    arguments = {k: v for k, v in locals().items() if k != "memory"}
    _check(arguments, memory)
    made = _plan(arguments)
    return made if memory is None else replace(made, fit=_Advice(arguments, memory).fit(made))


def _plan(arguments: dict[str, Any]) -> Plan:
    z = sizes(**arguments)
    mode = "kept" if z.kept else "tiled"
    return Plan(arguments, z.C_local, z.S, z.T, mode, z.logits, items(z), operations(z), traffic(z), collectives(z))


# ---------------------------------------------------------------------------------------------------- does it fit


@dataclass(frozen=True)
class _Advice:
    """Looks for arguments that fit `memory`, beginning with those that were asked for."""

    asked: dict[str, Any]
    memory: int

    def fit(self, made: Plan) -> Fit:
        fits, rate = made.peak <= self.memory, self.largest_rate()
        if fits:
            return Fit(self.memory, True, rate, ())
        less = rate if rate is not None and rate.arguments["sample_rate"] < self.asked["sample_rate"] else None
        found = [self.change(""), less, *self.savers(), self.fewer_samples(), self.more_ranks()]
        return Fit(self.memory, False, rate, tuple(change for change in found if change is not None))

    def change(self, text: str, **changes: Any) -> Change | None:
        """These changes, with logits kept as asked or else tiled, if they fit."""
        for tiled in ({}, {"logits_budget": 0}):
            peak = _plan({**self.asked, **changes, **tiled}).peak
            if peak <= self.memory:
                words = [text] * bool(text) + ["tiled logits"] * bool(tiled)
                return Change(", ".join(words), {**changes, **tiled}, peak)
        return None

    def fits(self, **changes: Any) -> bool:
        return self.change("", **changes) is not None

    def largest_rate(self) -> Change | None:
        """The largest sampling rate that fits, of `ADVISED_DIGITS` digits; without an update in backward, which is for all classes."""
        everything = self.change("a sampling rate of 1", sample_rate=1.0)
        if everything is not None:
            return everything
        C = self.asked["num_classes"]
        other = {"update_in_backward": False} if self.asked["update_in_backward"] else {}
        window = _largest(C - 1, lambda n: self.fits(sample_rate=n / C, **other))
        if not window:
            return None
        exponent = math.floor(math.log10(window / C)) + 1 - ADVISED_DIGITS
        rate = math.floor(window / C / 10.0**exponent) / 10.0**-exponent
        return self.change(f"a sampling rate of {rate:.{ADVISED_DIGITS}g}", sample_rate=rate, **other)

    def savers(self) -> list[Change | None]:
        """What fits of `SAVERS`: one of them, or as few together as it takes."""
        allowed = {text: changes for text, changes in SAVERS.items() if self._saves(changes)}
        for count in range(1, len(allowed) + 1):
            found = []
            for texts in combinations(allowed, count):
                together = {k: v for text in texts for k, v in allowed[text].items()}
                found.append(self.change(" and ".join(texts), **together))
            if any(found):
                return found
        return []

    def _saves(self, changes: dict[str, Any]) -> bool:
        """Whether it may be joined with what was asked for, and is no part of it."""
        asked = self.asked
        if "update_in_backward" in changes:
            return (
                asked["sample_rate"] == 1 and asked["autocast"] is not torch.float16 and not asked["update_in_backward"]
            )
        return asked["optimizer"] != "sgd" if "optimizer" in changes else asked["dtype"] not in HALF

    def fewer_samples(self) -> Change | None:
        world = self.asked["world_size"]
        samples = _largest(self.asked["batch_size"] // world, lambda n: self.fits(batch_size=n * world)) * world
        return (
            self.change(f"a global batch of {samples:,}", batch_size=samples)
            if 0 < samples < self.asked["batch_size"]
            else None
        )

    def more_ranks(self) -> Change | None:
        most = min(self.asked["num_classes"], MAX_WORLD)
        ranks = _fewest(self.asked["world_size"], most, lambda n: self.fits(world_size=n))
        return None if ranks is None else self.change(f"{ranks:,} ranks", world_size=ranks)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number in `[1, most]` for which all up to it fit; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fewest(few: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest number above `few`, which is too few, that fits; looked for by doubling, as too many may be wrong again."""
    enough = min(2 * few, most)
    while few < enough and not fits(enough):
        few, enough = enough, min(2 * enough, most)
    if few >= enough:
        return None
    return enough - _largest(enough - few - 1, lambda fewer: fits(enough - fewer))


# ---------------------------------------------------------------------------------------------------- arguments


def _check(a: dict[str, Any], memory: int | None) -> None:
    for name in ("num_classes", "embedding_size", "world_size", "batch_size"):
        if not isinstance(a[name], int) or isinstance(a[name], bool) or a[name] < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {a[name]!r}")
    for name, value, least in (("memory", memory, 1), ("logits_budget", a["logits_budget"], 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} must be a number of bytes of at least {least}, or None, not {value!r}")
    if (
        isinstance(a["sample_rate"], bool)
        or not isinstance(a["sample_rate"], (int, float))
        or not 0 < a["sample_rate"] <= 1
    ):
        raise ValueError(f"sample_rate is a share of the classes in (0, 1], not {a['sample_rate']!r}")
    _check_choices(a)
    if a["update_in_backward"] and a["sample_rate"] < 1:
        raise ValueError(f"update_in_backward is for sample_rate=1.0, not {a['sample_rate']!r}")
    if a["update_in_backward"] and a["autocast"] is torch.float16:
        raise ValueError(
            "update_in_backward cannot be joined with autocast float16, which needs a GradScaler; allowed is bfloat16 or None"
        )


def _check_choices(a: dict[str, Any]) -> None:
    named = a["optimizer"]
    if not (
        named in OPTIMIZERS
        if isinstance(named, str)
        else isinstance(named, type) and issubclass(named, torch.optim.Optimizer)
    ):
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZERS)}, or a torch.optim.Optimizer class, not {named!r}"
        )
    if a["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(_name, DTYPES))}, not {_name(a['dtype'])}")
    if a["autocast"] not in (None, *HALF):
        raise ValueError(f"autocast must be None, {' or '.join(map(_name, HALF))}, not {_name(a['autocast'])}")
    if a["low_precision"] not in (None, "master", "stochastic"):
        raise ValueError(f'low_precision must be None, "master" or "stochastic", not {a["low_precision"]!r}')
    try:
        torch.device(a["device"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be a type of device such as "cpu" or "cuda", not {a["device"]!r}') from error


# ---------------------------------------------------------------------------------------------------- text


def _name(value: Any) -> str:
    """A dtype or class as text."""
    return value.__name__ if isinstance(value, type) else str(value).removeprefix("torch.")


def size(count: int) -> str:
    """Bytes for reading: GiB, MiB or KiB."""
    unit, digits = next(
        ((unit, digits) for unit, digits in (("GiB", 30), ("MiB", 20)) if count >= 1 << digits), ("KiB", 10)
    )
    return f"{count / (1 << digits):.2f} {unit}"


def _head_lines(made: Plan) -> list[str]:
    a = made.arguments
    ranks = "1 rank" if a["world_size"] == 1 else f"{a['world_size']:,} ranks"
    budget = DEFAULT_LOGITS_BUDGET if a["logits_budget"] is None else a["logits_budget"]
    words = [f"{_name(a['dtype'])} weights", f"{_name(a['autocast'] or a['dtype'])} products", _name(a["optimizer"])]
    words += ["updated in backward"] * a["update_in_backward"] + [f"low precision: {a['low_precision']}"] * bool(
        a["low_precision"]
    )
    return [
        f"C = {a['num_classes']:,} classes, D = {a['embedding_size']:,}, N = {a['batch_size']:,} samples, {ranks}, "
        f"r = {a['sample_rate']:g}",
        f"{', '.join(words)}, on {a['device']}",
        f"a rank: {made.classes:,} classes, {made.rows:,} rows a step; logits are {made.mode} ({size(made.logits)}, "
        f"a budget of {size(budget)}), {made.tile:,} rows a tile",
    ]


def _memory_lines(made: Plan) -> list[str]:
    lines = [f"{'memory of a rank':34}{'largest':>12}  {'at the peak':>12}"]
    for item in made.items:
        if item.largest:
            now = item.bytes.get(made.peak_phase, 0)
            lines.append(
                f"  {item.name:32}{size(item.largest):>12}  {size(now) if now else '-':>12}  {item.formula}".rstrip()
            )
    return [*lines, f"  {'peak, in ' + made.peak_phase:32}{'':>12}  {size(made.peak):>12}"]


def _step_lines(made: Plan) -> list[str]:
    lines = ["a step of a rank"]
    lines += [f"  {name:32}{count / 1e12:>12.3f}  10^12 operations" for name, count in made.operations.items()]
    lines += [f"  {name + ', read and written':32}{size(count):>12}" for name, count in made.traffic.items()]
    return lines + [f"  {c.name:36}sent {size(c.sent):>12}, received {size(c.received):>12}" for c in made.collectives]


def _fit_lines(made: Plan) -> list[str]:
    fit = made.fit
    if fit is None:
        return []
    room = f"{size(fit.memory)} ({fit.memory / 1e9:.3g} GB)"
    if fit.fits:
        lines = ["", f"{size(made.peak)} fit into {room}; the backbone and its activations come on top"]
        if made.arguments["sample_rate"] < 1 and fit.largest_rate is not None:
            lines.append(f"  the largest that fits is {_change_line(fit.largest_rate)}")
        return lines
    lines = ["", f"{size(made.peak)} do not fit into {room}"]
    if not fit.changes:
        return [
            *lines,
            f"  nothing that was tried makes them fit: a sampling rate, tiled logits, {', '.join(SAVERS)}, fewer samples, more ranks",
        ]
    none = "" if fit.largest_rate is not None else "no sampling rate makes them fit; "
    return [*lines, f"  {none}any one of these does:", *(f"    {_change_line(change)}" for change in fit.changes)]


def _change_line(change: Change) -> str:
    arguments = ", ".join(f"{k}={_name(v)}" for k, v in change.arguments.items())
    return f"{change.text}, by {arguments} ({size(change.peak)})"
