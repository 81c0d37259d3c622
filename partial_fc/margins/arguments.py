"""What a margin was built with, and how it becomes one that was built otherwise.

    ArcFace(margin=0.5)    ── remembering ──>   Given(arguments={"scale": 64.0, "margin": 0.5, ...})
    margin.margin = 0.2    ── set_argument ──>  ArcFace(margin=0.2), which validates it; what differs is taken over

Running statistics and parameters stay as they are. A margin of one's own takes part by itself: its constructor is
wrapped when its class is made.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from partial_fc.batch.building import digest_of_values
from partial_fc.batch.facts import digest_of
from partial_fc.distributed.given import plain
from partial_fc.margins.description import canonical, equal, plain_of, text_of

Function = TypeVar("Function", bound=Callable[..., None])

GIVEN, KNOWN = "_given", "_known"  # where a margin keeps them
STRUCTURE = (
    "normalize",
    "normalize_embeddings",
    "bias",
    "centers",
    "by_class",
)  # what the parameters of a head are made for
OF_MODULES = frozenset(vars(nn.Module())) | {GIVEN, KNOWN}


@dataclass(frozen=True)
class Given:
    """What a margin was built with."""

    arguments: dict[str, Any]  # of its constructor, to build it as it is now
    built: dict[str, Any]  # the same, as it was built; the same object while nothing has changed
    known: dict[str, Any]  # all of them, also those of the classes above
    plain: dict[str, Any]  # its attributes that are numbers, texts or tuples, as the arguments have made them
    prepared: tuple[int, int] | None = None  # what its head has prepared it for
    values: str = ""  # a digest of those for each class, as the arguments have made them: ranks compare it


def given_of(margin: nn.Module) -> Given | None:
    """Return what a margin was built with; None if that is not known, as in a constructor that is still running."""
    found: Given | None = vars(margin).get(GIVEN)
    return found


# ---------------------------------------------------------------------------------------------------- remember


def remembering(init: Function) -> Function:
    """Wrap a constructor, so that a margin knows the arguments of the outermost one."""
    if getattr(init, "remembers", None) is init:
        return init

    @functools.wraps(init)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        own = vars(self)
        outermost = type(self).__init__ is build  # type: ignore[misc]
        if outermost:
            own.pop(GIVEN, None)
            own[KNOWN] = {}
        init(self, *args, **kwargs)
        if KNOWN not in own:
            return
        arguments = _named([init], self, args, kwargs, defaults=True)
        if outermost:
            classes: list[Any] = [each for each in type(self).__mro__ if "__init__" in vars(each)]
            inits = [each.__init__ for each in classes]
            arguments = {
                name: _copied(plain(v)) for name, v in _named(inits, self, args, kwargs, defaults=True).items()
            }
            found = Given(arguments, arguments, {**own.pop(KNOWN), **arguments}, plain_of(self))
            own[GIVEN] = found
        else:
            own[KNOWN] = {**own[KNOWN], **arguments}

    vars(build)["remembers"] = build
    return build  # type: ignore[return-value]


def remembering_classes(prepare: Function) -> Function:
    """Wrap a `prepare`, so that a margin knows what it was prepared for."""

    @functools.wraps(prepare)
    def prepared(self: Any, num_classes: int, selected: int) -> None:
        before = plain_of(self)
        prepare(self, num_classes, selected)
        given = given_of(self)
        if given is not None:
            moved = {name: value for name, value in plain_of(self).items() if before.get(name) != value}
            now, values = {**given.plain, **moved}, _values_of(self)
            vars(self)[GIVEN] = replace(given, prepared=(num_classes, selected), plain=now, values=values)

    return prepared  # type: ignore[return-value]


def _named(inits: list[Any], self: Any, args: Any, kwargs: Any, defaults: bool = False) -> dict[str, Any]:
    """Return the arguments of a call of the first constructor by name. Those of *args are the next constructor's."""
    found: dict[str, Any] = {}
    more: tuple[Any, ...] = ()
    options: dict[str, Any] = {}
    bound = _signature(inits[0]).bind_partial(self, *args, **kwargs).arguments
    for name, parameter in list(_signature(inits[0]).parameters.items())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            more = bound.get(name, ())
        elif parameter.kind is parameter.VAR_KEYWORD:
            options = bound.get(name, {})
        elif name in bound or (defaults and parameter.default is not parameter.empty):
            found[name] = bound.get(name, parameter.default)
    if more and len(inits) > 1:
        options = _named(inits[1:], self, more, options)
    return {**found, **options}


