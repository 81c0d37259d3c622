"""How tensors lie in a checkpoint: `torch.distributed.checkpoint`, one file a rank, sharded matrices in blocks of rows.

    RowBlocks     rows [first, first + n) of a matrix [C, ...], written in blocks of at most ROW_BLOCK_BYTES under one name
    RowSource     a matrix that is read in blocks of rows from wherever it lies (a file of another format), never whole in memory
    write / read  all ranks of a group together, or one process without a group
    stream        a stored matrix block by block, for whoever writes it somewhere else

Blocks keep memory flat: what is written or read at a time is one block, whatever the shard's size. Stock DCP would write a shard as one
item and, when loading, hold each item beside the tensor that it fills.

Nothing that is read can run code: tensors and plain values are loaded with `weights_only`, metadata by an unpickler that knows only the
classes of the format.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from partial_fc.distributed.missing import naming_the_missing
from partial_fc.shards import local_part

ROW_BLOCK_BYTES = 16 << 20  # smaller ones are written more slowly (benchmarks/checkpoint.py)


@runtime_checkable
class RowSource(Protocol):
    """A matrix `[C, ...]` that is read in blocks of rows from wherever it lies."""

    shape: torch.Size
    dtype: torch.dtype

    def rows(self, a: int, b: int) -> Tensor:
        """Rows a to b, `[b - a, ...]`, on the CPU."""
        ...


def block_rows(row_shape: torch.Size, dtype: torch.dtype, rows: int) -> int:
    """How many of `rows` rows of that shape make a block: some blocks in flight are a small part of a small shard, too."""
    row_bytes = max(1, row_shape.numel() * dtype.itemsize)
    return max(1, min(ROW_BLOCK_BYTES, max(1 << 20, rows * row_bytes // 32)) // row_bytes)


class RowBlocks:
    """Rows `[first, first + count)` of a matrix, as `torch.distributed.checkpoint` writes them: in blocks under one name.

    take(a, b) gives rows a to b, counted from `first`. It is called when they are written, block after block.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, first: int, count: int, take: Callable[[int, int], Tensor]
    ) -> None:
        self.shape, self.dtype, self.first, self.count, self.take = shape, dtype, first, count, take
        self._rows = block_rows(shape[1:], dtype, count)

    @classmethod
    def of_tensor(cls, tensor: DTensor, local: Tensor | None = None) -> RowBlocks:
        """This rank's rows of a row-sharded or replicated DTensor; `local`: a copy of them to write instead."""
        rows = local_part(tensor.detach()) if local is None else local
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return cls(tensor.shape, rows.dtype, offset[0] if offset else 0, len(rows), lambda a, b: rows[a:b])

    @classmethod
    def of_source(cls, source: RowSource) -> RowBlocks:
        return cls(torch.Size(source.shape), source.dtype, 0, source.shape[0], source.rows)

    def _chunk(self, a: int) -> ChunkStorageMetadata:
        rows = min(self._rows, self.count - a)
        return ChunkStorageMetadata(
            torch.Size([self.first + a, *[0] * (len(self.shape) - 1)]), torch.Size([rows, *self.shape[1:]])
        )

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        chunks = [self._chunk(a) for a in range(0, self.count, self._rows)]
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in chunks
        ]

    def block(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        a = index.offset[0] - self.first
        return self.take(a, min(a + self._rows, self.count))


def splits_by_rows(tensor: DTensor) -> bool:
    """Whether a DTensor is cut along its rows or not at all, so that `RowBlocks` can write it; others are left to stock DCP."""
    return tensor.ndim > 0 and all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in tensor.placements)


class _RowBlockPlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        stored = self.state_dict[index.fqn]
        return stored.block(index) if isinstance(stored, RowBlocks) else super().lookup_object(index)


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As the base; where the disk is full, its error, and not what torch.save says of the position it then finds itself at."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror) from error


