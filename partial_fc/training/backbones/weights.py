"""Initial weights from a file: from another trainer, `partial-fc export-backbone`, timm or transformers; or from a run.

file             a state dict, from torch.save or as safetensors; torch.load with weights_only runs no code in the file
or folder        of transformers: model.safetensors or pytorch_model.bin, or the parts that their index lists
or run           of this project, or a checkpoint of it: the backbone in it (saved.py)
  1. unwrap      {"state_dict": ...} and similar; "module." (DDP) and "_orig_mod." (torch.compile) before every name
  2. rename      only for models of transformers, by transformers itself: its files have the names of earlier versions
  3. compare     names and shapes with the backbone, or with the model inside a `timm:` or `hf:` backbone; the output
                 stage of these then keeps its random weights, and a classifier in the file is ignored
  4. copy        in the backbone's dtype; if anything does not fit, nothing is changed
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
from partial_fc.training.saved import backbone_in, checkpoint_in, describe_backbone

_WRAPPERS = ("state_dict", "state_dict_backbone", "backbone", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.")
_CLASSIFIERS = ("fc.", "head.", "classifier.", "head_dist.")
_IN_FOLDERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHOWN = 3
INPUT_STATISTICS = ("input_mean", "input_std")
"""Names of the buffers of a model that normalises its input (outside.py)."""


def load_weights(backbone: nn.Module, path: str | Path) -> str:
    """Load weights and batch statistics from the file, folder, run or checkpoint `path` into `backbone`.

    Returns a line that says what was loaded, what was not used, and what keeps its random weights.

    Raises UserError, and changes nothing, for a file that cannot be read or does not fit. The message lists missing
    names, unknown names and shapes that differ.
    """
    state = read_weights(path)
    target, state, unused = _match(backbone, state)
    own = target.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{n} is {list(state[n].shape)}, not {list(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    problems = []
    if missing:
        problems.append(f"missing in the file: {_some(missing)}")
    if unknown:
        problems.append(f"unknown to the backbone: {_some(unknown)}")
    if shapes:
        problems.append(f"different shapes: {_some(shapes)}")
    if any("position" in shape or "pos_embed" in shape for shape in shapes):
        problems.append("position embeddings are not interpolated: give the --data.image_size of the weights")
    if any(name in INPUT_STATISTICS for name in (*missing, *unknown)):
        problems.append("--backbone.normalize_input must be as it was for the weights")
    if problems and (found := checkpoint_in(path)) and (of_run := describe_backbone(found)):
        problems.append(of_run)
    if problems:
        raise UserError(
            f"the weights {path} do not fit the backbone: {'; '.join(problems)}; check --backbone.name, the embedding "
            "size and the size and channels of the images"
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    text = f"loaded {len(state):,} tensors from {path}"
    if unused:
        text += f"; not used, of its classifier or another task: {_some(unused)}"
    return text if target is backbone else f"{text}; the output stage is random{_input_hint(backbone)}"


def _input_hint(backbone: nn.Module) -> str:
    """Return words for weights that expect other images than the model is given."""
    expected = getattr(backbone, "own_input", None)
    if expected is None or hasattr(backbone, INPUT_STATISTICS[0]) or all(v == 0.5 for each in expected for v in each):
        return ""
    mean, std = (", ".join(f"{value:g}" for value in each) for each in expected)
    return (
        f"; they expect images with mean {mean} and std {std}, and get them in [-1, 1]: set "
        "--backbone.normalize_input true"
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file, folder, run or checkpoint by name, unwrapped. UserError if it cannot be read."""
    path = Path(path)
    checkpoint = checkpoint_in(path)
    if checkpoint is not None:
        return _without_prefixes(backbone_in(checkpoint))
    if path.is_dir():
        return _without_prefixes({name: value for part in _files_of(path) for name, value in _read(part).items()})
    return _without_prefixes(_read(path))


def _files_of(folder: Path) -> list[Path]:
    """Return the files of weights in a folder of transformers.

    Raises UserError if there are none, or if the index names files outside the folder.
    """
    found = next((folder / name for name in _IN_FOLDERS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            f"the folder {folder} is neither a run nor a checkpoint of this project, and has no file of weights "
            f"({', '.join(_IN_FOLDERS)}); name the run or the file with --backbone.weights"
        )
    if found.suffix != ".json":
        return [found]
    try:
        names = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [folder / name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{found} is not an index of weights (weight_map: name -> file)") from error
    if len(parts) != len(names) or not parts:
        raise UserError(f"the index {found} must name files in its own folder, and at least one")
    return parts


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"the file of weights {path} does not exist; check --backbone.weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load of a damaged or foreign file can raise nearly anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the weights {path} cannot be read: {reason[0][:200]}; "
            "give a state dict written by torch.save, or a safetensors file"
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
            f"the weights {path} are not a state dict (names and tensors), and have none under the keys "
            f"{', '.join(_WRAPPERS)}"
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


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` without those of `_PREFIXES` that all names have."""
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _match(backbone: nn.Module, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """Return the module that `state` is for, the backbone or the model inside it, the tensors for that module, and the
    names of those that are not used."""
    trunk = getattr(backbone, "trunk", None)
    if not isinstance(trunk, nn.Module) or any(name.startswith("trunk.") for name in state):
        return backbone, state, []
    if hasattr(type(trunk), "from_pretrained"):
        return trunk, *_renamed_by_transformers(trunk, state)
    own = trunk.state_dict()
    unused = [name for name in state if name not in own and name.startswith(_CLASSIFIERS)]
    return trunk, {name: value for name, value in state.items() if name not in unused}, unused


def _renamed_by_transformers(trunk: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return `state` with the names of `trunk`, a model of transformers, by loading it into a second such model; and
    the names that are not used.

    Entries that do not fit are in the result as tensors without data, for the message of `load_weights`: tensors of
    another shape, and tensors for parts of the model that it does not have, such as further blocks. The file's
    tensors for other tasks are ignored: a classifier, a decoder, a removed pooler, a mask token.
    """
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    if getattr(trunk, "pooler", trunk) is None:
        options["add_pooling_layer"] = False
    try:
        with _silent_transformers():
            loaded, info = type(trunk).from_pretrained(  # type: ignore[attr-defined]
                None, config=trunk.config, state_dict=dict(state), **options
            )
    except Exception as error:  # tensors that cannot be split or joined as their names require
        raise UserError(
            f"the weights cannot be loaded into {type(trunk).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    renamed = {name: value for name, value in loaded.state_dict().items() if name not in info["missing_keys"]}
    renamed |= {name: torch.empty(shape, device="meta") for name, shape, _ in sorted(info["mismatched_keys"])}
    parts = {name for name, _ in trunk.named_children()}
    # a model with a classifier has the backbone's names behind a prefix
    unknown = sorted({name.removeprefix(f"{loaded.base_model_prefix}.") for name in info["unexpected_keys"]})
    of_parts = [name for name in unknown if name.partition(".")[0] in parts and not name.endswith("mask_token")]
    unused = [name for name in unknown if name not in of_parts]
    return renamed | dict.fromkeys(of_parts, torch.empty(0, device="meta")), unused


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Silence the progress bar and the table of missing keys; `load_weights` reports these in one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
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
