"""Settings in the form of earlier versions, in which margins and optimizers were not classes.

    head: {margin: adaface, h: 0.5}
      ->  head: {margin: {class_path: AdaFace, init_args: {h: 0.5}}}
    optimizer: {name: lars, lr: 10, head_lr_factor: 0.01}
      ->  optimizer: {class_path: LARS, init_args: {lr: 10, ...}}, head_lr_factor: 0.01

Files are read as what they mean, because run folders hold them. Options of the command line are refused with a message
that gives the options to write instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from partial_fc.training.errors import UserError

Table = dict[str, Any]

MARGINS: dict[str, tuple[str, Table]] = {
    "softmax": ("Softmax", {}),
    "normface": ("NormFace", {}),
    "sphereface": ("SphereFace", {}),
    "cosface": ("CosFace", {}),
    "arcface": ("ArcFace", {}),
    "combined": ("CombinedMargin", {}),
    "subcenter": ("SubCenterArcFace", {}),
    "curricular": ("CurricularFace", {}),
    "adaface": ("AdaFace", {}),
    "magface": ("MagFace", {}),
    "elastic_arc": ("ElasticFace", {"kind": "arc"}),
    "elastic_cos": ("ElasticFace", {"kind": "cos"}),
    "adaptive": ("AdaptiveMargin", {}),
    "sphereface2": ("SphereFace2", {}),
}
MARGIN_ARGUMENTS = {
    **{
        name: name
        for name in ("scale", "m1", "m2", "m3", "centers", "l_a", "u_a", "l_m", "u_m", "h", "plus", "t", "balance")
    },
    "m": "margin",
    "lambda_g": "penalty_weight",
    "statistics_momentum": "momentum",
    "sigma": "deviation",
}
ADAPTIVE_ARGUMENTS = {"l_m": "smallest", "u_m": "largest"}
MARGIN_DEFAULTS = {"m1": 1.0, "m2": 0.5, "m3": 0.0, "plus": False}  # null is that of all others

OPTIMIZERS: dict[str, tuple[str, Table]] = {
    "sgd": ("SGD", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
    "radam": ("RAdam", {"decoupled_weight_decay": True}),
    "lars": ("LARS", {}),
    "lamb": ("LAMB", {}),
    "lookahead_sgd": ("LookaheadSGD", {}),
    "lookahead_adamw": ("LookaheadAdamW", {}),
    "ranger": ("Ranger", {}),
    "adabelief": ("AdaBelief", {}),
    "yogi": ("Yogi", {}),
}
OPTIMIZER_DEFAULTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
WITH_MOMENTUM = ("SGD", "LARS", "LookaheadSGD")
ONLY_OLD = ("name", "head_name", "head_lr_factor")  # settings of `optimizer` that do not exist any more


# ---------------------------------------------------------------------------------------------------- files


def in_new_form(found: Table) -> Table:
    """Return the settings of a file in today's form. UserError for a mixture of both forms, and for unknown names."""
    new: Table = {}
    for name, value in found.items():
        table = value if isinstance(value, dict) else {}
        if name == "head" and (table.keys() & MARGIN_ARGUMENTS.keys() or table.get("margin") in tuple(MARGINS)):
            new[name] = _head(table)
        elif name == "optimizer" and table.keys() & set(ONLY_OLD):
            new |= _optimizer(table)
        else:
            new[name] = value
    return new


def _head(old: Table) -> Table:
    margin = old.get("margin")
    if margin is not None and margin not in tuple(MARGINS):
        cls = margin.get("class_path") if isinstance(margin, dict) else margin
        given = [name for name in old if name in MARGIN_ARGUMENTS]
        arguments = ", ".join(f"{MARGIN_ARGUMENTS[name]}: {old[name]}" for name in given)
        raise UserError(
            f"head.{given[0]} is an argument of the margin; write "
            f"head: {{margin: {{class_path: {cls}, init_args: {{{arguments}}}}}}}"
        )
    cls, preset = MARGINS[margin] if margin is not None else (None, {})
    new = {name: value for name, value in old.items() if name not in MARGIN_ARGUMENTS}
    changed = [name for name in old if name in MARGIN_ARGUMENTS and old[name] != MARGIN_DEFAULTS.get(name)]
    spec: Table = {"init_args": {**preset, **{_margin_argument(cls, name): old[name] for name in changed}}}
    new["margin"] = spec if cls is None else {"class_path": cls, **spec}
    return new


