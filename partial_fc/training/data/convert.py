"""One format into another: encoded pictures are copied as they are, in parts, so that a conversion that was ended goes on where it was.

    source, in order   ── part: at most PART images or PART_BYTES ──  written and flushed  ── then noted in DEST/.convert.json
    at the end         the destination is opened as training would open it: counts, labels, names, and the bytes of some pictures

    recordio    train.rec, train.idx, property; pictures by identity, so that identities can have ranges
    webdataset  shard-000000.tar, ...          a part each: 000000000.jpg, 000000000.cls
    parquet     train-000000.parquet, ...      a part each: image (bytes), label
    list        list.txt and images/
    folder      identity/000000000.jpg

At the end the note says that the conversion is finished; until then nothing but its own command opens the destination.
Formats without names of identities get them beside the data, in identities.json. A part that was begun and not noted is written again.
"""

from __future__ import annotations

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
from tqdm import tqdm

from partial_fc.checkpoint.locks import LOCK, FolderLock
from partial_fc.training.data.dataset import EncodedIdentities, UnreadableImage, what_changed
from partial_fc.training.data.decode import read_header
from partial_fc.training.data.formats.detect import STATE, open_source
from partial_fc.training.data.formats.file_labels import NAMES
from partial_fc.training.data.formats.recordio import frame, pack
from partial_fc.training.errors import UserError

LEFT_OUT = "left_out.txt"
PART, PART_BYTES = 10_000, 512 * 2**20
_COMPARED = 100
_LARGEST_COUNT = 2**24  # whole numbers below it are exact in the float32 labels of a record


