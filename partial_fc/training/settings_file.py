"""Reading settings files, so that nothing in them is run.

    YAML text       a safe loader: tables, lists, texts and numbers
      in_new_form   files of earlier versions in today's form
      load_settings classes by their import paths; UserError for one that is not trusted
      jsonargparse

jsonargparse imports what `{class_path: module.Name}` names, and a text where a class or a table of settings is
expected, before it checks what it is; and importing a module runs it. So classes are allowed only where a setting is a
class, and only those that class_settings.py trusts: those of this package and of torch.optim, and those that the user
has named otherwise than in the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from partial_fc.training.class_settings import TRUST, ClassSettings, is_trusted
from partial_fc.training.errors import UserError
from partial_fc.training.files import text_of
from partial_fc.training.old_settings import in_new_form
from partial_fc.training.settings_parser import NAMED, as_on_command_line, check_tables, with_whole_numbers

MODE = "partial_fc"
OF_CLASSES = ("class_path", "init_args", "dict_kwargs")
Kinds = Mapping[str, type[ClassSettings]]


class SettingsFileError(yaml.YAMLError):
    """A settings file asks for code that the user has not named, or for what no setting can be."""


def use_safe_loader(parser: jsonargparse.ArgumentParser, settings: type, classes: Kinds) -> None:
    """Let `parser` read files and values safely.

    settings: the dataclass of all settings. classes: setting that is a class -> its kind.
    """

    def load(text: str) -> Any:
        found = jsonargparse.get_loader("yaml")(text)
        if not isinstance(found, dict):
            _refuse_classes(found, classes)
            return found
        try:
            found = load_settings(found, classes)
            _refuse_classes(found, classes)
            check_tables(settings, found)
            found = with_whole_numbers(settings, found)
        except UserError as error:
            raise SettingsFileError(str(error)) from error
        return found

    jsonargparse.set_loader(MODE, load, exceptions=(yaml.YAMLError,))
    parser.parser_mode = MODE


def check_file(path: Path, settings: type, classes: Kinds) -> None:
    """UserError for a file that is no table of settings. UnicodeDecodeError for one that is not UTF-8; what is no YAML
    is left to the parser."""
    text = text_of(path)
    try:
        found = jsonargparse.get_loader("yaml")(f"{text}\n")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    _check_keys(node, path, set())
    if isinstance(node, yaml.MappingNode) and not isinstance(found, dict):  # one name without a value
        found = yaml.safe_load(text)
    if found is None:
        raise UserError(f"{path} is empty; write settings into it, or leave it out")
    if not isinstance(found, dict):
        kind = "a list" if isinstance(found, list) else "a single value"
        raise UserError(f"{path} is {kind}, not a table of settings (name: value)")
    try:
        _refuse_classes(found, classes)
        check_tables(settings, in_new_form(found))
    except (UserError, SettingsFileError) as error:
        raise UserError(f"{path}: {error}") from error
    if all(value is None for value in found.values()):
        raise UserError(f"{path} has no settings, only names of empty tables: {', '.join(map(str, found))}")


def _check_keys(node: yaml.Node | None, path: Path, seen: set[int], prefix: str = "") -> None:
    """UserError for a name that a table has twice: YAML takes the last one, without the settings of the first."""
    if node is None or id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _check_keys(inner, path, seen, prefix)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, inner in node.value:
            name = f"{prefix}.{key.value}" if prefix else str(key.value)
            line = key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{path} has {name} twice, in lines {lines[name]} and {line}; join them")
            lines[name] = line
            _check_keys(inner, path, seen, name)


def load_settings(found: dict[str, Any], classes: Kinds) -> dict[str, Any]:
    """Return the settings of a file in today's form, classes by their import paths. UserError for untrusted ones."""
    found = in_new_form(found)
    train = found.get("train")
    if isinstance(train, dict) and train.get("mixed_precision") is False:  # what YAML makes of no without quotes
        found["train"] = {**train, "mixed_precision": "no"}
    for option, kind in classes.items():
        *tables, name = option.split(".")
        table: Any = found
        for each in tables:
            table = table.get(each) if isinstance(table, dict) else None
        if isinstance(table, dict) and table.get(name) is not None:
            table[name] = _class(table[name], option, kind)
    return found


def shown_settings(found: dict[str, Any], classes: Kinds) -> dict[str, Any]:
    """Return the settings of a file as on the command line, with all arguments of this package's classes."""
    shown: dict[str, Any] = {}
    for name, value in as_on_command_line(in_new_form(found)).items():
        shown[name] = value
        if name in classes and value in tuple(classes[name].names):
            with contextlib.suppress(UserError):  # of a package that is not installed
                arguments = classes[name](value).all_arguments(name)
                shown |= {f"{name}.{argument}": default for argument, default in arguments.items()}
    return shown


def _class(given: Any, option: str, kind: type[ClassSettings]) -> Any:
    """Return what a file has for a class option, with the import path of the class."""
    spec = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path", ""), str):
        raise UserError(
            f"{option} is {given!r}; give the name of a class, or {{class_path: CLASS, init_args: {{...}}}}"
        )
    unknown = [key for key in spec if key not in ("class_path", "init_args")]
    if "class_path" not in spec:
        return spec
    if unknown:
        raise UserError(f"{option}: {', '.join(unknown)} stands beside class_path; write arguments into init_args")
    path = kind.path_of(spec["class_path"], option)
    if not is_trusted(path):
        raise UserError(
            f"{option} names code that would be imported and run: {path}; if you trust it, set "
            f"{TRUST}={path.partition('.')[0]} in the environment, or give --{option} {path} on the command line"
        )
    kind.load(path, option)
    arguments = spec.get("init_args")
    if (NAMED.get() or {}).get(option, path) != path and isinstance(arguments, dict):
        arguments = kind.changed_arguments(path, arguments, option)
    return {**spec, "class_path": path} if arguments is None else {**spec, "class_path": path, "init_args": arguments}


def _refuse_classes(found: Any, classes: Kinds, name: str = "") -> None:
    """SettingsFileError if a class is named where no setting is one."""
    if isinstance(found, dict):
        for key, inner in found.items():
            inside = f"{name}.{key}" if name else str(key)
            if key in OF_CLASSES:
                raise SettingsFileError(
                    f"{key} names code to be imported, which {name or 'a settings file'} does not need; "
                    "do not trust this file"
                )
            if inside not in classes:
                _refuse_classes(inner, classes, inside)
    elif isinstance(found, list):
        for inner in found:
            _refuse_classes(inner, classes, name)
