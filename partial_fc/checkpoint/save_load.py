"""Save and load one checkpoint of everything that has a state dict: written by all ranks, read at any world size.

    path/
      manifest.json      names the complete data folder and the size of each of its files; replaced atomically, last
      data-0007/         a torch.distributed.checkpoint (layout.py): one file per rank, and .metadata

Sharded tensors (DTensors) are written by the ranks that hold their rows. Loading fills the tensors of the objects in
place, at any world size. Replicated tensors are written once. The rest of a state dict (numbers, names) is a
*skeleton*: a copy of the state dict with a placeholder for each tensor.

    save    state dicts ── collect ──> name -> rows | tensor | skeleton ── write ──> data-0008/ ── publish ──> manifest
    load    manifest.json, file sizes, skeletons ── check ──> fill tensors in place ── load_state_dict

A process that is killed at any moment leaves the previous checkpoint intact, because the manifest names the previous
data folder until it is replaced.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from partial_fc.checkpoint.increments import DONE, MISSED, Copy, Increments, loaded_from, rows_as_they_are
from partial_fc.checkpoint.layout import RowBlocks, RowSource, read, splits_by_rows, stream, write
from partial_fc.checkpoint.locks import FolderLock
from partial_fc.checkpoint.manifest import (
    WITH_PARTS,
    discard,
    find_damage,
    naming_the_checkpoint,
    new_data_folder,
    publish,
    read_manifest,
)
from partial_fc.checkpoint.named import check_to_load, check_to_save, unwrapped
from partial_fc.checkpoint.parts import PLACEHOLDER as PLACEHOLDER
from partial_fc.checkpoint.parts import StoredRows, link_parts
from partial_fc.checkpoint.safe_reader import SafeReader
from partial_fc.distributed.agreement import on_every_rank, on_first_rank
from partial_fc.distributed.operation import operation
from partial_fc.distributed.shards import local_part


class Stateful(Protocol):
    """Anything with a state dict.

    Two more methods are optional. `check_state(state)` is called before anything is loaded, with the skeleton of the
    stored state (placeholders instead of tensors); it raises ValueError if the state does not fit this object.
    `state_template()` returns a state dict with all tensors allocated, for objects that have none before their first
    step. So is an attribute, `any_shape`: names of tensors that `load_state_dict` takes in any shape.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@operation("save_checkpoint")
def save_checkpoint(path: str | os.PathLike[str], **named: Stateful) -> None:
    """Write the state of the `named` objects as one checkpoint. Replace the checkpoint at `path` once it is complete.

    Every rank must call it with the same names and see the same folder. All ranks write sharded heads; one rank writes
    everything else. A state dict may hold a `RowSource` (layout.py) instead of a matrix; it is read and written block
    by block.

    Raises, the same on every rank: OSError if the folder cannot be written (full, read-only) or another process is
    writing to it; TypeError for a value without a state dict (give an epoch and a step as a `Progress`) and for a state
    that could not be loaded again. The previous checkpoint is then unchanged.
    """
    folder = Path(path)
    state = collect(named)
    with _locked(folder):
        write_checkpoint(folder, state, sorted(named))


@operation("load_checkpoint")
def load_checkpoint(path: str | os.PathLike[str], **named: Stateful) -> None:
    """Load the state of the `named` objects from a checkpoint of any world size. Every rank must call it.

    Tensors are filled in place. Raises, the same on every rank and before anything has changed: FileNotFoundError if
    there is no complete checkpoint; ValueError if a file is missing, truncated or damaged, or if names, shapes or the
    head's margin do not match.
    """
    check_to_load(named)
    folder = Path(path)
    manifest, reader, metadata, stored = on_every_rank(lambda: _opened(folder))
    missing = sorted(set(named) - set(manifest["names"]))
    if missing:
        raise ValueError(f"checkpoint {folder} has no {', '.join(missing)}; it has {', '.join(manifest['names'])}")
    skeletons: dict[str, Any] = dict.fromkeys(named, 0)
    read(skeletons, reader)
    made_up = set() if stored is None else stored.leave_out_missed(skeletons)
    metadata = {k: v for k, v in metadata.items() if not any(k.startswith(f"{name}/{MISSED}/") for name in made_up)}
    tensors: dict[str, Tensor] = {}
    untouched = {} if stored is None else stored.untouched(named, made_up)
    with rows_as_they_are(untouched.values()):
        for name, stateful in named.items():
            _check_state(stateful, skeletons[name], f"checkpoint {folder}: {name}")
            tensors.update(_destinations(stateful, name, metadata, folder))
        in_parts = [] if stored is None else [key for key in stored.described if not stored.is_plain(key, made_up)]
        of_rows = {key: tensors.pop(key) for key in in_parts if key in tensors}
        read(tensors, reader)
        if stored is not None:
            on_every_rank(lambda: stored.fill(of_rows, made_up, untouched))
        # optimizers last: what rows have missed is about those that are loaded
        for name in sorted(named, key=lambda name: isinstance(named[name], torch.optim.Optimizer)):
            named[name].load_state_dict(_restore(skeletons[name], {**tensors, **of_rows}))
    loaded_from(named, folder, manifest)


