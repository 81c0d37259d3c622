"""Will it fit? The memory, work and traffic of a head on each rank, before anything is allocated.

    arguments           ──>  bytes in each phase (memory.py), operations and traffic (costs.py);
                             the peak is the largest sum of bytes over a phase
    memory of a rank    ──>  whether the peak fits, and what to change if not (advice.py)
    both                ──>  a table to read, or a dictionary for programs

docs/cost-model.md says what is counted, and how close the results are to measurements.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from partial_fc.batch.status import DTYPES
from partial_fc.classes.hard_negatives import check_hard_negatives, check_neighbours
from partial_fc.classes.head_arguments import checked_block
from partial_fc.classes.head_state import DEFAULT_LOGITS_BUDGET
from partial_fc.distributed.given import as_whole, plain
from partial_fc.optim.optimizer_class import LowPrecision
from partial_fc.optim.row_state import HALF, SkippedRowsChoice
from partial_fc.planning.advice import SAVERS, Change, Fit, advise
from partial_fc.planning.costs import OPTIMIZERS, Collective, Search, collectives, operations, search, sizes, traffic
from partial_fc.planning.memory import PHASES, Item, items
from partial_fc.planning.predicted import Prediction, lines, predict
from partial_fc.planning.tiers import Kept, Tier, tier_lines, tier_of


@dataclass(frozen=True)
class Plan:
    """The result of `plan`. Bytes and operations are those of one rank, the one with the most classes."""

    arguments: dict[str, Any]
    classes: int  # C_local
    rows: int  # S: all of the shard, or the expected number under sampling
    tile: int  # T
    mode: str  # "kept" or "tiled"
    logits: int  # bytes of kept logits, which the head compares with logits_budget
    items: tuple[Item, ...]
    operations: dict[str, int]
    traffic: dict[str, int]
    collectives: tuple[Collective, ...]
    fit: Fit | None = None
    search: Search | None = None  # for hard negatives
    skipped_rows: SkippedRowsChoice | None = None  # what rows do that a step does not select; None without sampling
    with_kernels: tuple[Prediction, ...] = ()  # on some cards; none where kernels of logits serve no card
    tier: Tier | None = None  # what is kept in a storage

    @property
    def phases(self) -> dict[str, int]:
        """Bytes in each phase of a step."""
        return {phase: sum(item.bytes.get(phase, 0) for item in self.items) for phase in PHASES}

    @property
    def peak_phase(self) -> str:
        phases = self.phases
        return max(phases, key=phases.__getitem__)

    @property
    def peak(self) -> int:
        """The largest number of bytes over all phases."""
        return max(self.phases.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON: bytes and operations as integers, dtypes and optimizers by name."""
        own = {**asdict(self), "phases": self.phases, "peak_phase": self.peak_phase, "peak": self.peak}
        plain: dict[str, Any] = json.loads(json.dumps(own, default=_name))
        return plain

    def __str__(self) -> str:
        of_step = [*_step_lines(self), *([] if self.tier is None else tier_lines(self.tier)), *lines(self.with_kernels)]
        return "\n".join([*_fit_lines(self), *_head_lines(self), "", *_memory_lines(self), "", *of_step])


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
    hard_negatives: int = 0,
    skipped_rows: SkippedRowsChoice | None = None,
    storage: Kept | None = None,
    sample_block: int = 1,
    disk: int | None = None,
    centers: int = 1,
) -> Plan:
    """Return what a head of these sizes needs on each rank. Nothing is allocated.

    Args:
        world_size: number of ranks that the classes are split over.
        batch_size: N, samples of the global batch.
        optimizer: "sgd", "sgd-momentum", "adam", "adamw", "rmsprop", "adagrad", in any case, or a class with its
            default options.
        autocast: dtype of the matrix products under torch.autocast, None without it.
        memory: bytes that a rank may use for the head; `fit` of the result then says whether that is enough and what to
            change if not.
        storage: "host" or "files": as `HostRows()` or `FileRows(...)` of `PartialFC`; `tier` of the result then has
            what is kept there.
        disk: bytes per second that the disk reads and writes, for all ranks that share it.
        centers: rows of a class, the sub-centers of `SubCenterArcFace`.
        device: type of device; on "cpu" tiles are smaller, and large buffers are held from step to step.

    `update_in_backward`, `low_precision` and `skipped_rows` are those of `RowOptimizer`, the other arguments those of
    `PartialFC`.

    Raises ValueError for invalid arguments.
    """
    arguments = {k: v for k, v in locals().items() if k != "memory"}
    memory = _check(arguments, memory)
    made = _plan(arguments)
    if memory is None:
        return made
    return replace(made, fit=advise(arguments, memory, lambda changed: _plan(changed).peak))


