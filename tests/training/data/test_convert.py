"""`partial-fc data convert`: any format into any other, killed and gone on with, verified, and nothing of others
overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import args
from data_files import WRITERS, folder_of, insightface, list_file, picture, samples, shards

from partial_fc.training.cli.main import main
from partial_fc.training.data import convert as convert_module
from partial_fc.training.data import find_format, open_source, writers
from partial_fc.training.data.convert import FORMATS, convert
from partial_fc.training.data.formats.detect import CONVERSION_STATE
from partial_fc.training.errors import UserError
from partial_fc.training.files import FileSystem

ROOT = Path(__file__).parents[3]
CONTENT = samples(identities=4, images=3)


def what(dataset):
    """[(name of the identity, encoded picture)], sorted."""
    return sorted(
        (dataset.identity_names[int(label)], bytes(dataset.encoded(index)))
        for index, label in enumerate(dataset.labels.tolist())
    )


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", list(WRITERS))
@pytest.mark.parametrize("dest", FORMATS)
def test_every_format_becomes_every_other(tmp_path, source, dest):
    there = open_source(WRITERS[source](tmp_path / "source", CONTENT))
    done = convert(there, tmp_path / "dest", dest, part=5)
    assert done == {"images": 12, "identities": 4, "left_out": 0}
    assert find_format(tmp_path / "dest")[0] == dest
    assert what(open_source(tmp_path / "dest")) == what(there)
    assert [name for name in files(tmp_path / "dest") if name.startswith(".")] == [CONVERSION_STATE]


def test_images_of_identities_in_any_order_get_ranges_in_recordio(tmp_path):
    mixed = [CONTENT[index] for index in (7, 0, 11, 3, 4, 8)]
    convert(open_source(shards(tmp_path / "source", mixed)), tmp_path / "dest", "recordio", part=2)
    dataset = open_source(tmp_path / "dest")
    assert dataset.labels.tolist() == [0, 1, 1, 2, 2, 3]
    assert dataset._labels_from_ranges() is not None
    assert (tmp_path / "dest" / "property").read_text() == "4,20,20"
    insightface(tmp_path / "expected", sorted(mixed, key=lambda sample: sample[0]))
    for name in ("train.rec", "train.idx"):
        assert (tmp_path / "dest" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_what_a_float32_cannot_count_has_no_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "MAX_EXACT", 14)
    convert(open_source(list_file(tmp_path / "source", CONTENT)), tmp_path / "dest", "recordio", part=5)
    dataset = open_source(tmp_path / "dest")
    assert dataset._labels_from_ranges() is None
    assert dataset.name_of(0) == "train.rec#0"
    assert what(dataset) == what(open_source(tmp_path / "source" / "faces.txt"))


@pytest.mark.parametrize("dest", FORMATS)
def test_a_conversion_that_was_ended_anywhere_goes_on_to_the_same_files(tmp_path, monkeypatch, dest):
    """Ended within each of its parts and after the last; what an unfinished part has left does no harm."""
    source = open_source(WRITERS["folder"](tmp_path / "source", CONTENT))
    convert(source, tmp_path / "whole", dest, part=4)
    real = convert_module.read_header
    for stop in (3, 6, 7):
        calls = iter(range(1000))

        def failing(data, stop=stop, calls=calls):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return real(data)

        with monkeypatch.context() as patch:
            patch.setattr(convert_module, "read_header", failing)
            with pytest.raises(KeyboardInterrupt):
                convert(source, tmp_path / "ended", dest, part=4)
    assert json.loads((tmp_path / "ended" / CONVERSION_STATE).read_text())["done"] >= 8
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "_verify", failing_verify)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "ended", dest, part=4)
    convert(source, tmp_path / "ended", dest, part=4)
    expected, found = files(tmp_path / "whole"), files(tmp_path / "ended")
    assert set(found) == set(expected)
    if dest != "parquet":
        assert found == expected
    assert what(open_source(tmp_path / "ended")) == what(source)


@pytest.mark.parametrize("dest", ["list", "folder"])
def test_pictures_are_on_the_disk_before_a_part_is_noted(tmp_path, monkeypatch, dest):
    """Every time that all is written to the disk: the pictures there are, and what is noted of them."""
    seen = []

    def sync(self):
        pictures = sum(path.suffix == ".jpg" for path in (tmp_path / "dest").rglob("*"))
        seen.append((pictures, json.loads((tmp_path / "dest" / CONVERSION_STATE).read_text())["done"]))

    monkeypatch.setattr(FileSystem, "sync", sync)
    convert(open_source(WRITERS["list"](tmp_path / "source", CONTENT)), tmp_path / "dest", dest, part=5)
    assert seen == [(5, 0), (10, 5), (12, 10)]


def failing_verify(*arguments):
    raise KeyboardInterrupt


def test_a_conversion_that_was_killed_goes_on(tmp_path):
    source = folder_of(tmp_path / "source", [(label % 40, picture(label)) for label in range(1500)])
    dest = tmp_path / "dest"
    command = [
        sys.executable,
        "-m",
        "partial_fc",
        "data",
        "convert",
        str(source),
        str(dest),
        *args("--format recordio --part 50"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (dest / "train.rec").exists() or (dest / "train.rec").stat().st_size < 200_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = json.loads((dest / CONVERSION_STATE).read_text())["done"]
    assert 0 < done < 1500, "killed in the middle"
    assert main(command[3:]) == 0
    assert what(open_source(dest)) == what(open_source(source))
    assert len(open_source(dest)) == 1500


def test_folders_of_others_are_left_alone(tmp_path):
    source = open_source(folder_of(tmp_path / "source", CONTENT))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    with pytest.raises(UserError, match="is not empty and holds no conversion; give a new"):
        convert(source, foreign, "webdataset")
    with pytest.raises(UserError, match="is a file; give a new or empty folder"):
        convert(source, tmp_path / "file", "webdataset")
    convert(source, tmp_path / "done", "webdataset")
    before = files(tmp_path / "done")
    assert convert(source, tmp_path / "done", "webdataset") == {"images": 12, "identities": 4, "left_out": 0}
    with pytest.raises(UserError, match="holds a finished conversion to webdataset; give another folder"):
        convert(source, tmp_path / "done", "recordio")
    (tmp_path / "source" / "id0000" / "00001.jpg").write_bytes(picture(99))
    with pytest.raises(UserError, match="holds a finished conversion of other data"):
        convert(open_source(tmp_path / "source"), tmp_path / "done", "webdataset")
    assert files(tmp_path / "done") == before
    assert files(foreign) == {"precious": b"data"}


@pytest.mark.parametrize("dest", FORMATS)
def test_half_a_conversion_is_no_data_set(tmp_path, monkeypatch, dest):
    source = open_source(folder_of(tmp_path / "source", CONTENT))
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "_verify", failing_verify)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "half", dest)
    with pytest.raises(UserError, match=f"half holds an unfinished conversion to {dest}; run the same command again"):
        open_source(tmp_path / "half")
    if dest == "list":
        with pytest.raises(UserError, match="holds an unfinished conversion"):
            open_source(tmp_path / "half" / "list.txt")
    convert(source, tmp_path / "half", dest)
    assert what(open_source(tmp_path / "half")) == what(source)


def test_a_finished_conversion_that_lost_images_is_not_taken_for_whole(tmp_path):
    source = open_source(folder_of(tmp_path / "source", CONTENT))
    convert(source, tmp_path / "dest", "webdataset", part=5)
    (tmp_path / "dest" / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match="holds 7 images, but 12 were converted; remove it"):
        convert(source, tmp_path / "dest", "webdataset", part=5)


def test_a_begun_conversion_of_something_else_is_refused(tmp_path, monkeypatch):
    source = open_source(folder_of(tmp_path / "source", CONTENT))
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "_verify", failing_verify)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "begun", "webdataset")
    with pytest.raises(
        UserError, match="holds an unfinished conversion to webdataset; finish it, or give another folder"
    ):
        convert(source, tmp_path / "begun", "recordio")
    (tmp_path / "source" / "id0000" / "00001.jpg").write_bytes(picture(99))
    with pytest.raises(
        UserError, match=r"an unfinished conversion of other data \(id0000/00001\.jpg of the source set was"
    ):
        convert(open_source(tmp_path / "source"), tmp_path / "begun", "webdataset")


@pytest.mark.parametrize("dest", FORMATS)
def test_unreadable_pictures_are_left_out_and_named_or_refused(tmp_path, dest):
    content = [*CONTENT[:4], (1, b"no picture"), (2, b"nor this"), *CONTENT[9:]]  # identity 2 has none that can be read
    source = open_source(folder_of(tmp_path / "source", content))
    with pytest.raises(UserError, match=r"cannot read the image id0001/00004\.jpg .*--on_error skip"):
        convert(source, tmp_path / "refused", dest, on_error="raise", part=3)
    done = convert(source, tmp_path / "dest", dest, part=3)
    assert done == {"images": 7, "identities": 3, "left_out": 2}
    left = (tmp_path / "dest" / "left_out.txt").read_text()
    assert left.count("\n") == 2 and "id0001/00004.jpg (cannot identify" in left
    there = open_source(tmp_path / "dest", format=dest)
    assert there.identity_names == ["id0000", "id0001", "id0003"]
    assert len(there) == 7


def test_what_was_left_out_of_the_source_is_counted_and_named_too(tmp_path, capsys):
    path = list_file(tmp_path / "source", [*CONTENT, (3, b"no picture")])
    path.write_text(path.read_text() + "lonely\n")
    assert main(["data", "convert", str(path), str(tmp_path / "dest"), "--format", "webdataset"]) == 0
    assert (
        "12 images of 4 identities as webdataset, counts and labels verified; 2 damaged images"
        in capsys.readouterr().out
    )
    first, second = (tmp_path / "dest" / "left_out.txt").read_text().splitlines()
    assert first == "faces.txt line 16 (it has a path or a label, but not both)"
    assert second.startswith("pictures/a 012.jpg (cannot identify")


def test_a_destination_that_is_not_what_was_written_is_found_out(tmp_path, monkeypatch):
    source = open_source(folder_of(tmp_path / "source", CONTENT))
    add = writers.ListWriter.add

    def adds(change):
        monkeypatch.setattr(
            writers.ListWriter, "add", lambda self, *given: add(self, *change(*given)) if change(*given) else None
        )

    adds(lambda place, label, *rest: (place, (label + 1) % 4, *rest))
    with pytest.raises(UserError, match="does not have the label that was written; remove"):
        convert(source, tmp_path / "labels", "list")
    adds(lambda place, label, data, suffix: (place, label, picture(7), suffix))
    with pytest.raises(UserError, match="does not have the bytes of"):
        convert(source, tmp_path / "bytes", "list")
    adds(lambda place, *rest: (place, *rest) if place else None)
    with pytest.raises(UserError, match="holds 11 images, but 12 were written"):
        convert(source, tmp_path / "count", "list")


def test_names_that_no_folder_can_have_are_encoded_and_numbers_keep_their_order(tmp_path):
    lines = []
    for number, name in enumerate(("../up", "a%2Fb", "a/b", ".hidden", "plain name".replace(" ", "_"), "ü")):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
        lines.append(f"{number}.jpg {name}")
    (tmp_path / "faces.txt").write_text("\n".join(lines))
    convert(open_source(tmp_path / "faces.txt"), tmp_path / "names", "folder")
    assert sorted(path.name for path in (tmp_path / "names").iterdir() if path.is_dir()) == [
        "%2E%2E%2Fup", "%2Ehidden", "a%252Fb", "a%2Fb", "plain_name", "ü",
    ]  # fmt: skip
    (tmp_path / "faces.txt").write_text("0.jpg 10\n1.jpg 9\n2.jpg 100\n")
    convert(open_source(tmp_path / "faces.txt"), tmp_path / "numbers", "folder")
    there = open_source(tmp_path / "numbers")
    assert there.identity_names == ["009", "010", "100"]
    assert [bytes(there.encoded(index)) for index in range(3)] == [picture(1), picture(0), picture(2)]


def test_the_command_says_what_it_did_and_mistakes_in_a_line(tmp_path, capsys):
    source = insightface(tmp_path / "source", CONTENT).parent
    assert main(["data", "convert", str(source), str(tmp_path / "dest"), "--format", "webdataset"]) == 0
    out, err = capsys.readouterr()
    assert "12 images of 4 identities as webdataset, counts and labels verified" in out
    assert "to webdataset: 100%" in err
    assert main(["data", "convert", str(source), str(tmp_path / "dest"), "--format", "webdataset"]) == 0
    assert "dest: already converted: 12 images of 4 identities as webdataset" in capsys.readouterr().out
    for arguments, words in (
        (
            ["convert", str(source), str(tmp_path / "dest"), "--format", "list"],
            "holds a finished conversion to webdataset",
        ),
        (["convert", str(source), str(tmp_path / "x"), "--format", "zip"], "invalid choice: 'zip'"),
        (["convert", str(tmp_path / "absent"), str(tmp_path / "x"), "--format", "list"], "absent does not exist"),
        (["convert", str(source), str(tmp_path / "x"), "--format", "list", "--part", "0"], "--part is 0"),
        (["inspect", str(source), "--source_format", "parquet"], "has no parquet data"),
        (["turn"], "unknown command 'turn'; choose one of: inspect, convert"),
    ):
        assert main(["data", *arguments]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert main(["data", "--help"]) == 0
    assert "inspect" in capsys.readouterr().out
