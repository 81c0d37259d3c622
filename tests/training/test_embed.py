"""`partial-fc embed`: embeddings of any data set, in parts that are the same whoever makes them and after a kill."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path

import forked
import numpy as np
import pyarrow.parquet
import pytest
from data_files import WRITERS, folder_of, image_folder, picture, samples
from launched import tiny_run

from partial_fc.checkpoint.locks import FolderLock
from partial_fc.training import embed_data
from partial_fc.training.cli.main import main
from partial_fc.training.data import open_source
from partial_fc.training.embedding import Embedder
from partial_fc.training.embedding_files import EmbeddingFiles
from partial_fc.training.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    config = tiny_run(
        folder,
        data={"folder": str(folder / "images"), "image_size": 32, "holdout_identities": 2},
        output={"folder": str(folder / "run"), "log_every": 1},
    )
    assert main(["train", str(config)]) == 0
    return folder / "run"


def embed(run: Path, output: Path, *options: object) -> Path:
    assert main(["embed", str(run), "--output", str(output), *map(str, options)]) == 0
    return output


def table(output: Path) -> dict[str, list]:
    """All rows, by pyarrow alone."""
    parts = [pyarrow.parquet.read_table(path) for path in sorted(output.glob("part-*.parquet"))]
    return pyarrow.concat_tables(parts).to_pydict()


def parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("part-*")}


@pytest.mark.parametrize("kind", [*WRITERS])
def test_every_format_has_the_embeddings_of_its_images(run, tmp_path, kind, capsys):
    content = samples(identities=4, images=3)
    source = WRITERS[kind](tmp_path / "data", content)
    output = embed(run, tmp_path / "out", "--data", source, "--flip", "--batch_size", 5)
    assert re.search(
        r"out: embeddings of 12 images, 32 numbers each; 12 made now, [\d,]+ images a second", capsys.readouterr().out
    )
    rows = table(output)
    dataset = open_source(source, 32)
    wanted = Embedder.open(run, flip=True).embed([bytes(dataset.encoded(place)) for place in range(12)])
    assert rows["id"] == list(range(12)) and rows["label"] == dataset.labels.tolist()
    assert rows["identity"] == [dataset.identity_names[label] for label in rows["label"]]
    assert rows["path"] == [dataset.name_of(place) for place in range(12)]
    np.testing.assert_allclose(rows["embedding"], wanted, atol=1e-5)
    np.testing.assert_allclose(rows["norm"], np.linalg.norm(wanted, axis=1), rtol=1e-5)


def test_the_runs_own_sets_are_taken_without_data(run, tmp_path):
    assert len(set(table(embed(run, tmp_path / "train"))["identity"])) == 4
    assert len(table(embed(run, tmp_path / "held", "--split", "holdout"))["id"]) == 16


def test_npz_holds_the_same(run, tmp_path):
    first, second = embed(run, tmp_path / "a"), embed(run, tmp_path / "b", "--files", "npz")
    rows = table(first)
    arrays = [np.load(path) for path in sorted(second.glob("part-*.npz"))]
    for name, values in rows.items():
        assert np.concatenate([each[name] for each in arrays]).tolist() == values, name
    assert [each.embeddings.tolist() for each in EmbeddingFiles.open(second).parts()] == [
        each.embeddings.tolist() for each in EmbeddingFiles.open(first).parts()
    ]


def test_unreadable_images_are_left_out_and_listed(run, tmp_path, capsys, mistake):
    data = image_folder(tmp_path / "data", 3, 4, damaged=2)
    (data / "id003").mkdir()
    output = embed(run, tmp_path / "out", "--data", data, "--batch_size", 3)
    out = capsys.readouterr().out
    assert "embeddings of 10 images" in out and "10 made now" in out
    left_out = f"2 images could not be read; 1 skipped, such as a folder without an image: listed in {output}"
    assert left_out in out
    embed(run, tmp_path / "out", "--data", data)
    assert f"they were there already\n{left_out}" in capsys.readouterr().out
    assert table(output)["id"] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    listed = (output / "unreadable.txt").read_text()
    assert [line.split(" (")[0] for line in listed.splitlines()] == ["id003", "id000/0.png", "id001/0.png"]
    (data / "id003").rmdir()
    line = mistake("embed", run, "--data", data, "--output", tmp_path / "strict", "--on_error", "raise")
    assert "cannot read the image id000/0.png" in line and "pass --on_error skip" in line


def test_two_ranks_write_the_parts_of_one(run, tmp_path):
    data = folder_of(tmp_path / "data", [(label % 5, picture(label)) for label in range(40)])
    options = ["--data", data, "--part", 8, "--batch_size", 4]
    alone = embed(run, tmp_path / "alone", *options)
    out = forked.succeed("embed", str(run), "--output", str(tmp_path / "both"), *map(str, options))
    assert "40 made now" in out
    assert parts(tmp_path / "both") == parts(alone) and len(parts(alone)) == 5


def test_after_a_kill_the_same_command_goes_on_and_the_parts_are_the_same(run, tmp_path, capsys):
    data = folder_of(tmp_path / "data", [(label % 9, picture(label)) for label in range(600)])
    options = ["--data", str(data), "--part", "20", "--batch_size", "10"]
    process = forked.fork("embed", str(run), "--output", str(tmp_path / "killed"), *options)
    deadline = time.monotonic() + 120
    while len(parts(tmp_path / "killed")) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    before = parts(tmp_path / "killed")
    assert len(before) < 30, "killed in the middle"
    with pytest.raises(UserError, match="are unfinished; run the same `partial-fc embed` again"):
        EmbeddingFiles.open(tmp_path / "killed")
    (tmp_path / "killed" / ".part-000029.parquet.1.tmp").write_bytes(b"left by the kill")
    damaged = min(before)  # two ranks write, in no order
    (tmp_path / "killed" / damaged).write_bytes(b"damaged since")
    del before[damaged]
    capsys.readouterr()
    embed(run, tmp_path / "killed", *options[:2])
    made = int(re.search(r"(\d+) made now", capsys.readouterr().out)[1])
    assert made == 600 - 20 * len(before), "only what was missing"
    assert parts(tmp_path / "killed") == parts(embed(run, tmp_path / "whole", *options))
    assert before.items() <= parts(tmp_path / "killed").items()
    assert not list((tmp_path / "killed").glob(".part*"))
    capsys.readouterr()
    embed(run, tmp_path / "killed", *options)
    assert "they were there already" in capsys.readouterr().out


def test_memory_holds_a_part_and_no_more(run, tmp_path, monkeypatch):
    """Rows are written as soon as their part is complete."""
    data = folder_of(tmp_path / "data", [(label % 5, picture(label)) for label in range(60)])
    written: list[tuple[int, int]] = []
    seen = 0
    original, batches = embed_data.write_part, embed_data.embed_images_of

    def count(*arguments):
        nonlocal seen
        for batch in batches(*arguments):
            seen += batch.asked
            yield batch

    def note(path, rows, about):
        written.append((len(rows), seen))
        original(path, rows, about)

    monkeypatch.setattr(embed_data, "write_part", note)
    monkeypatch.setattr(embed_data, "embed_images_of", count)
    embed(run, tmp_path / "out", "--data", data, "--part", 15, "--batch_size", 5)
    assert written == [(15, 15), (15, 30), (15, 45), (15, 60)]


def test_other_embeddings_and_other_folders_are_left_alone(run, tmp_path, mistake):
    data = folder_of(tmp_path / "data", samples())
    output = embed(run, tmp_path / "out", "--data", data)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    other = folder_of(tmp_path / "other", samples(identities=3))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    for options, words in (
        (["--data", other, "--output", output], "embeddings of other data (the data set had 12 images and has 9)"),
        (["--data", data, "--output", output, "--flip"], "with flip False, now True"),
        (["--data", data, "--output", output, "--files", "npz"], "as parquet files, now npz"),
        (["--data", data, "--output", tmp_path / "mine"], "is not empty and holds no embeddings"),
        (["--data", data, "--output", tmp_path / "mine" / "precious"], "is a file; give a new or empty folder"),
    ):
        assert words in mistake("embed", run, *options)
    index = json.loads((output / "embeddings.json").read_text())
    (output / "embeddings.json").write_text(json.dumps(index | {"backbone": "f" * 32}))
    assert "by another backbone or another checkpoint" in mistake("embed", run, "--data", data, "--output", output)
    (output / "embeddings.json").write_text("{")
    assert "embeddings.json is damaged" in mistake("embed", run, "--data", data, "--output", output)
    (output / "embeddings.json").write_bytes(before["embeddings.json"])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def hold(folder: str, ready: str) -> None:
    lock = FolderLock(Path(folder))
    lock.acquire()
    Path(ready).touch()
    time.sleep(60)


def test_two_at_once_do_not_write_to_one_folder(run, tmp_path, mistake):
    from runner import forking

    process = forking().Process(target=hold, args=(str(tmp_path / "out"), str(tmp_path / "ready")))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert "is being written by another process" in mistake("embed", run, "--output", tmp_path / "out")
    process.kill()
    process.join()
    embed(run, tmp_path / "out")


def test_a_full_disk_is_told_and_what_was_done_stays(run, tmp_path, monkeypatch, mistake):
    data = folder_of(tmp_path / "data", samples(identities=8))
    original, calls = os.fsync, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == 4:  # the index, two parts, then this
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = mistake("embed", run, "--data", data, "--output", tmp_path / "out", "--part", 6)
    assert "No space left on device); the same command goes on from here" in line
    assert len(parts(tmp_path / "out")) == 2 and not list((tmp_path / "out").glob(".part*"))
    assert len(table(embed(run, tmp_path / "out", "--data", data))["id"]) == 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere"], "the data folder nowhere does not exist"),
        (["--batch_size", "0"], "--batch_size is 0; give at least 1"),
        (["--part", "0"], "--part is 0; give at least 1"),
        (["--workers", "-1"], "--workers is -1; give at least 0"),
        (["--split", "new"], "has no set 'new', only train, holdout"),
        (["--image_column", "x"], "--image_column applies to the data set of --data"),
        (["--runtime", "onnxruntime"], "is a run, which torch runs"),
        (["--checkpoint", "3000"], "there is no checkpoint '3000'"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, options, words, mistake):
    assert words in mistake("embed", run, "--output", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