class Writer(ABC):
    """Writes a destination in parts. `names` of identities; `total` images; `noted`: what the last complete part left."""

    def __init__(self, folder: Path, names: list[str], size: tuple[int, int]) -> None:
        self.folder, self.names, self.size = folder, names, size
        self.noted: dict[str, Any] = {}
        self._open: list[IO[bytes]] = []

    def order(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """In which order it wants the source's images, of which these are the labels."""
        return np.arange(len(labels))

    @abstractmethod
    def begin(self, part: int) -> None:
        """A new part; what an unfinished one has left is no more."""

    @abstractmethod
    def add(self, place: int, label: int, picture: bytes | memoryview, suffix: str) -> None: ...

    @abstractmethod
    def end(self) -> None:
        """The part is whole and on the disk; `noted` is up to date."""

    def abandon(self) -> None:
        """Close what is open; the part is not whole."""
        for file in self._open:
            file.close()
        self._open.clear()

    def _opened(self, name: str, size: int = 0) -> IO[bytes]:
        """A file of the destination, cut to `size` bytes, to write on from there."""
        path = self.folder / name
        path.touch()
        file = path.open("r+b")
        self._open.append(file)
        file.truncate(size)
        file.seek(size)
        return file

    def _to_disk(self) -> None:
        """All open files are whole, and closed."""
        for file in self._open:
            file.flush()
            os.fsync(file.fileno())
        self.abandon()

    def finish(self, labels: list[int]) -> None:
        """After the last part; labels of all images that were written."""
        _replace(self.folder / NAMES, json.dumps(self.names, ensure_ascii=True, indent=0).encode())

    def name(self, label: int) -> str:
        """What the destination calls an identity."""
        return self.names[label]


class TarWriter(Writer):
    def begin(self, part: int) -> None:
        self._whole = self.folder / f"shard-{part:06d}.tar"
        self._archive = tarfile.TarFile(fileobj=self._opened(".part"), mode="w", format=tarfile.USTAR_FORMAT)
        self._empty = True

    def add(self, place: int, label: int, picture: bytes | memoryview, suffix: str) -> None:
        self._empty = False
        for name, data in ((f"{place:09d}{suffix}", bytes(picture)), (f"{place:09d}.cls", str(label).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            self._archive.addfile(member, io.BytesIO(data))

    def end(self) -> None:
        self._archive.close()
        self._to_disk()
        if not self._empty:
            os.replace(self.folder / ".part", self._whole)
        else:
            os.unlink(self.folder / ".part")


class ParquetWriter(Writer):
    def begin(self, part: int) -> None:
        self._whole = self.folder / f"train-{part:06d}.parquet"
        self._images: list[dict[str, Any]] = []
        self._labels: list[int] = []

    def add(self, place: int, label: int, picture: bytes | memoryview, suffix: str) -> None:
        self._images.append({"bytes": bytes(picture), "path": f"{place:09d}{suffix}"})
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
        shown = datasets.utils.logging.is_progress_bar_enabled()
        datasets.utils.logging.disable_progress_bar()
        try:
            table.to_parquet(self._opened(".part"))
            self._to_disk()
        finally:
            if shown:
                datasets.utils.logging.enable_progress_bar()
        os.replace(self.folder / ".part", self._whole)


class RecordWriter(Writer):
    """Record 0 is written first, for its place, and told the numbers at the end. Where a float32 could not hold them exactly, there is no
    such record and there are no ranges; the pictures then begin with key 0."""

    def __init__(self, folder: Path, names: list[str], size: tuple[int, int], total: int) -> None:
        super().__init__(folder, names, size)
        if len(names) >= _LARGEST_COUNT:
            raise UserError(
                f"{len(names):,} identities are more than RecordIO's labels can tell apart ({_LARGEST_COUNT - 1:,})"
            )
        self._ranges = total + len(names) + 1 < _LARGEST_COUNT

    def order(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return labels.argsort(kind="stable")

    def begin(self, part: int) -> None:
        self._rec, self._idx = (self._opened(name, self.noted.get(name, 0)) for name in ("train.rec", "train.idx"))
        self._key = self.noted.get("key", 0)
        if self._key == 0 and self._ranges:
            self._write(pack((0.0, 0.0), b"", 0))

    def _write(self, data: bytes) -> None:
        self._idx.write(f"{self._key}\t{self._rec.tell()}\n".encode())
        self._rec.write(frame(data))
        self._key += 1

    def add(self, place: int, label: int, picture: bytes | memoryview, suffix: str) -> None:
        self._write(pack((float(label),), picture, self._key))

    def end(self) -> None:
        self.noted = {"key": self._key, "train.rec": self._rec.tell(), "train.idx": self._idx.tell()}
        self._to_disk()

    def finish(self, labels: list[int]) -> None:
        super().finish(labels)
        present = sorted(set(labels))
        if self._ranges:
            starts = np.searchsorted(labels, [*present, present[-1] + 1] if present else []) + 1
            self.begin(-1)
            pictures = self._key
            for first, after in itertools.pairwise(starts.tolist()):
                self._write(pack((float(first), float(after)), b"", self._key))
            self._rec.seek(0)
            self._rec.write(frame(pack((float(pictures), float(self._key)), b"", 0)))
            self._to_disk()
        _replace(self.folder / "property", f"{len(present)},{self.size[1]},{self.size[0]}".encode())


class FolderWriter(Writer):
    def __init__(self, folder: Path, names: list[str], size: tuple[int, int]) -> None:
        super().__init__(folder, names, size)
        numbers = bool(names) and all(name.isascii() and name.isdigit() for name in names)
        width = max(map(len, names), default=0)
        self._folders = [name.zfill(width) if numbers else _as_folder(name) for name in names]
        if len(set(self._folders)) != len(names):
            raise UserError("two identities of the source have one name; a folder cannot hold both")

    def begin(self, part: int) -> None:
        pass

    def add(self, place: int, label: int, picture: bytes | memoryview, suffix: str) -> None:
        folder = self.folder / self._folders[label]
        folder.mkdir(exist_ok=True)
        (folder / f"{place:09d}{suffix}").write_bytes(picture)

    def end(self) -> None:
        _sync_pictures()

    def finish(self, labels: list[int]) -> None:
        pass

    def name(self, label: int) -> str:
        return self._folders[label]


class ListWriter(Writer):
    def begin(self, part: int) -> None:
        self._list = self._opened("list.txt", self.noted.get("list.txt", 0))

    def add(self, place: int, label: int, picture: bytes | memoryview, suffix: str) -> None:
        name = f"images/{place // 1000:06d}/{place:09d}{suffix}"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
        self._list.write(f"{name} {label}\n".encode())

    def end(self) -> None:
        self.noted = {"list.txt": self._list.tell()}
        _sync_pictures()
        self._to_disk()


_SIMPLE: dict[str, Callable[[Path, list[str], tuple[int, int]], Writer]] = {
    "webdataset": TarWriter,
    "parquet": ParquetWriter,
    "list": ListWriter,
    "folder": FolderWriter,
}
FORMATS = ("recordio", *_SIMPLE)


def convert(
    source: EncodedIdentities, dest: str | Path, format: str, *, on_error: str = "skip", part: int = PART
) -> dict[str, int]:
    """Write `source` to the folder `dest` as `format`, or go on with a conversion of the same that was ended; {"images", "identities",
    "left_out": samples that the source could not open as whole ones, and unreadable pictures}. A finished one is left as it is.

    Raises UserError for a folder that holds something else, for an unreadable picture if `on_error` says so, and if what was written turns
    out not to be what was read.
    """
    folder = Path(dest)
    what = {"format": format, "source": source.fingerprint()}
    state = _state(folder, what)
    if state and "finished" in state:
        return _still_there(folder, state)
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error}") from error
    try:
        return _convert(
            source,
            folder,
            format,
            on_error,
            part,
            state or {**what, "done": 0, "part": 0, "left_out": [], "writer": {}},
        )
    finally:
        lock.release()


def _convert(
    source: EncodedIdentities, folder: Path, format: str, on_error: str, part: int, state: dict[str, Any]
) -> dict[str, int]:
    size = _first_size(source)
    names = source.identity_names
    writer = (
        RecordWriter(folder, names, size, len(source)) if format == "recordio" else _SIMPLE[format](folder, names, size)
    )
    writer.noted = state["writer"]
    order = writer.order(source.labels.numpy())
    _save(folder, state)
    with tqdm(total=len(source), initial=state["done"], unit="image", desc=f"to {format}", mininterval=0.5) as bar:
        while state["done"] < len(source):
            try:
                _one_part(source, order, writer, state, part, on_error, bar)
            finally:
                writer.abandon()
            state.update(part=state["part"] + 1, writer=writer.noted)
            _save(folder, state)
    missing = {place for place, _ in state["left_out"]}
    written = np.array([index for place, index in enumerate(order.tolist()) if place not in missing], dtype=np.int64)
    labels = source.labels.numpy()[written]
    writer.finish(labels.tolist())
    if not len(written):
        raise UserError(f"no image of the source can be read; the first: {state['left_out'][0][1]}")
    _verify(source, written, labels, writer, folder, format)
    left_out = [*source.left_out, *(name for _, name in state["left_out"])]
    if left_out:
        _replace(folder / LEFT_OUT, "".join(f"{name}\n" for name in left_out).encode("utf-8", "replace"))
    finished = {"images": len(written), "identities": len(np.unique(labels)), "left_out": len(left_out)}
    _save(folder, {"format": format, "source": state["source"], "finished": finished})
    (folder / LOCK).unlink(missing_ok=True)
    return finished


def is_finished(dest: str | Path) -> bool:
    """Whether a conversion is finished there, whichever: `convert` of the same has nothing to do, and of another is refused."""
    try:
        state = json.loads((Path(dest) / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of a damaged note `convert` says so
        return False
    return isinstance(state, dict) and "finished" in state


def _still_there(folder: Path, state: dict[str, Any]) -> dict[str, int]:
    """What a finished conversion counted; UserError if there are not as many images any more."""
    finished: dict[str, int] = state["finished"]
    there = len(open_source(folder, format=state["format"]))
    if there != finished["images"]:
        raise UserError(
            f"{folder} holds {there:,} images, and {finished['images']:,} were converted; remove it and convert again"
        )
    return finished


def _one_part(
    source: EncodedIdentities,
    order: npt.NDArray[np.int64],
    writer: Writer,
    state: dict[str, Any],
    part: int,
    on_error: str,
    bar: Any,
) -> None:
    writer.begin(state["part"])
    taken, size = 0, 0
    while state["done"] < len(order) and taken < part and size < PART_BYTES:
        place = state["done"]
        index = int(order[place])
        try:
            picture = source.encoded(index)
            suffix = _suffix(source, index, picture)
            writer.add(place, int(source.labels[index]), picture, suffix)
            size += len(picture)
        except UnreadableImage as error:
            if on_error == "raise":
                raise UserError(f"cannot read the image {error}; mend or remove it, or pass --on_error skip") from error
            state["left_out"].append([place, str(error)])
        state["done"] += 1
        taken += 1
        bar.update()
    writer.end()


def _suffix(source: EncodedIdentities, index: int, picture: bytes | memoryview) -> str:
    try:
        return read_header(picture)[0]
    except Exception as error:  # decoders raise almost anything
        raise source._unreadable(index, error) from error


def _first_size(source: EncodedIdentities) -> tuple[int, int]:
    """(width, height) of the first picture that has them."""
    for index in range(min(len(source), 1000)):
        try:
            _, width, height = read_header(source.encoded(index))
        except Exception:  # it is named when its turn comes
            continue
        return width, height
    return source.image_shape[2], source.image_shape[1]


def _state(folder: Path, what: dict[str, Any]) -> dict[str, Any] | None:
    """What a conversion of the same has left in the folder; None for a new one; UserError for anything else in it."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder that is new or empty")
    there = [each.name for each in folder.iterdir() if each.name != LOCK]
    if not there:
        return None
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not empty, and no conversion of this kind was begun there; name a folder that is new or empty"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / STATE} is damaged ({error}); remove the folder and begin anew") from error
    if state["format"] != what["format"]:
        begun = "finished; name" if "finished" in state else "begun; go on with that, or name"
        raise UserError(f"{folder} holds a conversion to {state['format']} that was {begun} another folder")
    changed = what_changed({"source": state["source"]}, {"source": what["source"]})
    if changed:
        stage = "finished" if "finished" in state else "begun"
        raise UserError(f"{folder} holds a conversion that was {stage} of other data ({changed}); name another folder")
    return state


def _verify(
    source: EncodedIdentities,
    written: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    writer: Writer,
    folder: Path,
    format: str,
) -> None:
    """UserError unless the destination, opened as for training, has the images `written` (places in the source) and their labels."""
    there = open_source(folder, format=format, on_error="raise", unfinished=True)  # type: ignore[arg-type]
    if len(there) != len(written):
        raise UserError(
            f"{folder} holds {len(there):,} images, and {len(written):,} were written; remove it and begin anew"
        )
    number = {writer.name(int(label)): int(label) for label in np.unique(labels)}
    ids = np.array([number.get(name, -1) for name in there.identity_names], dtype=np.int64)[there.labels.numpy()]
    if format == "folder":
        order = np.lexsort((np.arange(len(labels)), np.array([writer.name(label) for label in labels.tolist()])))
        written, labels = written[order], labels[order]
    wrong = np.flatnonzero(ids != labels)
    if len(wrong):
        raise UserError(
            f"{folder}: {there.name_of(int(wrong[0]))} has another label than was written; remove it and begin anew"
        )
    for place in np.unique(np.linspace(0, len(written) - 1, _COMPARED).astype(np.int64)).tolist():
        if bytes(there.encoded(place)) != bytes(source.encoded(int(written[place]))):
            raise UserError(
                f"{folder}: {there.name_of(place)} has other bytes than {source.name_of(int(written[place]))}; begin anew"
            )


def _as_folder(name: str) -> str:
    """A name as a folder's: others than plain ones are percent-encoded, no two alike."""
    plain = (
        name
        and name[0] != "."
        and not set(name) & set('/\\%\0<>:"|?*\n\r')
        and name == name.strip()
        and len(name.encode()) < 200
    )
    return name if plain else urllib.parse.quote(name, safe="").replace(".", "%2E") or "%"


def _sync_pictures() -> None:
    """All pictures that were written are on the disk, and their folders: after a power failure none of a noted part is empty.

    One call for all file systems of the machine. An fsync of each of 5,000 pictures took 9 seconds at the end of a part, and 23 as they
    were written; this took 0.1.
    """
    if hasattr(os, "sync"):  # not on Windows
        os.sync()


def _save(folder: Path, state: dict[str, Any]) -> None:
    """Note the state, after the names of all files that it speaks of are on the disk."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _replace(folder / STATE, json.dumps(state).encode())


def _replace(path: Path, data: bytes) -> None:
    """All of a file or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