def _plan(arguments: dict[str, Any]) -> Plan:
    z = sizes(**arguments)
    kept, block, disk = arguments["storage"], arguments["sample_block"], arguments["disk"]
    mode = "kept" if z.kept else "tiled"
    fixed = arguments, z.C_local, z.S, z.T, mode, z.logits, items(z), operations(z), traffic(z), collectives(z)
    tier = None if kept is None else tier_of(z, kept, block, disk)
    kernels = () if kept or z.centers > 1 else predict(z)  # no kernel of logits serves sub-centers
    return Plan(*fixed, search=search(z), skipped_rows=z.skipped, with_kernels=kernels, tier=tier)


# ---------------------------------------------------------------------------------------------------- arguments


def _check(arguments: dict[str, Any], memory: int | None) -> int | None:
    """Give every number of `arguments` one spelling, and return the memory. ValueError for what cannot be."""
    for name in ("num_classes", "embedding_size", "world_size", "batch_size", "centers"):
        value = as_whole(arguments[name])
        if value is None or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {arguments[name]!r}")
        arguments[name] = value
    bytes_of = {"memory": memory, "logits_budget": arguments["logits_budget"]}
    for name, least in (("memory", 1), ("logits_budget", 0)):
        given = bytes_of[name]
        if given is not None:
            bytes_of[name] = as_whole(given)
            if (bytes_of[name] or 0) < least or bytes_of[name] is None:
                raise ValueError(f"{name} must be a number of bytes of at least {least}, or None, not {given!r}")
    arguments["logits_budget"] = bytes_of["logits_budget"]
    rate = plain(arguments["sample_rate"])
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise ValueError(f"sample_rate must be in (0, 1], not {rate!r}")
    arguments["sample_rate"] = float(rate)
    _check_choices(arguments)
    hard, _ = check_hard_negatives(arguments["hard_negatives"], 1, rate)
    check_neighbours(hard, arguments["num_classes"])
    arguments["hard_negatives"] = hard
    arguments["sample_block"] = checked_block(arguments["sample_block"], arguments["num_classes"], rate)
    if arguments["disk"] is not None and (as_whole(arguments["disk"]) or 0) < 1:
        raise ValueError(f"disk must be a number of bytes per second of at least 1, or None, not {arguments['disk']!r}")
    if arguments["storage"] is not None and rate == 1 and not arguments["update_in_backward"]:
        raise ValueError("storage with sample_rate=1.0 requires update_in_backward")
    if arguments["update_in_backward"] and rate < 1:
        raise ValueError(f"update_in_backward requires sample_rate=1.0, not {rate!r}")
    if arguments["update_in_backward"] and arguments["autocast"] is torch.float16:
        raise ValueError(
            "update_in_backward is incompatible with autocast float16, which needs a GradScaler; use bfloat16 or None"
        )
    return bytes_of["memory"]


def _check_choices(arguments: dict[str, Any]) -> None:
    optimizer = arguments["optimizer"]
    if isinstance(optimizer, str):
        optimizer = arguments["optimizer"] = optimizer.lower()
        known = optimizer in OPTIMIZERS
    else:
        known = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    if not known:
        names = ", ".join(OPTIMIZERS)
        raise ValueError(f"optimizer must be one of {names}, or a torch.optim.Optimizer class, not {optimizer!r}")
    dtype = arguments["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(_name, DTYPES))}, not {_name(dtype)}")
    autocast = arguments["autocast"]
    if autocast not in (None, *HALF):
        raise ValueError(f"autocast must be None, {' or '.join(map(_name, HALF))}, not {_name(autocast)}")
    if arguments["low_precision"] not in (None, "master", "stochastic"):
        raise ValueError(f'low_precision must be None, "master" or "stochastic", not {arguments["low_precision"]!r}')
    if arguments["skipped_rows"] not in (None, "dense", "still"):
        raise ValueError(f'skipped_rows must be "dense" or "still", not {arguments["skipped_rows"]!r}')
    device, storage = arguments["device"], arguments["storage"]
    if storage not in (None, "host", "files"):
        raise ValueError(f'storage must be None, "host" or "files", not {storage!r}')
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be a type of device such as "cpu" or "cuda", not {device!r}') from error


# ---------------------------------------------------------------------------------------------------- text


def _name(value: Any) -> str:
    """Return a dtype or a class as text."""
    return value.__name__ if isinstance(value, type) else str(value).removeprefix("torch.")


def size(count: int) -> str:
    """Return a number of bytes in GiB, MiB or KiB."""
    for unit, digits in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << digits:
            return f"{count / (1 << digits):.2f} {unit}"
    return f"{count / (1 << 10):.2f} KiB"


