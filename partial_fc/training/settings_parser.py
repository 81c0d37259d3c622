"""The command line of dataclasses of settings, and settings from what was parsed.

    dataclass RunConfig
      head: HeadConfig            a dataclass       -> a group of options, --head.sample_rate 0.1
        margin: MarginSettings    a class           -> --head.margin AdaFace --head.margin.h 0.33
                                                       and --head.margin.help AdaFace
      data: DataConfig
        mix: list[MixedSet]       a list of dataclasses

What is parsed is what was given, in the file and then on the command line; `settings_from` fills in the defaults of the
dataclasses. If the command line names another class than the file, those arguments of the file are kept that the new
class takes and that were not the old class's defaults: `train quickstart.yaml --head.margin CosFace` keeps the file's
scale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from partial_fc.training.class_settings import TRUST, ClassSettings, enforce_trust, trust_package_of
from partial_fc.training.errors import UserError
from partial_fc.training.files import is_unicode
from partial_fc.training.old_settings import check_options
from partial_fc.training.whole_numbers import whole_number

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

Settings = TypeVar("Settings")
Kind = type[ClassSettings]

NAMED: ContextVar[Mapping[str, str] | None] = ContextVar("NAMED", default=None)
"""Option -> import path of the class that the command line names for it; set while a command line is parsed."""
NOT_ACCEPTED = re.compile(
    r'key "(?P<option>[\w.]+)".*class_path \'(?P<path>[\w.]+)\'.*Option \'(?P<name>[\w.]+)\' is not accepted', re.S
)

DENIED = re.compile(r'key "(?P<option>[\w.]+)".*Importing \'(?P<path>[\w.]+)\' is not allowed', re.S)
TRUST_HINT = f"if a class belongs there and you trust it, list its package in the environment variable {TRUST}"


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Names the classes of an option in place of the import paths of all subclasses."""

    def _get_help_string(self, action: Any) -> str:
        classes = getattr(action, "settings_class", None)
        if classes is None:
            found: str = super()._get_help_string(action)
            return found
        return f"{action.help} (default: {action.default_words}; classes: {', '.join(classes.names)})"


class SettingsParser(jsonargparse.ArgumentParser):
    """A parser whose options may be classes with arguments: `add_class_option`, `add_settings`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _HelpFormatter, "allow_abbrev": False, **options})
        self.class_options: dict[str, Kind] = {}
        self.whole_options: set[str] = set()
        self._may_be_null: set[str] = set()

    def add_class_option(
        self, option: str, kind: Kind, default: ClassSettings | None, words: str, group: str | None = None
    ) -> None:
        """Add --OPTION CLASS, --OPTION.ARGUMENT VALUE and --OPTION.help CLASS. default: None for an option that may be
        null."""
        container = self if group is None else (self.groups or {})[group]
        spec = (
            None
            if default is None
            else {"class_path": kind.path_of(default.class_path, option), "init_args": default.init_args}
        )
        container.add_subclass_arguments(
            kind.base,
            option,
            as_group=False,
            instantiate=False,
            skip=set(kind.skip),
            default=spec,
            metavar="CLASS",
            help=words,
        )
        action: Any = next(action for action in self._actions if action.dest == option)
        action.settings_class, action.default_words = kind, _words(default)
        self.class_options[option] = kind
        if default is None:
            self._may_be_null.add(option)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *more: Any, **options: Any
    ) -> jsonargparse.Namespace:
        """As jsonargparse's, with classes by their names. UserError for a class that is unknown and an argument that it
        does not take."""
        if args is None or not self.class_options:  # a parser of jsonargparse's own, for the arguments of a class
            return super().parse_args(args, *more, **options)
        check_options(args, self.class_options)
        args, named = self._with_import_paths(args)
        enforce_trust()
        token = NAMED.set(named)
        try:
            return super().parse_args(args, *more, **options)
        except jsonargparse.ArgumentError as error:
            words = self._explain(str(error))
            if words is None:
                raise
            raise UserError(words) from error
        finally:
            NAMED.reset(token)

    def _with_import_paths(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return the arguments with import paths in place of names of classes, and the class that each option names."""
        found: list[str] = []
        named: dict[str, str] = {}
        for place, argument in enumerate(arguments):
            flag, equals, value = argument.partition("=")
            if not equals:  # the value of an option before it, if at all
                flag, value = (arguments[place - 1] if place else ""), argument
            option = flag.removeprefix("--").removesuffix(".help")
            if option in self.whole_options and flag.startswith("--"):
                value = _as_whole(option, value)
                found.append(f"{flag}={value}" if equals else value)
                continue
            if option not in self.class_options or not flag.startswith("--") or value.startswith(("-", "{")):
                found.append(argument)
                continue
            path = value if value == "null" and option in self._may_be_null else self._import_path(option, value)
            if not flag.endswith(".help"):
                named[option] = path
            found.append(f"{flag}={path}" if equals else path)
        return found, named

    def _import_path(self, option: str, given: str) -> str:
        kind = self.class_options[option]
        if given not in kind.names:
            trust_package_of(given)
        kind.load(given, option)
        return kind.path_of(given, option)

    def _explain(self, error: str) -> str | None:
        """Return what to tell the user in place of an error of jsonargparse's, or None."""
        denied, unknown = DENIED.search(error), NOT_ACCEPTED.search(error)
        if denied is not None:
            return f"{denied['option']} names code that would be imported and run: {denied['path']}; {TRUST_HINT}"
        if unknown is not None and unknown["option"] in self.class_options:
            return self._not_accepted(**unknown.groupdict())
        return None

    def _not_accepted(self, option: str, path: str, name: str) -> str:
        kind = self.class_options[option]
        if path.rpartition(".")[2] == kind.base.__name__:
            return f"--{option}.{name} needs the class that it is an argument of: give --{option} CLASS before it"
        name_of_class = path.rpartition(".")[2]
        cls = name_of_class if name_of_class in kind.names else path
        takes = ", ".join(kind.takes(path, option)) or "no arguments"
        return (
            f"--{option}.{name}: {cls} has no argument {name}; it takes {takes} (--{option}.help {cls} explains them)"
        )