def write(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write `state` (name -> RowBlocks, Tensor or plain value) into the empty `folder`; every rank of the group (None: all) must call it.

    What ranks hold alike is written once. Raises OSError, the same on every rank, naming the rank that failed.
    """
    try:
        with naming_the_missing("the writing of a checkpoint", group):
            _save_state_dict(
                state,
                storage_writer=_Writer(folder),
                process_group=group,
                no_dist=not dist.is_initialized(),
                planner=_RowBlockPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            )
    except CheckpointException as error:
        raise OSError(f"checkpoint {folder} cannot be written: {_first_failure(error)}") from error


def read(state: dict[str, Any], reader: SafeReader, *, alone: bool = False) -> None:
    """Fill the tensors of `state` in place and replace its plain values; every rank must call it with the same names, unless `alone`.

    Raises OSError, the same on every rank, naming the rank that failed.
    """
    _read(
        state,
        reader,
        _SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        dist.is_initialized() and not alone,
    )


def stream(reader: SafeReader, name: str, take: Callable[[int, Tensor], None]) -> None:
    """Call `take(first_row, rows)` for each stored block of a matrix, in any order, one at a time; this process alone."""
    stored = reader.read_metadata().state_dict_metadata.get(name)
    if not isinstance(stored, TensorStorageMetadata):
        raise ValueError(f"checkpoint {reader.path} has no tensor {name}")
    _read({name: _Whole(stored)}, reader, _StreamPlanner(take), use_group=False)


def _read(state: dict[str, Any], reader: SafeReader, planner: DefaultLoadPlanner, use_group: bool) -> None:
    try:
        with naming_the_missing("the reading of a checkpoint"):
            _load_state_dict(state, storage_reader=reader, no_dist=not use_group, planner=planner)
    except CheckpointException as error:
        raise OSError(f"checkpoint {reader.path} cannot be read: {_first_failure(error)}") from error


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}" if dist.is_initialized() else str(cause)


class _Whole:
    """Stands for all rows of a stored matrix in a load plan; nothing of its size is allocated."""

    def __init__(self, stored: TensorStorageMetadata) -> None:
        self._size = stored.size

    def size(self) -> torch.Size:
        return self._size

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * len(self._size)), self._size)]


class _StreamPlanner(DefaultLoadPlanner):
    def __init__(self, take: Callable[[int, Tensor], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._take = take

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # the base would first put tensors in the place of what is none
        self.state_dict, self.original_state_dict, self.metadata, self.is_coordinator = (
            state_dict,
            state_dict,
            metadata,
            is_coordinator,
        )

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata[read_item.dest_index.fqn]
        return torch.empty(read_item.lengths, dtype=stored.properties.dtype)  # type: ignore[union-attr]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._take(read_item.dest_offsets[0] if read_item.dest_offsets else 0, tensor)


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
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(
            f"checkpoint metadata asks for {module}.{name}, which no checkpoint needs; the file is not to be trusted"
        )


def _memory_format(enum: object, name: object) -> Any:
    """The one thing that is read by getattr: Python 3.11.0 to 3.11.3 write a member of an enum so."""
    if enum is _MEM_FORMAT_ENCODING and name in _MEM_FORMAT_ENCODING.__members__:
        return _MEM_FORMAT_ENCODING[str(name)]
    raise pickle.UnpicklingError(
        f"checkpoint metadata asks for {name!r} of {enum!r}, which no checkpoint needs; the file is not to be trusted"
    )


def is_plain_name(name: object) -> bool:
    """Whether it names a file beside the one that says it, and nothing elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


# what else a damaged pickle makes of the classes that it may name
_RARE = (AttributeError, MemoryError, RecursionError, RuntimeError, AssertionError)


class SafeReader(FileSystemReader):
    """Reads a data folder; its metadata once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises FileNotFoundError if there is none, ValueError if it is damaged or names a file outside its folder."""
        if self._metadata is None:
            self._metadata = self._read_metadata(Path(self.path) / ".metadata")
        return self._metadata

    def check(self) -> None:
        """ValueError if the metadata places anything outside its file, or tensors where too few bytes are; nothing is read or allocated."""
        metadata, path = self.read_metadata(), Path(self.path) / ".metadata"
        sizes = {info.relative_path: 0 for info in metadata.storage_data.values()}  # type: ignore[union-attr]
        for name in sizes:
            sizes[name] = (Path(self.path) / name).stat().st_size
        try:
            for index, info in metadata.storage_data.items():  # type: ignore[union-attr]
                if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[info.relative_path]:
                    raise ValueError(
                        f"{index.fqn} is at {info.offset} to {info.offset + info.length} of {info.relative_path}"
                    )
            for name, stored in metadata.state_dict_metadata.items():
                if isinstance(stored, TensorStorageMetadata):
                    _check_chunks(name, stored, metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _read_metadata(self, path: Path) -> Metadata:
        try:
            metadata: Metadata = _SafeUnpickler(io.BytesIO(path.read_bytes())).load()
            files = {info.relative_path for info in metadata.storage_data.values()}  # type: ignore[union-attr]
            assert isinstance(metadata.state_dict_metadata, dict), "it holds no table of tensors"
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: the checkpoint is not complete") from None
        except (
            pickle.UnpicklingError,
            EOFError,
            IndexError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            *_RARE,
        ) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for file in files:
            if not is_plain_name(file):
                raise ValueError(
                    f"{path} names {file!r}, which is no file beside it; the checkpoint is not to be trusted"
                )
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def _check_chunks(name: str, stored: TensorStorageMetadata, metadata: Metadata) -> None:
    """ValueError unless the chunks of a tensor make up its shape, and each has the bytes for its share."""
    count, each = 0, stored.properties.dtype.itemsize
    for chunk in stored.chunks:
        inside = all(
            min(a, n) >= 0 and a + n <= size for a, n, size in zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        )
        length = metadata.storage_data[MetadataIndex(name, chunk.offsets)].length  # type: ignore[index]
        numbers = math.prod(chunk.sizes)
        if not inside or numbers * each > length:
            raise ValueError(
                f"{name} {list(stored.size)} has a piece {list(chunk.sizes)} at {list(chunk.offsets)} in {length} bytes"
            )
        count += numbers
    if count != math.prod(stored.size):
        raise ValueError(f"{name} is {list(stored.size)}, its pieces hold {count} numbers")


class _SafeLoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
