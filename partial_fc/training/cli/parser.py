"""Shared by the commands: a parser that raises UserError, and the options that several commands have."""

from __future__ import annotations

import argparse
from typing import NoReturn

from partial_fc.training.errors import UserError
from partial_fc.training.whole_numbers import whole


class CommandParser(argparse.ArgumentParser):
    """The parser of `partial-fc COMMAND`: it raises UserError instead of exiting; options cannot be abbreviated."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"partial-fc {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` explains every setting")


def add_traceback(parser: argparse.ArgumentParser) -> None:
    """Add --traceback. main() looks for it in the arguments itself, so that it works for every error."""
    parser.add_argument("--traceback", action="store_true", help="print the traceback of an error")


def add_on_error(parser: argparse.ArgumentParser, what: str = "an image that cannot be read") -> None:
    """Add --on_error, for files that are damaged."""
    parser.add_argument(
        "--on_error", choices=("skip", "raise"), default="skip", help=f"what to do about {what} (default skip)"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add --workers; `check_at_least` validates it."""
    parser.add_argument(
        "--workers",
        type=whole,
        default=None,
        help="processes per rank that load images (default: chosen by the number of cores)",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, a name for RunFolder.find_checkpoint."""
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="WHICH",
        help="newest (default), best (by the run's evaluation.best), or a step",
    )


def check_at_least(options: argparse.Namespace, name: str, least: int) -> None:
    """Raise UserError if the number given for the option `name` is below `least`."""
    value = getattr(options, name)
    if value is not None and value < least:
        raise UserError(f"--{name} is {value}; give at least {least}")


def config_first(arguments: list[str]) -> list[str]:
    """Return `arguments` with a leading CONFIG.yaml turned into `--config CONFIG.yaml`."""
    if arguments and not arguments[0].startswith("-"):
        return ["--config", *arguments]
    return arguments
