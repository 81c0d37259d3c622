"""What many tests look at: the local part of a tensor, and what a call says when it raises."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def needs(package: str) -> pytest.MarkDecorator:
    """The mark of a test that is skipped beside torch alone (.ci/versions.py)."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def message_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The class and the words of the ValueError or RuntimeError that the call raises."""
    return _message(function, (ValueError, RuntimeError), *arguments, **options)


def any_message_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The same, of a TypeError, too."""
    return _message(function, (ValueError, RuntimeError, TypeError), *arguments, **options)


def outcome_of(call: Callable[[], Any], *, fine: str) -> str:
    """The class and the words of the ValueError or RuntimeError that the call raises; `fine` if it raises nothing."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return fine


def _message(function: Callable[..., Any], kinds: tuple[type[Exception], ...], *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def args(text: str) -> list[str]:
    """The arguments of a command, none of which has a space."""
    return text.split()
