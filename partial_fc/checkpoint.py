"""One global checkpoint of everything that has a state dict, written by all ranks, read at any world size.

    path/
      manifest.json      which data folder is complete; replaced in one move, last of all
      data-0007/         torch.distributed.checkpoint: one file a rank, and .metadata

Sharded tensors (DTensors) are written by the ranks that hold their rows, in blocks of rows, so that neither side ever needs a second
copy of a shard; loading fills the tensors of the objects in place, however many ranks there are now. Replicated tensors are written
once. Everything else of a state dict (numbers, names) is a *skeleton* with a mark in the place of each tensor.

A process killed at any moment leaves the previous checkpoint: until the manifest is replaced it names the previous data folder.
Nothing read from a file can run code: tensors and skeletons are loaded with `weights_only`, metadata by an unpickler that knows only
the classes of the format.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from partial_fc.shards import local_part

FORMAT = 1
MANIFEST = "manifest.json"
ROW_BLOCK_BYTES = 16 << 20
MARK = "__tensor__"
OWN = re.compile(r"data-\d{4,}")  # a user's own data-anything stays


class Stateful(Protocol):
    """Anything with a state dict."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def save_checkpoint(path: str | os.PathLike[str], **named: Stateful) -> None:
    """Write the state of `named` objects as one checkpoint, replacing the one at `path` when it is complete.

    Every rank must call it with the same names. Sharded heads are written by all ranks, all else by one.
    Raises OSError, the same on every rank, if the folder cannot be written.
    """
    folder = Path(path)
    data = folder / _agreed(lambda: _new_data_folder(folder))
    state: dict[str, Any] = {}
    for name, thing in named.items():
        tensors: dict[str, Tensor] = {}
        state[name] = _flatten(thing.state_dict(), name, tensors)
        _check_loads(state[name], name)
        state.update({k: _RowBlocks(v) if isinstance(v, DTensor) else v.detach() for k, v in tensors.items()})
    with _translated():
        save(
            state,
            storage_writer=FileSystemWriter(data),
            planner=_RowBlockPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not dist.is_initialized(),
        )
    _agreed(lambda: _publish(folder, data.name, sorted(named)))


def load_checkpoint(path: str | os.PathLike[str], **named: Stateful) -> None:
    """Read the state of `named` objects from a checkpoint that any number of ranks wrote; every rank must call it.

    Tensors are filled in place. Raises FileNotFoundError if there is no complete checkpoint, ValueError if it holds other names or
    other shapes than the objects have.
    """
    folder = Path(path)
    manifest = _everywhere(lambda: _read_manifest(folder))
    reader = _SafeReader(folder / manifest["data"])
    metadata = _everywhere(lambda: reader.read_metadata().state_dict_metadata)
    missing = sorted(set(named) - set(manifest["names"]))
    if missing:
        raise ValueError(f"checkpoint {folder} has no {', '.join(missing)}; it has {', '.join(manifest['names'])}")
    skeletons: dict[str, Any] = dict.fromkeys(named, 0)
    _read(skeletons, reader)
    tensors: dict[str, Tensor] = {}
    for name, thing in named.items():
        here: dict[str, Tensor] = {}
        stored = [key for key in metadata if key.startswith(f"{name}/")]
        _flatten(thing.state_dict(), name, here)
        template = getattr(thing, "state_template", None)
        if template is not None and not here.keys() >= set(stored):
            here.clear()
            _flatten(template(), name, here)
        for key in stored:
            tensors[key] = _target(key, metadata[key], here.get(key), folder)
    _read(tensors, reader)
    for name, thing in named.items():
        thing.load_state_dict(_restore(skeletons[name], tensors))


def _target(key: str, stored: Any, here: Tensor | None, folder: Path) -> Tensor:
    """The tensor to read `key` into: the object's own where it has one, a new one where it has none yet."""
    if here is None:
        return torch.empty(stored.size, dtype=stored.properties.dtype)
    if here.shape != stored.size:
        raise ValueError(f"checkpoint {folder}: {key} is {list(stored.size)}, here it is {list(here.shape)}")
    return here.detach()


def _read(state: dict[str, Any], reader: FileSystemReader) -> None:
    with _translated():
        load(
            state,
            storage_reader=reader,
            planner=_SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not dist.is_initialized(),
        )


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Without torch's warning that there is no process group, and with an OSError for what it raises beside Exception."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            rank, failure = next(iter(error.failures.items()))
            raise OSError(f"checkpoint: rank {rank}: {failure[0]}") from error


