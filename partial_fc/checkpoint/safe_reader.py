"""Read the metadata of a checkpoint without running code from it, and check it before any tensor is read.

    .metadata    a pickle of torch.distributed.checkpoint: tensors, their chunks, and the file and bytes of each chunk

`_SafeUnpickler` loads only the classes of this format. File names, offsets, shapes and sizes are checked against each
other and against the files (`SafeReader.check`).
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)


class _SafeUnpickler(pickle.Unpickler):
    """Unpickle the metadata of a distributed checkpoint; refuse any other class."""

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
            return PurePosixPath  # the path of the writer; not used
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(
            f"checkpoint metadata refers to {module}.{name}, which no checkpoint needs; do not trust this file"
        )


def _check_operations(data: bytes) -> None:
    """Refuse a pickle in which a few bytes make the unpickler allocate much: a place in its table far behind those that
    a file of this size can fill, or a `bytearray`, which is made before its bytes are there."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "BYTEARRAY8":
            raise pickle.UnpicklingError("checkpoint metadata has a bytearray, which no checkpoint needs")
        if "PUT" in operation.name and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError(f"checkpoint metadata puts an object in place {argument} of {len(data)} bytes")


def _memory_format(enum: object, name: object) -> Any:
    """Replace `getattr` for the only use in this format: Python 3.11.0 to 3.11.3 pickle enum members with it."""
    if enum is _MEM_FORMAT_ENCODING and name in _MEM_FORMAT_ENCODING.__members__:
        return _MEM_FORMAT_ENCODING[str(name)]
    raise pickle.UnpicklingError(
        f"checkpoint metadata refers to {name!r} of {enum!r}, which no checkpoint needs; do not trust this file"
    )


def is_plain_name(name: object) -> bool:
    """Whether `name` is a file name without any path."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def cannot_be_read(path: Path, error: OSError) -> OSError:
    """Return an error of the disk as one that names the file."""
    return type(error)(f"{path} cannot be read: {error.strerror or error}")


# what unpickling a damaged file raises
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    IndexError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    MemoryError,
    RecursionError,
    RuntimeError,
    AssertionError,
)


class SafeReader(FileSystemReader):
    """Reader of one data folder. It reads the metadata once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata.

        Raises FileNotFoundError if there is none, ValueError if it is damaged or names a file outside its folder,
        OSError that names it if the disk cannot read it.
        """
        if self._metadata is None:
            self._metadata = self._read_metadata(Path(self.path) / ".metadata")
        return self._metadata

    def check(self) -> None:
        """ValueError if data lie outside their file or a tensor has too few bytes. Reads no tensor data."""
        metadata = self.read_metadata()
        path = Path(self.path) / ".metadata"
        sizes = {info.relative_path: 0 for info in metadata.storage_data.values()}  # type: ignore[union-attr]
        for name in sizes:
            sizes[name] = (Path(self.path) / name).stat().st_size
        try:
            for index, info in metadata.storage_data.items():  # type: ignore[union-attr]
                if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[info.relative_path]:
                    end = info.offset + info.length
                    raise ValueError(f"{index.fqn} is at bytes {info.offset} to {end} of {info.relative_path}")
            for name, stored in metadata.state_dict_metadata.items():
                if isinstance(stored, TensorStorageMetadata):
                    _check_chunks(name, stored, metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _read_metadata(self, path: Path) -> Metadata:
        try:
            data = path.read_bytes()
            _check_operations(data)
            metadata: Metadata = _SafeUnpickler(io.BytesIO(data)).load()
            files = {info.relative_path for info in metadata.storage_data.values()}  # type: ignore[union-attr]
            assert isinstance(metadata.state_dict_metadata, dict), "it has no table of tensors"
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: the checkpoint is not complete") from None
        except OSError as error:
            raise cannot_be_read(path, error) from error
        except _DAMAGED as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for file in files:
            if not is_plain_name(file):
                raise ValueError(
                    f"{path} names {file!r}, which is not a file in its folder; do not trust this checkpoint"
                )
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


def _check_chunks(name: str, stored: TensorStorageMetadata, metadata: Metadata) -> None:
    """ValueError unless the chunks of a tensor fill its shape and each has enough bytes."""
    count = 0
    itemsize = stored.properties.dtype.itemsize
    for chunk in stored.chunks:
        inside = all(
            min(a, n) >= 0 and a + n <= size for a, n, size in zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
        )
        length = metadata.storage_data[MetadataIndex(name, chunk.offsets)].length  # type: ignore[index]
        elements = math.prod(chunk.sizes)
        if not inside or elements * itemsize > length:
            raise ValueError(
                f"{name} {list(stored.size)} has a chunk {list(chunk.sizes)} at {list(chunk.offsets)} in {length} bytes"
            )
        count += elements
    if count != math.prod(stored.size):
        raise ValueError(f"{name} has shape {list(stored.size)}, but its chunks hold {count} elements")
