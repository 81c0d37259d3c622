"""Settings that are a class with its arguments: the margin and the optimizers.

    --head.margin AdaFace --head.margin.h 0.33
    head: {margin: {class_path: AdaFace, init_args: {h: 0.33}}}     ->  MarginSettings("AdaFace", {"h": 0.33})
    settings.build("head.margin")                                   ->  AdaFace(h=0.33)

A class is given by one of the names that its kind of settings lists, or by its import path (`mypackage.MyMargin`). Its
arguments are those of its constructor: jsonargparse reads them from the signature, checks their types and prints them
with `--head.margin.help AdaFace`. Settings are plain data; an object is made of them only where it is needed.

Importing a module runs it. Classes of `names` may always be imported. Other classes must be named on the command line,
or belong to a package that the environment variable PARTIAL_FC_TRUST lists: a settings file alone cannot make
jsonargparse import anything else.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import jsonargparse

from partial_fc.training.errors import UserError

TRUST = "PARTIAL_FC_TRUST"
Self = TypeVar("Self", bound="ClassSettings")

_named_packages: set[str] = set()
"""Packages of the classes that the command line names."""


@dataclass
class ClassSettings:
    """A class, and those arguments of its constructor that differ from their defaults.

    Subclasses say which classes may be named: subclasses of `base`.

    Every method takes `option`, the name of the setting ("head.margin"), for its messages, and raises UserError for a
    class that is unknown, cannot be imported or is not a subclass of `base`.
    """

    base: ClassVar[type]
    names: ClassVar[Mapping[str, str]]
    """Name of a class -> its import path."""
    skip: ClassVar[frozenset[str]] = frozenset()
    """Arguments of constructors that are not settings."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Module that some classes of `names` need -> what to install."""

    class_path: str
    """One of `names`, or an import path."""
    init_args: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the class, without its package."""
        return self.class_path.rpartition(".")[2]

    @classmethod
    def path_of(cls, given: str, option: str) -> str:
        """Return the import path of a class that is given by name or by import path."""
        if "." in given:
            return given
        if given not in cls.names:
            raise UserError(
                f"--{option} is {given}; choose one of {', '.join(cls.names)}, "
                f"or give a class of your own by its import path, package.{cls.base.__name__}"
            )
        return cls.names[given]

    @classmethod
    def load(cls, given: str, option: str) -> Any:
        """Return the class that is given by name or by import path."""
        module, _, name = cls.path_of(given, option).rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            missing = error.name if isinstance(error, ImportError) else None
            if missing is not None and missing in cls.packages:
                raise UserError(f"--{option} {given} needs the package {cls.packages[missing]}") from error
            raise UserError(f"--{option} {given} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, cls.base)):
            raise UserError(f"--{option} {given} is not a subclass of {cls.base.__name__}")
        return found

    @classmethod
    def read(cls: type[Self], given: Mapping[str, Any], option: str, default: Self | None) -> Self:
        """Return the settings that were parsed, with the arguments of `default` if it is of the same class."""
        loaded = cls.load(given["class_path"], option)
        arguments = _as_dict(given.get("init_args", {}))
        for name, value in arguments.items():
            if value is None and not _may_be_null(loaded, cls.skip, name):
                raise UserError(
                    f"--{option}.{name} is null, without a value; give a value, or leave it out for the default"
                )
        if default is not None and cls.load(default.class_path, option) is loaded:
            arguments = {**default.init_args, **arguments}
        named = cls.names.get(loaded.__name__)
        own = named is not None and cls.load(named, option) is loaded
        path = loaded.__name__ if own else given["class_path"]
        return cls(path, cls.changed_arguments(path, arguments, option))

    @classmethod
    def changed_arguments(cls, path: str, arguments: Mapping[str, Any], option: str) -> dict[str, Any]:
        """Return those of the arguments of a class that differ from its defaults."""
        known = _defaults(cls.load(path, option), cls.skip)
        plain = {name: _without_tuples(value) for name, value in known.items()}
        return {k: v for k, v in arguments.items() if k not in plain or _without_tuples(v) != plain[k]}

    @classmethod
    def takes(cls, given: str, option: str) -> list[str]:
        """Return the names of the arguments of a class."""
        return list(_defaults(cls.load(given, option), cls.skip))

    def all_arguments(self, option: str) -> dict[str, Any]:
        """Return the arguments and the defaults of all others, as plain data: no tuples, no objects."""
        known = _defaults(self.load(self.class_path, option), self.skip)
        plain = {name: value for name, value in known.items() if _is_plain(value)}
        found: dict[str, Any] = _without_tuples({**plain, **self.init_args})
        return found

    def arguments(self, option: str) -> dict[str, Any]:
        """Return what to call the constructor with; arguments that are classes themselves are objects."""
        parser = _parser(self.load(self.class_path, option), self.skip)
        try:
            parsed = parser.parse_object(self.init_args, defaults=False)
        except jsonargparse.ArgumentError as error:
            raise UserError(f"--{option} {self.name}: {' '.join(str(error).split())}") from error
        return dict(parser.instantiate(parsed).items(branches=True, nested=False))

    def build(self, option: str, *first: Any, **more: Any) -> Any:
        """Return an object of the class. first, more: arguments that are not settings. UserError if it refuses them."""
        cls, arguments = self.load(self.class_path, option), self.arguments(option)
        try:
            return cls(*first, **arguments, **more)
        except (TypeError, ValueError) as error:
            raise UserError(f"--{option} {self.name}: {error}") from error


@functools.cache
def _parser(cls: type, skip: frozenset[str]) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=set(skip))
    return parser


@functools.cache
def _defaults(cls: type, skip: frozenset[str]) -> dict[str, Any]:
    found: dict[str, Any] = _parser(cls, skip).get_defaults().as_dict()
    return found


@functools.cache
def _may_be_null(cls: type, skip: frozenset[str], name: str) -> bool:
    """Return whether an argument of a class may be null; in init_args, jsonargparse takes null for any type."""
    if _defaults(cls, skip).get(name) is None:
        return True
    try:
        return _parser(cls, skip).parse_args([f"--{name}", "null"], defaults=False)[name] is None
    except (jsonargparse.ArgumentError, TypeError):
        return False


def _as_dict(value: Any) -> Any:
    if isinstance(value, jsonargparse.Namespace):
        value = dict(value.items(branches=True, nested=False))
    return {key: _as_dict(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(inner) for key, inner in value.items()}
    return [_without_tuples(inner) for inner in value] if isinstance(value, tuple | list) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(inner) for inner in value)
    return value is None or isinstance(value, bool | int | float | str)


# ---------------------------------------------------------------------------------------------------- imports


def is_trusted(path: str) -> bool:
    """Return whether a settings file may name this class."""
    return any(path == each or path.startswith(f"{each}.") for each in _allowed())


def trust_package_of(path: str) -> None:
    """Let settings files name classes of this package, because the command line names this class of it."""
    package = path.partition(".")[0]
    if package.isidentifier():
        _named_packages.add(package)


def enforce_trust() -> None:
    """Make jsonargparse refuse to import anything but classes that settings files may name."""
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(_allowed()))


def _allowed() -> set[str]:
    listed = {name.strip() for name in os.environ.get(TRUST, "").split(",")} - {""}
    for name in listed:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{TRUST} lists {name!r}; give names of packages, separated by commas")
    paths = [path for kind in ClassSettings.__subclasses__() for path in kind.names.values()]
    shortest = {f"partial_fc.{path.rpartition('.')[2]}" for path in paths}  # as jsonargparse writes them
    return {
        "torch.optim",
        "partial_fc.margins",
        "partial_fc.training.data",
        *paths,
        *shortest,
        *_named_packages,
        *listed,
    }