def _head_lines(made: Plan) -> list[str]:
    a = made.arguments
    ranks = "1 rank" if a["world_size"] == 1 else f"{a['world_size']:,} ranks"
    budget = DEFAULT_LOGITS_BUDGET if a["logits_budget"] is None else a["logits_budget"]
    words = [f"{_name(a['dtype'])} weights", f"{_name(a['autocast'] or a['dtype'])} products", _name(a["optimizer"])]
    if a["update_in_backward"]:
        words.append("updated in backward")
    if a["low_precision"]:
        words.append(f"low precision: {a['low_precision']}")
    if a["centers"] > 1:
        words.append(f"{a['centers']} sub-centers a class")
    if a["hard_negatives"]:
        words.append(f"{a['hard_negatives']} hard negatives a class")
    if a["storage"]:
        words.append({"host": "HostRows", "files": "FileRows"}[a["storage"]])
    if a["sample_block"] > 1:
        words.append(f"blocks of {a['sample_block']:,} classes")
    if made.skipped_rows is not None:
        words.append(f"skipped rows: {made.skipped_rows}")
    return [
        f"C = {a['num_classes']:,} classes, D = {a['embedding_size']:,}, N = {a['batch_size']:,} samples, {ranks}, "
        f"r = {a['sample_rate']:g}",
        f"{', '.join(words)}, on {a['device']}",
        f"per rank: {made.classes:,} classes, {made.rows:,} rows per step; logits are {made.mode} "
        f"({size(made.logits)}, budget {size(budget)}), {made.tile:,} rows per tile",
    ]


def _memory_lines(made: Plan) -> list[str]:
    lines = [f"{'memory per rank':34}{'largest':>12}  {'at the peak':>12}"]
    for item in made.items:
        if item.largest:
            now = item.bytes.get(made.peak_phase, 0)
            sizes = f"{size(item.largest):>12}  {size(now) if now else '-':>12}"
            lines.append(f"  {item.name:32}{sizes}  {item.formula}".rstrip())
    gradient = next(item.largest for item in made.items if item.name in ("row gradients", "weight gradient"))
    more = [] if made.arguments["update_in_backward"] else [f"gradients of earlier micro-batches ({size(gradient)})"]
    more += ["the further tiles of logits of inter_topk"]
    return [
        *lines,
        f"  {'peak, in ' + made.peak_phase:32}{'':>12}  {size(made.peak):>12}",
        *(f"  not counted: {each}" for each in more),
    ]


def _step_lines(made: Plan) -> list[str]:
    lines = ["one step, per rank"]
    lines += [f"  {name:32}{count / 1e12:>12.3f}  10^12 operations" for name, count in made.operations.items()]
    lines += [f"  {name + ', read and written':32}{size(count):>12}" for name, count in made.traffic.items()]
    lines += _collective_lines(made.collectives)
    if made.search is None:
        return lines
    lines += ["", "one search for hard negatives, per rank"]
    lines.append(f"  {'matrix products':32}{made.search.operations / 1e12:>12.3f}  10^12 operations")
    return lines + _collective_lines(made.search.collectives)


def _collective_lines(found: tuple[Collective, ...]) -> list[str]:
    return [f"  {c.name:36}sent {size(c.sent):>12}, received {size(c.received):>12}" for c in found]


def _fit_lines(made: Plan) -> list[str]:
    fit = made.fit
    if fit is None:
        return []
    room = f"{size(fit.memory)} ({fit.memory / 1e9:.3g} GB)"
    if fit.fits:
        lines = [f"{size(made.peak)} fit into {room}; the backbone and its activations need memory besides"]
        if made.arguments["sample_rate"] < 1 and fit.largest_rate is not None:
            lines.append(f"  the largest that fits is {_change_line(fit.largest_rate)}")
        return [*lines, ""]
    lines = [f"{size(made.peak)} do not fit into {room}"]
    if not fit.changes:
        tried = f"a sampling rate, tiled logits, {', '.join(SAVERS)}, fewer samples, more ranks"
        return [*lines, f"  none of the changes that were tried makes it fit: {tried}", ""]
    none = "" if fit.largest_rate is not None else "no sampling rate makes it fit; "
    return [
        *lines,
        f"  {none}each of these changes does:",
        *(f"    {_change_line(change)}" for change in fit.changes),
        "",
    ]


def _change_line(change: Change) -> str:
    arguments = ", ".join(f"{k}={_name(v)}" for k, v in change.arguments.items())
    return f"{change.text}: {arguments} ({size(change.peak)})"