@functools.lru_cache(maxsize=512)
def _signature(init: Any) -> inspect.Signature:
    return inspect.signature(init)


def argument_names(cls: Any) -> tuple[str, ...]:
    """Return the names that a class's constructor takes, itself or in **options for the class above."""
    return _argument_names(cls)


@functools.lru_cache(maxsize=512)
def _argument_names(cls: Any) -> tuple[str, ...]:
    found: list[str] = []
    for each in cls.__mro__:
        if "__init__" not in vars(each) or each is nn.Module:
            continue
        parameters = list(_signature(each.__init__).parameters.values())[1:]
        named = (p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        found += [name for name in named if name not in found]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(found)


def _copied(value: Any) -> Any:
    """Return a list or tensor of its own, because the caller may change theirs."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, list | dict | set) else value


# ---------------------------------------------------------------------------------------------------- change


def set_argument(margin: Any, name: str, value: Any) -> bool:
    """Change an argument of the constructor; return whether `name` is one.

    Raises ValueError as the constructor does, and for what cannot change; AttributeError for a number that would have
    no effect.
    """
    given = given_of(margin)
    if given is None or name in OF_MODULES or name.startswith("_") or _is_registered(margin, name):
        return False
    cls = type(margin)
    names = {*argument_names(cls), *given.arguments}
    name = margin.other_names.get(name, name) if margin.other_names.get(name, name) in names else name
    if inspect.isdatadescriptor(getattr(cls, name, None)):
        return False  # a property of one's own
    own = cls.__module__.startswith("partial_fc.")
    if name not in names:
        _refuse_without_effect(margin, name, value, given, own)
        return False
    if own and name == "momentum" and plain(value) == 0:
        return False  # holds the running statistics of a margin that is built, for a while
    here, argument = vars(margin).get(name), given.arguments.get(name)
    if not own and here is not None and argument is not None and not equal(canonical(here), canonical(argument)):
        return False  # its constructor stores it in another form, which is what the caller sets
    change(margin, given, {name: _copied(plain(value))})
    return True


def _is_registered(margin: nn.Module, name: str) -> bool:
    return any(name in vars(margin)[kind] for kind in ("_buffers", "_parameters", "_modules"))


def _refuse_without_effect(margin: nn.Module, name: str, value: Any, given: Given, own: bool) -> None:
    """AttributeError for an attribute that the margin does not read, or that its constructor fixes.

    own: whether the class is one of this package; other classes may use any attributes that their constructor does not
    pass on to a class above.
    """
    there = name in vars(margin) or hasattr(type(margin), name)
    if there and equal(canonical(getattr(margin, name)), canonical(value)):
        return
    # DeepSpeed numbers modules by attributes of these names
    setting = isinstance(plain(value), bool | int | float | str | tuple) and not name.startswith(("ds_", "id"))
    if (name in given.known and not there) or (own and setting):
        cls: Any = type(margin)
        names = ", ".join(argument_names(cls)) or "none"
        raise AttributeError(
            f"{name} of {cls.__name__} cannot be set to {value!r}: it is no argument of its constructor, whose "
            f"arguments are {names}"
        )


def change(margin: Any, given: Given, asked: dict[str, Any]) -> None:
    """Make the margin one that was built with the arguments of `given`, but for those of `asked`; state stays."""
    arguments = {**given.arguments, **asked}
    before, after = (made(margin, each, given.prepared) for each in (given.arguments, arguments))
    check_structure(margin, after, given, arguments)
    for mine, old, new in zip(margin.modules(), before.modules(), after.modules(), strict=True):
        _take_over(mine, old, new)
    for name in asked:  # also where the attribute was set by itself before
        if name in vars(after):
            vars(margin)[name] = vars(after)[name]
    known, values = {**given.known, **arguments}, _values_of(after)  # made on the host: no wait for a device
    vars(margin)[GIVEN] = replace(given, arguments=arguments, known=known, plain=plain_of(after), values=values)


def _values_of(margin: nn.Module) -> str:
    """Return a digest of the values for each class: unsaved buffers, which arguments make and no step moves."""
    if not margin.by_class:
        return "none"
    saved = margin.state_dict(keep_vars=True)
    tables = [(name, b) for name, b in margin.named_buffers() if name not in saved and b.ndim and not b.is_meta]
    return f"{digest_of([[name, *digest_of_values(b)] for name, b in tables]):x}"


def made(margin: nn.Module, arguments: dict[str, Any], prepared: tuple[int, int] | None) -> Any:
    """Return a margin of the same class with these arguments. ValueError if they are refused."""
    cls = type(margin)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            other = cls(**arguments)
        except TypeError as error:
            words = ", ".join(f"{k}={v!r}" for k, v in arguments.items() if not isinstance(v, Tensor | list))
            raise ValueError(f"{cls.__name__} cannot be built with {words}: {error}") from error
        if prepared is not None:
            other.prepare(*prepared)  # type: ignore[operator]
    return other


def check_structure(margin: Any, after: Any, given: Given, arguments: dict[str, Any]) -> None:
    """ValueError if a head of this margin would have to be built anew."""
    moved = {k: v for k, v in arguments.items() if k not in given.arguments or given.arguments[k] is not v}
    words = ", ".join(f"{k}={v!r}" for k, v in moved.items())
    name = type(margin).__name__
    differ = [
        f"{each} is {getattr(margin, each)} and would be {getattr(after, each)}"
        for each in STRUCTURE
        if getattr(margin, each) != getattr(after, each)
    ]
    if (margin.binary is None) != (after.binary is None):
        differ.append("its classes would be binary decisions, or would no longer be")
    shapes = [{k: v.shape for k, v in each.state_dict().items()} for each in (margin, after)]
    if shapes[0] != shapes[1] or [type(m) for m in margin.modules()] != [type(m) for m in after.modules()]:
        differ.append("its buffers or parameters would have other names or shapes")
    if differ:
        raise ValueError(
            f"{name} cannot be changed to {words} once it is built: {'; '.join(differ)}. Build another {name} with "
            f"{words}, and another head for it"
        )


def _take_over(mine: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Take over the attributes and unsaved buffers in which `new` differs from `old`."""
    for name in [name for name in {**vars(old), **vars(new)} if name not in OF_MODULES]:
        if name not in vars(new):
            vars(mine).pop(name, None)
        elif name not in vars(old) or not equal(vars(old)[name], vars(new)[name]):
            vars(mine)[name] = vars(new)[name]
    saved = mine.state_dict()
    for name, buffer in new.named_buffers(recurse=False):
        if name not in saved and not equal(dict(old.named_buffers(recurse=False)).get(name), buffer):
            here = dict(mine.named_buffers(recurse=False)).get(name, buffer)
            mine.register_buffer(name, buffer.to(here.device), persistent=False)


def describe(margin: nn.Module) -> str:
    """Return name and settings as they are now, each value in one spelling."""
    given = given_of(margin)
    return text_of(margin, plain_of(margin, None if given is None else given.plain))


def argument_now(margin: nn.Module, name: str) -> Any:
    """Return what an argument of the constructor is now; None if it is not known."""
    given = given_of(margin)
    return None if given is None else given.arguments.get(name, given.known.get(name))


def check_argument(margin: nn.Module, name: str, value: Any) -> None:
    """ValueError unless an argument of the constructor can be changed to `value`."""
    given, asked = _with_argument(margin, name, value)
    arguments = {**given.arguments, **asked}
    check_structure(margin, made(margin, arguments, given.prepared), given, arguments)


def _with_argument(margin: nn.Module, name: str, value: Any) -> tuple[Given, dict[str, Any]]:
    given, cls = given_of(margin), type(margin)
    names: tuple[str, ...] = () if given is None else argument_names(cls)
    if given is None or (name not in names and name not in given.arguments):
        raise ValueError(f"{cls.__name__} has no argument {name}; its arguments are {', '.join(names) or 'unknown'}")
    return given, {name: value}


def change_argument(margin: nn.Module, name: str, value: Any) -> None:
    """Change an argument of the constructor. ValueError as `check_argument`."""
    change(margin, *_with_argument(margin, name, value))
