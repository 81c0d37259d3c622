"""A run folder that nodes do not share is refused on all ranks, with the rank that does not see it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from launched import finish, start, tiny_run

from partial_fc.training import shared_folder
from partial_fc.training.errors import UserError
from partial_fc.training.shared_folder import check_same_start, check_shared


def accelerator_of(rank: int, world: int) -> Any:
    return SimpleNamespace(num_processes=world, process_index=rank, is_main_process=rank == 0)


def told(action: Any, *arguments: Any) -> str:
    try:
        action(*arguments)
    except UserError as error:
        return re.sub(r"\(on [^)]*\)", "(on HOST)", str(error))
    return ""


def start_in(rank: int, world: int, resumes: list[bool]) -> str:
    return told(check_same_start, Path("RUN"), resumes[rank], accelerator_of(rank, world))


def share(rank: int, world: int, folders: list[Path]) -> str:
    with mock.patch.object(shared_folder, "VISIBLE_SECONDS", 0.3):
        return told(check_shared, folders[rank], accelerator_of(rank, world))


@pytest.mark.parametrize("resumes", [[True, True, True], [False, False, False]])
def test_all_start_or_all_resume(ranks, resumes):
    assert ranks(3).run(start_in, resumes) == [""] * 3


def test_some_see_a_run_and_others_none(ranks):
    message = (
        "rank 0 (on HOST) sees a run in RUN, but rank 1 (on HOST) sees none; all nodes must share --output.folder: put "
        "it on storage that all of them mount at the same path"
    )
    assert ranks(3).run(start_in, [True, False, True]) == [message] * 3


def test_all_see_the_folder_of_the_first(ranks, tmp_path):
    assert ranks(3).run(share, [tmp_path] * 3) == [""] * 3
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_a_rank_sees_another_folder(ranks, tmp_path):
    folders = [tmp_path / name for name in ("shared", "shared", "own")]
    for folder in set(folders):
        folder.mkdir()
    (message,) = set(ranks(3).run(share, folders))
    assert message.startswith(f"rank 2 (on HOST) does not see what rank 0 writes to {folders[2]}; all nodes must share")
    assert not list(folders[0].iterdir())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_in_folders_of_the_same_name(tmp_path):
    """Two ranks that take one relative path for two folders."""
    tiny = tiny_run(tmp_path)
    script = 'mkdir -p "$0/$RANK" && cd "$0/$RANK" && exec python -m partial_fc train "$1" --output.folder run'
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", "--no-python", "bash", "-c", script]
    code, _, err = finish(start([*command, str(tmp_path), str(tiny)]))
    assert code == 1 and "exitcode  : 2" in err
    assert err.count("partial-fc: error: rank 1 (on ") == 1 and "does not see what rank 0 writes to run;" in err
