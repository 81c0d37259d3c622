"""The text that describes a margin, "ArcFace(scale=64.0, m1=1.0, m2=0.5, m3=0.0, gradient='exact')", and what it means.

Equal settings have one text, however they were spelled: numbers are floats, but ints where the class declares an int.
Texts of earlier versions are compared by what they mean.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.distributed.given import plain

NOT_COMPARED = {"gradient", "past_pi", "easy_margin"}  # stored state does not depend on them
LATER = {
    "normalize_embeddings": True,
    "annealing": 0.0,
    "kind": "cos",
}  # settings that texts of earlier versions do not have
LONGEST = 10_000  # characters of a description that is read


def text_of(margin: nn.Module, settings: dict[str, Any]) -> str:
    return f"{type(margin).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def plain_of(margin: nn.Module, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the attributes that are numbers, texts or tuples of them. names: only these."""
    found = {}
    for name, value in vars(margin).items():
        if not name.startswith("_") and name != "training" and (names is None or name in names):
            setting = canonical(value, getattr(type(margin), name, None))
            if isinstance(setting, bool | int | float | str | tuple):
                found[name] = setting
    return found


def canonical(value: Any, default: Any = None) -> Any:
    """Return numbers as floats, or as ints where the class declares an int; tuples by their parts."""
    value = plain(value)
    if isinstance(value, tuple):
        return tuple(canonical(each) for each in value)
    if isinstance(value, int) and not isinstance(value, bool):
        whole = isinstance(default, int) and not isinstance(default, bool)
        return value if whole or abs(value) >= 2**53 else float(value)
    return value


def equal(a: Any, b: Any) -> bool:
    """Return whether two attributes are equal. Objects that compare by identity count as equal: they hold state."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    compare: Any = type(a).__eq__
    if compare is object.__eq__:
        return True
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


# ---------------------------------------------------------------------------------------------------- compare


def same_margin(one: str, other: str, may_miss: Iterable[str] = ()) -> bool:
    """Return whether two descriptions are of margins between which stored state can be moved.

    Numbers are compared as numbers, and not by their spelling; `gradient`, `past_pi` and `easy_margin` are left out,
    because nothing that is stored depends on them. may_miss: settings that only one of them needs to have.
    """
    parsed = [_parsed(each) for each in (one, other)]
    if parsed[0] is None or parsed[1] is None:
        return one == other
    (name, mine), (their_name, theirs) = parsed[0], parsed[1]
    mine, theirs = ({**{k: v for k, v in LATER.items() if k in b}, **a} for a, b in ((mine, theirs), (theirs, mine)))
    ignored = {*NOT_COMPARED, *(key for key in may_miss if key not in mine or key not in theirs)}
    keys = {*mine, *theirs} - ignored
    return name == their_name and all(k in mine and k in theirs and close(mine[k], theirs[k]) for k in keys)


def _parsed(text: str) -> tuple[str, dict[str, Any]] | None:
    """Return name and settings of a description; None for other texts."""
    if len(text) > LONGEST:
        return None
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args):
            return None
        return call.func.id, {str(each.arg): _value(each.value) for each in call.keywords}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    """Return the value of an expression: plain values, tuples, inf, nan, and np.float64(0.5), as numpy writes it."""
    if isinstance(node, ast.Tuple):
        return tuple(_value(each) for each in node.elts)
    if isinstance(node, ast.Call) and len(node.args) == 1:
        return _value(node.args[0])
    if isinstance(node, ast.Name):
        return float(node.id)
    return ast.literal_eval(node)


def close(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in (a, b)):
        return type(a) is type(b) and bool(a == b)
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))
