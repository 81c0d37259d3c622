"""Embeddings of a whole data set, in parts that ranks share; what was done stays done when a process is killed.

data set of n images         ── parts of `part` images ──>     the parts that are missing are shared out to the ranks
images of a rank's parts     ── workers decode, backbone ──>   rows of one part   ── one move ──>   part-*.parquet

A rank holds the rows of one part and a few batches. Parts are whole batches, so a part has the same bits whoever makes
it and whatever was there before. Ranks exchange nothing but the word that they have finished; all of them must see the
folder.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from partial_fc.checkpoint.locks import LOCK, FolderLock
from partial_fc.training.all_ranks import raise_on_all, run_on_main_for_all
from partial_fc.training.data import IdentityDataset
from partial_fc.training.data.loader import BatchLoader
from partial_fc.training.data.samplers import Integers, Sampler
from partial_fc.training.data.splits import what_changed
from partial_fc.training.embedding import Embedder
from partial_fc.training.embedding_files import (
    FORMAT,
    INDEX,
    UNREADABLE,
    Embedded,
    FileKind,
    job_digest,
    part_path,
    read_about,
    read_index,
    valid_text,
    write_index,
    write_part,
)
from partial_fc.training.errors import UserError
from partial_fc.training.files import write_atomically

BATCH = 256  # images of a forward
PART = 8192  # images of a part of a large data set
LEAST_PARTS = 4  # for each rank, of a smaller one


@dataclass
class Finished:
    """What was embedded, what was not, and how long it took."""

    images: int
    """Images that have an embedding."""
    unreadable: int
    """Images that could not be read, and what was skipped."""
    parts: int
    skipped: int
    """What the data set left out because there is no image in it, or no label, such as empty folders."""
    made: int
    """Images that were embedded now; the others were there."""
    seconds: float


class Chosen(Sampler):
    """Some images of a data set, in a given order."""

    def __init__(self, labels: Tensor, chosen: Integers) -> None:
        super().__init__(labels, 1, 0)
        self.chosen = chosen

    @property
    def length(self) -> int:
        return len(self.chosen)

    def order(self, epoch: int) -> Integers:
        return self.chosen


@dataclass
class Reading:
    """How images are read: by `workers` processes; and what is done about those that are unreadable."""

    batch_size: int | None = None
    """Images of a forward on each rank; None for BATCH, or in an unfinished folder for its own."""
    workers: int = 0
    on_error: Literal["skip", "raise"] = "skip"


@dataclass
class EmbeddedBatch:
    """The readable images of a batch: places in the data set `[n]`, images `[n, C, H, W]`, embeddings `[n, D]`."""

    places: Tensor
    images: Tensor
    embeddings: Tensor
    unreadable: list[str]
    asked: int
    """Images of the batch, unreadable ones included."""


def embed_images_of(
    embedder: Embedder, dataset: IdentityDataset, chosen: Integers, reading: Reading
) -> Generator[EmbeddedBatch, None, None]:
    """Yield the embeddings of the images `chosen` `[m]` of a data set, batch after batch, in this order.

    Raises UserError for an unreadable image if reading.on_error says so.
    """
    batch_size = reading.batch_size or BATCH
    loader = BatchLoader(
        dataset,
        batch_size=batch_size,
        sampler=Chosen(dataset.labels, chosen),
        drop_last=False,
        workers=reading.workers,
        pin=embedder.device.type == "cuda",
        on_error=reading.on_error,
    )
    left = len(chosen)
    try:
        with closing(loader.iterate()) as batches:
            for batch in batches:
                asked = min(left, batch_size)
                left -= asked
                count = len(batch.indices)
                embeddings = embedder.embed_batch(batch.images) if count else torch.empty(0, embedder.dimension)
                yield EmbeddedBatch(batch.indices, batch.images, embeddings, batch.unreadable, asked)
    except UserError as error:
        raise UserError(str(error).replace("--data.", "--")) from error


def embed_data(
    embedder: Embedder,
    dataset: IdentityDataset,
    folder: str | Path,
    accelerator: Accelerator,
    reading: Reading,
    *,
    name: str = "images",
    kind: FileKind = "parquet",
    part: int | None = None,
) -> Finished:
    """Write the embeddings of all images of a data set to `folder`; go on with what an earlier call has left there.

    Every rank must call it. name: of the data set, for the progress bar. part: images of a part; None chooses, and an
    unfinished folder keeps its own, as it does the batch size. embedding_files.py describes the files.

    Raises UserError, the same on every rank, for a folder that holds anything else, or that another process writes to.
    """
    out = Path(folder)
    lock = FolderLock(out)
    began = time.monotonic()
    index = run_on_main_for_all(
        lambda: _begin(embedder, dataset, out, accelerator.num_processes, reading, kind, part, lock), accelerator
    )
    try:
        missing: list[int] = []
        if "finished" not in index:
            missing = _make_parts(embedder, dataset, out, index, accelerator, reading, name)
        finished, made = run_on_main_for_all(lambda: _finish(out, dataset, index, missing), accelerator)
    finally:
        lock.release()
    return Finished(**finished, skipped=len(dataset.skipped), made=made, seconds=time.monotonic() - began)


def _begin(
    embedder: Embedder,
    dataset: IdentityDataset,
    folder: Path,
    world: int,
    reading: Reading,
    kind: FileKind,
    part: int | None,
    lock: FolderLock,
) -> dict[str, Any]:
    """Lock the folder, and return its index: that of an earlier call, or a new one."""
    job = {
        "data": dataset.fingerprint(),
        "backbone": embedder.digest,
        "preprocessing": embedder.preprocessing,
        "dimension": embedder.dimension,
    }
    if len(dataset) == 0:
        raise UserError("the data set has no images")
    found = _earlier(folder, job, kind)
    try:
        lock.acquire()
    except BlockingIOError as error:
        raise UserError(str(error).replace("another run", "another process")) from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or error}") from error
    if found is not None:
        return found
    index = {
        "format": FORMAT,
        **job,
        "source": embedder.source,
        "files": kind,
        "images": len(dataset),
        **_sizes(len(dataset), world, reading.batch_size or BATCH, part),
    }
    write_index(folder, index)
    return index


def _sizes(images: int, world: int, batch_size: int, part: int | None) -> dict[str, int]:
    """Return {"part", "batch_size"}: a part is a number of whole batches."""
    part = part or min(PART, -(-images // (LEAST_PARTS * world)))
    batch_size = min(batch_size, part)
    return {"part": -(-part // batch_size) * batch_size, "batch_size": batch_size}


def _earlier(folder: Path, job: dict[str, Any], kind: FileKind) -> dict[str, Any] | None:
    """Return the index of an earlier call for the same job; None for a new or empty folder. UserError for others."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new or empty folder")
    if not (folder / INDEX).exists():
        if all(each.name == LOCK or each.name.startswith(f".{INDEX}") for each in folder.iterdir()):
            return None
        raise UserError(f"{folder} is not empty and holds no embeddings; give a new or empty folder")
    index = read_index(folder)
    other = _difference(index, job, kind)
    if other is not None:
        kind_of = "embeddings" if "finished" in index else "unfinished embeddings"
        raise UserError(f"{folder} holds {kind_of} {other}; give another folder")
    return index


