"""`RowStore`: the memory of the class rows of one loss and of their optimizer state, where it is not torch's own.

    new(name)       a tensor [C_local, ...] of zero pages (HostRows), or of a sparse file that is mapped (FileRows)
    ready(rows)     before anybody looks at rows: room for them is reserved, their pages are read in, and those that
                    nobody has touched get initial values
    a thread        reads the pages of the next window in while a step computes, and begins to write those of the last

There is one copy of a row, in the page cache of the host, which the optimizer writes and the next forward reads: so
no row is ever stale, whatever the thread does. It only decides when pages come and go.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import mmap
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.failures import tell_own
from partial_fc.tiers import pages
from partial_fc.tiers.initial import rows_at_a_time, rows_of
from partial_fc.tiers.kinds import FileRows, Storage
from partial_fc.tiers.wiring import WHOLE_GRADIENT, WRITTEN

log = logging.getLogger("partial_fc")

BLOCK_BYTES = 256 << 10  # room is reserved, and written, in blocks of a file
READ_AT_ONCE = 256 << 20  # of a file of which all is read
MOST_ASKED = 4 << 30  # of a file of so many bytes it costs less to ask which pages are in memory than to read them
READING = "the reading of class rows"
WAY = ". Go on from the newest checkpoint, with a folder on a disk that is sound and has room"


_stores: weakref.WeakSet[RowStore] = weakref.WeakSet()


def scratch_like(tensor: Tensor) -> Tensor | None:
    """Return memory for a copy of a tensor where the tensor is itself, if it is in a store; else None."""
    for store in _stores:
        if store.rows_of(tensor) is not None:
            return store.scratch(store.count, tuple(tensor.shape[1:]), tensor.dtype)
    return None


class RowStoreError(RuntimeError):
    """Rows cannot be read or written any more. The run ends; it goes on from its newest checkpoint."""


@dataclass(frozen=True)
class Initial:
    """What a row holds before anybody has touched it: normal numbers, drawn and rounded to `dtype`; or a number."""

    std: float = 0.0
    seed: int | None = None  # None: all numbers are `fill`
    dtype: torch.dtype = torch.float32
    fill: float = 0.0

    @property
    def is_zero(self) -> bool:
        return self.seed is None and self.fill == 0

    def write(self, tensor: Tensor, rows: Tensor, lo: int) -> None:
        """Write them to the local rows `[n]` of a tensor, some at a time."""
        if self.seed is None:
            tensor.data.index_fill_(0, rows, self.fill)
            return
        shape = tuple(tensor.shape[1:])
        for part in rows.split(rows_at_a_time(math.prod(shape))):
            drawn = rows_of(part + lo, shape, std=self.std, seed=self.seed)
            # not a version of the parameter: no value that anybody has seen changes
            tensor.data.index_copy_(0, part, drawn.to(self.dtype).to(tensor.dtype))


class RowStore:
    """The memory of one loss on this rank, for the classes `[lo, lo + count)`.

    device: where the loss computes. upcoming: called in a forward, returns what draws the local rows of the next one;
    or None.
    """

    def __init__(self, storage: Storage, lo: int, count: int, device: torch.device) -> None:
        self.storage = storage
        self.device = device
        self.folder = Path(storage.folder) if isinstance(storage, FileRows) else None
        self.lo = lo
        self.count = count
        self.touched = torch.zeros(count, dtype=torch.bool, device="cpu")
        self.untouched = count
        self.tensors: dict[str, _Rows] = {}
        self.upcoming: Callable[[], Callable[[], Tensor] | None] = lambda: None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[Tensor | None] | None = None
        self._last: Tensor | None = None  # rows of the last forward
        self._here: Tensor | None = None  # rows whose pages the thread has read in, ascending
        self.waited = 0.0  # seconds in all for which forwards have waited for rows
        self.saved: Any = None  # the checkpoint that has all rows but those of `changed`, or None (checkpoint/)
        self.changed: Tensor | None = None  # [C_local], rows that may have changed since; None: any of them
        self._versions: dict[str, int] = {}  # of the tensors, after the last writing that is known
        _stores.add(self)

    # ---------------------------------------------------------------------------------------------------- memory

    def new(self, name: str, row_shape: tuple[int, ...], dtype: torch.dtype, initial: Initial | None) -> Tensor:
        """Return `[count, *row_shape]` that holds `initial` in rows that were touched, and will in others when they
        are; None for rows that the caller writes. It takes the place of an earlier tensor of this name."""
        self._wait()
        self.tensors.pop(name, None)
        rows = _Rows(self.folder, self.count, row_shape, dtype, initial)
        self.tensors[name], self._versions[name] = rows, rows.tensor._version  # noqa: SLF001
        for first, part in self._parts(touched=True) if self.untouched < self.count else ():
            self._reserve([rows], first + part)
            if initial is not None and not initial.is_zero:
                initial.write(rows.tensor, first + part, self.lo)
        return rows.tensor

    def scratch(self, count: int, row_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return zeros `[count, *row_shape]` for an operation, where the rows are too."""
        rows = _Rows(self.folder, count, row_shape, dtype, None)
        with _Naming(self.folder, "has no room for what is made of class rows"):
            rows.reserve_all()
        return rows.tensor

    def follow(self, name: str, source: Tensor) -> None:
        """Write to the rows of a tensor that were touched what `source` has in them."""
        tensor = self.tensors[name].tensor
        for first, part in self._parts(touched=True):
            tensor.data.index_copy_(0, first + part, source.index_select(0, first + part).to(tensor.dtype))

    def forget(self, kept: set[str]) -> None:
        """Let go of all tensors but these: their memory is free when nobody else holds them."""
        self._wait()
        self.tensors = {name: rows for name, rows in self.tensors.items() if name in kept}
        self._versions = {name: version for name, version in self._versions.items() if name in kept}

    def resized(self, lo: int, count: int) -> RowStore:
        """Return the store of other classes; all of its rows are written by the caller."""
        self._wait()
        other = RowStore(self.storage, lo, count, self.device)
        other.untouched, other.upcoming = 0, self.upcoming
        other.touched.fill_(True)
        return other

    def rows_of(self, tensor: Tensor) -> _Rows | None:
        """Return the rows that a tensor is the memory of, or None."""
        for rows in self.tensors.values():
            if len(tensor) and rows.tensor.data_ptr() == tensor.data_ptr() and rows.tensor.shape == tensor.shape:
                return rows
        return None

    # ---------------------------------------------------------------------------------------------------- changes

    def begin_changes(self, saved: Any) -> None:
        """Note from here on which rows change. saved: what has them all."""
        self.saved, self.changed = saved, torch.zeros(self.count, dtype=torch.bool, device="cpu")
        self.wrote()

    def wrote(self) -> None:
        """A step has written rows that were ready for it."""
        self._versions = self._versions_now()

    def note(self, index: Tensor | None) -> None:
        """The local rows `index`, or all, may change; all, too, if somebody has written rows that were not ready."""
        changed = self.changed  # a thread may take it away, whose writing of a checkpoint has failed
        if changed is None:
            return
        if index is None or self._versions != self._versions_now():
            self.saved = self.changed = None
        else:
            changed.index_fill_(0, index, True)

    def _versions_now(self) -> dict[str, int]:
        return {name: rows.tensor._version for name, rows in self.tensors.items()}  # noqa: SLF001

    def _check_writes(self) -> None:
        """Raise RuntimeError if somebody has written to a parameter that still has initial values to get."""
        now = self._versions_now() if self.untouched else {}
        if any(version != self._versions[name] for name, version in now.items() if "/" not in name):
            raise RuntimeError(WRITTEN.format(storage=type(self.storage).__name__))

    # ---------------------------------------------------------------------------------------------------- rows

    def ready(self, index: Tensor | None, *, ahead: bool = True) -> None:
        """Call it before the local rows `index`, or all, are read or written. RowStoreError if they cannot be. ahead:
        they are those of a forward, after which others come."""
        with _telling():
            self._wait()
            self._check_writes()
            self.note(index)
            if index is None:
                self._check_all()
                for first, part in self._parts(touched=False) if self.untouched else ():
                    self._touch(first + part)
                return
            new = index[~self.touched.index_select(0, index)] if self.untouched else index[:0]
            if len(new):
                self._reserve(list(self.tensors.values()), new)
            if self.folder is not None:
                self._read_in(index if self._here is None else index[~_among(index, self._here)])
            if len(new):
                self._touch(new.unique())
            if self.folder is not None and ahead:
                self._pending = self._worker().submit(self._ahead, self.upcoming(), self._last)
                self._last = index

    def readable(self, index: Tensor) -> None:
        """Call it before the local rows `index` are read as they are. RowStoreError if they cannot be."""
        if self.folder is not None:
            with _telling():
                self._read_in(index)

    def check(self, rows: Any, *, trains: bool) -> None:
        """Raise RowStoreError if the thread has found that rows cannot be read or written, RuntimeError if a training
        forward would make a gradient of all rows. rows: the `ClassRows`."""
        self._wait()
        optimizer = rows.live_optimizer
        in_backward = optimizer is not None and optimizer.update_in_backward
        if trains and not (rows.sampled or in_backward) and rows.main.requires_grad:
            raise RuntimeError(WHOLE_GRADIENT.format(storage=type(self.storage).__name__))

    def _touch(self, new: Tensor) -> None:
        """Write the initial values of these rows, each once and untouched."""
        self._reserve(list(self.tensors.values()), new)
        for rows in self.tensors.values():
            if rows.initial is not None and not rows.initial.is_zero:
                rows.initial.write(rows.tensor, new, self.lo)
        self.touched.index_fill_(0, new, True)
        self.untouched -= len(new)

    def _parts(self, touched: bool) -> Any:
        """Yield (first row, places behind it) of the rows that were touched, or were not, some at a time."""
        step = max(1, BLOCK_BYTES // max(1, min(rows.row_bytes for rows in self.tensors.values())))
        for first in range(0, self.count, step):
            part = (self.touched[first : first + step] == touched).nonzero()[:, 0]
            if len(part):
                yield first, part

    # ---------------------------------------------------------------------------------------------------- files

    def _reserve(self, tensors: list[_Rows], index: Tensor) -> None:
        """Take room on the disk for the blocks of these rows."""
        with _Naming(self.folder, "has no room for class rows, or cannot be written"):
            for rows in tensors:
                rows.reserve(index)

    def _read_in(self, index: Tensor) -> None:
        with _Naming(self.folder, "holds class rows that cannot be read"):
            for rows in self.tensors.values():
                rows.read_in(index)

    def _check_all(self) -> None:
        """Read the pages of all rows in that memory has not: an access of one that cannot be read would end the
        process. Where files are larger than memory, some will have gone when they are used; then they are read from the
        disk twice, which is as much again."""
        with _Naming(self.folder, "holds class rows that cannot be read"):
            for rows in self.tensors.values():
                rows.read_all_in()

    def _ahead(self, draw: Callable[[], Tensor] | None, last: Tensor | None) -> Tensor | None:
        """In the thread: read in what the next forward draws, and begin to write what the last one has moved. Return
        the rows that are read in, ascending."""
        coming = None if draw is None else draw().sort().values
        if coming is not None:
            if self.untouched:
                self._reserve(list(self.tensors.values()), coming)
            self._read_in(coming)
        with _Naming(self.folder, "cannot be written"):
            for rows in self.tensors.values():
                rows.write_behind(last)
        return coming

    def _worker(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="partial_fc rows")
        return self._thread

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            start = time.perf_counter()
            self._here = pending.result()
            self.waited += time.perf_counter() - start


class _Rows:
    """One tensor of the store: mapped memory, and what was reserved of its file."""

    def __init__(
        self,
        folder: Path | None,
        count: int,
        row_shape: tuple[int, ...],
        dtype: torch.dtype,
        initial: Initial | None,
    ) -> None:
        self.initial = initial
        self.row_bytes = math.prod(row_shape) * dtype.itemsize
        self.size = count * self.row_bytes
        self.file: int | None = None  # its descriptor
        shape = (count, *row_shape)
        if not self.size:
            self.tensor = torch.empty(shape, dtype=dtype, device="cpu")
            return
        with _Naming(folder or "the memory of the host", "cannot hold class rows", ""):
            memory = self._anonymous() if folder is None else self._map(folder)
        self.tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
        self.reserved = torch.zeros(-(-self.size // BLOCK_BYTES), dtype=torch.bool, device="cpu")

    def _anonymous(self) -> mmap.mmap:
        kinds = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, self.size, flags=kinds)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_NOHUGEPAGE)  # one row would take 2 MB
        return memory

    def _map(self, folder: Path) -> mmap.mmap:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            self.file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, self.size)
        memory = mmap.mmap(self.file, self.size)
        free = shutil.disk_usage(folder).free
        level = logging.WARNING if self.size > free else logging.INFO
        log.log(level, "class rows in %s: %d bytes when all are used, of %d that are free", folder, self.size, free)
        memory.madvise(mmap.MADV_RANDOM)  # reading further than what is asked for would only push out other rows
        return memory

    def reserve(self, index: Tensor) -> None:
        """Take room on the disk for the blocks of the rows `[n]`; OSError if there is none."""
        if self.file is None:
            return
        blocks = self._blocks(index)
        for a, b in _runs(blocks[~self.reserved.index_select(0, blocks)]):
            start = a * BLOCK_BYTES
            pages.reserve(self.file, start, min(b * BLOCK_BYTES, self.size) - start)
            self.reserved[a:b] = True

    def reserve_all(self) -> None:
        """Take room on the disk for all of it; OSError if there is none."""
        if self.file is not None:
            pages.reserve(self.file, 0, self.size)

    def read_in(self, index: Tensor) -> None:
        """Read the pages of the rows `[n]` that memory has not; OSError if they cannot be read."""
        if self.file is None or not len(index):
            return
        places = pages.first_of_pages(index * self.row_bytes, self.row_bytes)
        if self.size <= MOST_ASKED:
            places = places[~pages.resident(self.tensor.data_ptr(), self.size)[places // pages.PAGE]]
        self._read_pages(places)

    def _read_pages(self, places: Tensor) -> None:
        """Read the pages around these places `[n]` of the file; OSError if one cannot be read."""
        assert self.file is not None
        if pages.reads_itself():
            pages.read_in(places + self.tensor.data_ptr())
            return
        for place in places.tolist():
            os.pread(self.file, 1, place)

    def read_all_in(self) -> None:
        """Read all pages that memory has not, but holes; OSError if one cannot be read."""
        if self.file is None:
            return
        address, place = self.tensor.data_ptr(), 0
        while place < self.size:
            try:
                place = os.lseek(self.file, place, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # none behind it
                    return
                raise
            end = min(os.lseek(self.file, place, os.SEEK_HOLE), self.size)
            for start in range(place // pages.PAGE * pages.PAGE, end, READ_AT_ONCE):
                missing = ~pages.resident(address + start, min(READ_AT_ONCE, end - start))
                self._read_pages(missing.nonzero()[:, 0] * pages.PAGE + start)
            place = end

    def write_behind(self, last: Tensor | None) -> None:
        """Begin to write the blocks of the rows `[n]`; OSError if earlier writes of the file have failed."""
        if self.file is None:
            return
        if last is not None and self.size > _memory_for_files():
            for a, b in _runs(self._blocks(last)):
                pages.write_out(self.file, a * BLOCK_BYTES, (b - a) * BLOCK_BYTES, pages.START_WRITING)
        pages.write_out(self.file, 0, 1, pages.WAIT_FOR_WRITES)

    def _blocks(self, index: Tensor) -> Tensor:
        """Return the blocks of the file in which the rows are, ascending."""
        first = index * self.row_bytes
        last = (first + (self.row_bytes - 1)) // BLOCK_BYTES
        return torch.cat((first // BLOCK_BYTES, last)).unique()


def _among(rows: Tensor, known: Tensor) -> Tensor:
    """Return `[n]`: whether each of `rows [n]` is one of the ascending `known`."""
    if not len(known):
        return torch.zeros_like(rows, dtype=torch.bool)
    return known[torch.searchsorted(known, rows).clamp_(max=len(known) - 1)] == rows


def _runs(blocks: Tensor) -> list[tuple[int, int]]:
    """Return sorted numbers `[n]` as ranges [a, b)."""
    if not len(blocks):
        return []
    cuts = (blocks[1:] - blocks[:-1] != 1).nonzero()[:, 0] + 1
    starts = torch.cat((blocks[:1], blocks[cuts])).tolist()
    ends = torch.cat((blocks[cuts - 1], blocks[-1:])).tolist()
    return [(a, b + 1) for a, b in zip(starts, ends, strict=True)]


def _memory_for_files() -> int:
    """Return how many bytes of one file the page cache may be expected to hold beside others."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Tell the other ranks of an error of this one, which they would wait for."""
    try:
        yield
    except Exception as error:
        if dist.is_initialized():
            tell_own(error, READING)
        raise


class _Naming:
    """Makes a RowStoreError of an OSError: which folder it is, what is wrong with it, and what to do."""

    def __init__(self, folder: Path | str | None, what: str, way: str = WAY) -> None:
        self.folder = folder
        self.what = what
        self.way = way

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise RowStoreError(f"{self.folder} {self.what}: {error.strerror or error}{self.way}") from error
