"""Draws cases by number: every margin with its settings, and every option that goes with the others.

case_of(7)      the same case in every run and on every machine
valid(case)     why the head would refuse it, "" if it would not; who makes a case smaller asks
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, TypeVar

from fuzz_cases import Case, margin_of
from fuzz_faults import FAULTS, OF_GATHER, Fault

SCALES = (1.0, 8.0, 30.0, 64.0)
SMALL_SCALES = (1.0, 4.0)  # a cosine in bfloat16 is off by 0.01, a logit by as many times the scale
MARGINS = (
    "ArcFace", "CosFace", "NormFace", "SphereFace", "CombinedMargin", "Softmax", "SubCenterArcFace", "CurricularFace", "AdaFace", "MagFace",
    "ElasticFace", "AdaptiveMargin", "SphereFace2",
)  # fmt: skip
WORLDS = (0, 1, 2, 3, 4)
JUMPING = (
    "SubCenterArcFace",
    "CurricularFace",
    "AdaFace",
    "MagFace",
)  # not compared where cosines are rounded to bfloat16
# (argument, lowest, highest) that a schedule moves
SCHEDULED = {
    "ArcFace": ("margin", 0.0, 1.5), "SubCenterArcFace": ("margin", 0.0, 1.5), "CurricularFace": ("margin", 0.0, 1.5),
    "CosFace": ("margin", 0.0, 1.0), "SphereFace": ("margin", 1.0, 4.0), "CombinedMargin": ("m2", 0.0, 1.5),
    "NormFace": ("scale", 1.0, 40.0), "AdaFace": ("margin", 0.0, 1.5), "MagFace": ("l_m", 0.0, 0.5),
    "ElasticFace": ("margin", 0.0, 1.0), "AdaptiveMargin": ("smallest", 0.0, 0.4), "SphereFace2": ("margin", 0.0, 0.6),
}  # fmt: skip
T = TypeVar("T")


class Draw:
    def __init__(self, number: int, what: str = "case") -> None:
        self.random = random.Random(f"{what} {number}")

    def of(self, values: Sequence[T]) -> T:
        return values[self.random.randrange(len(values))]

    def whole(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def number(self, low: float, high: float) -> float:
        return self.random.randint(round(low * 1000), round(high * 1000)) / 1000

    def one_in(self, n: int) -> bool:
        return self.random.randrange(n) == 0


def settings_of(draw: Draw, margin: str, small: bool) -> dict[str, Any]:
    """Arguments of a margin; all that the dense reference reads are in it."""
    if margin == "Softmax":
        return {"bias": draw.one_in(2)}
    found: dict[str, Any] = {"scale": draw.of(SMALL_SCALES if small else SCALES)}
    if margin in ("ArcFace", "SubCenterArcFace", "CurricularFace"):
        found["margin"] = draw.number(0.0, 1.5)
    if margin in ("ArcFace", "SubCenterArcFace", "CombinedMargin"):
        found["gradient"] = draw.of(["exact", "exact", "straight_through"])
    if margin in ("ArcFace", "SubCenterArcFace"):
        found["past_pi"] = draw.of(["monotonic", "monotonic", "plain", "sine", "joined"])
        found["easy_margin"] = draw.one_in(4)
    if margin == "SubCenterArcFace":
        found["centers"] = draw.whole(1, 4)
    if margin == "CurricularFace":
        found["momentum"] = draw.number(0.01, 1.0)
    if margin == "CosFace":
        found["margin"] = draw.number(0.0, 1.0)
    if margin == "SphereFace":
        found |= {"margin": draw.number(1.0, 4.0), "annealing": draw.of([0.0, 0.0, 1.0, 100.0])}
    if margin in ("SphereFace", "NormFace"):
        found["normalize_embeddings"] = not draw.one_in(3)
        if not found["normalize_embeddings"]:
            found["scale"] = 1.0
    if margin == "CombinedMargin":
        found |= {"m1": draw.of([1.0, draw.number(1.0, 2.0)]), "m2": draw.number(0.0, 1.5), "m3": draw.number(0.0, 0.5)}
        one = found["m1"] == 1.0
        found["past_pi"] = draw.of(["monotonic", "monotonic", "plain", *(("sine", "joined") if one else ())])
        found["easy_margin"] = one and draw.one_in(4)
    if margin == "AdaFace":
        found |= {"margin": draw.number(0.0, 1.5), "h": draw.number(0.05, 1.0), "momentum": draw.number(0.01, 1.0)}
    if margin == "MagFace":
        low, rise = draw.number(0.1, 3.0), draw.number(0.5, 5.0)
        found |= {"l_a": low, "u_a": low + rise, "l_m": draw.number(0.0, 0.5), "u_m": draw.number(0.5, 1.2)}
        found["penalty_weight"] = draw.number(0.0, 20.0)
    if margin == "ElasticFace":
        found |= {"kind": draw.of(["arc", "cos"]), "margin": draw.number(0.0, 1.0)}
        found |= {"deviation": draw.number(0.0, 0.3), "plus": draw.one_in(2)}
    if margin == "AdaptiveMargin":
        smallest = draw.number(0.0, 0.5)
        found |= {"smallest": smallest, "largest": max(0.4, smallest) + draw.number(0.0, 1.0)}
        found["exponent"] = draw.number(0.1, 1.0)
    if margin == "SphereFace2":
        found |= {"margin": draw.number(0.0, 0.6), "t": draw.of([1.0, 3.0, 4.5]), "balance": draw.number(0.1, 0.9)}
    return found


def case_of(number: int) -> Case:
    """The case of a number; what does not go together is left out."""
    draw = Draw(number)
    while True:
        case = drawn(draw)
        if not valid(case):
            return case


def drawn(draw: Draw) -> Case:
    world = draw.of(WORLDS)
    kernels = draw.one_in(12)  # in the interpreter a launch takes its time
    weight_dtype = draw.of(["float64", "float32", "float64", "bfloat16"])
    embedding_dtype = draw.of(["float64", "float32", "float64", "bfloat16"])
    if kernels:
        weight_dtype, embedding_dtype = draw.of(["float32", "bfloat16"]), draw.of(["float32", "bfloat16"])
    autocast = "float64" not in (weight_dtype, embedding_dtype) and draw.one_in(3)
    small = "float64" not in (weight_dtype, embedding_dtype) and (autocast or weight_dtype == "bfloat16")
    margin = draw.of([name for name in MARGINS if not (small and name in JUMPING)])
    settings = settings_of(draw, margin, small)
    lengths = settings.get("normalize_embeddings", True)
    sample_rate = draw.of([1.0, 1.0, 0.02, 0.1, 0.3, 0.5, 0.9])
    whole = sample_rate == 1.0
    classes = draw.of([draw.whole(1, 6), draw.whole(1, 60), draw.whole(61, 70 if kernels else 300)])
    counts = tuple(draw.whole(0, 6) for _ in range(max(1, world)))
    if draw.one_in(10):
        counts = tuple(draw.of([0, 0, 25]) for _ in counts)
    optimizer = draw.of(["sgd", "adamw", "plain"] if whole else ["sgd", "adamw"])
    early = whole and optimizer == "sgd" and draw.one_in(2)
    momentum = draw.of([0.0, 0.9])
    low = None
    if weight_dtype == "bfloat16" and optimizer != "plain" and not early:
        low = draw.of([None, "master", "stochastic"])
    late = not whole and weight_dtype != "bfloat16" and not draw.one_in(3)
    steps = draw.whole(2, 6) if late else draw.whole(1, 3)
    nearest = 0 if margin == "Softmax" or small or not lengths else draw.of([0, 0, 0, 1, 2, 5])
    hard = 0 if whole else draw.of([0, 0, 1, 3])
    schedule = None
    if margin in SCHEDULED and lengths and not small and draw.one_in(3):
        argument, lowest, highest = SCHEDULED[margin]
        start = draw.number(lowest, highest)
        schedule = (argument, start, draw.number(lowest, highest), draw.of(["linear", "exponential", "step"]))
        settings[argument] = start
    return Case(
        world=world,
        replicas=draw.of([n for n in range(1, world + 1) if world % n == 0]) if world > 1 and draw.one_in(3) else 1,
        classes=classes,
        width=draw.of([draw.whole(1, 4), draw.whole(1, 33)]),
        counts=counts,
        margin=margin,
        settings=settings,
        sample_rate=sample_rate,
        weight_dtype=weight_dtype,
        embedding_dtype=embedding_dtype,
        length=draw.of([1.0, 0.05, 20.0]) if margin != "Softmax" and lengths else 1.0,
        zero=draw.one_in(6),
        budget=draw.of([None, 0, 2000]),
        small_tiles=draw.one_in(2),
        smoothing=0.0 if margin == "SphereFace2" else draw.of([0.0, 0.0, 0.1, 0.5]),
        beyond=None if margin == "Softmax" or small or not lengths else draw.of([None, None, 0.3, -0.2]),
        corrected=not whole and draw.one_in(2),
        nearest=nearest,
        nearer_by=draw.number(0.0, 0.6) if nearest else 0.1,
        hard=hard,
        hard_every=draw.whole(1, 3) if hard else 2,
        block=1 if whole else draw.of([1, 1, 2, 5]),
        storage=draw.of([None, None, "host", "file"]),
        kernels=kernels,
        autocast=autocast,
        class_weights=draw.one_in(3),
        reduction=draw.of(["mean", "mean", "sum", "none"]),
        scale_embedding_grad=draw.one_in(2),
        metrics=draw.one_in(4),
        validate=draw.of(["always", "first", "never"]),
        ignore=draw.of([-100, -100, -1, 255 + classes, classes - 1]),
        ignored=draw.of([0.0, 0.0, 0.3, 0.8, 1.0]),
        pattern=draw.of(["random", "random", "one", "few", "last"]),
        each=draw.of([0, 0, 0, 1, 2, 3]),
        sample_weights=draw.one_in(4),
        joint=draw.one_in(2),
        frozen=draw.one_in(8),
        optimizer=optimizer,
        momentum=momentum,
        decay=draw.of([0.0, 0.01]),
        nesterov=late and optimizer == "sgd" and momentum > 0 and draw.one_in(2),
        skipped="dense" if late else "still",
        rate_falls=draw.one_in(2),
        early=early,
        low=low,
        schedule=schedule,
        change=draw.of([None, None, None, "expand", "remap-mean", "remap-first"]) if steps > 1 else None,
        micro=1 if early else draw.whole(1, 3),
        steps=steps,
        clip=None if early else draw.of([None, None, 0.5]),
        center=draw.of([None, None, "paper", "gradient"]),
        seed=draw.whole(0, 1_000),
    )


def valid(case: Case) -> str:
    """Why a case is none; what a margin refuses is found by making it."""
    whole = case.sample_rate == 1
    half = "float64" not in (case.weight_dtype, case.embedding_dtype) and (
        case.autocast or case.weight_dtype == "bfloat16"
    )
    lengths = case.margin != "Softmax" and case.settings.get("normalize_embeddings", True)
    fewest = min(case.at(step).classes for step in range(case.steps))
    problems = {
        "a rank without a number of samples": len(case.counts) != case.ranks,
        "ranks that are no mesh": case.replicas > 1 and case.world % case.replicas != 0,
        "logits of half precision are not compared there": half
        and (case.margin in JUMPING or case.beyond is not None or case.nearest or case.settings.get("scale", 1) > 4),
        "a threshold of a margin that jumps, in half precision": half
        and (case.settings.get("past_pi", "monotonic") in ("sine", "joined") or case.settings.get("easy_margin")),
        "autocast has no effect": case.autocast and "float64" in (case.weight_dtype, case.embedding_dtype),
        "lengths are kept": not lengths and (case.beyond is not None or case.nearest > 0),
        "no distribution": case.margin == "SphereFace2" and case.smoothing > 0,
        "nothing is drawn": whole and (case.corrected or case.hard or case.block > 1 or case.skipped == "dense"),
        "not so many classes": case.hard >= fewest or case.block > fewest,
        "rows that are stored": case.storage
        and (case.change or case.optimizer == "plain" or (whole and not case.early)),
        "kernels take float32": case.kernels and "float64" in (case.weight_dtype, case.embedding_dtype),
        "an optimizer of all rows": case.optimizer == "plain" and (not whole or case.low or case.early),
        "moved in backward": case.early
        and (not whole or case.micro > 1 or case.clip is not None or case.optimizer != "sgd" or case.low),
        "low precision": case.low and case.weight_dtype != "bfloat16",
        "late rows in half precision": case.skipped == "dense" and case.weight_dtype == "bfloat16",
        "a change needs two steps": case.change and (case.steps < 2 or case.center is not None),
        "sub-centers have no mean": case.change == "remap-mean" and case.settings.get("centers", 1) > 1,
        "nesterov needs momentum": case.nesterov and (not case.momentum or case.skipped != "dense"),
        "a schedule of another argument": case.schedule is not None
        and (case.margin not in SCHEDULED or case.settings.get(case.schedule[0]) != case.schedule[1]),
    }
    found = next((name for name, wrong in problems.items() if wrong), "")
    if not found:
        try:
            for step in range(case.steps):
                margin_of(case.at(step))
        except (ValueError, TypeError) as error:
            return str(error)
    return found


def faulty_case_of(number: int) -> tuple[Case, tuple[Fault, ...]]:
    """A case, and what is wrong with a batch before it, on one rank or two."""
    case, draw = case_of(number), Draw(number, "faults")
    # every rank has samples, so that there is something to be wrong; and looks at them
    counts = tuple(max(1, n) for n in case.counts)
    case = dataclasses.replace(case, counts=counts, validate="always", steps=1, micro=1, change=None)
    places = draw.random.sample(range(case.ranks), min(case.ranks, draw.whole(1, 2)))
    faults = [(rank, draw.of(sorted(FAULTS))) for rank in places]
    if any(name in OF_GATHER for _, name in faults):
        case = dataclasses.replace(case, joint=True)
    if case.world == 0 or case.ranks == 1:
        # nobody to disagree with
        faults = [
            (rank, "a NaN" if name in ("embeddings of another dtype", "labels by name") else name)
            for rank, name in faults
        ]
    return case, tuple(faults)
