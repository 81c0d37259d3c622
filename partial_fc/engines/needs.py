"""The error of an adapter whose engine is not installed or too old."""

from __future__ import annotations

import importlib.metadata
import re

INSTALL = "pip install 'partial_fc[engines]'"


def need(package: str, oldest: str) -> None:
    """Raise ModuleNotFoundError if `package` is not installed, RuntimeError if it is older than `oldest` ("5.24")."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"{package} is not installed: {INSTALL}", name=package) from None
    if _numbers(version) < _numbers(oldest):
        raise RuntimeError(f"{package} {version} is too old: {oldest} or newer is required; {INSTALL} --upgrade")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]
