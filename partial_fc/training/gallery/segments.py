"""Segments: the files of a gallery's rows, each written once and never changed.

Rows, in batches of up to BATCH   ── write_segment ──>   segment-00000001.arrow   ── Segment ──>  memory-mapped columns

    row          int64           number of the row: unique in the gallery, rising from row to row and segment to segment
    identity     string
    picture      string, null    where its picture is, as given
    thumbnail    binary, null    a small encoded image
    images       int32           how many images the row stands for
    length       float32         length of the sum of their unit embeddings
    code         binary, null    code of the index; null if there are no codes
    embedding    float32 [D]     of unit length

The format is Arrow's IPC file, uncompressed, so that embeddings are read where the file is mapped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from partial_fc.tiers import pages
from partial_fc.training.errors import UserError
from partial_fc.training.files import on_disk

BATCH = 16_384
UNIT_TOLERANCE = 1e-3  # of the length of a stored embedding

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint8]


def arrow() -> Any:
    """Return pyarrow. UserError that says what to install."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ModuleNotFoundError as error:
        raise UserError(f"a gallery needs {error.name}: pip install 'partial_fc[gallery]'") from error
    return pyarrow


@dataclass
class Rows:
    """Up to BATCH rows, with the columns of a segment."""

    numbers: Integers
    identities: Sequence[str]
    pictures: Sequence[str | None]
    thumbnails: Sequence[bytes | None]
    images: npt.NDArray[np.int32]
    lengths: Floats
    embeddings: Floats
    """[n, D], of unit length."""
    codes: Codes | None = None
    """[n, bytes], None if there are no codes."""

    def __len__(self) -> int:
        return len(self.numbers)

    def chosen(self, which: npt.NDArray[np.bool_]) -> Rows:
        """Return the rows where `which` `[n]` is true."""
        places = np.flatnonzero(which).tolist()
        return Rows(
            self.numbers[which],
            [self.identities[place] for place in places],
            [self.pictures[place] for place in places],
            [self.thumbnails[place] for place in places],
            self.images[which],
            self.lengths[which],
            self.embeddings[which],
            None if self.codes is None else self.codes[which],
        )


def write_segment(path: Path, batches: Iterable[Rows], dimension: int) -> int:
    """Write the file and return its number of rows; it is on the disk when this returns. OSError if that fails."""
    pa = arrow()
    schema = _schema(pa, dimension)
    count = 0
    with on_disk(path) as file, pa.ipc.new_file(file, schema) as writer:
        for rows in batches:
            columns = [
                pa.array(rows.numbers, pa.int64()),
                _column(pa, rows.identities, pa.string()),
                _column(pa, rows.pictures, pa.string()),
                _column(pa, rows.thumbnails, pa.binary()),
                pa.array(rows.images, pa.int32()),
                pa.array(rows.lengths, pa.float32()),
                _code_column(pa, rows),
                pa.FixedSizeListArray.from_arrays(
                    pa.array(np.ascontiguousarray(rows.embeddings).ravel(), pa.float32()), dimension
                ),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            count += len(rows)
    return count


def _column(pa: Any, values: Sequence[Any], kind: Any) -> Any:
    return values.column if isinstance(values, Stored) else pa.array(values, kind)


def _code_column(pa: Any, rows: Rows) -> Any:
    if rows.codes is None:
        return pa.nulls(len(rows), pa.binary())
    codes = np.ascontiguousarray(rows.codes)
    ends = np.arange(len(codes) + 1, dtype=np.int32) * codes.shape[1]
    return pa.Array.from_buffers(pa.binary(), len(codes), [None, pa.py_buffer(ends), pa.py_buffer(codes)])


def _schema(pa: Any, dimension: int) -> Any:
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("identity", pa.string(), nullable=False),
            pa.field("picture", pa.string()),
            pa.field("thumbnail", pa.binary()),
            pa.field("images", pa.int32(), nullable=False),
            pa.field("length", pa.float32(), nullable=False),
            pa.field("code", pa.binary()),
            pa.field("embedding", pa.list_(pa.field("item", pa.float32(), nullable=False), dimension), nullable=False),
        ]
    )