def _words(default: ClassSettings | None) -> str:
    if default is None:
        return "null"
    arguments = ", ".join(f"{name} {value}" for name, value in default.init_args.items())
    return f"{default.class_path} with {arguments}" if arguments else default.class_path


# ---------------------------------------------------------------------------------------------------- dataclasses


def class_options(cls: type, prefix: str = "") -> dict[str, Kind]:
    """Return the settings of a dataclass, and of those inside it, that are classes: their names and kinds."""
    found: dict[str, Kind] = {}
    for each, kind, section in _fields(cls):
        name = f"{prefix}.{each.name}" if prefix else each.name
        found |= {name: kind} if kind is not None else {} if section is None else class_options(section, name)
    return found


def add_settings(parser: SettingsParser, cls: type, prefix: str = "") -> None:
    """Add an option for every field of a dataclass of settings, and of those inside it."""
    parts = list(_fields(cls))
    hints = get_type_hints(cls)
    whole = [each.name for each, kind, section in parts if kind is section is None and _is_whole(hints[each.name])]
    parser.whole_options |= {f"{prefix}.{name}" if prefix else name for name in whole}
    classes = {each.name for each, kind, _ in parts if kind is not None}
    inside = {each.name for each, _, section in parts if section is not None}
    parser.add_class_arguments(cls, prefix or None, skip=classes | inside)
    words = {each.arg_name: each.description for each in docstring_parser.parse_from_object(cls).params}
    for each, kind, section in parts:
        name = f"{prefix}.{each.name}" if prefix else each.name
        if kind is not None:
            parser.add_class_option(
                name, kind, _default(each), " ".join((words[each.name] or "").split()), prefix or cls.__name__
            )
        elif section is not None:
            add_settings(parser, section, name)


def _given(cls: type, given: Any, prefix: str) -> Iterator[tuple[Any, Any, Any, Any, Any, str]]:
    """Yield each field of `cls` that is given: it, its kind and section (`_fields`), its type, the type of an item of a
    list, and its full name."""
    hints = get_type_hints(cls)
    for each, kind, section in _fields(cls):
        if each.name in given:
            hint = hints[each.name]
            item = next(iter(get_args(hint)), None)
            yield each, kind, section, hint, item, f"{prefix}.{each.name}" if prefix else each.name


def _is_whole(hint: Any) -> bool:
    return hint is int or set(get_args(hint)) == {int, NoneType}


def _as_whole(name: str, text: str) -> str:
    """Return what the command line gives for a whole number in digits; UserError for a number that is not whole."""
    try:
        number = whole_number(text)
    except ValueError as error:
        raise UserError(f"--{name} is {text}; {error}") from error
    return text if number is None else str(number)


def with_whole_numbers(cls: type, given: Any, prefix: str = "") -> Any:
    """Return a table of a file for the dataclass `cls` with 1e6 and 10.0 as integers where settings are whole numbers.
    UserError for numbers that are not whole."""
    if not isinstance(given, dict):
        return given
    found = dict(given)
    for each, kind, section, hint, item, name in _given(cls, given, prefix):
        value = given[each.name]
        if section is not None:
            found[each.name] = with_whole_numbers(section, value, name)
        elif get_origin(hint) is list and is_dataclass(item) and isinstance(item, type) and isinstance(value, list):
            found[each.name] = [with_whole_numbers(item, inner, name) for inner in value]
        elif kind is None and _is_whole(hint) and isinstance(value, float):
            found[each.name] = int(_as_whole(name, repr(value)))
    return found