def _difference(index: dict[str, Any], job: dict[str, Any], kind: FileKind) -> str | None:
    """Return words for what an index differs in from the job asked for."""
    changed = what_changed({"data": index["data"]}, {"data": job["data"]})
    if changed:
        return f"of other data ({changed})"
    if index["backbone"] != job["backbone"]:
        return f"by another backbone or another checkpoint ({index['backbone'][:12]}, now {job['backbone'][:12]})"
    for name in sorted(index["preprocessing"].keys() | job["preprocessing"].keys()):
        then, now = index["preprocessing"].get(name), job["preprocessing"].get(name)
        if then != now:
            return f"with {name} {then}, now {now}"
    if index["files"] != kind:
        return f"as {index['files']} files, now {kind}"
    return None


def _make_parts(
    embedder: Embedder,
    dataset: IdentityDataset,
    folder: Path,
    index: dict[str, Any],
    accelerator: Accelerator,
    reading: Reading,
    name: str,
) -> list[int]:
    """Write this rank's share of the parts that are missing; return the parts of all ranks."""
    missing = run_on_main_for_all(lambda: _missing_parts(folder, index), accelerator)
    own = missing[accelerator.process_index :: accelerator.num_processes]
    reading = replace(reading, batch_size=index["batch_size"])
    message = None
    try:
        _write_parts(embedder, dataset, folder, index, own, reading, _bar_name(name, accelerator), accelerator)
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{folder} cannot be written to ({error.strerror or error}); the same command goes on from here"
    raise_on_all(message, accelerator)
    return missing


def _bar_name(name: str, accelerator: Accelerator) -> str:
    world = accelerator.num_processes
    return f"embedding {name}" + (f" (rank 0 of {world})" if world > 1 else "")


