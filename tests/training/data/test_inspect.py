"""`partial-fc data inspect`: counts, sizes, and which images are unreadable, duplicate or missing."""

from __future__ import annotations

import io

import data_files
import numpy as np
import pytest
from data_files import picture, samples
from PIL import Image

from partial_fc.training.cli.main import main
from partial_fc.training.data import open_source
from partial_fc.training.data.inspection import inspect_data, plot_counts

CONTENT = [
    (0, picture(1)),
    (0, picture(2)),
    (0, picture(1)),  # twice within an identity
    (2, picture(2)),  # and across identities
    (2, picture(3, "PNG", size=30)),
    (2, b"no picture"),
    (3, picture(4)[:-60]),  # cut short: its header is fine
    (7, picture(5, grey=True)),
]


@pytest.mark.parametrize("kind", ["recordio", "webdataset", "list", "parquet"])
def test_what_is_wrong_is_counted_and_named(tmp_path, kind):
    found = inspect_data(open_source(data_files.WRITERS[kind](tmp_path, CONTENT)))
    assert found.counts.tolist() == [3, 3, 1, 1]
    assert found.sizes.tolist() == [len(data) for _, data in CONTENT]
    assert found.pixels == {(20, 20): 5, (30, 30): 1}
    assert found.kinds == {".jpg": 5, ".png": 1}
    assert len(found.unreadable) == 2
    assert "cannot identify" in found.unreadable[0] and "truncated" in found.unreadable[1].lower()
    assert [len(group) for group in found.duplicates] == [2, 2]
    assert found.across == 1
    assert found.gaps == [1, 4, 5, 6]
    text = found.summary()
    for words in (
        "identities            4",
        "images                8",
        "with one image        2 identities; consider --data.min_images 2",
        "5 jpg, 1 png",
        "20 x 20 (5)",
        "2 groups, 1 of them across",
        "4..6",
    ):
        assert words in text


def test_files_that_do_not_end_as_images_are_counted_and_told(tmp_path, capsys):
    """Hidden files are not, nor folders."""
    for name in ("a/1.jpg", "a/2.jfif", "a/Thumbs.DB", "a/.3.heic", "b/1.HEIC", "b/2.PNG", "b/3", "b/.cache/x.heic"):
        path = tmp_path / "faces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1))
    (note,) = open_source(tmp_path / "faces").notes
    assert note.startswith("4 files in sub-folders are not read, because their names do not end as those of images")
    assert note.endswith(".webp): 1 .db, 1 .heic, 1 .jfif, 1 without a suffix")
    assert main(["data", "inspect", str(tmp_path / "faces")]) == 0
    assert f"note                  {note}" in capsys.readouterr().out
    assert main(["data", "convert", str(tmp_path / "faces"), str(tmp_path / "list"), "--format", "list"]) == 0
    assert f"note: {note}" in capsys.readouterr().err
    settings = [
        "--data.folder",
        str(tmp_path / "faces"),
        "--train.batch_size",
        "2",
        "--output.folder",
        str(tmp_path / "r"),
    ]
    assert main(["train", "--check", *settings]) == 0
    assert f"note: {note}" in capsys.readouterr().out


def test_headers_alone_find_what_headers_show(tmp_path):
    found = inspect_data(open_source(data_files.list_file(tmp_path / "f", CONTENT)), decode=False)
    assert len(found.unreadable) == 1
    assert found.pixels == {(20, 20): 6, (30, 30): 1}


def test_samples_without_a_place_are_named_too(tmp_path):
    path = data_files.list_file(tmp_path / "f", CONTENT[:2])
    path.write_text(path.read_text() + "lonely\n")
    assert inspect_data(open_source(path)).unreadable == ["faces.txt line 5 (it has a path or a label, but not both)"]


def test_folders_have_no_gaps_and_numbers_far_apart_neither(tmp_path):
    assert inspect_data(open_source(data_files.folder_of(tmp_path / "a", CONTENT[:4]))).gaps == []
    assert (
        inspect_data(open_source(data_files.list_file(tmp_path / "b", [(7_000_000, picture(1)), (3, picture(2))]))).gaps
        == []
    )


def colours(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


@pytest.mark.parametrize("largest", [5, 400])
def test_the_histogram_has_a_bar_for_what_there_is(tmp_path, largest):
    found = inspect_data(open_source(data_files.list_file(tmp_path / "f", samples(2, 1))))
    found.counts = np.array([1, 1, 2, 2, 2, 3, largest])
    plot_counts(tmp_path / "counts.png", found, "faces")
    blue = (np.abs(colours(tmp_path / "counts.png").astype(int) - [0x3B, 0x6E, 0xA5]).max(1) < 4).sum()
    assert blue > 5000


def test_the_command_prints_and_draws(tmp_path, capsys):
    source = data_files.insightface(tmp_path / "set", CONTENT).parent
    assert main(["data", "inspect", str(source), "--plot", str(tmp_path / "counts.png")]) == 0
    out = capsys.readouterr().out
    assert "duplicate images      2 groups, 1 of them across identities" in out
    assert "train.rec#1 = train.rec#3" in out
    with Image.open(io.BytesIO((tmp_path / "counts.png").read_bytes())) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_plot_is_made_with_its_folder_and_is_the_same_each_time(tmp_path, ending):
    source = data_files.insightface(tmp_path / "set", CONTENT).parent
    for name in "ab":
        assert main(["data", "inspect", str(source), "--plot", str(tmp_path / name / f"counts.{ending}")]) == 0
    first, second = ((tmp_path / name / f"counts.{ending}").read_bytes() for name in "ab")
    assert len(first) > 1000
    if ending != "svg":  # ids in an SVG are drawn
        assert first == second


def test_a_plot_that_cannot_be_made_is_said_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for plot, message in (
        ("x.jpg", "ends with .png or .svg or .pdf"),
        ("x", "ends with"),
        ("file/x.png", "is not a writable folder"),
    ):
        assert main(["data", "inspect", str(tmp_path / "nothing"), "--plot", str(tmp_path / plot)]) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and message in err[0] and "--plot" in err[0]


def test_the_format_and_the_split_are_said_first(tmp_path, capsys):
    for kind, words in (("list", "list (faces.txt)"), ("folder", "folder")):
        source = data_files.WRITERS[kind](tmp_path / kind, [(0, picture(1)), (0, picture(1)), (2, picture(2))])
        assert main(["data", "inspect", str(source)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"format: {words}\n")
        assert "1 group, 0 of them across" in out
    shards = data_files.WRITERS["webdataset"](tmp_path / "shards", samples(2, 1))
    folder = shards if shards.is_dir() else shards.parent
    for path in folder.glob("*.tar"):
        path.rename(path.with_name(f"train-{path.name.split('-')[-1]}"))
    assert main(["data", "inspect", str(folder), "--split", "train"]) == 0
    assert capsys.readouterr().out.startswith("format: webdataset, split train (train-")


def test_a_file_of_pairs_is_sent_to_verify(tmp_path, mistake):
    (tmp_path / "lfw.bin").write_bytes(b"pairs")
    assert f"evaluate on them with `partial-fc verify RUN {tmp_path / 'lfw.bin'}`" in mistake(
        "data", "inspect", str(tmp_path / "lfw.bin")
    )