def check_tables(cls: type, given: Any, prefix: str = "") -> None:
    """UserError for what no setting of the dataclass `cls` can be, in a file or on the command line: something else in
    the place of a table, and null where a setting has a type without it. jsonargparse checks neither in a file."""
    for each, kind, section, hint, item, name in _given(cls, given, prefix):
        value = given[each.name]
        if section is not None:
            _check_table(section, value, name)
        elif kind is None and _is_nothing(value, hint):
            what = "empty" if value is not None and not value.strip() else "null, without a value"
            raise UserError(f"--{name} is {what}; give a value, or leave it out for the default")
        elif isinstance(value, str) and not is_unicode(value):
            raise UserError(
                f"--{name} is {value!r}, a name that is not UTF-8, which config.yaml of the run could not hold; rename "
                "it, or give a symbolic link to it"
            )
        elif get_origin(hint) is list and is_dataclass(item) and isinstance(value, list):
            for number, inner in enumerate(value):
                _check_table(item, inner, f"{name}[{number}]", may_be_null=False)
                unknown = [key for key in inner if key not in _names(item)] if isinstance(inner, dict) else []
                if unknown:
                    raise UserError(f"{name}[{number}] has no setting {unknown[0]}; it has {', '.join(_names(item))}")


def _is_nothing(value: Any, hint: Any) -> bool:
    """Return whether a value is null where its type has no null, or a text that names nothing."""
    if isinstance(value, str):  # of a text, jsonargparse takes null on the command line for a word
        return not value.strip() or (value == "null" and hint is str)
    return value is None and NoneType not in get_args(hint)


def _check_table(cls: Any, value: Any, name: str, *, may_be_null: bool = True) -> None:
    if value is None and may_be_null:  # a table without entries
        return
    if not isinstance(value, dict | jsonargparse.Namespace):
        raise UserError(f"{name} is a table of settings, not {_in_words(value)}; write the settings below {name}")
    check_tables(cls, value, name)


def _names(cls: Any) -> list[str]:
    return [each.name for each, _, _ in _fields(cls)]


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return f"the text {value!r}" if isinstance(value, str) else json.dumps(value, default=str)


def settings_from(cls: type[Settings], given: Mapping[str, Any] | jsonargparse.Namespace, prefix: str = "") -> Settings:
    """Return the dataclass of settings `cls` with what was parsed, and its defaults for all else."""
    values = {}
    for each, kind, section, hint, item, name in _given(cls, given, prefix):
        value = given[each.name]
        if kind is not None:
            default = _default(each)
            if value is None and default is not None:
                raise UserError(f"--{name} is null; choose one of {', '.join(kind.names)}")
            value = None if value is None else kind.read(value, name, default)
        elif section is not None and value is None:  # a table without entries
            continue
        elif section is not None:
            value = settings_from(section, value, name)
        elif get_origin(hint) is list and is_dataclass(item) and isinstance(item, type):
            value = [settings_from(item, inner) for inner in value]
        values[each.name] = value
    return cls(**values)


def plain_settings(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return a dataclass of settings as nested dicts of plain values, classes with all their arguments, as a file has
    them."""
    found: dict[str, Any] = {}
    for each in fields(settings):
        value, name = getattr(settings, each.name), f"{prefix}.{each.name}" if prefix else each.name
        if isinstance(value, ClassSettings):
            found[each.name] = {"class_path": value.class_path, "init_args": value.all_arguments(name)}
        elif is_dataclass(value):
            found[each.name] = plain_settings(value, name)
        elif isinstance(value, list | tuple):
            found[each.name] = [plain_settings(inner) if is_dataclass(inner) else inner for inner in value]
        else:
            found[each.name] = value
    return found


def as_on_command_line(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a file has them, with the arguments of a class beside it: head.margin, head.margin.scale,
    ..."""
    found: dict[str, Any] = {}

    def add(value: Any, name: str) -> None:
        if isinstance(value, dict) and "class_path" in value:
            found[name] = value["class_path"]
            value = value.get("init_args", {})
        if isinstance(value, dict):
            for key, inner in value.items():
                add(inner, f"{name}.{key}" if name else key)
        else:
            found[name] = value

    add(dict(settings), "")
    return found


def with_arguments_beside(settings: Any) -> Any:
    """Return settings as a file has them, each class as one table: {class: AdaFace, h: 0.33}."""
    if not isinstance(settings, dict):
        return settings
    if "class_path" in settings:
        return {"class": settings["class_path"], **settings.get("init_args", {})}
    return {name: with_arguments_beside(value) for name, value in settings.items()}


def _fields(cls: Any) -> Iterator[tuple[Field[Any], Kind | None, type | None]]:
    """Yield the fields of a dataclass, with the kind of ClassSettings or the dataclass of settings that a field has."""
    hints = get_type_hints(cls)
    for each in fields(cls):
        hint = next(iter(get_args(hints[each.name])), hints[each.name])  # of a type that may be None
        if isinstance(hint, type) and issubclass(hint, ClassSettings):
            yield each, hint, None
        else:
            yield each, None, hints[each.name] if is_dataclass(hints[each.name]) else None


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()
