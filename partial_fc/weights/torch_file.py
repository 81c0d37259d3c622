"""Load a file of another trainer without running code from it, and find class weights and optimizer state in it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULE = "state_dict_softmax_fc"
OPTIMIZER = "state_optimizer"


def load_file(path: Path) -> Any:
    """Return the content of a torch.save file with `weights_only`, memory-mapped if possible."""
    try:
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|global[^\n]*?`?([\w]+\.[\w.]+)`?", str(error))
        if refused is not None:
            name = refused[1] or refused[2]
            raise ValueError(
                f"{path} refers to {name}, which tensors and plain values do not need; do not trust this file. If it "
                "is your own, load it in the program that wrote it and save only the weight tensor"
            ) from error
        raise ValueError(f"{path} is damaged or not a torch.save file") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load of a damaged or foreign file raises nearly anything
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is truncated or not a torch.save file ({first_line}); copy it again") from error


def module_state(content: Any) -> dict[str, Any]:
    """Return the state dict of the module that holds the class weights, empty if there is none."""
    if not isinstance(content, dict):
        return {}
    module = content.get(MODULE, content)
    return module if isinstance(module, dict) else {}


def find_weight(path: Path, content: Any, key: str | None) -> Tensor:
    """Return the tensor at `key` ("a/b" for nested dicts), by default the weight of the module."""
    name = key or "weight"
    found = module_state(content) if key is None else content
    for part in name.split("/"):
        if not isinstance(found, dict) or part not in found:
            keys = ", ".join(list(map(str, found))[:12]) if isinstance(found, dict) else f"a {type(found).__name__}"
            raise ValueError(
                f"{path} has no {name}; it has {keys or 'nothing'}: give the name of the class weights with key="
            )
        found = found[part]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{path}: {name} is a {type(found).__name__}, not a tensor; give the name of the class weights with key="
        )
    return found


def optimizer_state(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (state of the last parameter, options of its group) of a torch optimizer, empty dicts if there is none."""
    try:
        group = content[OPTIMIZER]["param_groups"][-1]
        state = content[OPTIMIZER]["state"].get(group["params"][-1], {})
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}, {}
    return (state if isinstance(state, dict) else {}), {k: v for k, v in group.items() if k != "params"}
