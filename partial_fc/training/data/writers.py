"""Writers of data sets, one for each format that `partial-fc data convert` can write.

A destination is written in parts. convert.py calls, in this order:

    writer = make_writer(format, ...)
    writer.begin(part); writer.add(...) for each image; writer.end()      once per part
    writer.finish(labels)                                                 after the last part

After `end` the part is on the disk, and `writer.progress` is what a later writer needs to continue. `begin` discards
what an interrupted part may have left.

    recordio    train.rec, train.idx, property; sorted by identity, so that identities have ranges
    webdataset  shard-000000.tar, ...          one file per part: 000000000.jpg, 000000000.cls
    parquet     train-000000.parquet, ...      one file per part: image (bytes), label
    list        list.txt and images/
    folder      identity/000000000.jpg

Formats without names of identities get them in identities.json, beside the data.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import tarfile
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.data.formats.file_labels import NAMES
from partial_fc.training.data.formats.record_file import MAX_EXACT, frame, pack
from partial_fc.training.errors import UserError
from partial_fc.training.files import FileSystem, write_atomically

_UNFINISHED = ".part"  # name of a tar or Parquet file while it is written


class Writer(ABC):
    """Writes a data set into `folder`. names: those of the identities. size: (width, height) for `property`."""

    def __init__(self, folder: Path, names: list[str], size: tuple[int, int]) -> None:
        self.folder = folder
        self.names = names
        self.size = size
        self.progress: dict[str, Any] = {}
        self._open_files: list[IO[bytes]] = []

    def order(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the order in which to add the source's images, whose labels are `labels`."""
        return np.arange(len(labels))

    @abstractmethod
    def begin(self, part: int) -> None:
        """Begin a part; discard what an interrupted one has left."""

    @abstractmethod
    def add(self, place: int, label: int, image: bytes | memoryview, suffix: str) -> None:
        """Write an image. place: its number in `order`, unique. suffix: of its kind, such as .jpg."""

    @abstractmethod
    def end(self) -> None:
        """Complete the part: write it to the disk, and update `progress`."""

    def abandon(self) -> None:
        """Close the files of a part that is not complete, whatever the disk says of what they still hold."""
        for file in self._open_files:
            with contextlib.suppress(OSError):
                file.close()
        self._open_files.clear()

    def _open_at(self, name: str, size: int = 0) -> IO[bytes]:
        """Open a file of the destination, cut it to `size` bytes, and continue from there."""
        path = self.folder / name
        path.touch()
        file = path.open("r+b")
        self._open_files.append(file)
        file.truncate(size)
        file.seek(size)
        return file

    def _sync_and_close(self) -> None:
        """Write all open files to the disk and close them."""
        for file in self._open_files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._open_files.clear()

    def finish(self, labels: list[int]) -> None:
        """Complete the data set after the last part; `labels` are those of all images that were written."""
        write_atomically(self.folder / NAMES, json.dumps(self.names, ensure_ascii=True, indent=0).encode())

    def name(self, label: int) -> str:
        """Return the name of an identity in the destination."""
        return self.names[label]


class TarWriter(Writer):
    def begin(self, part: int) -> None:
        self._path = self.folder / f"shard-{part:06d}.tar"
        self._archive = tarfile.TarFile(fileobj=self._open_at(_UNFINISHED), mode="w", format=tarfile.USTAR_FORMAT)
        self._empty = True

    def add(self, place: int, label: int, image: bytes | memoryview, suffix: str) -> None:
        self._empty = False
        for name, data in ((f"{place:09d}{suffix}", bytes(image)), (f"{place:09d}.cls", str(label).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            self._archive.addfile(member, io.BytesIO(data))

    def end(self) -> None:
        self._archive.close()
        self._sync_and_close()
        if self._empty:
            os.unlink(self.folder / _UNFINISHED)
        else:
            os.replace(self.folder / _UNFINISHED, self._path)


class ParquetWriter(Writer):
    def begin(self, part: int) -> None:
        self._path = self.folder / f"train-{part:06d}.parquet"
        self._images: list[dict[str, Any]] = []
        self._labels: list[int] = []

    def add(self, place: int, label: int, image: bytes | memoryview, suffix: str) -> None:
        self._images.append({"bytes": bytes(image), "path": f"{place:09d}{suffix}"})
        self._labels.append(label)

    def end(self) -> None:
        if not self._images:
            return
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"Parquet files need the package `datasets` ({error}): pip install 'partial_fc[data]'"
            ) from error
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"image": self._images, "label": self._labels}, features=features)
        shows_bars = datasets.utils.logging.is_progress_bar_enabled()
        datasets.utils.logging.disable_progress_bar()
        try:
            table.to_parquet(self._open_at(_UNFINISHED))
            self._sync_and_close()
        finally:
            if shows_bars:
                datasets.utils.logging.enable_progress_bar()
        os.replace(self.folder / _UNFINISHED, self._path)