def stored_tensors(path: str | os.PathLike[str]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every tensor of a checkpoint by its key, such as "head/weight".

    Other keys look like "head_optimizer/state/0/momentum_buffer". Not a collective; loads no tensor. Raises
    FileNotFoundError or ValueError as `load_checkpoint` does.
    """
    _, _, metadata, _ = _opened(Path(path))
    return {k: (v.size, v.properties.dtype) for k, v in metadata.items() if isinstance(v, TensorStorageMetadata)}


def stored_values(path: str | os.PathLike[str], name: str) -> Any:
    """Return the stored state of `name` with `{"__tensor__": key}` in place of each tensor. Not a collective."""
    skeleton: dict[str, Any] = {name: 0}
    manifest, reader, _, _ = _opened(Path(path))
    if name not in manifest["names"]:
        raise ValueError(f"checkpoint {Path(path)} has no {name}; it has {', '.join(manifest['names'])}")
    read(skeleton, reader, alone=True)
    return skeleton[name]


def stream_tensor(path: str | os.PathLike[str], key: str, take: Callable[[int, Tensor], None]) -> None:
    """Call `take(first_row, rows)` for each stored block of the matrix `key`, in any order; one block in memory.

    Rows have made the steps that they had missed when they were saved. Not a collective.

    Raises FileNotFoundError, ValueError or OSError as `load_checkpoint` does.
    """
    _, reader, _, stored = _opened(Path(path))
    if stored is None or key not in stored.described:
        stream(reader, key, take)
        return
    for a, b in stored.blocks(key, 0, stored.described[key].size[0]):
        take(a, stored.made_up(key, a, b))


def stored_rows(path: str | os.PathLike[str]) -> StoredRows | None:
    """Return the class rows of a checkpoint that has them in parts (increments.py); None if it has none so."""
    return _opened(Path(path))[3]


# ---------------------------------------------------------------------------------------------------- state dicts


def collect(
    named: dict[str, Stateful], copy: Copy | None = None, increments: Increments | None = None
) -> dict[str, Any]:
    """Return name -> RowBlocks, tensor or skeleton of everything in `named`. copy: replaces each tensor by a copy.
    increments: of which class rows only some are written, as they are.

    Raises TypeError for a value without a state dict, and for a state that could be written but not loaded again.
    """
    check_to_save(named)
    state: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    as_they_are = [] if increments is None else [each for loss in increments.losses for each in loss.names]
    # others first: a model that has one of these heads in it has rows up to date
    for name in (name for name in named if name not in as_they_are):
        state[name] = _after_reload(flatten(named[name].state_dict(), name, tensors), name)
    with rows_as_they_are(() if increments is None else (loss.rows for loss in increments.losses)):
        for name in as_they_are:
            state[name] = _after_reload(flatten(named[name].state_dict(), name, tensors), name)
    if increments is not None:
        increments.decide(tensors)
        state |= increments.ids()
    for key, tensor in tensors.items():
        rows = None if increments is None else increments.blocks(key, tensor, copy)
        state[key] = _to_write(key, tensor, copy) if rows is None else rows
    return state


def _to_write(key: str, tensor: Tensor | RowSource, copy: Copy | None) -> RowBlocks | Tensor:
    if not isinstance(tensor, Tensor):
        return RowBlocks.of_source(tensor)
    if isinstance(tensor, DTensor) and splits_by_rows(tensor):
        return RowBlocks.of_tensor(tensor, None if copy is None else copy(key, local_part(tensor.detach())))
    if copy is None:
        return tensor.detach()
    if isinstance(tensor, DTensor):
        local = copy(key, local_part(tensor.detach()))
        mesh = tensor.device_mesh
        return DTensor.from_local(
            local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return copy(key, tensor.detach())


def flatten(value: Any, path: str, tensors: dict[str, Any]) -> Any:
    """Return the skeleton of `value`, with each tensor or RowSource moved to `tensors` under its path."""
    if isinstance(value, Tensor | RowSource):
        tensors[path] = value
        return {PLACEHOLDER: path}
    found = len(tensors)
    if isinstance(value, dict):
        parts: Any = {k: flatten(v, f"{path}/{k}", tensors) for k, v in value.items()}
        return parts if len(tensors) > found or type(value) is dict else value
    if isinstance(value, list | tuple):
        parts = [flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value.item() if type(value).__module__ == "numpy" and not getattr(value, "shape", ()) else value


def _after_reload(skeleton: Any, name: str) -> Any:
    """Return the skeleton as loading returns it. TypeError, before anything is replaced, if it cannot be loaded."""
    buffer = io.BytesIO()
    torch.save(skeleton, buffer)
    buffer.seek(0)
    try:
        return torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"Unsupported (?:global|class).*?([\w.]+\.\w+)", str(error))
        raise TypeError(
            f"the state of {name} holds {kind[1] if kind else 'an object'}, which is neither a tensor nor a plain "
            "value: a state dict that is saved may hold tensors, numbers, text, lists, tuples and dicts"
        ) from error


def _restore(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if set(skeleton) == {PLACEHOLDER}:
            return tensors[skeleton[PLACEHOLDER]]
        return {k: _restore(v, tensors) for k, v in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        restored = [_restore(v, tensors) for v in skeleton]
        return restored if isinstance(skeleton, list) else tuple(restored)
    return skeleton


def _check_state(stateful: Stateful, skeleton: Any, what: str) -> None:
    check = getattr(stateful, "check_state", None)
    if check is not None:
        try:
            check(skeleton)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:  # of values of other kinds
            raise ValueError(f"{what} is damaged: {type(error).__name__}: {error}") from error


def _empty_like_parameter(optimizer: torch.optim.Optimizer, key: str, stored: Any) -> Tensor | None:
    """Return an empty tensor for `state/INDEX/NAME` of an optimizer without state, sharded like its parameter (FSDP2).

    Return None for other keys, and if the parameter is not a DTensor of the stored shape.
    """
    kind, index, *_ = [*key.split("/"), ""]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if kind != "state" or not index.isdecimal() or int(index) >= len(parameters):
        return None
    parameter = parameters[int(index)]
    if not isinstance(parameter, DTensor) or parameter.shape != stored.size:
        return None
    return torch.empty_like(parameter.detach(), dtype=stored.properties.dtype)


def _destinations(stateful: Stateful, name: str, metadata: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Return, for each stored tensor of `name`, the tensor to read it into."""
    here: dict[str, Tensor] = {}
    bare = unwrapped(stateful)
    stored = [key for key in metadata if key.startswith(f"{name}/")]
    flatten(stateful.state_dict(), name, here)
    template = getattr(bare, "state_template", None)
    if template is not None and not here.keys() >= set(stored):
        here.clear()
        flatten(template(), name, here)
    destinations, any_shape = {}, getattr(stateful, "any_shape", ())
    for key in stored:
        own = here.get(key)
        if own is not None and own.shape != metadata[key].size and key.removeprefix(f"{name}/") in any_shape:
            own = None
        if own is None and isinstance(stateful, torch.optim.Optimizer):
            own = _empty_like_parameter(stateful, key.removeprefix(f"{name}/"), metadata[key])
        if own is None and key == f"{name}/{DONE}" and hasattr(bare, "class_rows"):
            rows = bare.class_rows
            dtype = metadata[key].properties.dtype
            own = rows.shards.wrap(torch.empty(rows.shards.local, dtype=dtype, device=rows.home))
        if own is None and not metadata[key].chunks:
            own = _own_rows_of(bare, stateful, key, metadata[key], folder)
        destinations[key] = _destination(key, metadata[key], own, folder, hasattr(bare, "class_rows"))
    return destinations


def _own_rows_of(bare: Any, stateful: Stateful, key: str, stored: Any, folder: Path) -> Tensor:
    """Return memory for this rank's rows of state that an optimizer has not, built with other options as it is."""
    rows = getattr(bare, "class_rows", None)
    of_state = isinstance(bare, torch.optim.Optimizer) and key.split("/")[1] == "state"
    if rows is None or not of_state or rows.shards.num_classes != stored.size[0]:
        raise ValueError(
            f"checkpoint {folder}: {key} has the rows of {stored.size[0]} classes, which this "
            f"{type(stateful).__name__} has not; build it as in the run that wrote the checkpoint"
        )
    local = torch.zeros(rows.shards.local, *stored.size[1:], dtype=stored.properties.dtype, device=rows.home)
    return rows.shards.wrap(local)


def _destination(key: str, stored: Any, here: Tensor | None, folder: Path, by_class: bool) -> Tensor:
    """Return the tensor to read `key` into: the object's own tensor, or a new one if it has none yet.

    by_class: it is of a head, a center loss or their optimizer.
    """
    if here is None:
        return torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu")
    if here.shape == stored.size:
        return here.detach() if here.requires_grad else here  # itself: it may be marked with the rows that it has
    problem = f"checkpoint {folder}: {key} has shape {list(stored.size)}, but the shape here is {list(here.shape)}"
    if not by_class:
        problem += "; build it with the sizes of the run that wrote the checkpoint"
    elif here.ndim == len(stored.size) > 1:
        if here.shape[1:] == stored.size[1:]:
            problem += (
                f"; the checkpoint has {stored.size[0]} classes: build the head for as many, load, "
                "then call expand() or remap()"
            )
        elif here.shape[:1] == stored.size[:1]:
            problem += "; the embedding size differs: build with the checkpoint's embedding size, or start a new run"
    raise ValueError(problem)


# ---------------------------------------------------------------------------------------------------- folders


def write_checkpoint(
    folder: Path,
    state: dict[str, Any],
    names: list[str],
    *,
    note: dict[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    increments: Increments | None = None,
) -> None:
    """Write the result of `collect` as the checkpoint at `folder`. note: extra entries of the manifest.

    Every rank of the group (None: all ranks) must call it.
    """
    data = folder / on_first_rank(lambda: new_data_folder(folder), group)
    try:
        if increments is not None and increments.before is not None:
            before, parts = increments.before, increments.parts
            on_first_rank(lambda: link_parts(before, parts, data), group)
        write(data, state, group)
        on_first_rank(lambda: publish(folder, data, {"names": names, **(note or {})}), group)
    except BaseException:
        # errors of other ranks are raised on rank 0, too
        if not dist.is_initialized() or dist.get_rank(group) == 0:
            discard(folder, data)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FolderLock(folder)

    def acquire() -> None:
        with naming_the_checkpoint(folder):
            lock.acquire()

    on_first_rank(acquire)
    try:
        yield
    finally:
        lock.release()


def _opened(folder: Path) -> tuple[dict[str, Any], SafeReader, dict[str, Any], StoredRows | None]:
    """Return the manifest of a checkpoint, the reader of its own data, what it has by key, and its class rows if they
    are in parts. ValueError or FileNotFoundError if a file is missing or not as it was written."""
    manifest = read_manifest(folder)
    problem = find_damage(folder, manifest)
    if problem is not None:
        raise problem
    if manifest["format"] == WITH_PARTS:
        stored = StoredRows(folder, manifest)
        stored.check()
        return manifest, stored.own, stored.metadata(), stored
    reader = SafeReader(folder / manifest["data"])
    reader.check()
    return manifest, reader, reader.read_metadata().state_dict_metadata, None