class Segment:
    """One segment, memory-mapped. UserError for a file that is damaged or is none; FileNotFoundError if it is gone."""

    def __init__(self, path: Path, size: int, rows: int, dimension: int) -> None:
        pa = arrow()
        self.path = path
        self.dimension = dimension
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{path} is damaged: it has {found:,} bytes and had {size:,}; restore it from a copy")
        try:
            _read_descriptions(pa, path)
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if not reader.schema.equals(_schema(pa, dimension)):
                raise ValueError("its columns are not those of a gallery")
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            for batch in self._batches:
                self._check_columns(batch)
            for batch in self._batches:
                batch.validate(full=True)
            numbers = [batch.column("row").to_numpy() for batch in self._batches]
            self.numbers: Integers = np.concatenate([np.empty(0, np.int64), *numbers])
            if len(self.numbers) != rows or (np.diff(self.numbers) <= 0).any():
                raise ValueError("its rows are not those that were written")
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); restore it from a copy") from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])

    def __len__(self) -> int:
        return len(self.numbers)

    def identities(self) -> list[str]:
        """Return the identity of each row."""
        return [name for batch in self._batches for name in batch.column("identity").to_pylist()]

    def codes(self, size: int) -> Codes:
        """Return the codes of all rows `[n, size]`; UserError if they have others."""
        return np.concatenate([np.empty((0, size), np.uint8), *(self._codes(batch, size) for batch in self._batches)])

    def _codes(self, batch: Any, size: int) -> Codes:
        column = batch.column("code")
        _, ends, data = column.buffers()
        if column.null_count == 0 and ends is not None and data is not None:
            places = np.frombuffer(ends, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
            if (np.diff(places) == size).all():
                return np.frombuffer(data, dtype=np.uint8)[places[0] : places[-1]].reshape(-1, size)
        raise UserError(f"{self.path} is damaged: its codes are not those of the gallery; restore it from a copy")

    def embeddings_at(self, numbers: Integers) -> Floats:
        """Return the embeddings `[n, D]` of rows of this segment, by their rising numbers `[n]`.

        Raises UserError for embeddings that are not of unit length.
        """
        places = np.searchsorted(self.numbers, numbers)
        found = np.empty((len(places), self.dimension), dtype=np.float32)
        splits = np.searchsorted(places, self._starts)
        for batch, (first, after) in enumerate(itertools.pairwise(splits.tolist())):
            if after > first:
                found[first:after] = self._chosen(batch, places[first:after] - self._starts[batch])
        self._check_unit(found)
        return found

    def _chosen(self, batch: int, places: Integers) -> Floats:
        """Return some embeddings of a batch."""
        embeddings = self._embeddings(batch)
        address, size = embeddings.ctypes.data, self.dimension * embeddings.itemsize
        if pages.reads_itself():
            inside = np.append(np.arange(0, size, pages.PAGE), size - 1)
            touched = (address + places[:, None] * size + inside).ravel()
            try:
                pages.read_in(torch.from_numpy(np.unique(touched // pages.PAGE) * pages.PAGE))
            except OSError as error:
                raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        chosen: Floats = embeddings[places]
        return chosen

    def _embeddings(self, batch: int) -> Floats:
        embeddings: Floats = self._batches[batch].column("embedding").flatten().to_numpy().reshape(-1, self.dimension)
        return embeddings

    def _check_unit(self, embeddings: Floats) -> None:
        with np.errstate(all="ignore"):
            lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
        if not (np.abs(lengths - 1) < UNIT_TOLERANCE).all():  # also for NaN
            raise UserError(f"{self.path} is damaged: an embedding is not of unit length; restore it from a copy")

    def batches(self) -> Iterator[Rows]:
        """Yield the rows in batches; UserError for embeddings that are not of unit length."""
        for number, batch in enumerate(self._batches):
            embeddings = self._embeddings(number)
            self._check_pages(embeddings.ctypes.data, embeddings.nbytes)
            self._check_unit(embeddings)
            coded = batch.column("code").null_count == 0 and len(batch) > 0
            yield Rows(
                batch.column("row").to_numpy(),
                Stored(batch.column("identity")),
                Stored(batch.column("picture")),
                Stored(batch.column("thumbnail")),
                batch.column("images").to_numpy(),
                batch.column("length").to_numpy(),
                embeddings,
                self._codes(batch, len(batch.column("code")[0].as_py())) if coded else None,
            )

    def picture(self, number: int) -> str | None:
        """Return the picture of a row of this segment."""
        return self._value("picture", number)

    def thumbnail(self, number: int) -> bytes | None:
        """Return the thumbnail of a row of this segment."""
        return self._value("thumbnail", number)

    def _value(self, column: str, number: int) -> Any:
        place = int(np.searchsorted(self.numbers, number))
        batch = int(np.searchsorted(self._starts, place, side="right")) - 1
        value = self._batches[batch].column(column)[place - int(self._starts[batch])]
        if value.is_valid and (data := value.as_buffer()) is not None:
            self._check_pages(data.address, data.size)
        return value.as_py()

    def _check_columns(self, batch: Any) -> None:
        """Raise UserError if what is always read of a batch cannot be read: all but embeddings and thumbnails."""
        for name in batch.schema.names:
            if name != "embedding":
                buffers = batch.column(name).buffers()
                for buffer in buffers[:2] if name == "thumbnail" else buffers:
                    if buffer is not None:
                        self._check_pages(buffer.address, buffer.size)

    def _check_pages(self, address: int, length: int) -> None:
        """Raise UserError for a page that the disk cannot read; an access would end the process."""
        try:
            pages.check(address, length)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error


def _read_descriptions(pa: Any, path: Path) -> None:
    """Read what describes the batches of a file, with the numbers of their rows, before it is mapped: OSError where the
    disk cannot, which would end the process in mapped memory."""
    with path.open("rb") as file:  # what Arrow says of a file that it opened itself is without the system's error
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[0]))
        for number in range(reader.num_record_batches):
            reader.get_batch(number)


class Stored(Sequence[Any]):
    """A column of a file, whose values become objects when they are asked for."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, place: Any) -> Any:
        return self.column[place].as_py()
