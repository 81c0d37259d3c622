"""What a rank does, sends and holds at 8 to 1,024 ranks: one rank of torch's fake process group, and the plan.

    python benchmarks/many_ranks.py [--quick] [--out runs/many_ranks]       writes results.json, the tables and the plot

    draws       this rank's part of the windows of a whole cycle, at full size: the classes whose places it looks up,
                the operators that this takes in pieces as on a GPU, and the bytes that it keeps
    a step      forward, backward, update of a sampled head with all 65,536 samples and few classes: its collectives and
                operators. The fake group answers each collective with this rank's own numbers
    plan        memory and bytes at D = 512, which are computed and not measured

Nothing is timed. Ranks of the fake group are in one process each, one after another.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing import get_context
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_, cycle_table, plan
from partial_fc.cycle_table import PIECE_ELSEWHERE, make_table
from partial_fc.distributed.shards import shard_bounds
from partial_fc.sampling import Windows, permutation_of, window_size

RANKS = (8, 64, 256, 1024)
CLASSES = (100_000_000, 1_000_000_000)
SAMPLES, WIDTH, RATE = 65_536, 512, 0.1
CPU = torch.device("cpu")
# by torch's name of a collective: ours, and how often a rank sends what it brings, in a ring of k ranks
COLLECTIVES = {
    "_allgather_base_": ("all-gather", lambda k: k - 1),
    "allreduce_": ("all-reduce", lambda k: 2 * (k - 1) / k),
    "_reduce_scatter_base_": ("reduce-scatter", lambda k: (k - 1) / k),
    "alltoall_base_": ("all-to-all", lambda k: (k - 1) / k),
}


@dataclass
class Sent:
    """A collective of a step: bytes that a rank brings, and that it sends, and as many receives, in a ring."""

    kind: str
    own: int
    sent: int


@dataclass
class Counted(TorchDispatchMode):
    """Operators that make or write numbers, which are a GPU's launches; how many numbers they make; collectives."""

    world: int = 1
    operators: int = 0
    numbers: int = 0
    names: Counter[str] = field(default_factory=Counter)
    collectives: list[Sent] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d":
            kind, times = COLLECTIVES[name]
            given = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            own = given[-1].nbytes
            self.collectives.append(Sent(kind, own, round(own * times(self.world))))
        elif not all(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            self.operators += 1
            self.names[name] += 1
            self.numbers += sum(each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor))
        return made


