"""Draws cases: every margin with its settings, and every option that goes with the others (hypothesis)."""

from __future__ import annotations

import dataclasses
from typing import Any

from fuzz_cases import Case
from fuzz_faults import FAULTS, OF_GATHER, Fault
from hypothesis import strategies as st

SCALES = st.sampled_from([1.0, 8.0, 30.0, 64.0])
SMALL_SCALES = st.sampled_from([1.0, 4.0])  # a cosine in bfloat16 is off by 0.01, a logit by as many times the scale
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


def numbers(low: float, high: float) -> Any:
    return st.integers(round(low * 1000), round(high * 1000)).map(lambda value: value / 1000)


@st.composite
def settings_of(draw: Any, margin: str, small: bool) -> dict[str, Any]:
    """Arguments of a margin; all that the dense reference reads are in it."""
    if margin == "Softmax":
        return {"bias": draw(st.booleans())}
    found: dict[str, Any] = {"scale": draw(SMALL_SCALES if small else SCALES)}
    if margin in ("ArcFace", "SubCenterArcFace", "CurricularFace"):
        found["margin"] = draw(numbers(0.0, 1.5))
    if margin in ("ArcFace", "SubCenterArcFace"):
        found["gradient"] = draw(st.sampled_from(["exact", "exact", "straight_through"]))
    if margin == "SubCenterArcFace":
        found["centers"] = draw(st.integers(1, 4))
    if margin == "CurricularFace":
        found["momentum"] = draw(numbers(0.01, 1.0))
    if margin == "CosFace":
        found["margin"] = draw(numbers(0.0, 1.0))
    if margin == "SphereFace":
        found["margin"] = draw(numbers(1.0, 4.0))
    if margin == "CombinedMargin":
        found |= {"m1": draw(numbers(1.0, 2.0)), "m2": draw(numbers(0.0, 1.5)), "m3": draw(numbers(0.0, 0.5))}
        found["gradient"] = draw(st.sampled_from(["exact", "exact", "straight_through"]))
    if margin == "AdaFace":
        found |= {
            "margin": draw(numbers(0.0, 1.5)),
            "h": draw(numbers(0.05, 1.0)),
            "momentum": draw(numbers(0.01, 1.0)),
        }
    if margin == "MagFace":
        low, rise = draw(numbers(0.1, 3.0)), draw(numbers(0.5, 5.0))
        found |= {"l_a": low, "u_a": low + rise, "l_m": draw(numbers(0.0, 0.5)), "u_m": draw(numbers(0.5, 1.2))}
        found["penalty_weight"] = draw(numbers(0.0, 20.0))
    if margin == "ElasticFace":
        kind = draw(st.sampled_from(["arc", "cos"]))
        found |= {
            "kind": kind,
            "margin": draw(numbers(0.0, 1.0)),
            "deviation": draw(numbers(0.0, 0.3)),
            "plus": draw(st.booleans()),
        }
    if margin == "AdaptiveMargin":
        smallest = draw(numbers(0.0, 0.5))
        found |= {
            "smallest": smallest,
            "largest": smallest + draw(numbers(0.0, 1.0)),
            "exponent": draw(numbers(0.1, 1.0)),
        }
    if margin == "SphereFace2":
        found |= {
            "margin": draw(numbers(0.0, 0.6)),
            "t": draw(st.sampled_from([1.0, 3.0, 4.5])),
            "balance": draw(numbers(0.1, 0.9)),
        }
    return found


