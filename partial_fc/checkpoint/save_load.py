"""One global checkpoint of everything that has a state dict, written by all ranks, read at any world size.

    path/
      manifest.json      which data folder is complete, and the size of each of its files; replaced in one move, last of all
      data-0007/         torch.distributed.checkpoint (storage.py): one file a rank, and .metadata

Sharded tensors (DTensors) are written by the ranks that hold their rows; loading fills the tensors of the objects in place, however many
ranks there are now. Replicated tensors are written once. Everything else of a state dict (numbers, names) is a *skeleton* with a mark in
the place of each tensor.

    save    state dicts ── collect ──> name -> rows | tensor | skeleton ── write ──> data-0008/ ── publish ──> manifest.json
    load    manifest.json, sizes, skeletons ── check ──> tensors in place ── load_state_dict

A process killed at any moment leaves the previous checkpoint: until the manifest is replaced it names the previous data folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from partial_fc.checkpoint.layout import RowBlocks, RowSource, SafeReader, read, splits_by_rows, stream, write
from partial_fc.checkpoint.locks import FolderLock
from partial_fc.checkpoint.manifest import damage, discard, new_data_folder, publish, read_manifest, writing
from partial_fc.distributed.agreement import on_every_rank, on_first_rank
from partial_fc.shards import local_part

MARK = "__tensor__"

Copy = Callable[[str, Tensor], Tensor]  # (name, tensor) -> what to write in its place


class Stateful(Protocol):
    """Anything with a state dict.

    It may also have `check_state(state)`, called before anything is loaded with what is not tensors of the stored state (tensors are
    marks), which raises ValueError if the state is another thing's; and `state_template()`, a state dict with all tensors allocated, for
    things that have none before their first step.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def save_checkpoint(path: str | os.PathLike[str], **named: Stateful) -> None:
    """Write the state of `named` objects as one checkpoint, replacing the one at `path` when it is complete.

    Every rank must call it with the same names, and see the same folder. Sharded heads are written by all ranks, all else by one.
    A state dict may hold a `RowSource` (storage.py) in the place of a matrix, which is then read and written block by block.

    Raises, the same on every rank: OSError if the folder cannot be written (full, read-only) or another process is writing it, TypeError
    for a state that could not be read again. The previous checkpoint is untouched by then.
    """
    folder = Path(path)
    state = collect(named)
    with _locked(folder):
        write_checkpoint(folder, state, sorted(named))


def load_checkpoint(path: str | os.PathLike[str], **named: Stateful) -> None:
    """Read the state of `named` objects from a checkpoint that any number of ranks wrote; every rank must call it.

    Tensors are filled in place. Raises, the same on every rank and before anything has changed: FileNotFoundError if there is no complete
    checkpoint, ValueError if a file is missing, truncated or damaged, or if the checkpoint holds other names, shapes, or a head of another
    margin than the objects have.
    """
    folder = Path(path)
    manifest = on_every_rank(lambda: read_manifest(folder))
    reader = SafeReader(folder / manifest["data"])
    metadata = on_every_rank(lambda: _check_whole(folder, manifest, reader).state_dict_metadata)
    missing = sorted(set(named) - set(manifest["names"]))
    if missing:
        raise ValueError(f"checkpoint {folder} has no {', '.join(missing)}; it has {', '.join(manifest['names'])}")
    skeletons: dict[str, Any] = dict.fromkeys(named, 0)
    read(skeletons, reader)
    tensors: dict[str, Tensor] = {}
    for name, thing in named.items():
        _check_state(thing, skeletons[name], f"checkpoint {folder}: {name}")
        here: dict[str, Tensor] = {}
        stored = [key for key in metadata if key.startswith(f"{name}/")]
        flatten(thing.state_dict(), name, here)
        template = getattr(thing, "state_template", None)
        if template is not None and not here.keys() >= set(stored):
            here.clear()
            flatten(template(), name, here)
        for key in stored:
            own = here.get(key)
            if own is None and isinstance(thing, torch.optim.Optimizer):
                own = _like_its_parameter(thing, key.removeprefix(f"{name}/"), metadata[key])
            tensors[key] = _target(key, metadata[key], own, folder)
    read(tensors, reader)
    for name, thing in named.items():
        thing.load_state_dict(_restore(skeletons[name], tensors))


