"""`partial-fc gallery`: enrol a data set, calibrate, search, add and remove; and what it says about mistakes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_files import folder_of, insightface, picture
from launched import tiny_run
from test_gallery import content

from partial_fc.training.cli.main import main
from partial_fc.training.data.decode import read_header
from partial_fc.training.embedding import Embedder
from partial_fc.training.embedding_files import EmbeddingFiles
from partial_fc.training.enrol_data import some_identities
from partial_fc.training.export.export import export_backbone
from partial_fc.training.gallery import Gallery


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    config = tiny_run(folder, output={"folder": str(folder / "run"), "log_every": 1})
    assert main(["train", str(config)]) == 0
    folder_of(folder / "data", [(label, picture(10 * label + each)) for label in range(8) for each in range(3)])
    return folder / "run"


@pytest.fixture
def data(run) -> Path:
    return run.parent / "data"


def command(*arguments: object) -> None:
    assert main(["gallery", *map(str, arguments)]) == 0


def built(folder: Path, run: Path, data: Path, *options: object) -> Gallery:
    command("build", folder, "--run", run, "--data", data, *options)
    return Gallery.open(folder)


@pytest.mark.parametrize("mode", ["mean", "all"])
@pytest.mark.parametrize("by", ["images", "embeddings", "npz"])
def test_a_data_set_is_enrolled_by_images_or_by_embeddings(run, data, tmp_path, mode, by, capsys):
    options = ["--per_identity", mode]
    if by == "images":
        held = built(tmp_path / "g", run, data, *options)
    else:
        files = ["--files", "npz" if by == "npz" else "parquet"]
        assert main(["embed", str(run), "--data", str(data), "--output", str(tmp_path / "e"), *files]) == 0
        command("build", tmp_path / "g", "--embeddings", tmp_path / "e", *options)
        held = Gallery.open(tmp_path / "g")
    assert f"8 identities ({mode} of their images), exact search among" in capsys.readouterr().out
    assert held.identities == [f"id{label:04d}" for label in range(8)] and held.rows == (8 if mode == "mean" else 24)
    embedder = Embedder.open(run)
    held.check_backbone(embedder.digest, embedder.dimension, embedder.preprocessing)
    embeddings = embedder.embed([path.read_bytes() for path in sorted(data.rglob("*.jpg"))])
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    means = unit.reshape(8, 3, -1).mean(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    wanted = (unit @ means.T).max(1) if mode == "mean" else np.ones(24)
    found = held.search(embeddings, 1)
    np.testing.assert_allclose([answer.matches[0].cosine for answer in found], wanted, atol=1e-5)
    if by == "images":
        match = found[0].matches[0]
        assert match.picture == str(data / "id0000" / "00000.jpg") if mode == "all" else Path(match.picture).exists()
        assert read_header(held.thumbnail(match.row)) == (".jpg", 32, 32)


def test_the_whole_way(run, data, tmp_path, capsys):
    """build, calibrate, search, add, extend, search again, remove."""
    first, other = tmp_path / "first", tmp_path / "other"
    for label in range(8):
        shutil.copytree(data / f"id{label:04d}", (first if label < 6 else other) / f"id{label:04d}")
    g = tmp_path / "g"
    command("build", g, "--run", run, "--data", first)
    assert "has no threshold yet" in capsys.readouterr().out
    command("calibrate", g, "--data", data, "--far", "0.1")
    said = capsys.readouterr().out
    assert (
        "threshold 0." in said and "by 24 images of 8 identities (168 comparisons" in said and "6 searches by" in said
    )
    command("calibrate", g, "--threshold", "0.999")
    image = first / "id0003" / "00009.jpg"
    command("search", g, image, "-k", "2", "--results", tmp_path / "new" / "answers.jsonl")
    said = capsys.readouterr().out
    assert f"{image}: " in said and "(threshold 0.999; " in said
    (line,) = (tmp_path / "new" / "answers.jsonl").read_text().splitlines()
    answer = json.loads(line)
    assert len(answer["matches"]) == 2 and answer["nobody"] is (answer["matches"][0]["cosine"] < 0.999)
    command("search", g, image, "--threshold", "-1")
    assert f"{image}: id0003 (" in capsys.readouterr().out or Gallery.open(g).per_identity == "mean"
    command("add", g, "--data", other)
    assert "8 identities" in capsys.readouterr().out
    command("add", g, "--images", image, other / "id0006" / "00018.jpg", "--identity", "Ada")
    command("add", g, "--images", image, "--identity", "Ada", "--existing", "extend")
    assert len(Gallery.open(g)) == 9
    command("search", g, "--data", data, "--threshold", "-1")
    said = capsys.readouterr().out
    assert "24 searches" in said and "24 of enrolled identities: " in said and "0.00% nobody" in said
    (tmp_path / "names").write_text("id0000\n\nid0001\n")
    command("remove", g, "--names", tmp_path / "names", "Ada")
    assert "3 removed; " in capsys.readouterr().out
    command("search", g, "--data", data, "--threshold", "1")
    assert "6 of others: 100.00% nobody" in capsys.readouterr().out
    command("info", g, "--identities")
    said = capsys.readouterr().out
    assert (
        "6 identities" in said and "threshold 0.999, set by hand" in said and "flip False" in said and "id0005" in said
    )


def test_the_hint_after_a_build_is_a_command_that_works(tmp_path, capsys):
    """By the identities that the run has held out, with a share that so few allow."""
    config = tiny_run(tmp_path, data={"holdout_identities": 3}, output={"folder": str(tmp_path / "run")})
    assert main(["train", str(config)]) == 0
    built(tmp_path / "g", tmp_path / "run", tmp_path / "images")
    (hint,) = re.findall(r"partial-fc gallery (calibrate .*)", capsys.readouterr().out)
    assert hint.endswith("--split holdout --far 0.21"), "24 images, each beside 2 other identities"
    command(*hint.split())
    assert "by 24 images of 3 identities (48 comparisons" in capsys.readouterr().out
    (tmp_path / "images").rename(tmp_path / "moved")
    built(tmp_path / "h", tmp_path / "run", tmp_path / "moved")
    assert "--data HELD_OUT --far 1e-3, by identities that were not trained on" in capsys.readouterr().out


def test_an_identity_that_looks_like_another_is_noted(run, data, tmp_path, capsys):
    g = tmp_path / "g"
    built(g, run, data, "--per_identity", "all")
    command("calibrate", g, "--threshold", "0.9999")
    capsys.readouterr()
    command("add", g, "--images", data / "id0002" / "00007.jpg", "--identity", "Bob")
    said = capsys.readouterr().out
    assert "note: an image of 'Bob' looks like 'id0002', enrolled before (cosine 1.000); are they the same?" in said


def test_the_threshold_can_be_set_while_building(run, data, tmp_path, capsys):
    held = built(tmp_path / "g", run, data, "--far", "0.1", "--no_thumbnails")
    assert held.threshold is not None and held.thumbnail(held.search(np.ones((1, 32)), 1)[0].matches[0].row) is None
    command("info", tmp_path / "g")
    assert "by 24 images of 8 identities" in capsys.readouterr().out


def test_an_exported_backbone_and_data_without_files_serve_as_well(run, data, tmp_path):
    export_backbone(run, tmp_path / "exported", data=[data])
    records = insightface(tmp_path / "rec", [(label, picture(10 * label)) for label in range(5)])
    held = built(tmp_path / "g", tmp_path / "exported", records.parent, "--flip")
    match = held.search(np.ones((1, 32)), 1)[0].matches[0]
    assert match.picture.startswith("train.rec#") and held.thumbnail(match.row)
    command("search", tmp_path / "g", "--run", run, data / "id0000" / "00000.jpg")
    assert held.preprocessing["flip"] is True


def test_embeddings_of_elsewhere_need_a_name_for_their_backbone(tmp_path, mistake, run, data):
    rows = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", embedding=rows, identity=np.array(list("aabbcc")))
    assert "name it with --backbone" in mistake(
        "gallery", "build", tmp_path / "g", "--embeddings", tmp_path / "mine.npz"
    )
    command("build", tmp_path / "g", "--embeddings", tmp_path / "mine.npz", "--backbone", "theirs")
    held = Gallery.open(tmp_path / "g")
    assert held.identities == list("abc") and held.backbone == "theirs"
    assert "embeddings of 8 numbers, but the backbone gives 32" in mistake(
        "gallery", "search", tmp_path / "g", "--run", run, data / "id0000" / "00000.jpg"
    )
    assert "name the backbone with --run" in mistake("gallery", "search", tmp_path / "g", data / "id0000" / "00000.jpg")
    for arrays, words in (
        ({"embedding": rows}, "has no column identity"),
        ({"identity": np.array(["a"])}, "has no column embedding"),
        ({"embedding": rows, "identity": np.array(["a"])}, "columns have different lengths"),
        ({"embedding": rows[0], "identity": np.array(["a"])}, "not numbers [n, D]"),
        ({"embedding": np.array([None]), "identity": np.array(["a"])}, "cannot be read"),
        ({"embedding": rows[:0], "identity": np.array([], dtype=str)}, "has no embeddings"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        assert words in mistake(
            "gallery", "build", tmp_path / "new", "--embeddings", tmp_path / "bad.npz", "--backbone", "x"
        )
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    assert "bad.parquet cannot be read" in mistake(
        "gallery", "build", tmp_path / "new", "--embeddings", tmp_path / "bad.parquet", "--backbone", "x"
    )
    assert not (tmp_path / "new").exists()


def test_embeddings_that_lost_a_part_are_refused(run, data, tmp_path, mistake):
    assert main(["embed", str(run), "--data", str(data), "--output", str(tmp_path / "e"), "--part", "8"]) == 0
    assert len(EmbeddingFiles.open(tmp_path / "e").files) == 3
    (tmp_path / "e" / "part-000001.parquet").unlink()
    line = mistake("gallery", "build", tmp_path / "g", "--embeddings", tmp_path / "e")
    assert "part-000001.parquet is missing; run the same `partial-fc embed` again" in line


def test_mistakes_are_one_line_and_change_nothing(run, data, tmp_path, mistake, monkeypatch):
    g = tmp_path / "g"
    held = built(g, run, data)
    before = content(g)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    image = data / "id0000" / "00000.jpg"
    exported = tmp_path / "exported"
    config = tiny_run(tmp_path / "two", output={"folder": str(tmp_path / "two" / "run"), "log_every": 1})
    assert main(["train", str(config), "--seed", "5"]) == 0
    for arguments, words in (
        (["build", g, "--run", run, "--data", data], "is a gallery already"),
        (["build", tmp_path / "x"], "name the backbone with --run"),
        (["build", tmp_path / "x", "--run", run, "--embeddings", data], "give either --embeddings, or --run and"),
        (["build", tmp_path / "x", "--embeddings", data], "has no embeddings (no embeddings.json)"),
        (["build", tmp_path / "x", "--run", exported, "--data", data], "does not exist"),
        (["add", g, "--data", data], "'id0000' and 7 more are enrolled in"),
        (["add", g, "--images", image], "give --images and --identity together"),
        (
            ["add", g, "--images", tmp_path / "broken.jpg", "--identity", "x"],
            "broken.jpg cannot be read: cannot identify",
        ),
        (["add", g, "--images", tmp_path / "none.jpg", "--identity", "x"], "none.jpg cannot be read: No such file"),
        (["add", g, "--images", image, "--identity", " "], "is ' '; give a name that is not empty"),
        (["remove", g], "no identity is named"),
        (["remove", g, "x"], "'x' is not enrolled"),
        (["remove", g, "--names", tmp_path / "nothing"], "cannot be read"),
        (["search", g], "give image files, or a data set"),
        (["search", g, image, "--data", data], "give image files, or a data set"),
        (["search", g, image, "-k", "0"], ": -k is 0; give at least 1"),
        (["search", g, tmp_path / "broken.jpg"], "broken.jpg cannot be read"),
        (["search", g, image, "--run", tmp_path / "two" / "run"], "was built with another backbone"),
        (["search", g, image, "--flip"], "was built with flip False, but now it is True"),
        (["search", tmp_path, image], "is not a gallery (it has no gallery.json)"),
        (["calibrate", g, "--data", data], "give --far, --fpir or --threshold"),
        (["calibrate", g, "--data", data, "--far", "1e-6"], "too few for a false accept rate of 1e-06"),
        (["calibrate", g, "--threshold", "2"], "it is a cosine"),
        (["calibrate", g, "--threshold", "0.2", "--far", "0.1"], "give one of"),
        (["fly"], "unknown command 'fly'"),
    ):
        assert words in mistake("gallery", *arguments)
    assert content(g) == before and len(held) == 8
    assert not (tmp_path / "x").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("partial_fc.training.cli.main.find_ranks", lambda: None)
    assert "gallery runs in one process" in mistake("gallery", "info", g)


def test_an_empty_gallery_says_so(run, data, tmp_path, mistake):
    g = tmp_path / "g"
    held = built(g, run, data)
    command("remove", g, *held.identities)
    assert "is empty; add identities" in mistake("gallery", "search", g, data / "id0000" / "00000.jpg")
    command("add", g, "--data", data)
    assert len(held) == 8


def test_the_backbone_of_a_gallery_may_have_moved(run, data, tmp_path, mistake):
    shutil.copytree(run, tmp_path / "run")
    built(tmp_path / "g", tmp_path / "run", data)
    shutil.rmtree(tmp_path / "run")
    image = data / "id0000" / "00000.jpg"
    assert "where it is no longer; name it with --run" in mistake("gallery", "search", tmp_path / "g", image)
    command("search", tmp_path / "g", image, "--run", run)


def test_calibration_draws_whole_identities():
    labels = np.repeat(np.arange(50), 4)
    chosen = some_identities(labels, most=42)
    counts = np.bincount(labels[chosen], minlength=50)
    assert set(counts.tolist()) == {0, 4} and counts.sum() == 40
    assert some_identities(labels, most=10**6).all()
    assert len(set(labels[some_identities(labels, most=1)].tolist())) == 2