@st.composite
def cases(draw: Any, worlds: tuple[int, ...] = WORLDS) -> Case:
    world = draw(st.sampled_from(worlds))
    weight_dtype = draw(st.sampled_from(["float64", "float32", "float64", "bfloat16"]))
    embedding_dtype = draw(st.sampled_from(["float64", "float32", "float64", "bfloat16"]))
    small = weight_dtype == "bfloat16" and embedding_dtype != "float64"
    margin = draw(st.sampled_from([name for name in MARGINS if not (small and name in JUMPING)]))
    settings = draw(settings_of(margin, small))
    sample_rate = draw(st.sampled_from([1.0, 1.0, 0.02, 0.1, 0.3, 0.5, 0.9]))
    classes = draw(st.one_of(st.integers(1, 6), st.integers(1, 60), st.integers(61, 300)))
    counts = tuple(draw(st.lists(st.integers(0, 6), min_size=max(1, world), max_size=max(1, world))))
    if draw(st.integers(0, 9)) == 0:
        counts = tuple(draw(st.sampled_from([0, 0, 25])) for _ in counts)
    ignore = draw(st.sampled_from([-100, -100, -1, 255 + classes, classes - 1]))
    each = draw(st.sampled_from([0, 0, 0, 1, 2, 3]))
    rate_one = sample_rate == 1.0
    optimizer = draw(st.sampled_from(["sgd", "adamw", "plain"] if rate_one else ["sgd", "adamw"]))
    early = rate_one and optimizer == "sgd" and draw(st.booleans())
    low = None
    if weight_dtype == "bfloat16" and optimizer != "plain" and not early:
        low = draw(st.sampled_from([None, "master", "stochastic"]))
    return Case(
        world=world,
        mesh=world == 4 and draw(st.booleans()),
        classes=classes,
        width=draw(st.one_of(st.integers(1, 4), st.integers(1, 33))),
        counts=counts,
        margin=margin,
        settings=settings,
        sample_rate=sample_rate,
        weight_dtype=weight_dtype,
        embedding_dtype=embedding_dtype,
        length=draw(st.sampled_from([1.0, 0.05, 20.0])) if margin != "Softmax" else 1.0,
        zero=draw(st.integers(0, 5)) == 0,
        budget=draw(st.sampled_from([None, 0, 2000])),
        small_tiles=draw(st.booleans()),
        smoothing=0.0 if margin == "SphereFace2" else draw(st.sampled_from([0.0, 0.0, 0.1, 0.5])),
        beyond=None if margin == "Softmax" or small else draw(st.sampled_from([None, None, 0.3, -0.2])),
        corrected=not rate_one and draw(st.booleans()),
        class_weights=draw(st.integers(0, 3)) == 0,
        reduction=draw(st.sampled_from(["mean", "mean", "sum", "none"])),
        scale_embedding_grad=draw(st.booleans()),
        metrics=draw(st.integers(0, 3)) == 0,
        validate=draw(st.sampled_from(["always", "first", "never"])),
        ignore=ignore,
        ignored=draw(st.sampled_from([0.0, 0.0, 0.3, 0.8, 1.0])),
        pattern=draw(st.sampled_from(["random", "random", "one", "few", "last"])),
        each=each,
        sample_weights=draw(st.integers(0, 3)) == 0,
        joint=draw(st.booleans()),
        frozen=draw(st.integers(0, 7)) == 0,
        optimizer=optimizer,
        momentum=draw(st.sampled_from([0.0, 0.9])),
        decay=draw(st.sampled_from([0.0, 0.01])),
        early=early,
        low=low,
        micro=1 if early else draw(st.integers(1, 3)),
        steps=draw(st.integers(1, 3)),
        clip=None if early else draw(st.sampled_from([None, None, 0.5])),
        center=draw(st.sampled_from([None, None, "paper", "gradient"])),
        seed=draw(st.integers(0, 1_000)),
    )


@st.composite
def faulty_cases(draw: Any) -> tuple[Case, tuple[Fault, ...]]:
    """A case, and what is wrong with a batch before it, on one rank or two."""
    case = draw(cases())
    # every rank has samples, so that there is something to be wrong; and looks at them
    counts = tuple(max(1, n) for n in case.counts)
    case = dataclasses.replace(case, counts=counts, validate="always", steps=1, micro=1)
    some = st.tuples(st.integers(0, case.ranks - 1), st.sampled_from(sorted(FAULTS)))
    faults = draw(st.lists(some, min_size=1, max_size=2, unique_by=lambda fault: fault[0]))
    if any(name in OF_GATHER for _, name in faults):
        case = dataclasses.replace(case, joint=True)
    if case.world == 0 or case.ranks == 1:
        # nobody to disagree with
        faults = [
            (rank, "a NaN" if name in ("embeddings of another dtype", "labels by name") else name)
            for rank, name in faults
        ]
    return case, tuple(faults)