def _span(part: int, index: dict[str, Any]) -> range:
    """Return the images of a part."""
    return range(part * index["part"], min((part + 1) * index["part"], index["images"]))


def _parts(index: dict[str, Any]) -> range:
    return range(-(-index["images"] // index["part"]))


def _about(part: int, index: dict[str, Any], unreadable: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of a part."""
    span = _span(part, index)
    job = {name: index[name] for name in ("backbone", "preprocessing", "dimension", "source")}
    return {
        "job": job,
        "of": job_digest({name: index[name] for name in ("data", "backbone", "preprocessing", "part")}),
        "first": span.start,
        "images": len(span),
        "unreadable": list(unreadable),
    }


def _is_made(path: Path, part: int, index: dict[str, Any]) -> bool:
    """Return whether a file is the part of this job."""
    found = read_about(path)
    wanted = _about(part, index, [])
    return found is not None and all(found.get(key) == wanted[key] for key in ("of", "first", "images"))


def _missing_parts(folder: Path, index: dict[str, Any]) -> list[int]:
    for left in folder.glob(".part-*.tmp"):  # of a process that was killed
        left.unlink(missing_ok=True)
    return [part for part in _parts(index) if not _is_made(part_path(folder, part, index["files"]), part, index)]


def _write_parts(
    embedder: Embedder,
    dataset: IdentityDataset,
    folder: Path,
    index: dict[str, Any],
    parts: Sequence[int],
    reading: Reading,
    bar_name: str,
    accelerator: Accelerator,
) -> None:
    if not parts:
        return
    chosen = np.concatenate([np.arange(span.start, span.stop) for span in (_span(part, index) for part in parts)])
    bar = tqdm(total=len(chosen), desc=bar_name, unit="image", disable=not accelerator.is_main_process, mininterval=0.5)
    with bar, closing(embed_images_of(embedder, dataset, chosen, reading)) as batches:
        for part, rows, unreadable in _in_parts(batches, dataset, index, parts, bar):
            write_part(part_path(folder, part, index["files"]), rows, _about(part, index, unreadable))


def _in_parts(
    batches: Iterator[EmbeddedBatch], dataset: IdentityDataset, index: dict[str, Any], parts: Sequence[int], bar: Any
) -> Iterator[tuple[int, Embedded, list[str]]]:
    """Yield (part, its rows, its unreadable images), as soon as all images of a part were seen."""
    for part in parts:
        held: list[EmbeddedBatch] = []
        seen = 0
        while seen < len(_span(part, index)):  # a batch is of one part, because parts are whole batches
            held.append(next(batches))
            seen += held[-1].asked
            bar.update(held[-1].asked)
        unreadable = [valid_text(name) for each in held for name in each.unreadable]
        places = torch.cat([each.places for each in held])
        yield part, _rows(dataset, places, torch.cat([each.embeddings for each in held])), unreadable


def _rows(dataset: IdentityDataset, places: Tensor, embeddings: Tensor) -> Embedded:
    labels = dataset.labels[places]
    return Embedded(
        places.numpy(),
        labels.numpy(),
        [valid_text(dataset.identity_names[label]) for label in labels.tolist()],
        [valid_text(dataset.name_of(place)) for place in places.tolist()],
        torch.linalg.vector_norm(embeddings, dim=1).numpy(),
        embeddings.numpy(),
    )


def _finish(
    folder: Path, dataset: IdentityDataset, index: dict[str, Any], made: list[int]
) -> tuple[dict[str, int], int]:
    """Note that all parts are there; return {"images", "unreadable", "parts"}, and how many images have an embedding in
    the parts `made`. UserError if one is missing."""
    missing = _missing_parts(folder, index)
    if missing:
        raise UserError(
            f"{part_path(folder, missing[0], index['files'])} is missing or damaged after all ranks have finished; "
            "run the same command again (with several machines, all of them must see the folder)"
        )
    if "finished" in index:
        return index["finished"], 0
    images = 0
    unreadable = [valid_text(name) for name in dataset.skipped]
    for part in _parts(index):
        of_part = (read_about(part_path(folder, part, index["files"])) or {}).get("unreadable", [])
        unreadable += of_part
        images += (len(_span(part, index)) - len(of_part)) * (part in made)
    if unreadable:
        write_atomically(folder / UNREADABLE, "".join(f"{name}\n" for name in unreadable))
    finished = {
        "images": index["images"] - (len(unreadable) - len(dataset.skipped)),
        "unreadable": len(unreadable),
        "parts": len(_parts(index)),
    }
    write_index(folder, {**index, "finished": finished})
    return finished, images
