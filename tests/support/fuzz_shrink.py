"""Makes a failing case of the property tests smaller, and keeps it.

shrunk(case, fails)     options are dropped and sizes lowered, one at a time, as long as it fails in the same way
kept(), keep(case)      the cases of tests/core/fuzz_found.txt, which the tests run each time
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from fuzz_cases import Case, default_of
from fuzz_draw import valid

FOUND = Path(__file__).parents[1] / "core" / "fuzz_found.txt"
SIZES = ("classes", "width", "steps", "micro", "each", "seed", "nearest", "hard", "hard_every", "block")


def same_way(error: BaseException) -> str:
    """What is alike in the failures of a case while it is made smaller: the words without numbers, less what ranks
    say of where."""
    last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    words = re.sub(r"\[.*|[-+.\d]+e?[-+]?\d*", "", last.split(" is ")[0] if ": off by" in last else last)
    return f"{type(error).__name__} {words[:80]}"


def shrunk(case: Case, fails: Callable[[Case], str], most: int = 400) -> Case:
    """The smallest case that is found to fail as this one does. fails: `same_way` of its failure, "" without one."""
    expected = fails(case)
    assert expected, "it does not fail"
    tries, again = 0, True
    while again:
        again = False
        for smaller in smaller_than(case):
            if valid(smaller) or smaller == case:
                continue
            tries += 1
            if tries > most:
                return case
            if fails(smaller) == expected:
                case, again = smaller, True
                break
    return case


def smaller_than(case: Case) -> Iterator[Case]:
    """Cases with one thing less, the largest steps first."""
    for world in (0, 1, 2):
        if world < case.world:
            yield replace(case, world=world, replicas=1, counts=case.counts[: max(1, world)])
            yield replace(case, world=world, replicas=1, counts=tuple(sorted(case.counts)[::-1][: max(1, world)]))
    for each in fields(case):
        if each.name not in (*SIZES, "world", "counts", "settings"):
            yield replace(case, **{each.name: default_of(each)})
    if case.margin != "ArcFace":
        yield replace(case, margin="ArcFace", settings={"scale": 8.0, "margin": 0.3}, schedule=None)
    for name in case.settings:
        yield replace(case, settings={key: value for key, value in case.settings.items() if key != name})
    for each in fields(case):
        if each.name in SIZES:
            value, least = getattr(case, each.name), default_of(each) if each.name not in ("classes", "width") else 1
            for less in dict.fromkeys((least, value // 2, value - 1)):
                if least <= less < value:
                    yield replace(case, **{each.name: less})
    for rank, count in enumerate(case.counts):
        for less in dict.fromkeys((0, count // 2, count - 1)):
            if 0 <= less < count:
                yield replace(case, counts=(*case.counts[:rank], less, *case.counts[rank + 1 :]))


def kept() -> list[Case]:
    lines = FOUND.read_text().splitlines() if FOUND.exists() else []
    return [eval(line, {"Case": Case}) for line in lines if line.startswith("Case(")]


def keep(case: Case) -> None:
    if case not in kept():
        with FOUND.open("a") as file:
            file.write(f"{case!r}\n")
