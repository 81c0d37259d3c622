"""Settings files hold settings: what is read from one names no code.

    YAML text ── a safe loader ──> tables, lists, texts and numbers ── no class_path, no text in the place of a table ──> jsonargparse

jsonargparse imports what `{class_path: module.Name}` names, or a text that stands in the place of a table of settings, before it sees that
no class is asked for there; and importing a module runs it. So both are refused before it sees them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jsonargparse
import yaml

MODE = "partial_fc"
OF_CLASSES = ("class_path", "init_args", "dict_kwargs")


class NamesCodeError(yaml.YAMLError):
    """A settings file asks for code by name."""


def use_safe_loader(parser: jsonargparse.ArgumentParser, tables: Collection[str]) -> None:
    """Let `parser` read files and values so. tables: names of settings that are tables of settings."""

    def load(text: str) -> Any:
        found = jsonargparse.get_loader("yaml")(text)
        _refuse_names_of_code(found)
        for name in tables:
            if isinstance(found, dict) and isinstance(found.get(name), str):
                raise NamesCodeError(f"{name} is a table of settings, not {found[name]!r}")
        return found

    jsonargparse.set_loader(MODE, load, exceptions=(yaml.YAMLError,))
    parser.parser_mode = MODE


def _refuse_names_of_code(found: Any) -> None:
    if isinstance(found, dict):
        for key in found:
            if key in OF_CLASSES:
                raise NamesCodeError(
                    f"{key} names code to be imported, which settings do not need; the file is not to be trusted"
                )
    for each in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        _refuse_names_of_code(each)