def _margin_argument(cls: str | None, old: str) -> str:
    return ADAPTIVE_ARGUMENTS.get(old, MARGIN_ARGUMENTS[old]) if cls == "AdaptiveMargin" else MARGIN_ARGUMENTS[old]


def _optimizer(old: Table) -> Table:
    """Return the new settings `optimizer`, `head_optimizer` and `head_lr_factor`."""
    given = {name: value for name, value in old.items() if name not in ONLY_OLD and value is not None}
    factor, head = old.get("head_lr_factor", 1.0), old.get("head_name")
    new: Table = {"optimizer": _class_of("name", old["name"], given) if "name" in old else {"init_args": given}}
    if head is None:
        return {**new, "head_lr_factor": factor}
    shared: Table = {name: given[name] for name in ("momentum", "weight_decay") if name in given}
    rate = given.get("lr", OPTIMIZER_DEFAULTS["lr"])
    return {**new, "head_optimizer": _class_of("head_name", head, {**shared, "lr": rate * factor})}


def _class_of(setting: str, name: Any, given: Table) -> Table:
    if name not in tuple(OPTIMIZERS):
        raise UserError(f"optimizer.{setting} is {name}; it was one of {', '.join(OPTIMIZERS)} in earlier versions")
    cls, arguments = OPTIMIZERS[name]
    arguments = {**OPTIMIZER_DEFAULTS, **given, **arguments}
    if cls not in WITH_MOMENTUM:
        del arguments["momentum"]
    return {"class_path": cls, "init_args": arguments}


# ---------------------------------------------------------------------------------------------------- the command line


def check_options(arguments: Sequence[str], options: Collection[str]) -> None:
    """UserError if the command line has options of the old form. options: names of the class options of today."""
    given = dict(_pairs(arguments))
    replaced: list[tuple[list[str], list[str]]] = []
    for option in options:
        if option.rpartition(".")[2] == "margin":
            replaced.append(_margin_options(given, option))
    if "optimizer" in options:
        replaced.append(_optimizer_options(given))
    old = [name for names, _ in replaced for name in names]
    if old:
        words = " ".join(f"--{name} {given[name]}" for name in old)
        raise UserError(
            f"{words}: of an earlier version; write {' '.join(text for _, new in replaced for text in new)}"
        )


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options with their values."""
    for argument, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            yield name[2:], value if equals else after


def _margin_options(given: Mapping[str, str], option: str) -> tuple[list[str], list[str]]:
    """(The names of old options, the options to give instead.) option: "head.margin", or "margin"."""
    prefix, margin = option.removesuffix("margin"), given.get(option)
    old = [prefix + name for name in MARGIN_ARGUMENTS if prefix + name in given]
    cls = margin
    arguments: Table = {}
    new = []
    if margin in MARGINS:
        cls, arguments = MARGINS[margin]
        old.insert(0, option)
        new.append(f"--{option} {cls}")
    new += [f"--{option}.{name} {value}" for name, value in arguments.items()]
    new += [
        f"--{option}.{_margin_argument(cls, name.removeprefix(prefix))} {given[name]}" for name in old if name != option
    ]
    return old, new


def _optimizer_options(given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(The names of old options, the options to give instead.)"""
    old = [f"optimizer.{name}" for name in ONLY_OLD if f"optimizer.{name}" in given]
    new = []
    for name in old:
        value = given[name]
        cls, arguments = OPTIMIZERS.get(value, (value, {}))
        if name == "optimizer.name":
            new += [f"--optimizer {cls}", *(f"--optimizer.{k} {str(v).lower()}" for k, v in arguments.items())]
        elif name == "optimizer.head_name":
            new += [f"--head_optimizer {cls}", "--head_optimizer.lr RATE (its own, not a factor)"]
        elif "optimizer.head_name" not in old:
            new.append(f"--head_lr_factor {value}")
    return old, new