class RecordWriter(Writer):
    """Writes record 0 first, to reserve its place, and fills in its numbers at the end.

    If a float32 could not hold these numbers exactly, there is no record 0 and there are no ranges; the images then
    begin at key 0.
    """

    def __init__(self, folder: Path, names: list[str], size: tuple[int, int], total: int) -> None:
        super().__init__(folder, names, size)
        if len(names) >= MAX_EXACT:
            raise UserError(
                f"{len(names):,} identities are more than the float32 labels of RecordIO can hold ({MAX_EXACT - 1:,}); "
                "choose another format"
            )
        self._with_ranges = total + len(names) + 1 < MAX_EXACT

    def order(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return labels.argsort(kind="stable")

    def begin(self, part: int) -> None:
        self._rec = self._open_at("train.rec", self.progress.get("train.rec", 0))
        self._idx = self._open_at("train.idx", self.progress.get("train.idx", 0))
        self._key = self.progress.get("key", 0)
        if self._key == 0 and self._with_ranges:
            self._write(pack((0.0, 0.0), b"", 0))

    def _write(self, data: bytes) -> None:
        self._idx.write(f"{self._key}\t{self._rec.tell()}\n".encode())
        self._rec.write(frame(data))
        self._key += 1

    def add(self, place: int, label: int, image: bytes | memoryview, suffix: str) -> None:
        self._write(pack((float(label),), image, self._key))

    def end(self) -> None:
        self.progress = {"key": self._key, "train.rec": self._rec.tell(), "train.idx": self._idx.tell()}
        self._sync_and_close()

    def finish(self, labels: list[int]) -> None:
        super().finish(labels)
        present = sorted(set(labels))
        if self._with_ranges:
            # The first key of each identity, and the key after the last image; images have keys 1, 2, ...
            starts = np.searchsorted(labels, [*present, present[-1] + 1] if present else []) + 1
            self.begin(-1)
            first_identity = self._key
            for first, after in itertools.pairwise(starts.tolist()):
                self._write(pack((float(first), float(after)), b"", self._key))
            self._rec.seek(0)
            self._rec.write(frame(pack((float(first_identity), float(self._key)), b"", 0)))
            self._sync_and_close()
        write_atomically(self.folder / "property", f"{len(present)},{self.size[1]},{self.size[0]}".encode())


class FolderWriter(Writer):
    def __init__(self, folder: Path, names: list[str], size: tuple[int, int]) -> None:
        super().__init__(folder, names, size)
        if names and all(name.isascii() and name.isdigit() for name in names):
            width = max(map(len, names))
            self._folders = [name.zfill(width) for name in names]  # so that sorting by name keeps the order of numbers
        else:
            self._folders = [_folder_name(name) for name in names]
        if len(set(self._folders)) != len(names):
            raise UserError("two identities of the source have the same name, so a folder cannot hold both")

    def begin(self, part: int) -> None:
        self._written = FileSystem(self.folder)

    def add(self, place: int, label: int, image: bytes | memoryview, suffix: str) -> None:
        folder = self.folder / self._folders[label]
        folder.mkdir(exist_ok=True)
        (folder / f"{place:09d}{suffix}").write_bytes(image)

    def end(self) -> None:
        self._written.sync()  # so that a power failure leaves no image of a completed part empty

    def finish(self, labels: list[int]) -> None:
        pass

    def name(self, label: int) -> str:
        return self._folders[label]


class ListWriter(Writer):
    def begin(self, part: int) -> None:
        self._written = FileSystem(self.folder)
        self._list = self._open_at("list.txt", self.progress.get("list.txt", 0))

    def add(self, place: int, label: int, image: bytes | memoryview, suffix: str) -> None:
        name = f"images/{place // 1000:06d}/{place:09d}{suffix}"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        self._list.write(f"{name} {label}\n".encode())

    def end(self) -> None:
        self.progress = {"list.txt": self._list.tell()}
        self._written.sync()  # so that a power failure leaves no image of a completed part empty
        self._sync_and_close()


_OTHER_WRITERS: dict[str, Callable[[Path, list[str], tuple[int, int]], Writer]] = {
    "webdataset": TarWriter,
    "parquet": ParquetWriter,
    "list": ListWriter,
    "folder": FolderWriter,
}
FORMATS = ("recordio", *_OTHER_WRITERS)


MAX_NAME = 200  # bytes; a file system takes 255


def make_writer(format: str, folder: Path, names: list[str], size: tuple[int, int], total: int) -> Writer:
    """Return the writer of a format, for `total` images of identities `names`."""
    if format == "recordio":
        return RecordWriter(folder, names, size, total)
    return _OTHER_WRITERS[format](folder, names, size)


def _folder_name(name: str) -> str:
    """Return a folder name for an identity: percent-encoded unless it is plain. Different names stay different."""
    try:
        size, errors = len(os.fsencode(name)), "surrogateescape"  # a name that is not UTF-8 has its bytes again
    except UnicodeEncodeError:  # half a character, which JSON can have, and no name of a folder
        size, errors = MAX_NAME, "surrogatepass"
    plain = (
        name
        and name[0] != "."
        and not set(name) & set('/\\%\0<>:"|?*\n\r')
        and name == name.strip()
        and size < MAX_NAME
    )
    return name if plain else urllib.parse.quote(name, safe="", errors=errors).replace(".", "%2E") or "%"