def draws(classes: int, world: int) -> dict[str, Any]:
    """Of a cycle, by the rank in the middle. Its table is made of tensors without numbers, at full size; what a step
    reads of it is counted at a small one."""
    lo, hi = shard_bounds(classes, world // 2, world)
    size = window_size(classes, RATE)
    permutation = permutation_of(classes, 0, 0)
    permutation.positions_of(torch.arange(1))  # what lies outside, of √C numbers, is found once a cycle, with them
    pieces_of_a_gpu = patch.object(cycle_table, "PIECE", PIECE_ELSEWHERE)
    with pieces_of_a_gpu, FakeTensorMode(allow_non_fake_inputs=True), Counted() as making:
        make_table(permutation, size, lo, hi, CPU)
    steps = -(-classes // size)
    pieces = -(-(hi - lo) // PIECE_ELSEWHERE)
    small = Windows().fit(1000 * pieces, RATE, 0, 0, 999 * pieces, CPU, 1)
    with patch.object(cycle_table, "PIECE", 999):
        small.rows(0)
    with Counted() as reading:
        for step in range(small.steps):
            small.rows(step)
    return {
        "classes": classes,
        "world": world,
        "own classes": hi - lo,
        "window": size,
        "places looked up a step": (hi - lo) / steps,
        "numbers made a step": making.numbers / steps,
        "operators a step": making.operators / steps + reading.operators / small.steps,
        "bytes kept": 4 * (hi - lo),
    }


def step(world: int, samples: int, bounded: bool) -> dict[str, Any]:
    """Of the second step of one rank of `world`. bounded: whether logits need no maximum."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=world // 2, world_size=world, store=FakeStore())
    torch.manual_seed(0)
    margin = ArcFace(64.0 if bounded else 1000.0)  # such a scale leaves the range of float32
    head = PartialFC(16, 64 * world, margin, RATE, on_nonfinite="skip")
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    for _ in range(2):
        x = torch.randn(samples // world, 16, requires_grad=True)
        labels = torch.randint(0, 64 * world, (samples // world,))
        with Counted(world) as counted:
            head(x, labels).backward()
            clip_grad_norm_([x], head, max_norm=5.0)
            optimizer.step()
            optimizer.zero_grad()
    dist.destroy_process_group()
    names = ["status", "payload", *["statistics"] * (len(counted.collectives) - 4), "embedding gradient", "norm"]
    found = {
        "world": world,
        "bounded": bounded,
        "samples": samples,
        "operators": counted.operators,
        "collectives": [{"name": name, **asdict(c)} for name, c in zip(names, counted.collectives, strict=True)],
    }
    statistics = [c for name, c in zip(names, counted.collectives, strict=True) if name == "statistics"]
    found["statistics"] = 2 * sum(c.sent for c in statistics)  # sent and received
    numbers = sum(c.own for c in statistics)
    found["statistics if gathered"] = 2 * numbers * (world - 1)
    return found


def planned(classes: int, world: int) -> dict[str, Any]:
    made = plan(classes, WIDTH, world, SAMPLES, RATE, "sgd-momentum", autocast=torch.bfloat16)
    of = {item.name: item.largest for item in made.items}
    sent = {c.name: c.sent + c.received for c in made.collectives}
    return {"classes": classes, "world": world, "peak": made.peak, "items": of, "bytes": sent, "rows": made.rows}


def in_a_process(function: Any, *given: Any) -> dict[str, Any]:
    """Its result, in a process that ends then: a fake group stays no other's."""
    with get_context("spawn").Pool(1) as pool:
        found: dict[str, Any] = pool.apply(function, given)
        return found


def measure(quick: bool) -> dict[str, list[dict[str, Any]]]:
    classes = [each // 1000 for each in CLASSES] if quick else CLASSES
    samples = SAMPLES // 8 if quick else SAMPLES
    return {
        "draws": [draws(each, world) for each in classes for world in RANKS],
        "steps": [in_a_process(step, world, samples, bounded) for bounded in (True, False) for world in RANKS],
        "plans": [planned(each, world) for each in CLASSES for world in RANKS],
    }


def _size(value: float) -> str:
    """Bytes in units of 1,000, three digits."""
    if value < 1000:
        return f"{value:.0f} B"
    power = min(4, int(math.log10(value) / 3))
    number = value / 1000**power
    return f"{number:.{max(0, 2 - int(math.log10(number)))}f} {' kMGT'[power]}B"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(each) + " |" for each in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    drawn = [
        (
            f"{d['classes'] / 1e6:,g}M",
            *(_count(d[key]) for key in ("world", "own classes", "window", "places looked up a step")),
            f"{d['operators a step']:.1f}",
            _size(d["bytes kept"]),
        )
        for d in found["draws"]
    ]
    steps = []
    for s in found["steps"]:
        own = {c["name"]: 0 for c in s["collectives"]}
        for c in s["collectives"]:
            own[c["name"]] += c["own"]
        kinds = " + ".join(c["kind"] for c in s["collectives"] if c["name"] == "statistics")
        cells = _size(own["statistics"]), _size(s["statistics"]), _size(s["statistics if gathered"])
        steps.append((_count(s["world"]), "no" if s["bounded"] else "yes", kinds, *cells, str(s["operators"])))
    plans = []
    for p in found["plans"]:
        sent = {name.split(" (")[0]: each for name, each in p["bytes"].items()}
        network = [_size(sent[name]) for name in ("status", "payload", "statistics", "embedding gradient")]
        held = [p["items"]["weights"] + p["items"]["optimizer state"], p["items"]["steps of a cycle"], p["peak"]]
        memory = [_size(each) for each in held]
        plans.append((f"{p['classes'] / 1e6:,g}M", _count(p["world"]), _count(p["rows"]), *network, *memory))
    return "\n\n".join(
        (
            _table(
                [
                    "C",
                    "ranks",
                    "classes of the rank",
                    "window of all",
                    "places looked up a step",
                    "operators a step",
                    "kept",
                ],
                drawn,
            ),
            _table(
                [
                    "ranks",
                    "a maximum",
                    "statistics by",
                    "brought",
                    "sent and received",
                    "if gathered",
                    "operators of a step",
                ],
                steps,
            ),
            _table(
                [
                    "C",
                    "ranks",
                    "S",
                    "status",
                    "payload",
                    "statistics",
                    "embedding gradient",
                    "weights and state",
                    "steps of a cycle",
                    "peak",
                ],
                plans,
            ),
        )
    )


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Three panels against the ranks: places looked up, bytes of statistics, memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.0), layout="constrained")
    places, network, memory = figure.subplots(1, 3)
    for color, classes in zip(("C0", "C1"), sorted({d["classes"] for d in found["draws"]}), strict=True):
        of = [d for d in found["draws"] if d["classes"] == classes]
        name = f"C = {classes // 10**6:,}M"
        worlds = [d["world"] for d in of]
        places.plot(worlds, [d["places looked up a step"] for d in of], "o-", color=color, label=name)
        places.plot(worlds, [d["window"] for d in of], ":", color=color, label=f"{name}, the whole window")
    places.set_title("class ids looked up by a rank, a step")
    for color, bounded in (("C0", True), ("C1", False)):
        of = [s for s in found["steps"] if s["bounded"] == bounded]
        name = "bounded logits" if bounded else "with a maximum"
        worlds = [s["world"] for s in of]
        network.plot(worlds, [s["statistics"] for s in of], "o-", color=color, label=name)
        network.plot(worlds, [s["statistics if gathered"] for s in of], ":", color=color, label=f"{name}, if gathered")
    network.axhline(10e6, color="0.5", linewidth=0.8)
    network.set_title(f"statistics of N = {found['steps'][0]['samples']:,}: bytes sent and received")
    for color, classes in zip(("C0", "C1"), CLASSES, strict=True):
        of = [p for p in found["plans"] if p["classes"] == classes]
        memory.plot(
            [p["world"] for p in of], [p["peak"] for p in of], "o-", color=color, label=f"C = {classes // 10**6:,}M"
        )
    memory.set_title(f"planned peak of a rank, D = {WIDTH}, r = {RATE:g}: bytes")
    for axes in (places, network, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(RANKS, [str(each) for each in RANKS])
        axes.minorticks_off()
        axes.set_xlabel("ranks")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a thousandth of the classes, an eighth of the samples")
    parser.add_argument("--out", type=Path, default=Path("runs/many_ranks"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    found = measure(args.quick)
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    text = tables(found)
    (args.out / "tables.md").write_text(text + "\n")
    draw(found, args.out / "many-ranks.png")
    print(text)


if __name__ == "__main__":
    main()
