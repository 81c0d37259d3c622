"""Disks that fail: what is said of them on all ranks, and what is left (docs/bad-disks.md; benchmarks/disks.py tries
every file and call)."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from bad_disk import BadDisk, Outcome, Rule, compiler
from data_files import folder_of, samples
from launched import tiny_run

from partial_fc import Checkpointer, PartialFC, export_weights
from partial_fc.training import files
from partial_fc.training.all_ranks import run_on_all
from partial_fc.training.data import index_cache
from partial_fc.training.data.formats.detect import open_source
from partial_fc.training.data.formats.packed import IMAGES, LABELS, SOURCES, write_index
from partial_fc.training.data.safe_files import LargeFiles, read_whole
from partial_fc.training.data.splits import what_changed
from partial_fc.training.embedding_files import read_about
from partial_fc.training.errors import UserError
from partial_fc.training.export.card import run_metrics
from partial_fc.training.export.output_folder import check_free, publish, work_folder
from partial_fc.training.files import bytes_of, text_of
from partial_fc.training.gallery.loaded import removed_numbers
from partial_fc.training.gallery.manifest import Manifest
from partial_fc.training.run import RunFolder
from partial_fc.weights.safetensors_file import hold, temporary_name

COMMAND = "partial_fc.training.cli.main:main"
FULL, BROKEN = os.strerror(errno.ENOSPC), os.strerror(errno.EIO)


def fails(number: int) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


# ---------------------------------------------------------------------------------------------------- whole files


def test_a_file_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    files.write_atomically(path, "before")
    for name, number in (("fsync", errno.EIO), ("replace", errno.EROFS)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails(number))
            with pytest.raises(OSError, match=re.escape(os.strerror(number))) as raised:
                files.write_atomically(path, "after")
        assert raised.value.filename == str(path)
        assert path.read_text() == "before"
        assert [each.name for each in tmp_path.iterdir()] == ["metrics.json"]


def test_a_line_that_does_not_fit_is_cut_off(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if len(data) > 20:
                return super().write(data[:20])
            raise OSError(errno.ENOSPC, FULL)

    folder = RunFolder(tmp_path)
    folder.append_history({"step": 1})
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Full(self, "ab"))
    with pytest.raises(OSError, match=r"history\.jsonl") as raised:
        folder.append_history({"step": 2, "loss": 0.123456789012345})
    monkeypatch.undo()
    assert raised.value.errno == errno.ENOSPC
    assert folder.history() == [{"step": 1}]


def test_numpy_says_why_an_array_cannot_be_written(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is full")
    with pytest.raises(OSError, match=f"{FULL}: '/dev/full'"):
        files.save_array(Path("/dev/full"), np.zeros(100_000))


def test_what_was_open_already_is_named(tmp_path, monkeypatch):
    """The system names a file that it cannot open, and none whose read fails."""
    path = tmp_path / "a.txt"
    path.write_text("a")
    files = LargeFiles([path])
    with monkeypatch.context() as patch:
        for name in ("read", "pread"):
            patch.setattr(os, name, fails(errno.EIO))
        patch.setattr(Path, "read_text", fails(errno.EIO))
        patch.setattr(Path, "read_bytes", fails(errno.EIO))
        for read in (text_of, bytes_of, read_whole, lambda _: files.read(0, 0, 1)):
            with pytest.raises(OSError, match="Input/output error") as raised:
                read(path)
            assert raised.value.filename == str(path) and raised.value.errno == errno.EIO


def test_an_image_that_the_disk_does_not_read_for_now_is_no_other_image(tmp_path):
    data = open_source(folder_of(tmp_path / "data", samples()))
    sound = data.fingerprint()
    original = data.encoded_at

    data.encoded_at = lambda position: original(position) if position else fails(errno.ESTALE)()
    ill = data.fingerprint()
    assert ill["pictures"] == "" != sound["pictures"]
    assert what_changed({"training": ill}, {"training": sound}) is None
    assert what_changed({"training": sound}, {"training": ill}) is None
    assert "other content" in str(what_changed({"training": {**sound, "pictures": "0"}}, {"training": sound}))


def test_what_goes_wrong_on_a_disk_is_told_to_all_ranks(tmp_path):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/no/file: No such file or directory$"):
        run_on_all(lambda: (tmp_path / "no" / "file").write_text(""), accelerator)


def test_a_run_folder_that_cannot_be_made_is_free_afterwards(tmp_path, monkeypatch):
    (tmp_path / ".config.yaml.12345.tmp").write_text("of a process that was killed")
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(os, "link", fails(errno.EIO))
    with pytest.raises(UserError, match=BROKEN):
        folder.claim(lambda path: files.write_atomically(path, "a: 1\n"))
    monkeypatch.setattr(os, "link", fails(errno.EPERM))  # a file system without links
    folder.claim(lambda path: files.write_atomically(path, "a: 1\n"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.yaml", "plots"]
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_a_checkpoint_that_cannot_be_removed_is_no_error(tmp_path, monkeypatch, caplog):
    head = PartialFC(4, 10)
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    checkpointer.save(1, head=head)
    monkeypatch.setattr(Path, "unlink", fails(errno.EROFS))
    checkpointer.save(2, head=head)
    monkeypatch.undo()
    assert "step-000000001 cannot be removed: Read-only file system" in caplog.text
    assert checkpointer.steps() == [1, 2]
    checkpointer.save(3, head=head)
    assert checkpointer.steps() == [3]


def test_a_checkpoint_that_the_disk_cannot_read_is_no_reason_to_begin_anew(tmp_path, monkeypatch):
    head = PartialFC(4, 10)
    Checkpointer(tmp_path).save(1, head=head)
    checkpointer = Checkpointer(tmp_path)
    for name, number in (("read_text", errno.EIO), ("stat", errno.ESTALE)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, fails(number))
            with pytest.raises(OSError, match=os.strerror(number)):
                checkpointer.latest()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails(errno.EIO))
        with pytest.raises(OSError, match=rf"step-000000001/data-0001/\.metadata cannot be read: {BROKEN}"):
            checkpointer.load(head=head)
    assert checkpointer.latest() == tmp_path / "step-000000001"
    assert Checkpointer(tmp_path / "none").latest() is None


def test_what_the_disk_cannot_read_is_neither_damaged_nor_missing(tmp_path, monkeypatch):
    (tmp_path / "part-000000.npz").mkdir()
    with pytest.raises(UserError, match=r"part-000000\.npz cannot be read: Is a directory"):
        read_about(tmp_path / "part-000000.npz")
    assert read_about(tmp_path / "part-000001.npz") is None
    monkeypatch.setattr(Path, "read_bytes", fails(errno.EIO))
    monkeypatch.setattr(Path, "read_text", fails(errno.EIO))
    with pytest.raises(UserError, match=rf"removed-00000001\.npy cannot be read: {BROKEN}"):
        removed_numbers(tmp_path, Manifest(4, "mean", "b", removed="removed-00000001.npy"))
    with pytest.raises(OSError, match=rf"{BROKEN}: '.*metrics\.json'"):
        run_metrics(tmp_path, {"step": 1})


def test_an_export_deletes_what_a_killed_one_has_left(tmp_path):
    out = tmp_path / "exported"
    (tmp_path / ".exported-abcdefgh").mkdir()
    (tmp_path / ".exported-abcdefgh" / "part").write_text("")
    with work_folder(out, check_free(out)) as work:
        assert [each.name for each in tmp_path.iterdir()] == [work.parent.name]
        (work / "file").write_text("")
        publish(work, out)
    assert [each.name for each in out.iterdir()] == ["file"]
    with (
        pytest.raises(OSError, match=f"{FULL}: '{re.escape(str(tmp_path))}/other'"),
        work_folder(tmp_path / "other", tmp_path),
    ):
        raise OSError(errno.ENOSPC, FULL)


def test_class_weights_delete_what_a_killed_export_has_left(tmp_path):
    path = tmp_path / "weights[1].safetensors"
    left, others = temporary_name(path), temporary_name(path)
    for each in (left, others, tmp_path / ".weights2.safetensors.0123456789ab.tmp"):
        each.write_text("")
    with hold(others):
        export_weights(path, PartialFC(4, 10))
        assert not left.exists()
        assert others.exists()
    export_weights(path, PartialFC(4, 10), overwrite=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == [".weights2.safetensors.0123456789ab.tmp", path.name]


def test_a_cache_deletes_what_a_killed_process_has_left(tmp_path, monkeypatch):
    monkeypatch.setenv("PARTIAL_FC_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "data"
    source.write_text("")
    index_cache.cached("kind", [source], lambda: {"a": np.zeros(1)})
    (file,) = (tmp_path / "cache").glob("*.npz")
    (tmp_path / "cache" / f"{file.stem}.abcdefgh.tmp").write_text("")
    source.write_text("changed")
    index_cache.cached("kind", [source], lambda: {"a": np.ones(1)})
    assert [each.suffix for each in sorted((tmp_path / "cache").iterdir())] == [".lock", ".npz"]


# ---------------------------------------------------------------------------------------------------- calls that fail


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[BadDisk]:
    if compiler() is None:
        pytest.skip("no C compiler, or no LD_PRELOAD")
    with BadDisk(tmp_path_factory.mktemp("disk")) as started:
        yield started


def line_of(outcome: Outcome, *codes: int) -> str:
    """The one line that says what is wrong, after these exit codes."""
    assert outcome.codes == list(codes), outcome.text
    assert "Traceback" not in outcome.text
    (line,) = (each for each in outcome.texts[0].splitlines() if re.match(r"(partial-fc: )?error: ", each))
    return line


@pytest.mark.slow
def test_a_history_on_a_full_disk_ends_all_ranks_in_words(disk, tmp_path):
    run = tmp_path / "run"
    command = [
        "train",
        str(tiny_run(tmp_path)),
        "--output.folder",
        str(run),
        "--train.checkpoint_steps",
        "1",
        "--output.trackers",
        "[]",
    ]
    rules = [Rule("write", "*/history.jsonl", errno.ENOSPC, nth=2)]
    outcome = disk.run(COMMAND, command, rules=rules, ranks=2)
    assert line_of(outcome, 2, 2) == f"partial-fc: error: {run}/history.jsonl: {FULL}"
    again = disk.run(COMMAND, [*command, "--start_or_resume"], ranks=2)
    assert again.codes == [0, 0], again.text
    assert [row["step"] for row in RunFolder(run).history()] == [1, 2, 3]
    assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
def test_results_on_a_full_disk_end_all_ranks_in_words(disk, tmp_path):
    run = tmp_path / "run"
    command = ["train", str(tiny_run(tmp_path)), "--output.folder", str(run), "--output.trackers", "[]"]
    outcome = disk.run(COMMAND, command, rules=[Rule("write", "*/.training.png.tmp", errno.EDQUOT)], ranks=2)
    assert line_of(outcome, 2, 2) == f"partial-fc: error: {run}/plots/training.png: {os.strerror(errno.EDQUOT)}"
    assert disk.run(COMMAND, [*command, "--start_or_resume"], ranks=2).codes == [0, 0]
    assert (run / "report.html").exists() and not list(run.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("format", "calls", "nth", "number"),
    [
        ("recordio", "write|close", 9, errno.ENOSPC),
        ("list", "write|close", 9, errno.ENOSPC),
        ("folder", "fsync", 3, errno.EIO),
    ],
)
def test_a_conversion_on_a_bad_disk_is_gone_on_with(disk, tmp_path, format, calls, nth, number):
    tiny_run(tmp_path)
    out = tmp_path / "set"
    command = ["data", "convert", str(tmp_path / "images"), str(out), "--format", format, "--part", "20"]
    outcome = disk.run(COMMAND, command, rules=[Rule(calls, f"{out}*", number, nth=nth)])
    line = line_of(outcome, 2)
    assert str(out) in line and os.strerror(number) in line
    assert disk.run(COMMAND, command).codes == [0]
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize("what", ["topk", "checkpoint", "expand", "export"])
def test_all_rows_with_a_page_that_cannot_be_read(disk, tmp_path, what):
    """It would be a SIGBUS."""
    outcome = disk.run("bad_disk_work:rows_of_a_bad_page", str(tmp_path), what, ranks=2, group=True)
    assert outcome.codes == [2, 2], outcome.text
    assert "Traceback" not in outcome.text
    assert (
        f"{tmp_path}/rows holds class rows that cannot be read: {BROKEN}. Go on from the newest checkpoint"
        in outcome.texts[1]
    )
    assert "rank 1" in outcome.texts[0] and BROKEN in outcome.texts[0]


def test_a_gallery_a_packed_set_and_files_of_ranks_with_a_page_that_cannot_be_read(disk, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    np.save(packed / IMAGES, np.zeros((48, 1, 32, 32), np.uint8))
    for name in (LABELS, SOURCES):
        np.save(packed / name, np.zeros(48, np.int32))
    write_index(packed, ["a"], ["one"], {"identities": [], "sources": []}, {})
    outcome = disk.run("bad_disk_work:packed_set_of_a_bad_page", str(packed))
    assert outcome.codes == [0], outcome.text
    assert f"{packed / IMAGES}: {BROKEN}" in outcome.text
    outcome = disk.run("bad_disk_work:gallery_of_a_bad_page", str(tmp_path))
    assert outcome.codes == [2], outcome.text
    assert len(re.findall(rf"segment-\d+\.arrow cannot be read: {BROKEN}", outcome.text)) == 2
    outcome = disk.run("bad_disk_work:rank_file_of_a_bad_page", str(tmp_path))
    assert line_of(outcome, 2) == f"error: OSError: {tmp_path}/weights.pt cannot be read: {BROKEN}"


def test_a_short_write_is_gone_on_with(disk, tmp_path):
    rules = [Rule("write|pwrite", f"{tmp_path}/*", short=100), Rule("read|pread", f"{tmp_path}/*", short=100)]
    outcome = disk.run("bad_disk_work:weights", str(tmp_path), rules=rules, ranks=2, group=True)
    assert outcome.codes == [0, 0], outcome.text
    assert outcome.texts == disk.run("bad_disk_work:weights", str(tmp_path), ranks=2, group=True).texts