def stored_tensors(path: str | os.PathLike[str]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of a checkpoint, by its key: "head/weight", "head_optimizer/state/0/momentum_buffer".

    For this process alone, without loading anything. Raises FileNotFoundError or ValueError as `load_checkpoint` does.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    metadata = _check_whole(folder, manifest, SafeReader(folder / manifest["data"])).state_dict_metadata
    return {k: (v.size, v.properties.dtype) for k, v in metadata.items() if isinstance(v, TensorStorageMetadata)}


def stored_values(path: str | os.PathLike[str], name: str) -> Any:
    """What is not tensors of the stored state of `name`; `{"__tensor__": key}` stands for each tensor. For this process alone."""
    folder = Path(path)
    skeleton: dict[str, Any] = {name: 0}
    manifest = read_manifest(folder)
    if name not in manifest["names"]:
        raise ValueError(f"checkpoint {folder} has no {name}; it has {', '.join(manifest['names'])}")
    reader = SafeReader(folder / manifest["data"])
    _check_whole(folder, manifest, reader)
    read(skeleton, reader, alone=True)
    return skeleton[name]


def stream_tensor(path: str | os.PathLike[str], key: str, take: Callable[[int, Tensor], None]) -> None:
    """Call `take(first_row, rows)` for each stored block of the matrix `key`, in any order, one block in memory at a time.

    For this process alone. Raises FileNotFoundError, ValueError or OSError as `load_checkpoint` does.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    reader = SafeReader(folder / manifest["data"])
    _check_whole(folder, manifest, reader)
    stream(reader, key, take)


# ---------------------------------------------------------------------------------------------------- state dicts and skeletons


def collect(named: dict[str, Stateful], copy: Copy | None = None) -> dict[str, Any]:
    """name -> RowBlocks, tensor or skeleton of everything in `named`. `copy` makes what is written a copy of the tensors now.

    TypeError for a state that could be written but not read again.
    """
    state: dict[str, Any] = {}
    for name, thing in named.items():
        tensors: dict[str, Any] = {}
        state[name] = _as_loaded(flatten(thing.state_dict(), name, tensors), name)
        for key, tensor in tensors.items():
            state[key] = _to_write(key, tensor, copy)
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
    """The skeleton of `value`: as it is, with a mark for each tensor (or RowSource), which goes into `tensors` under its path."""
    if isinstance(value, Tensor | RowSource):
        tensors[path] = value
        return {MARK: path}
    found = len(tensors)
    if isinstance(value, dict):
        parts: Any = {k: flatten(v, f"{path}/{k}", tensors) for k, v in value.items()}
        return parts if len(tensors) > found or type(value) is dict else value
    if isinstance(value, list | tuple):
        parts = [flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value.item() if type(value).__module__ == "numpy" and not getattr(value, "shape", ()) else value


def _as_loaded(skeleton: Any, name: str) -> Any:
    """A copy of the skeleton as loading will give it; TypeError, before anything is replaced, if it cannot be loaded."""
    buffer = io.BytesIO()
    torch.save(skeleton, buffer)
    buffer.seek(0)
    try:
        return torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"the state of {name} holds what is neither a tensor nor a plain value: {str(error).splitlines()[0]}"
        ) from error


def _restore(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if set(skeleton) == {MARK}:
            return tensors[skeleton[MARK]]
        return {k: _restore(v, tensors) for k, v in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        restored = [_restore(v, tensors) for v in skeleton]
        return restored if isinstance(skeleton, list) else tuple(restored)
    return skeleton


def _check_state(thing: Stateful, skeleton: Any, what: str) -> None:
    check = getattr(thing, "check_state", None)
    if check is not None:
        try:
            check(skeleton)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error


def _like_its_parameter(optimizer: torch.optim.Optimizer, key: str, stored: Any) -> Tensor | None:
    """Room for `state/INDEX/NAME` of an optimizer that has no state before its first step, split as its parameter is (FSDP2); else None."""
    kind, index, *_ = [*key.split("/"), ""]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if kind != "state" or not index.isdecimal() or int(index) >= len(parameters):
        return None
    parameter = parameters[int(index)]
    if not isinstance(parameter, DTensor) or parameter.shape != stored.size:
        return None
    return torch.empty_like(parameter.detach(), dtype=stored.properties.dtype)


def _target(key: str, stored: Any, here: Tensor | None, folder: Path) -> Tensor:
    """The tensor to read `key` into: the object's own where it has one, a new one where it has none yet."""
    if here is None:
        return torch.empty(stored.size, dtype=stored.properties.dtype)
    if here.shape == stored.size:
        return here.detach()
    problem = f"checkpoint {folder}: {key} is {list(stored.size)}, here it is {list(here.shape)}"
    if isinstance(here, DTensor) or here.ndim == len(stored.size) > 1:
        if here.shape[1:] == stored.size[1:]:
            problem += f"; it is of {stored.size[0]} classes: build for as many, load, then expand() or remap() to what is wanted"
        elif here.shape[:1] == stored.size[:1]:
            problem += "; it is of another width: build for that, or start a new run"
    raise ValueError(problem)


# ---------------------------------------------------------------------------------------------------- folders


def write_checkpoint(
    folder: Path,
    state: dict[str, Any],
    names: list[str],
    *,
    note: dict[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write what `collect` made as the checkpoint at `folder`; every rank of the group (None: all) must call it. note: for the manifest."""
    data = folder / on_first_rank(lambda: new_data_folder(folder), group)
    try:
        write(data, state, group)
        on_first_rank(lambda: publish(folder, data, {"names": names, **(note or {})}), group)
    except BaseException:
        # another rank's error has come to rank 0, too
        if not dist.is_initialized() or dist.get_rank(group) == 0:
            discard(folder, data)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FolderLock(folder)

    def acquire() -> None:
        with writing(folder):
            lock.acquire()

    on_first_rank(acquire)
    try:
        yield
    finally:
        lock.release()


def _check_whole(folder: Path, manifest: dict[str, Any], reader: SafeReader) -> Metadata:
    """The metadata; ValueError or FileNotFoundError if a file of the checkpoint is not as it was written."""
    problem = damage(folder, manifest)
    if problem is not None:
        raise problem
    reader.check()
    return reader.read_metadata()
