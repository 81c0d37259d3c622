"""A checkpoint in two parts, heads and the rest, of which a kill can leave one of an earlier save.

    folder/partial_fc            the heads' checkpoint, with the token of its save
    folder/partial_fc.token      the token again, written when both parts are complete

A part that is written over the one of an earlier save makes the tokens differ, and loading refuses it. Checkpoints of
earlier versions have no token, and load as they are. All functions are collectives.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from partial_fc.checkpoint.manifest import MANIFEST, read_manifest
from partial_fc.checkpoint.save_load import stored_values
from partial_fc.distributed.agreement import on_first_rank

NAME = "save_token"  # within the heads' checkpoint
MARK = "partial_fc.token"
UNFINISHED, REST_FIRST = "unfinished", "unfinished, heads last"


class Token:
    """Names one save, alike on all ranks; saved with the heads."""

    def __init__(self) -> None:
        self.value = on_first_rank(lambda: secrets.token_hex(8))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = str(state_dict["value"])


def token_of(heads: str | os.PathLike[str]) -> str:
    """Return the token of the save that wrote the heads, "" if it wrote none.

    FileNotFoundError if there is no complete checkpoint of them.
    """
    return on_first_rank(lambda: _stored_token(Path(heads)))


def begin_save(folder: str | os.PathLike[str], heads: str, *, rest_first: bool = False) -> None:
    """Call it before anything is written to `folder`, which may hold the checkpoint of an earlier save.

    If the heads are written first, this marks only what an earlier version saved, which has no token, as what a kill
    leaves would not have. rest_first: the rest is written first, with which old heads would not fit.
    """

    def mark() -> None:
        path = Path(folder) / MARK
        if (Path(folder) / heads / MANIFEST).exists() and (rest_first or not path.exists()):
            _write(path, REST_FIRST if rest_first else UNFINISHED)

    on_first_rank(mark)


def end_save(folder: str | os.PathLike[str], token: Token) -> None:
    """Call it when this rank has written everything."""
    on_first_rank(lambda: _write(Path(folder) / MARK, token.value))


def check_same_save(folder: str | os.PathLike[str], heads: str, *, whole: bool = True) -> None:
    """Raise ValueError if heads and the rest of the folder are of different saves, or the last one was cut short.

    whole: a folder with the heads' token and no other is cut short as well.
    """

    def compare() -> None:
        own, mark = _stored_token(Path(folder) / heads), Path(folder) / MARK
        try:
            found = mark.read_text()
        except FileNotFoundError:
            found = "" if whole else own
        if not own and found != REST_FIRST:  # of an earlier version, and nothing of a new save was written over it
            return
        if found != own:
            rest = f"the other files of {folder}" if found else f"the other files of {folder}, which has no {MARK},"
            raise torn(f"{Path(folder) / heads}", rest)

    on_first_rank(compare)


def torn(heads: str, rest: str) -> ValueError:
    """The error of two parts that were not written by one save."""
    return ValueError(
        f"{heads} and {rest} are not of the same save: it was cut short while it wrote over an earlier one, or one "
        "part was copied without the other. Heads and backbone would be of different steps; resume from another "
        "checkpoint"
    )


def _stored_token(heads: Path) -> str:
    return str(stored_values(heads, NAME)["value"]) if NAME in read_manifest(heads)["names"] else ""


def _write(mark: Path, text: str) -> None:
    temporary = mark.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, mark)
