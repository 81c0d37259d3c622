"""Property tests: cases that nobody thought of, against one dense float64 process; and bad inputs, of which all ranks
say the same.

    python -m pytest tests/core/test_fuzz.py                40 cases, the same in every run
    launch/test -m slow -k fuzz -s                          2,000 cases and 500 bad inputs, others in every run
    PARTIAL_FC_FUZZ=20000 launch/test -m slow -k fuzz -s    as many as are given
    launch/test -m slow -k fuzz -s --hypothesis-seed=7      those of a seed

With -s it prints what was run.

A failing case is made smaller and printed: `case=Case(...)` is all that is needed to run it again (`again` below).
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from fuzz_cases import Case, Numbers, run_case
from fuzz_dense import NearJump, check
from fuzz_draw import MARGINS, WORLDS, cases, faulty_cases
from fuzz_faults import FAULTS, Fault, run_faulty
from hypothesis import HealthCheck, Phase, assume, given, settings
from runner import Ranks

NIGHTLY = int(os.environ.get("PARTIAL_FC_FUZZ", "2000"))
ALWAYS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}
QUICK = {**ALWAYS, "derandomize": True, "phases": [Phase.generate]}  # a case is small as it is, and CI is to end soon
Run = Callable[[int], Ranks]


class Tally:
    """What was run, by kind."""

    def __init__(self) -> None:
        self.cases, self.near, self.worst, self.by = 0, 0, 0.0, Counter[tuple[str, Any]]()

    def count(self, case: Case) -> None:
        self.cases += 1
        kinds = (
            "margin",
            "world",
            "mesh",
            "weight_dtype",
            "embedding_dtype",
            "sample_rate",
            "optimizer",
            "reduction",
            "micro",
            "each",
            "center",
        )
        self.by.update((name, getattr(case, name)) for name in kinds)

    def __str__(self) -> str:
        lines = [
            f"{self.cases} cases equal the dense reference; the largest error is {self.worst:.2f} of what is allowed"
        ]
        lines += [f"{self.near} more were too near a jump to be compared"]
        for name in dict.fromkeys(name for name, _ in self.by):
            lines.append(
                f"  {name}: "
                + ", ".join(f"{value} {n}" for (kind, value), n in sorted(self.by.items(), key=str) if kind == name)
            )
        return "\n".join(lines)


def again(ranks: Run, case: Case, tally: Tally | None = None) -> None:
    """Run a case and compare it."""
    results = [run_case(0, 1, case)] if case.world == 0 else ranks(case.world).run(run_case, case, timeout=120)
    compare(case, results, tally)


def compare(case: Case, results: list[Numbers], tally: Tally | None = None) -> None:
    try:
        worst = check(case, results)
    except NearJump:
        if tally is not None:
            tally.near += 1
        assume(False)
    if tally is not None:
        tally.worst = max(tally.worst, worst)
        tally.count(case)


@pytest.mark.timeout(600)
@settings(max_examples=40, **QUICK)
@given(case=cases())
def test_cases_equal_the_dense_reference(ranks, case):
    again(ranks, case)


@pytest.mark.timeout(600)
@settings(max_examples=25, **QUICK)
@given(drawn=faulty_cases())
def test_bad_inputs_raise_alike_on_all_ranks(ranks, drawn):
    bad_then_good(ranks, *drawn)


def bad_then_good(ranks: Run, case: Case, faults: tuple[Fault, ...], tally: Tally | None = None) -> None:
    """The same error on all ranks, that names one of the faulty ones; then the good batches, as if nothing had been."""
    results = (
        [run_faulty(0, 1, case, faults)]
        if case.world == 0
        else ranks(case.world).run(run_faulty, case, faults, timeout=120)
    )
    said = {r["said"] for r in results}
    assert len(said) == 1, f"{faults}: ranks raised different errors: {sorted(said)}"
    words = said.pop()
    assert words, f"{faults}: nothing was raised"
    assert words.split(":")[0] in ("ValueError", "NonFiniteError", "RuntimeError", "TypeError"), words
    named = case.world == 0 or any(f"rank {rank}" in words for rank, _ in faults)
    assert named or "width" in words, f"{faults}: {words!r} does not say which rank"
    compare(case, results, tally)


@pytest.mark.slow
@pytest.mark.timeout(20_000)
def test_fuzz_nightly(ranks):
    tally = Tally()

    @settings(max_examples=NIGHTLY, **ALWAYS)
    @given(case=cases())
    def run(case: Case) -> None:
        again(ranks, case, tally)

    run()
    print(f"\n{tally}")
    assert tally.cases >= NIGHTLY, f"only {tally.cases} of {NIGHTLY} cases were run"
    for name, values in (("margin", MARGINS), ("world", WORLDS), ("weight_dtype", ("float64", "float32", "bfloat16"))):
        missing = [value for value in values if not tally.by[name, value]]
        assert not missing, f"no case of {name} {missing}"


@pytest.mark.slow
@pytest.mark.timeout(20_000)
def test_fuzz_bad_inputs_nightly(ranks):
    tally, kinds = Tally(), Counter[str]()

    @settings(max_examples=NIGHTLY // 4, **ALWAYS)
    @given(drawn=faulty_cases())
    def run(drawn: tuple[Case, tuple[Fault, ...]]) -> None:
        bad_then_good(ranks, *drawn, tally)
        kinds.update(name for _, name in drawn[1])

    run()
    print(f"\nafter a bad batch, {tally}\n  faults: " + ", ".join(f"{name} {n}" for name, n in sorted(kinds.items())))
    assert tally.cases >= NIGHTLY // 4, f"only {tally.cases} of {NIGHTLY // 4} bad inputs were tried"
    assert len(kinds) > len(FAULTS) * 3 // 4, sorted(set(FAULTS) - set(kinds))


def test_the_comparison_finds_what_is_wrong():
    """A hundredth more or less of any number is found."""
    case = Case(
        world=0,
        classes=9,
        counts=(5,),
        settings={"scale": 8.0, "margin": 0.3},
        weight_dtype="float32",
        sample_rate=0.5,
        micro=2,
    )
    results = [run_case(0, 1, case)]
    assert check(case, results) < 1
    for change in (
        lambda r: r["steps"][0]["micro"][1].update(loss=r["steps"][0]["micro"][1]["loss"] * 1.01),
        lambda r: r["steps"][0]["micro"][0].update(x=r["steps"][0]["micro"][0]["x"] * 1.01),
        lambda r: r["steps"][0]["grads"].update(weight=r["steps"][0]["grads"]["weight"] * 1.01),
        lambda r: r["steps"][0]["after"].update(weight=r["steps"][0]["after"]["weight"] * 1.01),
        lambda r: r["steps"][0]["micro"][0].update(selected=r["steps"][0]["micro"][0]["selected"][1:]),
    ):
        wrong = [run_case(0, 1, case)]
        change(wrong[0])
        with pytest.raises(AssertionError):
            check(case, wrong)
    with pytest.raises(AssertionError):
        check(dataclasses.replace(case, settings={"scale": 8.0, "margin": 0.31}), results)
