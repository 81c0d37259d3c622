"""From one data format to another. Encoded images are copied unchanged, in parts; an interrupted conversion resumes.

    source, in order   ── a part: up to `part` images or PART_BYTES ──>  flushed to disk  ──>  noted in .convert.json
    at the end         the destination is opened as for training: counts, labels, names, and the bytes of some images

At the end the note says that the conversion is finished. Until then only the same command opens the destination. A part
that was begun but not noted is written again. The writers of all formats are in writers.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from partial_fc.checkpoint.locks import LOCK, FolderLock
from partial_fc.training.data.dataset import EncodedIdentities, UnreadableImage
from partial_fc.training.data.decode import read_header
from partial_fc.training.data.formats.detect import CONVERSION_STATE, open_source
from partial_fc.training.data.splits import what_changed
from partial_fc.training.data.writers import FORMATS, Writer, make_writer
from partial_fc.training.errors import UserError, words
from partial_fc.training.files import naming, sync_folder, told, write_atomically

__all__ = ["FORMATS", "PART", "convert", "is_finished"]

SKIPPED_LIST = "left_out.txt"
PART = 10_000
PART_BYTES = 512 * 2**20
_COMPARED_IMAGES = 100


def convert(
    source: EncodedIdentities, dest: str | Path, format: str, *, on_error: str = "skip", part: int = PART
) -> dict[str, int]:
    """Write `source` to the folder `dest` as `format`; resume an interrupted conversion of the same.

    Returns {"images", "identities", "left_out"}; left_out counts samples that were skipped when the source was opened,
    and unreadable images. A finished conversion is left unchanged.

    Raises UserError for a folder that holds something else, for an unreadable image if `on_error` is "raise", and if
    what was written does not match the source.
    """
    folder = Path(dest)
    job = {"format": format, "source": source.fingerprint()}
    state = _read_state(folder, job)
    if state and "finished" in state:
        return _check_finished(folder, state)
    lock = FolderLock(folder)
    try:
        lock.acquire()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {words(error)}") from error
    try:
        state = state or {**job, "done": 0, "part": 0, "left_out": [], "writer": {}}
        with naming(folder):
            return _convert(source, folder, format, on_error, part, state)
    finally:
        lock.release()


def _convert(
    source: EncodedIdentities, folder: Path, format: str, on_error: str, part: int, state: dict[str, Any]
) -> dict[str, int]:
    """Convert from `state` on.

    state: what .convert.json holds. done: images that were read; part: parts that were written; left_out: [place, name]
    of unreadable images; writer: the writer's progress.
    """
    writer = make_writer(format, folder, source.identity_names, _first_size(source), len(source))
    writer.progress = state["writer"]
    order = writer.order(source.labels.numpy())
    _save_state(folder, state)
    with tqdm(total=len(source), initial=state["done"], unit="image", desc=f"to {format}", mininterval=0.5) as bar:
        while state["done"] < len(source):
            try:
                _convert_part(source, order, writer, state, part, on_error, bar)
            finally:
                writer.abandon()
            state.update(part=state["part"] + 1, writer=writer.progress)
            _save_state(folder, state)
    unreadable = {place for place, _ in state["left_out"]}
    written = np.array([index for place, index in enumerate(order.tolist()) if place not in unreadable], dtype=np.int64)
    labels = source.labels.numpy()[written]
    writer.finish(labels.tolist())
    if not len(written):
        raise UserError(f"no image of the source can be read; the first: {state['left_out'][0][1]}")
    _verify(source, written, labels, writer, folder, format)
    skipped = [*source.skipped, *(name for _, name in state["left_out"])]
    if skipped:
        write_atomically(folder / SKIPPED_LIST, "".join(f"{name}\n" for name in skipped).encode("utf-8", "replace"))
    finished = {"images": len(written), "identities": len(np.unique(labels)), "left_out": len(skipped)}
    _save_state(folder, {"format": format, "source": state["source"], "finished": finished})
    (folder / LOCK).unlink(missing_ok=True)
    return finished


def _convert_part(
    source: EncodedIdentities,
    order: npt.NDArray[np.int64],
    writer: Writer,
    state: dict[str, Any],
    part: int,
    on_error: str,
    bar: Any,
) -> None:
    """Write one part, and update `state`."""
    writer.begin(state["part"])
    count = 0
    size = 0
    while state["done"] < len(order) and count < part and size < PART_BYTES:
        place = state["done"]
        index = int(order[place])
        try:
            image = source.encoded(index)
            suffix = _suffix(source, index, image)
            writer.add(place, int(source.labels[index]), image, suffix)
            size += len(image)
        except UnreadableImage as error:
            if on_error == "raise":
                raise UserError(f"cannot read the image {error}; fix or remove it, or pass --on_error skip") from error
            state["left_out"].append([place, str(error)])
        state["done"] += 1
        count += 1
        bar.update()
    writer.end()


def _suffix(source: EncodedIdentities, index: int, image: bytes | memoryview) -> str:
    try:
        return read_header(image)[0]
    except Exception as error:  # decoders raise almost anything
        raise source.unreadable(index, error) from error


def _first_size(source: EncodedIdentities) -> tuple[int, int]:
    """Return (width, height) of the first image with a readable header."""
    for index in range(min(len(source), 1000)):
        try:
            _, width, height = read_header(source.encoded(index))
        except Exception:  # it is reported when it is converted
            continue
        return width, height
    return source.image_shape[2], source.image_shape[1]


def is_finished(dest: str | Path) -> bool:
    """Return whether the folder holds a finished conversion, of whatever source and format."""
    try:
        state = json.loads((Path(dest) / CONVERSION_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # `convert` reports a damaged state
        return False
    return isinstance(state, dict) and "finished" in state


def _check_finished(folder: Path, state: dict[str, Any]) -> dict[str, int]:
    """Return the counts of a finished conversion; raise UserError if images are missing since."""
    finished: dict[str, int] = state["finished"]
    count = len(open_source(folder, format=state["format"]))
    if count != finished["images"]:
        raise UserError(
            f"{folder} holds {count:,} images, but {finished['images']:,} were converted; remove it and convert again"
        )
    return finished


def _read_state(folder: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of a conversion with this format and source; None if the folder is new or empty.

    Raises UserError if the folder holds anything else.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or empty folder")
    if all(each.name in (LOCK, f".{CONVERSION_STATE}.tmp") for each in folder.iterdir()):
        return None
    path = folder / CONVERSION_STATE
    missing = f"{folder} is not empty and holds no conversion; give a new or empty folder"
    with told(path, again="remove the folder and convert again", missing=missing):
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stage = "a finished" if "finished" in state else "an unfinished"
        if state["format"] != job["format"]:
            finish = "" if "finished" in state else "finish it, or "
            raise UserError(f"{folder} holds {stage} conversion to {state['format']}; {finish}give another folder")
        changed = what_changed({"source": state["source"]}, {"source": job["source"]})
    if changed:
        raise UserError(f"{folder} holds {stage} conversion of other data ({changed}); give another folder")
    return state


def _verify(
    source: EncodedIdentities,
    written: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    writer: Writer,
    folder: Path,
    format: str,
) -> None:
    """Raise UserError unless the destination, opened as for training, has the images `written` with these `labels`.

    written, labels: int64 [n], indices in the source and labels there, in the order in which they were written.
    """
    opened = open_source(folder, format=format, on_error="raise", unfinished=True)  # type: ignore[arg-type]
    if len(opened) != len(written):
        raise UserError(
            f"{folder} holds {len(opened):,} images, but {len(written):,} were written; remove it and convert again"
        )
    number = {writer.name(int(label)): int(label) for label in np.unique(labels)}
    ids = np.array([number.get(name, -1) for name in opened.identity_names], dtype=np.int64)[opened.labels.numpy()]
    if format == "folder":  # it is read in the order of the folders' names
        order = np.lexsort((np.arange(len(labels)), np.array([writer.name(label) for label in labels.tolist()])))
        written = written[order]
        labels = labels[order]
    wrong = np.flatnonzero(ids != labels)
    if len(wrong):
        raise UserError(
            f"{folder}: {opened.name_of(int(wrong[0]))} does not have the label that was written; remove the folder "
            "and convert again"
        )
    for place in np.unique(np.linspace(0, len(written) - 1, _COMPARED_IMAGES).astype(np.int64)).tolist():
        index = int(written[place])
        if _again(opened, place, folder) != _again(source, index, Path()):
            raise UserError(
                f"{folder}: {opened.name_of(place)} does not have the bytes of {source.name_of(index)}; remove the "
                "folder and convert again"
            )


def _again(data: EncodedIdentities, index: int, folder: Path) -> bytes:
    """Return an image that was read or written before. folder: what its name begins with in a message."""
    try:
        return bytes(data.encoded(index))
    except UnreadableImage as error:
        raise UserError(f"{folder / error.path} cannot be read again ({error.reason})") from error


def _save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state, after the names of all files that it refers to are on the disk."""
    sync_folder(folder)
    write_atomically(folder / CONVERSION_STATE, json.dumps(state).encode())
