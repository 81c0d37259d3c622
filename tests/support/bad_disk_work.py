"""What reads and writes files without a command, as functions for ranks on a bad disk (bad_disk.py): each prints what
it found, or one line that says what is wrong, and returns 0 or 2."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from partial_fc import (
    Checkpointer,
    FileRows,
    PartialFC,
    Progress,
    RowOptimizer,
    export_weights,
    import_weights,
)
from partial_fc.distributed.inquiry import RankMissing
from partial_fc.distributed.shards import local_part
from partial_fc.training.data import UnreadableImage
from partial_fc.training.data.formats.packed import PackedIdentities
from partial_fc.training.errors import UserError
from partial_fc.training.gallery import Gallery
from partial_fc.weights.rank_files import RankFiles

C, D, SEED = 6000, 16, 3


def in_words(work: Callable[..., None]) -> Callable[..., int]:
    """An error that names what is wrong ends in its words; any other in its traceback."""

    @functools.wraps(work)
    def call(*arguments: Any) -> int:
        try:
            work(*arguments)
        except (OSError, ValueError, RankMissing, RuntimeError, UserError) as error:
            print(f"error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0

    return call


def head_of(storage: FileRows | None = None, classes: int = C) -> tuple[PartialFC, RowOptimizer]:
    head = PartialFC(D, classes, sample_rate=0.05, seed=SEED, storage=storage)
    return head, RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)


def step_of(head: PartialFC, optimizer: RowOptimizer, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    loss = head(torch.randn(8, D, generator=generator), torch.randint(0, head.num_classes, (8,), generator=generator))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def digest(head: PartialFC) -> str:
    head.class_rows.catch_up()
    return f"{float(local_part(head.weight.detach()).double().square().sum()):.12f}"


@in_words
def checkpoints(folder: str, asynchronous: bool) -> None:
    """Six steps with a checkpoint after each two, from the newest there is; the last two are kept."""
    head, optimizer = head_of()
    progress = Progress()
    named = {"head": head, "head_optimizer": optimizer, "progress": progress}
    checkpointer = Checkpointer(Path(folder) / "run", keep_last=2, asynchronous=asynchronous, timeout=30)
    if checkpointer.latest():
        checkpointer.load(**named)
        print(f"from step {progress.step}")
    for step in range(progress.step, 6):
        step_of(head, optimizer, step)
        progress.step = step + 1
        if progress.step % 2 == 0:
            checkpointer.save(progress.step, **named)
    checkpointer.wait()
    print(f"steps {checkpointer.steps()}, rows {digest(head)}")


@in_words
def rows(folder: str) -> None:
    """Steps of a head whose rows are in files, all rows looked at, and a checkpoint."""
    head, optimizer = head_of(FileRows(Path(folder) / "rows"), 40_000)
    for step in range(4):
        step_of(head, optimizer, step)
        time.sleep(0.02)
    head.topk(torch.randn(4, D, generator=torch.Generator().manual_seed(0)), 3)
    checkpointer = Checkpointer(Path(folder) / "run")
    checkpointer.save(4, head=head, head_optimizer=optimizer)
    print(f"rows {digest(head)}")


@in_words
def weights(folder: str) -> None:
    """Class weights to one file and back."""
    head, _ = head_of()
    path = Path(folder) / "weights.safetensors"
    export_weights(path, head, overwrite=True)
    other = PartialFC(D, C, sample_rate=0.05, seed=SEED + 1)
    import_weights(path, other)
    print(f"rows {digest(other)}")


# ---------------------------------------------------------------------------------------------------- mapped files


def spoilt(address: int) -> None:
    """Make the page around an address one that the disk cannot read."""
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    failed = ctypes.CDLL(None).spoil(
        ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE
    )
    assert not failed


@in_words
def rows_of_a_bad_page(folder: str, what: str) -> None:
    """All rows are looked at, in one of several ways, when the last rank's disk cannot read a page of them."""
    head, optimizer = head_of(FileRows(Path(folder) / "rows"), 40_000)
    for step in range(2):
        step_of(head, optimizer, step)
    head.class_rows.catch_up()
    ranks = head.class_rows.shards.ranks
    if ranks.rank == ranks.world - 1:
        spoilt(local_part(head.weight).data_ptr() + 300_000)
    if what == "topk":
        head.topk(torch.randn(4, D), 3)
    elif what == "checkpoint":
        Checkpointer(Path(folder) / "run").save(2, head=head, head_optimizer=optimizer)
    elif what == "expand":
        head.expand(5)
    else:
        export_weights(Path(folder) / "weights.safetensors", head)


@in_words
def rank_file_of_a_bad_page(folder: str) -> None:
    path = Path(folder) / "weights.pt"
    torch.save(torch.randn(C, D), path)
    files = RankFiles([path])
    spoilt(files._weight(path).data_ptr() + 8192)
    files.rows(0, C)


@in_words
def gallery_of_a_bad_page(folder: str) -> None:
    from partial_fc.training.gallery.loaded import Loaded

    people = Path(folder) / "people"
    gallery = Gallery.build(people, np.eye(64, 512, dtype=np.float32), [f"p{i}" for i in range(64)], backbone="b" * 32)
    assert gallery.search(np.eye(1, 512, dtype=np.float32), 1)[0].matches[0].identity == "p0"
    (segment,) = Loaded(people)._segments.values()
    spoilt(segment._embeddings(0).ctypes.data + 16_384)
    try:
        list(segment.batches())
    except UserError as error:
        print(error)
    segment.embeddings_at(segment.numbers[:40])


@in_words
def packed_set_of_a_bad_page(folder: str) -> None:
    data = PackedIdentities(folder)
    spoilt(data._images.ctypes.data + 8192)
    try:
        data.load(10)
    except UnreadableImage as error:
        print(error)
    data.load(0)
