"""Kernels are tried where they are first used: each on a small problem, beside plain PyTorch, on that device.

    proven          rows, tiles, stream: when a forward chooses its kernels
    step_tried      when an optimizer steps rows by a kernel
    moves_tried     when rows make steps that they have missed by one

Once in a process for each device, D, dtypes and options that they are compiled for: some launches, and one wait of the
host. A kernel whose numbers differ is not called any more (launch.py), nor are those that depend on it. Nothing is
exchanged, so ranks may come to different ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from partial_fc.errors import log
from partial_fc.kernels import launch
from partial_fc.kernels.choice import Case, Kernels
from partial_fc.kernels.small_problems import (
    Compared,
    MovesCase,
    StepCase,
    of_moves,
    of_rows,
    of_step,
    of_stream,
    of_tiles,
)

TRIED_ON = {"cuda"}  # kinds of devices; not on a CPU, whose kernels are the interpreter's, for tests
KERNELS = {
    "rows": ("gather_rows", "project_rows"),
    "tiles": ("tile_exponentials",),
    "stream": ("stream_forward", "stream_backward"),
}
PROBLEMS: dict[str, Callable[[Case], list[Compared]]] = {"rows": of_rows, "tiles": of_tiles, "stream": of_stream}

Tried = Case | MovesCase | StepCase

_tried: set[tuple[str, Tried]] = set()  # by families


def proven(found: Kernels, case: Case) -> Kernels:
    """Return the kernels of a choice without those that fail their trial, or have failed before."""
    if found.rows and case.device.type in TRIED_ON:
        for family, problems in PROBLEMS.items():
            whole = _sound(found)
            if getattr(whole, family) and not _tried_once(family, case, partial(problems, case), KERNELS[family]):
                return Kernels(False, False, False, "there is no memory to try them")
    return _sound(found)


def step_tried(case: Callable[[], StepCase], device: torch.device) -> bool:
    """Return whether a step was tried, or need not be. One that has failed, `step_rows` does not launch."""
    if device.type not in TRIED_ON:
        return True
    given = case()
    return _tried_once("step", given, partial(of_step, given), ("step_rows",))


def moves_tried(case: Callable[[], MovesCase], device: torch.device) -> bool:
    """Return whether missed steps were tried, or need not be."""
    if device.type not in TRIED_ON:
        return True
    given = case()
    return _tried_once("moves", given, partial(of_moves, given), ("catch_up_rows",))


def tried_on(device: torch.device) -> bool:
    """Return whether kernels were tried on a device."""
    return any(case.device == device for _, case in _tried)


def _sound(found: Kernels) -> Kernels:
    """Return a choice without the kernels that have failed, and those that depend on them."""
    if not (launch.failed and found.rows):
        return found
    broken = {family: next((n for n in names if n in launch.failed), "") for family, names in KERNELS.items()}
    if broken["rows"]:
        return Kernels(False, False, False, f"{broken['rows']} has failed")
    left: dict[str, Any] = {f: getattr(found, f) and not broken[f] for f in ("tiles", "stream")}
    gone = [f"no {f}: {broken[f]} has failed" for f in left if left[f] != getattr(found, f)]
    reason = "; ".join([*([found.reason] if found.reason else []), *gone])
    return replace(found, **left, instead=found.instead and left["stream"], reason=reason)


def _tried_once(family: str, case: Tried, problems: Callable[[], list[Compared]], names: tuple[str, ...]) -> bool:
    """Try kernels on small problems, if that was not done. Return False where there was no memory for it: then it is
    done another time, and what is asked for now is left to plain PyTorch."""
    if (family, case) in _tried:
        return True
    _tried.add((family, case))
    try:
        with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(case.device.type, enabled=False):
            found = problems()
            errors = torch.stack([each.error for each in found]).tolist() if found else []  # the host waits
    except torch.OutOfMemoryError:
        _tried.discard((family, case))
        log.warning("kernels (%s) are not used now: there is no memory to try them on %s", family, case.device)
        return False
    except Exception as error:  # of the plain side; a kernel that raises is not called any more already
        for name in names:
            launch.give_up(name, f"its trial on {case.device} failed: {type(error).__name__}: {error}")
        return True
    for name in names:
        _judge(name, [(each, error) for each, error in zip(found, errors, strict=True) if each.kernel == name], case)
    return True


def _judge(name: str, found: list[tuple[Compared, float]], case: Tried) -> None:
    """Give a kernel up if one of its errors is not within its limit."""
    wrong = [(each, error) for each, error in found if not error <= each.limit]  # NaN is not
    if wrong:
        each, error = max(wrong, key=lambda pair: pair[1] if pair[1] == pair[1] else float("inf"))
        words = f"in its trial on {case.device} at D = {case.width}, {each.what} differ from plain PyTorch by "
        launch.give_up(name, f"{words}{error:.2g} of their size, and {each.limit:.2g} is allowed")
