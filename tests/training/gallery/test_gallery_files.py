"""The files of a gallery: a change that is killed or fails leaves it as it was; damage is named; changes wait in turn."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runner import forking
from test_gallery import assert_answers, both, built, content, images

from partial_fc.checkpoint.locks import FolderLock, exclusive
from partial_fc.training.errors import UserError
from partial_fc.training.gallery import Gallery, gallery
from partial_fc.training.gallery.manifest import MANIFEST

ENROLLED, NEW = images(5), images(4, seed=1, start=5)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The exit code of a process that runs the function."""
    process = started(function, *arguments)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def started(function: Callable[..., Any], *arguments: Any) -> Any:
    process = forking().Process(target=function, args=arguments)
    process.start()
    return process


# ---------------------------------------------------------------------------------------------------- killed, or failed


def killed_at(folder: str, action: str, number: int) -> None:
    """Change the gallery, and die at the `number`-th call that writes something for good."""
    calls = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    held = None if action == "build" else Gallery.open(folder)
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    change(held, folder, action)


def change(held: Gallery | None, folder: str | Path, action: str) -> None:
    if held is None:
        built(Path(folder), both(ENROLLED, NEW))
    elif action == "add":
        held.add(*NEW)
    elif action == "replace":
        held.add(*both(ENROLLED, NEW), existing="replace")
    else:
        held.remove(sorted(set(ENROLLED[1]))[1:])


@pytest.mark.parametrize(
    "action", ["add", *(pytest.param(name, marks=pytest.mark.slow) for name in ("replace", "remove", "build"))]
)
def test_a_change_that_is_killed_is_done_or_not_and_can_be_done_again(tmp_path, action):
    after = (ENROLLED[0][[n == "id000" for n in ENROLLED[1]]], ["id000"] * 3) if action == "remove" else None
    after = after or both(ENROLLED, NEW)
    seen = set()
    for number in range(1, 30):
        folder = tmp_path / str(number)
        if action != "build":
            built(folder, ENROLLED, per_identity="all")
        code = in_process(killed_at, str(folder), action, number)
        if action == "build" and not (folder / MANIFEST).exists():
            seen.add("before")
            change(None, folder, action)
        else:
            held = Gallery.open(folder)
            whole = len(held) == len(set(after[1]))
            seen.add("after" if whole else "before")
            assert_answers(held, after if whole else ENROLLED)
            if not whole:
                change(held, folder, action)
        assert_answers(Gallery.open(folder), after)
        assert set(content(folder)) == {MANIFEST} | Gallery.open(folder).manifest.files or whole
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and number > 3 and seen == {"before", "after"}


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_gallery_as_it_was(tmp_path, monkeypatch, fails):
    held = built(tmp_path / "g", ENROLLED)
    before = content(tmp_path / "g")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        for action in ("add", "remove"):
            with pytest.raises(UserError, match=r"No space left on device\); it is as it was before"):
                change(held, tmp_path / "g", action)
        assert content(tmp_path / "g") == before
    held.add(*NEW)
    assert_answers(held, both(ENROLLED, NEW))


# ---------------------------------------------------------------------------------------------------- together


def adds(folder: str, first: int) -> None:
    """Enrol five identities, one at a time."""
    held = Gallery.open(folder)
    for start in range(first, first + 5):
        held.add(*images(1, seed=start, start=start))


def test_processes_and_threads_that_add_at_once_lose_nothing_while_others_search(tmp_path):
    held = built(tmp_path / "g", ENROLLED)
    processes = [started(adds, str(tmp_path / "g"), first) for first in (100, 200)]
    threads = [threading.Thread(target=adds, args=(str(tmp_path / "g"), first)) for first in (300, 400)]
    shared = threading.Thread(target=lambda: [held.add(*images(1, seed=n, start=n)) for n in range(500, 505)])
    failures: list[BaseException] = []
    done = threading.Event()

    def searches() -> None:
        try:
            known = 0
            while not done.is_set():
                answers = held.search(ENROLLED[0], 3)
                assert [answer.identity for answer in answers] == ENROLLED[1]
                assert len(held) >= known, "what was enrolled stays"
                known = len(held)
        except BaseException as error:
            failures.append(error)

    searching = [threading.Thread(target=searches) for _ in range(2)]
    for each in (*threads, shared, *searching):
        each.start()
    for each in (*processes, *threads, shared):
        each.join(120)
    done.set()
    for each in searching:
        each.join(120)
    assert not failures and [each.exitcode for each in processes] == [0, 0]
    numbers = [*(n for first in (100, 200, 300, 400) for n in range(first, first + 5)), *range(500, 505)]
    assert_answers(held, both(ENROLLED, *(images(1, seed=n, start=n) for n in numbers)))


def holds(folder: str, ready: str) -> None:
    with exclusive(Path(folder), 5):
        Path(ready).touch()
        time.sleep(60)


def test_a_change_waits_for_another_process_and_names_it_if_that_is_in_vain(tmp_path, monkeypatch):
    held = built(tmp_path / "g", ENROLLED)
    process = started(holds, str(tmp_path / "g"), str(tmp_path / "ready"))
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    monkeypatch.setattr(gallery, "WAIT", 0.1)
    with pytest.raises(
        UserError, match=rf"written by another process \(process {process.pid} on .* seconds: try again"
    ):
        held.add(*NEW)
    assert held.search(ENROLLED[0][:1], 1)[0].identity == ENROLLED[1][0], "searches do not wait"
    monkeypatch.setattr(gallery, "WAIT", 30.0)
    threading.Timer(0.3, process.kill).start()
    held.add(*NEW)
    assert_answers(held, both(ENROLLED, NEW))
    process.join()


