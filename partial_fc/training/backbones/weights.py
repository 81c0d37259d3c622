"""Weights to start from: a file of parameters by name, from the field's trainers, from `partial-fc export-backbone`, or of another's model.

file             a state dict, by torch.save or as safetensors; torch's is read with weights_only, which runs no code of the file
  1. unwrap      {"state_dict": ...} and its like, "module." (DDP) and "_orig_mod." (torch.compile) before every name
  2. compare     names and shapes with the backbone's, or with those of the model inside of `timm:` and `hf:` backbones, whose
                 output stage then stays as it was drawn, and whose classifier in the file is passed over
  3. copy        in the backbone's own number format; nothing is changed if anything does not fit
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.training.errors import UserError

_WRAPPERS = ("state_dict", "state_dict_backbone", "backbone", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.")
_CLASSIFIERS = ("fc.", "head.", "classifier.", "head_dist.", "pooler.")
_SHOWN = 3


def load_weights(backbone: nn.Module, path: str | Path) -> None:
    """Give `backbone` the weights and batch statistics that the file `path` holds.

    Raises UserError, and changes nothing, for a file that cannot be read or does not fit: which names are missing, which are unknown,
    which shapes differ.
    """
    state = read_weights(path)
    target, state = _match(backbone, state)
    own = target.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [f"{n} is {list(state[n].shape)}, not {list(own[n].shape)}" for n in own if n in state and state[n].shape != own[n].shape]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (("it lacks", missing), ("it has names that the backbone has not:", unknown), ("shapes differ:", shapes))
        if names
    ]
    if problems:
        raise UserError(
            f"the weights {path} do not fit the backbone: {'; '.join(problems)}; check --backbone.name, its sizes and the images'"
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without what wraps them; UserError for a file that is none of these."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}; check --backbone.weights")
    if path.suffix == ".safetensors":
        return _strip(_read_safetensors(path))
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged or foreign files raises almost anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the weights {path} cannot be read: {reason[0][:200]}; give a state dict that torch.save wrote, or safetensors"
        ) from error
    while isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"the weights {path} are no state dict (names and tensors), nor wrap one as {', '.join(_WRAPPERS)}")
    return _strip(dict(content))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise UserError(f"reading {path} needs the package safetensors, which is missing: pip install 'partial_fc[export]'") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"the weights {path} are damaged: {error}") from error


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _match(backbone: nn.Module, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """(what the file is of: the backbone, or the model inside of it; the file's tensors for it)."""
    trunk = getattr(backbone, "trunk", None)
    if not isinstance(trunk, nn.Module) or any(name.startswith("trunk.") for name in state):
        return backbone, state
    inside = f"{getattr(trunk, 'base_model_prefix', '')}."  # transformers' models with a classifier hold the model by this name
    if inside != "." and any(name.startswith(inside) for name in state):
        state = {name.removeprefix(inside): value for name, value in state.items()}
    own = trunk.state_dict()
    return trunk, {name: value for name, value in state.items() if name in own or not name.startswith(_CLASSIFIERS)}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
