"""The errors of an adapter whose engine is not installed, too old, or not as the adapter knows it."""

from __future__ import annotations

import importlib.metadata
import inspect
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


def need_methods(engine: str, base: type, own: type, *helpers: str) -> None:
    """Raise RuntimeError if `own` replaces a method that `base` has not, which the engine would then never call.

    helpers: methods of `own` that replace nothing.
    """
    replaced = [
        k for k, v in vars(own).items() if inspect.isfunction(v) and not k.startswith("__") and k not in helpers
    ]
    lost = [name for name in replaced if not hasattr(base, name)]
    if lost:
        raise RuntimeError(
            f"{engine} {importlib.metadata.version(engine)} has no {base.__name__}.{lost[0]}, so {own.__name__} would "
            "train or save wrongly with it; use a version that docs/versions.md lists"
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]