def test_a_lock_keeps_out_threads_and_is_released_after_an_error(tmp_path):
    with exclusive(tmp_path, 1):
        waited: list[object] = []

        def wait() -> None:
            try:
                with exclusive(tmp_path, 0.05):
                    waited.append("held")
            except BlockingIOError as error:
                waited.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert "another thread of this process" in str(waited[0])
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path, 1):
        raise ZeroDivisionError
    with exclusive(tmp_path, 0.05):
        pass
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_gallery_that_is_gone_says_so(tmp_path):
    held = built(tmp_path / "g", ENROLLED)
    (tmp_path / "g").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"g is not a gallery \(it has no gallery.json\)"):
        held.search(ENROLLED[0][:1])
    with pytest.raises(UserError, match=r"g is not a gallery \(it has no gallery.json\)"):
        held.add(*NEW)
    (tmp_path / "elsewhere").rename(tmp_path / "g")
    held.add(*NEW)
    assert_answers(held, both(ENROLLED, NEW))


# ---------------------------------------------------------------------------------------------------- damaged


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def scribble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = data.index(np.float32(held_row(path)[0]).tobytes())
    data[middle : middle + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)


def held_row(path: Path) -> np.ndarray:
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        batch = pyarrow.ipc.open_file(mapped).get_batch(0)
        return batch.column("embedding").flatten().to_numpy().copy()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, r"segment-\d+.arrow is damaged: it has .* bytes and had"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), r"segment-\d+.arrow is damaged \("),
        (scribble, r"segment-\d+.arrow is damaged: an embedding is not of unit length"),
        (lambda path: path.unlink(), r"the gallery .* is damaged: .*segment-\d+.arrow is missing"),
    ],
)
def test_a_damaged_segment_is_named(tmp_path, damage, words):
    built(tmp_path / "g", ENROLLED)
    (path,) = (tmp_path / "g").glob("segment-*")
    damage(path)
    with pytest.raises(UserError, match=words):
        Gallery.open(tmp_path / "g")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("{", "gallery.json is damaged"),
        ("[]", "gallery.json is damaged"),
        ({"format": "partial_fc gallery, 9"}, "this version reads 'partial_fc gallery, 1'"),
        ({"dimension": 0}, "a count is not one"),
        ({"dimension": "16"}, "a count is not one"),
        ({"dimension": 8}, "its columns are not those of a gallery"),
        ({"removed": "../../etc/passwd"}, "it names files that are not its own"),
        ({"removed": "removed-00000099.npy"}, "removed-00000099.npy is missing"),
        ({"threshold": "high"}, "its threshold is no number"),
        ({"threshold": float("nan")}, "its threshold is no number"),
        ({"per_identity": "some"}, "no known kind"),
        ({"backbone": None}, "it does not name a backbone"),
        ({"surprise": 1}, "gallery.json is damaged"),
        ({"segments": [{"name": "/etc/passwd", "size": 1, "rows": 1}]}, "it names files that are not its own"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, changed, words):
    built(tmp_path / "g", ENROLLED)
    path = tmp_path / "g" / MANIFEST
    text = changed if isinstance(changed, str) else json.dumps(json.loads(path.read_text()) | changed)
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        Gallery.open(tmp_path / "g")


def test_files_that_do_not_belong_to_the_codes_are_named(tmp_path):
    held = built(tmp_path / "g", ENROLLED, index="codes")
    path = tmp_path / "g" / held.manifest.codes.name
    good = dict(np.load(path))
    for arrays, words in (
        ({"rotation": good["rotation"]}, "is damaged"),
        (good | {"rotation": good["rotation"][:3]}, "it holds float32 of shape"),
        (good | {"centres": good["centres"] * np.float32(np.nan)}, "it holds float32 of shape"),
        (good | {"centres": good["centres"].astype(np.float64)}, "it holds float64"),
        (good | {"centres": np.array([None])}, "is damaged"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=rf"codes-\d+.npz is damaged .*{'' if words == 'is damaged' else words}"):
            Gallery.open(tmp_path / "g")
    np.savez(path, **good)
    manifest = json.loads((tmp_path / "g" / MANIFEST).read_text())
    manifest["codes"]["size"] = 1
    (tmp_path / "g" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged"):
        Gallery.open(tmp_path / "g")


def test_a_damaged_row_is_found_by_the_search_that_reads_it(tmp_path):
    """With codes the rows themselves are not read at opening."""
    built(tmp_path / "g", ENROLLED, index="codes")
    (path,) = (tmp_path / "g").glob("segment-*")
    scribble(path)
    with pytest.raises(UserError, match="an embedding is not of unit length"):
        Gallery.open(tmp_path / "g").search(ENROLLED[0][:1])


def test_an_error_while_the_rows_are_brought_up_to_date_is_mended_by_the_next_search(tmp_path):
    held, other = built(tmp_path / "g", ENROLLED), Gallery.open(tmp_path / "g")
    held.add(*NEW)
    (newest,) = [tmp_path / "g" / entry.name for entry in held.manifest.segments[-1:]]
    whole = newest.read_bytes()
    scribble(newest)
    with pytest.raises(UserError, match="is not of unit length"):
        other.search(ENROLLED[0][:1])
    newest.write_bytes(whole)
    assert_answers(other, both(ENROLLED, NEW))


def test_without_faiss_or_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    import sys

    built(tmp_path / "g", ENROLLED)
    for package in ("faiss", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=rf"a gallery needs {package}: pip install 'partial_fc\[gallery\]'"):
                Gallery.open(tmp_path / "g")