# ---------------------------------------------------------------------------------------------------- state dicts and skeletons


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The skeleton of `value`: as it is, with a mark for each tensor, which goes into `tensors` under its path."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {MARK: path}
    found = len(tensors)
    if isinstance(value, dict):
        parts: Any = {k: _flatten(v, f"{path}/{k}", tensors) for k, v in value.items()}
        return parts if len(tensors) > found or type(value) is dict else value
    if isinstance(value, list | tuple):
        parts = [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value.item() if type(value).__module__ == "numpy" and not getattr(value, "shape", ()) else value


def _check_loads(skeleton: Any, name: str) -> None:
    """TypeError, before anything is replaced, for a state that could be written but not read again."""
    buffer = io.BytesIO()
    torch.save(skeleton, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(f"the state of {name} holds what is neither a tensor nor a plain value: {str(error).splitlines()[0]}") from error


def _restore(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if set(skeleton) == {MARK}:
            return tensors[skeleton[MARK]]
        return {k: _restore(v, tensors) for k, v in skeleton.items()}
    if isinstance(skeleton, list | tuple):
        restored = [_restore(v, tensors) for v in skeleton]
        return restored if isinstance(skeleton, list) else tuple(restored)
    return skeleton


class _RowBlocks:
    """A row-sharded DTensor as `torch.distributed.checkpoint` writes it: in blocks of rows under one name."""

    def __init__(self, tensor: DTensor) -> None:
        self.size, self.local = tensor.shape, local_part(tensor.detach())
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        self.first = offset[0] if offset else 0
        self.rows = max(1, ROW_BLOCK_BYTES // max(1, self.local[:1].nbytes or 1))

    def _chunk(self, a: int) -> ChunkStorageMetadata:
        rows = min(self.rows, len(self.local) - a)
        zeros = [0] * (self.local.ndim - 1)
        return ChunkStorageMetadata(torch.Size([self.first + a, *zeros]), torch.Size([rows, *self.local.shape[1:]]))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(a) for a in range(0, len(self.local), self.rows)]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def block(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        a = index.offset[0] - self.first
        return self.local[a : a + self.rows]


class _RowBlockPlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        stored = self.state_dict[index.fqn]
        return stored.block(index) if isinstance(stored, _RowBlocks) else super().lookup_object(index)


# ---------------------------------------------------------------------------------------------------- folders


def _new_data_folder(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"data-{max((int(p.name[5:]) for p in folder.glob('data-*') if OWN.fullmatch(p.name)), default=0) + 1:04d}"
    (folder / name).mkdir()
    return name


def _publish(folder: Path, data: str, names: list[str]) -> None:
    """Make `data` the checkpoint, in one atomic move, then remove what it replaces."""
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w") as file:
        json.dump({"format": FORMAT, "data": data, "names": names}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    for old in folder.glob("data-*"):
        if old.name != data and OWN.fullmatch(old.name) and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)  # the new one is in place; a busy old one is no failure


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        data = manifest["data"]
    except FileNotFoundError:
        raise FileNotFoundError(f"no complete checkpoint at {folder} (it has no {MANIFEST})") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"checkpoint {folder} has format {manifest.get('format')}, this version reads {FORMAT}")
    if Path(data).name != data or not (folder / data).is_dir():
        raise ValueError(f"{folder / MANIFEST} names {data!r}, which is no folder beside it")
    return dict(manifest)


def _everywhere(action: Any) -> Any:
    """The result of `action` on this rank; the first rank's error, if any rank has one, on all."""
    result, error = None, None
    try:
        result = action()
    except (OSError, ValueError) as caught:
        error = caught
    if dist.is_initialized():
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if error is None else (type(error), str(error)))
        first = next(((rank, e) for rank, e in enumerate(errors) if e is not None), None)
        if first is not None:
            rank, (kind, text) = first
            raise kind(text if all(e is not None for e in errors) else f"rank {rank}: {text}") from error
    if error is not None:
        raise error
    return result


def _agreed(action: Any) -> Any:
    """The result of `action` on the first rank, or its OSError, on every rank."""
    result: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result[0] = action()
        except OSError as error:
            result[1] = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise OSError(f"checkpoint cannot be written: {result[1]}")
    return result[0]


# ---------------------------------------------------------------------------------------------------- reading without running


class _SafeUnpickler(pickle.Unpickler):
    """Loads the metadata of a distributed checkpoint and nothing else."""

    ALLOWED = {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return PurePosixPath  # where it was written; not used
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(
            f"checkpoint metadata asks for {module}.{name}, which no checkpoint needs; the file is not to be trusted"
        )


class _SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata: Metadata = _SafeUnpickler(io.BytesIO(path.read_bytes())).load()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: the checkpoint is not complete") from None
        except (pickle.UnpicklingError, EOFError, IndexError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class _SafeLoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
