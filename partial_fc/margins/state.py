"""What a head's state holds of its margin: how it was built, and what has changed since.

{"margin": "ArcFace(scale=64.0, m1=1.0, m2=0.0, ...)",                as it was built: the head to load it into
 "margin_now": {"describes": "ArcFace(..., m2=0.2, ...)",             as it is now
                "arguments": {"margin": 0.2}, "attributes": {}}}      only if it was changed
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from partial_fc.distributed.given import as_whole
from partial_fc.margins.arguments import argument_names, change, check_structure, describe, given_of, made
from partial_fc.margins.description import canonical, close, equal, plain_of, same_margin, text_of


def describe_as_built(margin: nn.Module) -> str:
    """Return `describe()` as it was before anything was changed."""
    given = given_of(margin)
    if given is None:
        return describe(margin)
    if given.arguments is given.built:
        return text_of(margin, given.plain)
    return text_of(margin, plain_of(made(margin, given.built, given.prepared)))


def state_of(margin: nn.Module) -> dict[str, Any]:
    """Return what a head's state holds of its margin: as it was built and, if it was changed, as it is now."""
    given = given_of(margin)
    state: dict[str, Any] = {"margin": describe_as_built(margin)}
    if given is not None:
        changed = {k: v for k, v in given.arguments.items() if k not in given.built or given.built[k] is not v}
        arguments = {k: v for k, v in changed.items() if not equal(v, given.built.get(k))}
        attributes = {k: v for k, v in plain_of(margin, given.plain).items() if v != given.plain[k]}
        if arguments or attributes:
            state["margin_now"] = {"describes": describe(margin), "arguments": arguments, "attributes": attributes}
    return state


def misfit(margin: nn.Module, state: dict[str, Any]) -> str:
    """Return why a head's state is not for this margin, "" if it is. Its tensors are not read."""
    theirs, now = state.get("margin"), state.get("margin_now")
    if theirs is None:
        return ""
    changes = {} if now is None else now if isinstance(now, dict) else {"arguments": None}
    parts = [changes.get(each, {}) for each in ("arguments", "attributes")]
    if not (isinstance(theirs, str) and all(isinstance(part, dict) for part in parts)):
        return "the margin in it is not a description"
    if _fits_as_built(margin, theirs):
        try:
            _changed(margin, now)
        except (ValueError, TypeError) as error:
            return f"its margin has been changed to one that cannot be built: {error}"
        return ""
    if _fits_now(margin, theirs, now):
        return ""
    mine, moved = describe_as_built(margin), "" if now is None else now.get("describes")
    changed = f" (now {moved})" if moved and moved != theirs else ""
    return (
        f"it is of a head with {theirs}{changed}, this one has {mine}; build the head with that "
        "margin, or start a new run from the class weights alone (export_weights, import_weights)"
    )


def load_state(margin: nn.Module, state: dict[str, Any]) -> None:
    """Give the margin the values that a head's state holds, which `misfit` has accepted.

    Without "margin_now" they are those that it was built with. A state of another margin that has become this one
    changes nothing.
    """
    now, theirs = state.get("margin_now") or {}, state.get("margin")
    given = given_of(margin)
    if theirs is None or given is None or not _fits_as_built(margin, theirs):
        return
    wanted = {**given.built, **_changed(margin, now)}
    asked = {k: v for k, v in wanted.items() if not equal(v, given.arguments.get(k))}
    if asked:
        change(margin, given, asked)
    own = vars(margin)
    current = given_of(margin)
    assert current is not None
    for name, value in {**current.plain, **now.get("attributes", {})}.items():
        if name in plain_of(margin, current.plain) and not close(canonical(own[name]), canonical(value)):
            whole = isinstance(own[name], int) and as_whole(value) is not None
            own[name] = as_whole(value) if whole else value


def _fits_as_built(margin: nn.Module, theirs: str) -> bool:
    return same_margin(theirs, describe_as_built(margin), _left_out_before(margin))


def _fits_now(margin: nn.Module, theirs: str, now: Any) -> bool:
    described = theirs if now is None else now.get("describes")
    return isinstance(described, str) and same_margin(described, describe(margin), _left_out_before(margin))


def _left_out_before(margin: nn.Module) -> list[str]:
    """Return settings that descriptions of earlier versions do not have: numbers of numpy, 0-d tensors."""
    plain_types = (bool, int, float, str, tuple)
    return [name for name in plain_of(margin) if not isinstance(vars(margin)[name], plain_types)]


def _changed(margin: nn.Module, now: Any) -> dict[str, Any]:
    """Return the arguments that a state has changed. ValueError if the margin does not take them."""
    given = given_of(margin)
    if now is None or given is None:
        return {}
    arguments = dict(now.get("arguments", {}))
    unknown = sorted(set(arguments) - {*argument_names(type(margin)), *given.arguments})
    if unknown:
        raise ValueError(f"{type(margin).__name__} has no argument {', '.join(map(str, unknown))}")
    if arguments and not any(isinstance(v, Tensor | dict) for v in arguments.values()):
        after = {**given.built, **arguments}
        check_structure(margin, made(margin, after, given.prepared), given, after)
    return arguments
