"""Property tests: cases that nobody thought of, against one dense float64 process; and bad inputs, of which all ranks
say the same.

    python -m pytest tests/core/test_fuzz.py                40 cases, and those that once failed
    launch/test -m slow -k fuzz -s                          2,000 cases and 500 bad inputs
    PARTIAL_FC_FUZZ=20000 launch/test -m slow -k fuzz -s    as many as are given
    PARTIAL_FC_FUZZ_FROM=5000 ...                           the cases from that number on: parts of a long run
    PYTHONPATH=.:tests/support python tests/core/test_fuzz.py 123       the case 123 alone, made smaller if it fails

A case has a number, which is all that it depends on. With -s it prints what was run, and every 500 cases how far it is.

A failing case is made smaller and printed: `Case(...)` is all that is needed to run it again (`again` below). It is
added to tests/core/fuzz_found.txt, which the normal tests run again.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import fuzz_shrink
import pytest
from fuzz_cases import Case, Numbers, run_case
from fuzz_dense import NearJump, check
from fuzz_draw import MARGINS, WORLDS, case_of, faulty_case_of, valid
from fuzz_faults import FAULTS, Fault, run_faulty
from fuzz_shrink import keep, kept, same_way, shrunk
from runner import Ranks

NIGHTLY = int(os.environ.get("PARTIAL_FC_FUZZ", "2000"))
FIRST = int(os.environ.get("PARTIAL_FC_FUZZ_FROM", "0"))
MOST_FAILURES = 10  # after so many different ones a run ends
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
            "replicas",
            "weight_dtype",
            "embedding_dtype",
            "sample_rate",
            "optimizer",
            "reduction",
            "micro",
            "each",
            "center",
            "skipped",
            "corrected",
            "nearest",
            "hard",
            "block",
            "storage",
            "kernels",
            "autocast",
            "change",
        )
        self.by.update((name, getattr(case, name)) for name in kinds)
        self.by["schedule", case.schedule and case.schedule[3]] += 1
        self.by["past_pi", case.settings.get("past_pi")] += 1

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
        return
    if tally is not None:
        tally.worst = max(tally.worst, worst)
        tally.count(case)


def failure(ranks: Run, case: Case, tally: Tally | None = None) -> BaseException | None:
    try:
        again(ranks, case, tally)
    except Exception as error:
        return error
    return None


def made_smaller(ranks: Run, case: Case) -> str:
    """The lines that say how to run the failure of a case again; it is kept."""

    def fails(smaller: Case) -> str:
        error = failure(ranks, smaller)
        return "" if error is None else same_way(error)

    small = shrunk(case, fails)
    keep(small)
    error = failure(ranks, small)
    return f"{small!r}\n    {str(error).strip().splitlines()[-1] if str(error) else type(error).__name__}"


def test_cases_equal_the_dense_reference(ranks):
    for number in range(40):
        case = case_of(number)
        error = failure(ranks, case)
        assert error is None, f"case {number}, {case!r}: {error}"


def test_cases_that_once_failed_equal_it(ranks):
    for case in kept():
        assert not valid(case), (case, valid(case))
        error = failure(ranks, case)
        assert error is None, f"{case!r}: {error}"


@pytest.mark.timeout(600)
def test_bad_inputs_raise_alike_on_all_ranks(ranks):
    for number in range(25):
        bad_then_good(ranks, *faulty_case_of(number))


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
@pytest.mark.timeout(40_000)
def test_fuzz_nightly(ranks):
    tally, started, failures = Tally(), time.monotonic(), dict[str, str]()
    for number in range(FIRST, FIRST + NIGHTLY):
        case = case_of(number)
        error = failure(ranks, case, tally)
        if error is not None and same_way(error) not in failures:
            failures[same_way(error)] = made_smaller(ranks, case)
            print(f"\ncase {number} fails, as does\n{failures[same_way(error)]}", flush=True)
            if len(failures) == MOST_FAILURES:
                break
        if (number + 1 - FIRST) % 500 == 0:
            pace = (number + 1 - FIRST) / (time.monotonic() - started) * 60
            print(f"\ncases up to {number}: {pace:.0f} a minute", flush=True)
    print(f"\ncases {FIRST} to {FIRST + NIGHTLY - 1}: {tally}")
    assert not failures, "\n".join(failures.values())
    for name, values in (("margin", MARGINS), ("world", WORLDS), ("weight_dtype", ("float64", "float32", "bfloat16"))):
        missing = [value for value in values if not tally.by[name, value]]
        assert NIGHTLY < 1000 or not missing, f"no case of {name} {missing}"


@pytest.mark.slow
@pytest.mark.timeout(40_000)
def test_fuzz_bad_inputs_nightly(ranks):
    tally, kinds = Tally(), Counter[str]()
    for number in range(FIRST // 4, FIRST // 4 + NIGHTLY // 4):
        case, faults = faulty_case_of(number)
        try:
            bad_then_good(ranks, case, faults, tally)
        except Exception as error:
            raise AssertionError(f"faulty case {number}, {case!r}, {faults}: {error}") from error
        kinds.update(name for _, name in faults)
    print(f"\nafter a bad batch, {tally}\n  faults: " + ", ".join(f"{name} {n}" for name, n in sorted(kinds.items())))
    assert NIGHTLY < 1000 or len(kinds) > len(FAULTS) * 3 // 4, sorted(set(FAULTS) - set(kinds))


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


NEW = Case(
    world=0,
    classes=23,
    counts=(6,),
    settings={"scale": 8.0, "margin": 0.3},
    sample_rate=0.2,
    nearest=2,
    hard=2,
    hard_every=1,
    optimizer="adamw",
    skipped="dense",
    rate_falls=True,
    schedule=("margin", 0.3, 0.6, "linear"),
    change="remap-mean",
    steps=5,
)


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "neighbours": {"hard": 3},
        "nearer classes": {"nearer_by": 0.101},
        "a schedule": {"schedule": ("margin", 0.3, 0.61, "linear")},
        "learning rates": {"rate_falls": False},
        "rows that stand still": {"skipped": "still"},
        "decay": {"decay": 0.01},
        "merged rows": {"change": "remap-first"},
        "corrections": {"corrected": True},
        "blocks": {"block": 5},
    }.items(),
    ids=str,
)
def test_the_comparison_knows_each_option(what, change):
    """What ran without an option is not what the reference makes of it."""
    results = [run_case(0, 1, NEW)]
    assert check(NEW, results) < 1
    with pytest.raises(AssertionError):
        check(dataclasses.replace(NEW, **change), results)


def test_a_case_is_made_smaller_and_kept(tmp_path, monkeypatch):
    case = dataclasses.replace(NEW, world=3, counts=(6, 2, 1), margin="CosFace", clip=0.5, center=None, seed=77)
    assert not valid(case)

    def fails(smaller: Case) -> str:
        """With hard negatives and late rows, of 7 classes or more."""
        return "both" if smaller.hard and smaller.skipped == "dense" and smaller.classes >= 7 else ""

    small = shrunk(case, fails)
    assert small == Case(world=0, classes=7, width=1, counts=(0,), settings=small.settings, sample_rate=0.2, hard=1,
                         hard_every=1, skipped="dense")  # fmt: skip
    assert eval(repr(small), {"Case": Case}) == small
    monkeypatch.setattr(fuzz_shrink, "FOUND", tmp_path / "found.txt")
    keep(small)
    keep(small)
    assert kept() == [small]


def test_cases_of_a_number_are_the_same_and_valid():
    assert [repr(case_of(number)) for number in range(3)] == [repr(case_of(number)) for number in range(3)]
    assert not any(valid(case_of(number)) for number in range(300))


def main(numbers: list[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before torch imports triton
    pools: dict[int, Ranks] = {}

    def ranks(world: int) -> Ranks:
        return pools.setdefault(world, Ranks(world))

    for number in map(int, numbers):
        case, tally = case_of(number), Tally()
        error = failure(ranks, case, tally)
        said = f"it equals the dense reference: {tally.worst:.2f}" if tally.cases else "it is too near a jump"
        print(f"{case!r}\n    {said if error is None else made_smaller(ranks, case)}")
    for pool in pools.values():
        pool.stop(kill=True)


if __name__ == "__main__":
    main(sys.argv[1:])
