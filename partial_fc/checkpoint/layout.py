"""Tensors in a checkpoint: `torch.distributed.checkpoint` (DCP), one file per rank, matrices in blocks of rows.

    RowBlocks     rows [first, first + n) of a matrix [C, ...], written in blocks of at most ROW_BLOCK_BYTES
    RowSource     a matrix that is read in row blocks from elsewhere (a file of another format), never whole in memory
    write / read  collective over a group, or in one process without a group
    stream        read a stored matrix block by block, to write it somewhere else

Only one block is in memory at a time, whatever the size of the shard. DCP's own planner would write a shard as one
item and, when loading, hold each item beside the tensor that it fills.

Reading runs no code from a file: tensors and plain values are loaded with `weights_only`, the metadata with an
unpickler that knows only the classes of the format (safe_reader.py).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
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
from torch.futures import Future

from partial_fc.checkpoint.safe_reader import SafeReader
from partial_fc.distributed.objects import group_of_objects
from partial_fc.distributed.ranks import naming_the_missing
from partial_fc.distributed.shards import local_part, shard_bounds
from partial_fc.tiers.store import RowStoreError

ROW_BLOCK_BYTES = 16 << 20  # smaller blocks are written more slowly (benchmarks/checkpoint.py)


@runtime_checkable
class RowSource(Protocol):
    """A matrix `[C, ...]` that is read in blocks of rows, from a file or elsewhere."""

    shape: torch.Size
    dtype: torch.dtype

    def rows(self, a: int, b: int) -> Tensor:
        """Return rows a to b, `[b - a, ...]`, on the CPU."""
        ...


def block_rows(row_shape: torch.Size, dtype: torch.dtype, rows: int) -> int:
    """Return the number of rows per block for a matrix of `rows` rows.

    A block has at most ROW_BLOCK_BYTES, and at most a 32nd of the matrix (or 1 MiB), so that a few blocks in memory are
    little beside a small shard, too.
    """
    row_bytes = max(1, row_shape.numel() * dtype.itemsize)
    block_bytes = min(ROW_BLOCK_BYTES, max(1 << 20, rows * row_bytes // 32))
    return max(1, block_bytes // row_bytes)


class RowBlocks:
    """Rows `[first, first + count)` of a matrix, which DCP writes in blocks under one name.

    take(a, b) returns rows a to b, counted from `first`. It is called once per block, when the block is written.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, first: int, count: int, take: Callable[[int, int], Tensor]
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.first = first
        self.count = count
        self.take = take
        self._block_rows = block_rows(shape[1:], dtype, count)

    @classmethod
    def of_tensor(cls, tensor: DTensor, local: Tensor | None = None) -> RowBlocks:
        """Return this rank's rows of a row-sharded or replicated DTensor. local: a copy of them to write instead."""
        rows = local_part(tensor.detach()) if local is None else local
        return cls(tensor.shape, rows.dtype, rows_of_rank(tensor)[0], len(rows), lambda a, b: rows[a:b])

    @classmethod
    def of_source(cls, source: RowSource) -> RowBlocks:
        return cls(torch.Size(source.shape), source.dtype, 0, source.shape[0], source.rows)

    def _chunk(self, a: int) -> ChunkStorageMetadata:
        rows = min(self._block_rows, self.count - a)
        return ChunkStorageMetadata(
            torch.Size([self.first + a, *[0] * (len(self.shape) - 1)]), torch.Size([rows, *self.shape[1:]])
        )

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        chunks = [self._chunk(a) for a in range(0, self.count, self._block_rows)]
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
        return self.take(a, min(a + self._block_rows, self.count))


def splits_by_rows(tensor: DTensor) -> bool:
    """Whether a DTensor is sharded by rows or replicated, so that `RowBlocks` can write it. DCP writes others."""
    if not tensor.ndim or not all(type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in tensor.placements):
        return False
    lo, hi = rows_of_rank(tensor)
    return hi - lo == len(local_part(tensor.detach()))


def rows_of_rank(tensor: DTensor) -> tuple[int, int]:
    """Return the rows [lo, hi) that the placements give to this rank, by the chunk rule."""
    lo, hi = 0, tensor.shape[0]
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            mesh = tensor.device_mesh
            a, b = shard_bounds(hi - lo, mesh.get_local_rank(dim), mesh.size(dim))
            lo, hi = lo + a, lo + b
    return lo, hi


