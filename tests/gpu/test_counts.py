"""What a training step asks of a GPU: kernel launches, waits of the host, bytes of memory. Ceilings of each.

    PYTHONPATH=.:tests/support python tests/gpu/test_counts.py              all cases
    PYTHONPATH=.:tests/support python tests/gpu/test_counts.py r=1 "r=1, an element" "a further tile, kept"
                                                                            these, by line of the package

Counted is the third step, which finds all state made: forward, backward, clipping, the optimizer's step, zero_grad.
Batches and gradients of the backbone are made outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from device_counts import Counts, Line
from pretend_gpu import PretendGpu, join
from runner import Ranks
from torch import Tensor

from partial_fc import (
    CenterLoss,
    CurricularFace,
    DivergenceWatch,
    JoinedBatches,
    PartialFC,
    RowOptimizer,
    SphereFace2,
    SubCenterArcFace,
    clip_grad_norm_,
    gather,
)
from partial_fc.optim import row_optimizer
from partial_fc.softmax import tiles

CLASSES, SAMPLES, WIDTH = 2048, 64, 16
FEW = 8  # samples, where bytes of the weight are told from those of a batch

# ceilings: as measured, never to rise; lower them with the code
MOST: dict[str, dict[str, float]] = {
    "r=1": {"launches": 112, "waits": 1},
    "r=0.25": {"launches": 150, "waits": 1},
    "r=0.25, corrected": {"launches": 155, "waits": 1},
    "r=0.25, corrected, bf16": {"launches": 158, "waits": 1},
    "r=1, bf16": {"launches": 114, "waits": 1},
    "r=1, tiled": {"launches": 116, "waits": 1},
    "r=1, no clipping": {"launches": 107, "waits": 1},
    "r=0.25, hard negatives": {"launches": 157, "waits": 1},
    "r=0.25, label smoothing": {"launches": 205, "waits": 1},
    "r=0.25, a filter": {"launches": 160, "waits": 1},
    "r=0.25, SubCenterArcFace": {"launches": 183, "waits": 1},
    "r=0.25, CurricularFace": {"launches": 205, "waits": 1},
    "r=0.25, SphereFace2": {"launches": 231, "waits": 1},
    "r=1, AdamW": {"launches": 114, "waits": 1},
    "r=0.25, AdamW": {"launches": 165, "waits": 1},
    "r=1, metrics": {"launches": 218, "waits": 1},
    "r=1, label smoothing": {"launches": 163, "waits": 1},
    "r=1 and a center loss": {"launches": 177, "waits": 1},
    "r=1 and a center loss by gradient": {"launches": 194, "waits": 1},
    "r=1 and a center loss by gradient, still": {"launches": 173, "waits": 3},
    "r=1, weights of labels and samples": {"launches": 174, "waits": 1},
    "r=0.25, weights of labels and samples": {"launches": 214, "waits": 1},
    "r=1, two micro-batches": {"launches": 211, "waits": 1},
    "r=0.25, two micro-batches": {"launches": 305, "waits": 1},
    "r=1, two ranks": {"launches": 124, "waits": 1},
    "r=0.25, two ranks": {"launches": 162, "waits": 1},
    "r=0.25, two ranks, hard negatives": {"launches": 169, "waits": 1},
    "r=1, two ranks, JoinedBatches": {"launches": 126, "waits": 1},
    "r=1, two ranks, 10 parameters": {"launches": 126, "waits": 1},
    "r=1, two ranks, 10 parameters, DivergenceWatch": {"launches": 166, "waits": 1},
    "a further tile, kept": {"launches": 8, "waits": 0},
    "a further tile, tiled": {"launches": 11, "waits": 0},
    "a further tile, kept, bf16": {"launches": 10, "waits": 0},
    "a further tile, r=0.25": {"launches": 8, "waits": 0},
    "a further tile, r=0.25, corrected": {"launches": 8, "waits": 0},
    "a further block of the optimizer": {"launches": 1, "waits": 0},
    "a further block of the optimizer, r=0.25, AdamW": {"launches": 6, "waits": 0},
    "a further micro-batch": {"launches": 97, "waits": 0},
    "400 parameters to clip": {"launches": 14, "waits": 0},
    "r=1, an element": {"bytes": 85},
    "r=1, tiled, an element": {"bytes": 89},
    "r=1, bf16, an element": {"bytes": 75},
    "r=1, AdamW, an element": {"bytes": 93},
    "r=1, no clipping, an element": {"bytes": 77},
}


@dataclass(frozen=True)
class Case:
    """A training step. world: ranks; a single one has no group. tiles: of the class rows. blocks: of the optimizer's
    rows. parameters: of a backbone."""

    world: int = 1
    rate: float = 1.0
    kept: bool = True
    tiles: int = 1
    blocks: int = 1
    samples: int = SAMPLES
    width: int = WIDTH
    autocast: torch.dtype | None = None
    center: str = ""
    center_rows: str = "dense"
    weighted: bool = False
    micro_batches: int = 1
    joined: bool = False
    watched: bool = False
    clip: bool = True
    parameters: int = 0
    elements: int = 8  # of a parameter
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 0.1, "momentum": 0.9})
    more: dict[str, Any] = field(default_factory=dict)


CORRECTED = {"sampling_correction": "importance"}
ADAMW = {"optimizer": torch.optim.AdamW, "options": {"lr": 0.1}}

CASES: dict[str, Case] = {
    "r=1": Case(),
    "r=0.25": Case(rate=0.25),
    "r=0.25, hard negatives": Case(rate=0.25, more={"hard_negatives": 3}),  # between two searches
    "r=0.25, label smoothing": Case(rate=0.25, more={"label_smoothing": 0.1}),
    "r=0.25, a filter": Case(rate=0.25, more={"interclass_filter": 0.5}),
    "r=0.25, SubCenterArcFace": Case(rate=0.25, more={"margin": SubCenterArcFace(centers=2)}),
    "r=0.25, CurricularFace": Case(rate=0.25, more={"margin": CurricularFace()}),
    "r=0.25, SphereFace2": Case(rate=0.25, more={"margin": SphereFace2()}),
    "r=0.25, corrected": Case(rate=0.25, more=CORRECTED),
    "r=0.25, corrected, bf16": Case(rate=0.25, more=CORRECTED, autocast=torch.bfloat16),
    "r=1, bf16": Case(autocast=torch.bfloat16),
    "r=1, tiled": Case(kept=False),
    "r=1, no clipping": Case(clip=False),
    "r=1, AdamW": Case(**ADAMW),
    "r=0.25, AdamW": Case(rate=0.25, **ADAMW),
    "r=1, metrics": Case(more={"metrics": True}),
    "r=1, label smoothing": Case(more={"label_smoothing": 0.1}),
    "r=1 and a center loss": Case(center="paper"),
    "r=1 and a center loss by gradient": Case(center="gradient"),
    "r=1 and a center loss by gradient, still": Case(center="gradient", center_rows="still"),
    "r=1, weights of labels and samples": Case(weighted=True),
    "r=0.25, weights of labels and samples": Case(rate=0.25, weighted=True),
    "r=1, two micro-batches": Case(micro_batches=2),
    "r=0.25, two micro-batches": Case(rate=0.25, micro_batches=2),
    "r=1, two ranks": Case(world=2),
    "r=0.25, two ranks": Case(world=2, rate=0.25),
    "r=0.25, two ranks, hard negatives": Case(world=2, rate=0.25, more={"hard_negatives": 3}),
    "r=1, two ranks, JoinedBatches": Case(world=2, joined=True),
    "r=1, two ranks, 10 parameters": Case(world=2, parameters=10, elements=4096),
    "r=1, two ranks, 10 parameters, DivergenceWatch": Case(world=2, parameters=10, elements=4096, watched=True),
}

# what one more of something costs: the difference of two cases, divided by how many more there are
FURTHER: dict[str, tuple[Case, Case, int]] = {
    "a further tile, kept": (Case(tiles=4), Case(tiles=8), 4),
    "a further tile, tiled": (Case(tiles=4, kept=False), Case(tiles=8, kept=False), 4),
    "a further tile, kept, bf16": (Case(tiles=4, autocast=torch.bfloat16), Case(tiles=8, autocast=torch.bfloat16), 4),
    "a further tile, r=0.25": (Case(tiles=2, rate=0.25), Case(tiles=4, rate=0.25), 2),
    "a further tile, r=0.25, corrected": (
        Case(tiles=2, rate=0.25, more=CORRECTED),
        Case(tiles=4, rate=0.25, more=CORRECTED),
        2,
    ),
    "a further block of the optimizer": (Case(blocks=4), Case(blocks=8), 4),
    "a further block of the optimizer, r=0.25, AdamW": (
        Case(blocks=8, rate=0.25, **ADAMW),  # three blocks of the selected rows, then five
        Case(blocks=16, rate=0.25, **ADAMW),
        2,
    ),
    "a further micro-batch": (Case(micro_batches=2), Case(micro_batches=4), 2),
    "400 parameters to clip": (Case(), Case(parameters=400), 1),
}

# bytes for each element of the weight, in all passes of a step: two widths tell them from those of logits
AN_ELEMENT = ", an element"
BYTES: dict[str, Case] = {
    "r=1": Case(),
    "r=1, tiled": Case(kept=False),
    "r=1, bf16": Case(autocast=torch.bfloat16),
    "r=1, AdamW": Case(**ADAMW),
    "r=1, no clipping": Case(clip=False),
}


@dataclass(frozen=True)
class Step:
    """One training step on the device, with all that it holds."""

    case: Case
    gpu: PretendGpu

    def counts(self) -> Counts:
        """Of the third step."""
        case, gpu = self.case, self.gpu
        torch.manual_seed(0)
        head = PartialFC(
            case.width,
            CLASSES,
            sample_rate=case.rate,
            device=gpu.device,
            logits_budget=None if case.kept else 0,
            **case.more,
        )
        center = CenterLoss(case.width, CLASSES, update=case.center, device=gpu.device) if case.center else None  # type: ignore[arg-type]
        losses = [each for each in (head, center) if each is not None]
        optimizers: list[Any] = [RowOptimizer(case.optimizer, head, **case.options)]
        if center is not None:
            moves = {"lr": 0.1, "momentum": 0.9, "skipped_rows": case.center_rows}
            optimizers.append(RowOptimizer(torch.optim.SGD, center, **moves) if case.center == "gradient" else center)
        backbone = [torch.nn.Parameter(torch.randn(case.elements, device=gpu.device)) for _ in range(case.parameters)]
        watch = DivergenceWatch(torch.nn.ParameterList(backbone), head, every=100) if case.watched else None
        for _ in range(3):
            batches = [self.batch() for _ in range(case.micro_batches)]
            for parameter in backbone:
                parameter.grad = torch.randn(case.elements, device=gpu.device)
            gpu.clear()
            for x, y in JoinedBatches(batches) if case.joined else batches:
                cast = torch.autocast(gpu.device.type, case.autocast) if case.autocast else nullcontext()
                with cast:
                    if case.weighted:
                        two, half = torch.stack((y, y.flip(0)), 1), torch.full((len(y), 2), 0.5, device=gpu.device)
                        gpu.clear()
                        loss = head(gather(x, two, label_weights=half, sample_weights=half[:, 0]))
                    elif center is None:
                        loss = head(x, y)
                    else:
                        batch = gather(x, y)
                        loss = head(batch) + center(batch)
                loss.backward()
            if case.clip:
                clip_grad_norm_([*backbone, x], *losses, max_norm=5.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if watch is not None:
                watch.step()
            if head.collect_metrics:
                assert head.metrics
        return gpu.counts

    def batch(self) -> tuple[Tensor, Tensor]:
        case, device = self.case, self.gpu.device
        x = torch.randn(case.samples, case.width, device=device)
        return x.requires_grad_(), torch.randint(0, CLASSES, (case.samples,), device=device)


def counts_of(case: Case) -> Counts:
    """Of the third step, in a process that has the device."""
    rows = max(64, int(CLASSES * case.rate) // case.tiles // 64 * 64)
    of_tile = 4 * max(case.samples, case.width) * rows
    of_block = 4 * case.width * CLASSES // case.blocks
    with (
        mock.patch.object(tiles, "TILE_BYTES_ELSEWHERE", of_tile if case.tiles > 1 else tiles.TILE_BYTES_ELSEWHERE),
        mock.patch.object(row_optimizer, "BLOCK_BYTES_ELSEWHERE", of_block if case.blocks > 1 else 1 << 28),
        PretendGpu() as gpu,
    ):
        counts = Step(case, gpu).counts()
        assert not gpu.mistakes, gpu.mistakes
        return counts


def further(first: Case, second: Case, more: int) -> dict[str, float]:
    before, after = counts_of(first), counts_of(second)
    return {"launches": (after.launches - before.launches) / more, "waits": (after.waits - before.waits) / more}


def bytes_of_an_element(case: Case) -> float:
    """Bytes that a step moves for each element of the weight."""
    few, many = (counts_of(replace(case, samples=FEW, width=width)) for width in (64, 128))
    return (many.bytes - few.bytes) / (CLASSES * 64)


Figures = dict[str, dict[str, float]]


def further_table(first: Case, second: Case, more: int) -> str:
    """What one more costs, by line."""
    before, after = counts_of(first).by_line(), counts_of(second).by_line()
    nothing = Line()
    differences = {name: (line.launches - before.get(name, nothing).launches) / more for name, line in after.items()}
    ordered = sorted(differences.items(), key=lambda each: -each[1])
    return "\n".join(f"{launches:8g}  {name}" for name, launches in ordered if launches)


def bytes_table(case: Case) -> str:
    """The same by line, the most bytes first."""
    few, many = (counts_of(replace(case, samples=FEW, width=width)).by_line() for width in (64, 128))
    of_lines = {line: (found.bytes - few[line].bytes) / (CLASSES * 64) for line, found in many.items() if line in few}
    ordered = sorted(of_lines.items(), key=lambda each: -each[1])
    return "\n".join(f"{size:8.2f}  {line}" for line, size in ordered if size >= 0.1)


def measured(rank: int, world: int) -> Figures:
    """All figures of this many ranks, by the name of their case."""
    found: Figures = {}
    for name, case in CASES.items():
        if case.world == world:
            counts = counts_of(case)
            found[name] = {"launches": counts.launches, "waits": counts.waits}
    if world > 1:
        return found
    found |= {name: further(*of) for name, of in FURTHER.items()}
    return found | {f"{name}{AN_ELEMENT}": {"bytes": bytes_of_an_element(case)} for name, case in BYTES.items()}


def table(rank: int, world: int, name: str) -> str:
    return counts_of(CASES[name]).table()


@pytest.fixture(scope="module")
def figures(gpu_ranks: Callable[[int], Ranks]) -> Figures:
    return {**gpu_ranks(1).run(measured)[0], **gpu_ranks(2).run(measured)[0]}


@pytest.mark.parametrize("name", MOST)
def test_a_step_asks_no_more_of_the_device(figures: Figures, name: str):
    found = figures[name]
    assert found.keys() == MOST[name].keys()
    assert all(found[what] <= most for what, most in MOST[name].items()), f"{found} is more than {MOST[name]}"


def test_every_case_has_a_ceiling(figures: Figures):
    assert figures.keys() == MOST.keys()


def main(names: list[str]) -> None:
    torch.set_num_threads(1)  # of this process, which runs the cases of one rank
    pool = Ranks(2, join)
    if not names:
        for name, found in {**measured(0, 1), **pool.run(measured)[0]}.items():
            print(f"{name:48}", ", ".join(f"{what} {value:g}" for what, value in found.items()))
    for name in names:
        print(f"== {name}")
        if name.endswith(AN_ELEMENT):
            print(bytes_table(BYTES[name.removesuffix(AN_ELEMENT)]))
        elif name in FURTHER:
            print(further_table(*FURTHER[name]))
        elif CASES[name].world == 1:
            print(table(0, 1, name))
        else:
            print(pool.run(table, name)[0])
    pool.stop(kill=True)


if __name__ == "__main__":
    main(sys.argv[1:])
