"""Whether all ranks see the same run folder: on several nodes it must be on storage that they share.

    before anything is built      all ranks see a run in the folder, or none does
    once the folder exists        all ranks see a file that the first has just written, under a name that nobody could
                                  have looked up before

Without this, a run on folders of the same name on two nodes would fail at its first checkpoint, or resume on one node
and start on the other.
"""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

from accelerate import Accelerator

from partial_fc.checkpoint.manifest import VISIBLE_SECONDS
from partial_fc.distributed.objects import gather_objects
from partial_fc.training.all_ranks import run_on_all, run_on_main, run_on_main_for_all
from partial_fc.training.errors import UserError

SHARE = "all nodes must share --output.folder: put it on storage that all of them mount at the same path"


def check_same_start(folder: Path, resume: bool, accelerator: Accelerator) -> None:
    """Raise UserError on every rank unless all ranks resume a run in `folder`, or all start one. A collective."""
    if accelerator.num_processes == 1:
        return
    told = gather_objects((resume, socket.gethostname()), "an agreement whether to resume")
    sees, other = ([rank for rank, (each, _) in enumerate(told) if each is wanted] for wanted in (True, False))
    if sees and other:
        raise UserError(
            f"rank {sees[0]} (on {told[sees[0]][1]}) sees a run in {folder}, but rank {other[0]} (on "
            f"{told[other[0]][1]}) sees none; {SHARE}"
        )


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """Raise UserError on every rank unless all ranks see what the first writes to `folder`, which exists there. A
    collective."""
    if accelerator.num_processes == 1:
        return

    def write() -> str:
        path = folder / f".shared-{uuid.uuid4().hex}"
        try:
            path.touch()
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be written: {error.strerror}") from error
        return path.name

    mark = folder / run_on_main_for_all(write, accelerator)
    try:
        run_on_all(lambda: _look_for(mark, accelerator.process_index), accelerator)
    finally:
        run_on_main(lambda: mark.unlink(missing_ok=True), accelerator)


def _look_for(mark: Path, rank: int) -> None:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {rank} (on {socket.gethostname()}) does not see what rank 0 writes to {mark.parent}; {SHARE}"
            )
        time.sleep(0.1)
