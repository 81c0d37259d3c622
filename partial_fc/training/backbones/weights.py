"""Weights to start from: a file of parameters by name, from the field's trainers, from `partial-fc export-backbone`, or of another's model.

file             a state dict, by torch.save or as safetensors; torch's is read with weights_only, which runs no code of the file
or folder        of transformers: model.safetensors or pytorch_model.bin, or the parts that their index lists
  1. unwrap      {"state_dict": ...} and its like, "module." (DDP) and "_orig_mod." (torch.compile) before every name
  2. rename      of a model of transformers, as it does itself: its files keep the names of earlier versions
  3. compare     names and shapes with the backbone's, or with those of the model inside of `timm:` and `hf:` backbones, whose
                 output stage then stays as it was drawn, and whose classifier in the file is passed over
  4. copy        in the backbone's own number format; nothing is changed if anything does not fit
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.training.errors import UserError

_WRAPPERS = ("state_dict", "state_dict_backbone", "backbone", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.")
_CLASSIFIERS = ("fc.", "head.", "classifier.", "head_dist.")
_IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHOWN = 3


def load_weights(backbone: nn.Module, path: str | Path) -> None:
    """Give `backbone` the weights and batch statistics that the file or folder `path` holds.

    Raises UserError, and changes nothing, for a file that cannot be read or does not fit: which names are missing, which are unknown,
    which shapes differ.
    """
    state = read_weights(path)
    target, state = _match(backbone, state)
    own = target.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{n} is {list(state[n].shape)}, not {list(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("it lacks", missing),
            ("it has names that the backbone has not:", unknown),
            ("shapes differ:", shapes),
        )
        if names
    ]
    if problems:
        if any("position" in shape or "pos_embed" in shape for shape in shapes):
            problems.append("positions are not interpolated: give --data.image_size as in training of the weights")
        raise UserError(
            f"the weights {path} do not fit the backbone: {'; '.join(problems)}; check --backbone.name, its sizes and the images'"
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or folder by name, without what wraps them; UserError for one that is none of these."""
    path = Path(path)
    if path.is_dir():
        return _strip({name: value for part in _files_of(path) for name, value in _read(part).items()})
    return _strip(_read(path))


def _files_of(folder: Path) -> list[Path]:
    """The files of weights in a folder of transformers; UserError if there are none, or if its index names files elsewhere."""
    found = next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            f"the folder {folder} has no file of weights ({', '.join(_IN_FOLDERS)}); name the file with --backbone.weights"
        )
    if found.suffix != ".json":
        return [found]
    try:
        names = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [folder / name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{found} is no index of weights (weight_map: the file of each name)") from error
    if len(parts) != len(names) or not parts:
        raise UserError(f"{found} must name files that lie beside it")
    return parts


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no file of weights {path}; check --backbone.weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
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
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise UserError(
            f"the weights {path} are no state dict (names and tensors), nor wrap one as {', '.join(_WRAPPERS)}"
        )
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise UserError(
            f"reading {path} needs the package safetensors, which is missing: pip install 'partial_fc[export]'"
        ) from error
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
    if hasattr(type(trunk), "from_pretrained"):
        return trunk, _converted(trunk, state)
    own = trunk.state_dict()
    return trunk, {name: value for name, value in state.items() if name in own or not name.startswith(_CLASSIFIERS)}


def _converted(trunk: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` by the names of `trunk`, a model of transformers, as a second one loads it.

    What does not fit is there as a tensor without data: by its shape if that differs, and whatever the file has more of a part of the
    model, such as blocks. Other parts are a classifier, a decoder, a pooler that is left out; a mask token is of their task.
    """
    kept = {"add_pooling_layer": False} if getattr(trunk, "pooler", trunk) is None else {}
    how = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32, **kept}
    try:
        with _silent_transformers():
            loaded, found = type(trunk).from_pretrained(None, config=trunk.config, state_dict=dict(state), **how)  # type: ignore[attr-defined]
    except Exception as error:  # of tensors that it cannot split or join as their names ask for
        raise UserError(
            f"the weights do not become a {type(trunk).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    fitting = {name: value for name, value in loaded.state_dict().items() if name not in found["missing_keys"]}
    fitting |= {name: torch.empty(shape, device="meta") for name, shape, _ in sorted(found["mismatched_keys"])}
    parts = {name for name, _ in trunk.named_children()}
    unknown = {
        name.removeprefix(f"{loaded.base_model_prefix}.") for name in found["unexpected_keys"]
    }  # models with a classifier hold it so
    more = [name for name in sorted(unknown) if name.partition(".")[0] in parts and not name.endswith("mask_token")]
    return fitting | dict.fromkeys(more, torch.empty(0, device="meta"))


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Without its bar and its table of what was missing: that is told in one line."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
