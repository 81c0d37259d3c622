"""The name of what this rank is doing, for errors that say where every rank is.

with operation("save_checkpoint"):      also a decorator; the outermost name counts
    ...
current_operation("a collective")       "save_checkpoint" inside, what is given outside
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_current: ContextVar[str] = ContextVar("partial_fc operation", default="")


@contextlib.contextmanager
def operation(name: str) -> Iterator[None]:
    """Name everything inside, unless an operation around it has a name already."""
    token = _current.set(_current.get() or name)
    try:
        yield
    finally:
        _current.reset(token)


def current_operation(otherwise: str) -> str:
    """Return the name of the outermost operation, or `otherwise` outside of all."""
    return _current.get() or otherwise