class _RowBlockPlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        stored = self.state_dict[index.fqn]
        return stored.block(index) if isinstance(stored, RowBlocks) else super().lookup_object(index)


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write as the base class does, but raise the OSError of a full disk instead of torch.save's error about it,
        and that of rows that cannot be read."""
        _use_up_a_warning()
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError | RowStoreError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            if isinstance(cause, RowStoreError):
                raise cause from None
            raise OSError(cause.errno, cause.strerror) from error


@lru_cache
def _use_up_a_warning() -> None:
    """Torch warns once of storages with a dtype, which its own writer uses until 2.8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.empty(0, device="cpu").storage()


def write(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write `state` (name -> RowBlocks, Tensor or plain value) into the empty `folder`, replicated values once.

    Every rank of the group (None: all ranks) must call it. Raises OSError, the same on every rank, naming the rank that
    failed.
    """
    try:
        with naming_the_missing("the writing of a checkpoint", group):
            _save_state_dict(
                state,
                storage_writer=_Writer(folder),
                process_group=group_of_objects(group),  # torch sends plans, and no rows
                no_dist=not dist.is_initialized(),
                planner=_RowBlockPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            )
    except CheckpointException as error:
        raise OSError(f"checkpoint {folder} cannot be written: {_first_failure(error)}") from error


def read(state: dict[str, Any], reader: SafeReader, *, alone: bool = False) -> None:
    """Fill the tensors of `state` in place and replace its plain values. alone: read in this process only.

    Unless `alone`, every rank must call it with the same names. Raises OSError, the same on every rank, naming the rank
    that failed.
    """
    planner = _SafeLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _read(state, reader, planner, use_group=dist.is_initialized() and not alone)


def stream(reader: SafeReader, name: str, take: Callable[[int, Tensor], None]) -> None:
    """Call `take(first_row, rows)` for each stored block of a matrix, in any order, one at a time. Not a collective."""
    stored = reader.read_metadata().state_dict_metadata.get(name)
    if not isinstance(stored, TensorStorageMetadata):
        raise ValueError(f"checkpoint {reader.path} has no tensor {name}")
    _read({name: _SomeRows(stored, 0, stored.size[0])}, reader, _StreamPlanner(take), use_group=False)


def read_rows(reader: SafeReader, name: str, a: int, b: int) -> Tensor:
    """Return rows a to b of a stored matrix, in this process only."""
    stored = reader.read_metadata().state_dict_metadata.get(name)
    if not isinstance(stored, TensorStorageMetadata):
        raise ValueError(f"checkpoint {reader.path} has no tensor {name}")
    out = torch.empty(b - a, *stored.size[1:], dtype=stored.properties.dtype, device="cpu")

    def take(first: int, rows: Tensor) -> None:
        out[first : first + len(rows)] = rows

    _read({name: _SomeRows(stored, a, b)}, reader, _StreamPlanner(take), use_group=False)
    return out


def _read(state: dict[str, Any], reader: SafeReader, planner: DefaultLoadPlanner, use_group: bool) -> None:
    try:
        with naming_the_missing("the reading of a checkpoint"):
            group = group_of_objects() if use_group else None
            _load_state_dict(state, storage_reader=reader, process_group=group, no_dist=not use_group, planner=planner)
    except CheckpointException as error:
        raise OSError(f"checkpoint {reader.path} cannot be read: {_first_failure(error)}") from error


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}" if dist.is_initialized() else str(cause)


class _SomeRows:
    """Placeholder for rows a to b of a stored matrix in a load plan. It allocates nothing of that size."""

    def __init__(self, stored: TensorStorageMetadata, a: int, b: int) -> None:
        self._size = stored.size
        self._rows = a, b

    def size(self) -> torch.Size:
        return self._size

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        (a, b), row = self._rows, self._size[1:]
        return [ChunkStorageMetadata(torch.Size([a, *[0] * len(row)]), torch.Size([b - a, *row]))]


class _StreamPlanner(DefaultLoadPlanner):
    def __init__(self, take: Callable[[int, Tensor], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._take = take

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # the base class would replace `_SomeRows`, which is not a tensor
        self.state_dict = state_dict
        self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata[read_item.dest_index.fqn]
        return torch.empty(read_item.lengths, dtype=stored.properties.dtype, device="cpu")  # type: ignore[union-attr]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self._take(read_item.dest_offsets[0] if read_item.dest_offsets else 0, tensor)


class _SafeLoadPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
