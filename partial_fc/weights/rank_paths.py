"""Find the files that other trainers wrote, one per rank, and check that none is missing, repeated or out of order."""

from __future__ import annotations

import logging
import re
from pathlib import Path

log = logging.getLogger("partial_fc")

LAYOUTS = (r"checkpoint_gpu_(\d+)\.pt", r"softmax_fc_gpu_(\d+)\.pt", r"rank[:_](\d+)_softmax_weight\.pt")
RANK = re.compile(r"(?:rank|gpu)[:_-]?(\d+)")


def in_folder(folder: Path) -> list[Path]:
    """Return the files of one layout in a folder, in the order of ranks."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give a folder with one file per rank")
    found = {layout: [p for p in folder.iterdir() if re.fullmatch(layout, p.name)] for layout in LAYOUTS}
    found = {layout: paths for layout, paths in found.items() if paths}
    if not found:
        raise FileNotFoundError(
            f"{folder} has no per-rank files: none is named checkpoint_gpu_0.pt, softmax_fc_gpu_0.pt or "
            "rank_0_softmax_weight.pt; list files with other names in the order of ranks"
        )
    if len(found) > 1:
        names = " and ".join(sorted(paths[0].name for paths in found.values()))
        raise ValueError(
            f"{folder} has per-rank files of several layouts ({names}); list the files to use, in the order of ranks"
        )
    return in_order(sorted(next(iter(found.values())), key=lambda path: _rank_of(path) or 0))


def in_order(paths: list[Path]) -> list[Path]:
    """Return the paths. ValueError or FileNotFoundError if they are not those of ranks 0, 1, 2, ... by their names."""
    if not paths:
        raise ValueError("the list of files is empty; list one file per rank, in order")
    for i, path in enumerate(paths):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}, listed for rank {i}")
        if any(path.samefile(other) for other in paths[:i]):
            raise ValueError(f"{path} is listed twice; list each rank's file once")
    ranks = [_rank_of(path) for path in paths]
    if None in ranks:
        return paths
    for i, (path, rank) in enumerate(zip(paths, ranks, strict=True)):
        if rank == i:
            continue
        if rank in ranks[:i]:
            raise ValueError(f"{path} is a second file of rank {rank}; list each rank's file once")
        if i not in ranks:
            raise FileNotFoundError(
                f"the file of rank {i} is missing: {path} is of rank {rank}; every rank from 0 must have a file"
            )
        raise ValueError(
            f"the files are out of order: {path} is of rank {rank}, but is listed for rank {i}; list them by rank"
        )
    return paths


def _rank_of(path: Path) -> int | None:
    """Return the rank in a file name, None if there is none."""
    found = RANK.findall(path.name)
    return int(found[-1]) if found else None


def warn_of_unusual_split(where: str, counts: list[int]) -> None:
    """Log a warning if the numbers of rows are not a usual split, for example because of a file of another run."""
    total, world = sum(counts), len(counts)
    even = [total // world + (rank < total % world) for rank in range(world)]
    chunk = -(-total // world)
    chunks = [max(0, min(chunk, total - rank * chunk)) for rank in range(world)]
    if counts not in (even, chunks):
        log.warning(
            "the files in %s have %s rows, which is not a usual split of %d classes; are they from one run?",
            where,
            counts,
            total,
        )
