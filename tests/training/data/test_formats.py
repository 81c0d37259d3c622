"""Every format is the same data set: the same images, order, batches on any number of ranks, mid-epoch resume; and what
is found where."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from types import SimpleNamespace

import data_files
import numpy as np
import pyarrow.parquet
import pytest
import torch
from data_files import WRITERS, picture, pixels, samples
from PIL import Image

from partial_fc.training.cli.main import main
from partial_fc.training.cli.protocols import protocol_parser
from partial_fc.training.config import RunConfig, TrainConfig
from partial_fc.training.data import (
    DataConfig,
    GlyphIdentities,
    UnreadableImage,
    decode,
    find_format,
    loader,
    open_data,
    open_source,
    what_changed,
)
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.data.decode import decode_into, read_header
from partial_fc.training.data.formats.packed import write_index
from partial_fc.training.data.loader import BatchLoader, choose_workers
from partial_fc.training.errors import UserError
from partial_fc.training.results import evaluation_loader
from partial_fc.training.run import RunFolder
from partial_fc.training.trainer import Trainer

CONTENT = samples(identities=6, images=4)


@pytest.fixture(scope="module", params=list(WRITERS))
def source(request, tmp_path_factory):
    """(format, what --data.folder is given)."""
    return request.param, WRITERS[request.param](tmp_path_factory.mktemp("data") / "faces", CONTENT)


def test_a_format_is_found_and_gives_images_and_labels(source):
    kind, path = source
    assert find_format(path)[0] == kind
    dataset = open_source(path, 20, 3)
    assert dataset.labels.tolist() == [label for label, _ in CONTENT]
    assert len(set(dataset.identity_names)) == dataset.num_identities == 6
    assert dataset.image_shape == (3, 20, 20)
    assert list(dataset.skipped) == []
    assert len({dataset.name_of(index) for index in range(len(dataset))}) == len(CONTENT)
    for index in (0, 7, 23):
        assert bytes(dataset.encoded(index)) == CONTENT[index][1]
        assert torch.equal(dataset.load(index), pixels(CONTENT[index][1], 20))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_format_is_shuffled_and_sharded_and_resumed_as_any_other(source, tmp_path):
    """Mid-epoch at another world size: two ranks have taken 2 of 4 batches, three ranks take the rest. No format
    changes a bit of it."""
    _, path = source
    augment = AugmentConfig(flip_probability=0.5)

    def parts(dataset, world, start, stop, workers=0):
        batches = []
        for rank in range(world):
            loader = BatchLoader(
                dataset, batch_size=6, rank=rank, world=world, seed=3, augment=augment, workers=workers
            )
            loader.set_epoch(2)
            batches.append(list(loader.iterate(start))[: stop - start])
        return [torch.cat([part.images for part in batch]) for batch in zip(*batches, strict=True)]

    dataset = open_source(path, 20, 3)
    expected = parts(open_source(data_files.folder_of(tmp_path / "reference", CONTENT), 20, 3), 1, 0, 4)
    found = parts(dataset, 2, 0, 2) + parts(pickle.loads(pickle.dumps(dataset)), 3, 2, 4, workers=1)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_identities_are_held_out_of_any_format(source):
    _, path = source
    splits = open_data(DataConfig(folder=str(path), holdout_identities=2, identities=3, image_size=20), seed=5)
    holdout = splits.evaluation["holdout"]
    assert (splits.train.num_identities, holdout.num_identities) == (3, 2)
    assert not set(splits.train.identity_names) & set(holdout.identity_names)
    whole = open_source(path, 20, 3)
    for part in (splits.train, holdout):
        assert part.labels.unique().tolist() == list(range(part.num_identities))
        for index in range(len(part)):
            row = part.position_of(index)
            assert part.identity_names[int(part.labels[index])] == whole.identity_names[int(whole.labels[row])]
            assert part.name_of(index) == whole.name_of(row)
            assert torch.equal(part.load(index), whole.load(row))


def test_a_fingerprint_says_what_changed(tmp_path):
    path = data_files.list_file(tmp_path / "one", CONTENT)
    config = DataConfig(folder=str(path), holdout_identities=2)
    before = open_data(config, 0).fingerprint()
    assert what_changed(before, open_data(config, 0).fingerprint()) is None
    changed = open_data(config, 0)
    name = changed.train.name_of(3)
    (path.parent / name).write_bytes(b"another picture")
    assert what_changed(before, open_data(config, 0).fingerprint()).startswith(f"{name} of the training set was ")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    assert "images and has" in what_changed(before, open_data(config, 0).fingerprint())
    assert what_changed(before, {"training": before["training"]}) == "there is no holdout set any more"
    other = {**before["training"], "labels": "0"}
    assert (
        what_changed({"training": before["training"]}, {"training": other})
        == "images of the training set have other labels"
    )


def test_other_pictures_of_the_same_sizes_are_other_data(tmp_path):
    def grey(value):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (value,) * 3).save(out, "BMP")
        return out.getvalue()

    def written(values):
        data_files.folder_of(tmp_path / "faces", [(place // 3, grey(value)) for place, value in enumerate(values)])
        return open_data(DataConfig(folder=str(tmp_path / "faces")), 0)

    before = written(range(6)).fingerprint()
    assert what_changed(before, written(range(6)).fingerprint()) is None
    now = written(range(100, 106)).fingerprint()
    assert what_changed(before, now) == "images of the training set have other content"
    earlier = {"training": {key: value for key, value in before["training"].items() if key != "pictures"}}
    assert what_changed(earlier, now) is None
    (tmp_path / "faces" / "id0000" / "00000.jpg").unlink()
    (tmp_path / "faces" / "id0000" / "00000.jpg").mkdir()
    assert (
        open_data(DataConfig(folder=str(tmp_path / "faces")), 0).fingerprint()["training"]["pictures"]
        != now["training"]["pictures"]
    )


def test_a_packed_set_that_is_drawn_again_is_other_data(tmp_path):
    packed = write_packed(tmp_path / "packed", held_out=([4, 5], []))
    before = open_data(DataConfig(folder=str(packed)), 0).fingerprint()
    assert what_changed(before, open_data(DataConfig(folder=str(packed)), 0).fingerprint()) is None
    np.save(packed / "images.npy", 255 - np.load(packed / "images.npy"))
    assert "set have other content" in what_changed(before, open_data(DataConfig(folder=str(packed)), 0).fingerprint())


def test_what_is_not_there_is_said_with_what_was_looked_for(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        UserError,
        match=r"has no known data format; looked for: train\.rec.*\*\.tar.*parquet.*path label.*sub-folders",
    ):
        find_format(empty)
    with pytest.raises(UserError, match=r"has no webdataset data: looked for \*\.tar"):
        find_format(empty, "webdataset")
    data_files.shards(tmp_path / "both", CONTENT[:3])
    data_files.insightface(tmp_path / "both", CONTENT[:3])
    with pytest.raises(UserError, match=r"has recordio and webdataset data; choose one with --data\.format"):
        find_format(tmp_path / "both")
    assert find_format(tmp_path / "both", "webdataset")[0] == "webdataset"
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.bin has no known data format"):
        find_format(tmp_path / "model.bin")


def write_splits(kind, folder, prefixes):
    """Four samples under each of the prefixes, in two files; identities 0, 1 of the first, 10, 11 of the second, ..."""
    for place, prefix in enumerate(prefixes):
        content = [
            (10 * place + label, picture(100 * place + 10 * label + each)) for label in range(2) for each in range(2)
        ]
        if kind == "parquet":
            for path in (data_files.parquet(folder / f".{place}", content, each=2) / "data").glob("*.parquet"):
                path.rename(folder / f"{prefix}-0000{int(path.stem[-1])}-of-00002.parquet")
        else:
            for path in data_files.shards(folder / f".{place}", content, each=2).glob("*.tar"):
                path.rename(folder / f"{prefix}-{path.stem[-3:]}.tar")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_files_of_several_splits_are_not_read_as_one_set(tmp_path, kind, capsys, mistake):
    folder = write_splits(kind, tmp_path / "hub", ["train", "test", "validation"])
    words = r"hub has several splits: test \(2 files\), train \(2 files\), validation \(2 files\); choose one with --data\.split"
    with pytest.raises(UserError, match=words):
        open_data(DataConfig(folder=str(folder)), 0)
    assert open_data(DataConfig(folder=str(folder), split="train"), 0).train.identity_names == ["0", "1"]
    assert open_source(folder, split="test").identity_names == ["10", "11"]
    with pytest.raises(
        UserError, match=r"hub has no split 'training', only test \(2 files\), .*; give another --data\.split"
    ):
        open_source(folder, split="training")
    assert "choose one with --split" in mistake("data", "inspect", str(folder))
    assert main(["data", "inspect", str(folder), "--split", "validation"]) == 0
    assert "images                4" in capsys.readouterr().out
    assert main(["data", "convert", str(folder), str(tmp_path / "out"), "--format", "list", "--split", "train"]) == 0
    assert len(open_source(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("prefixes", "images"),
    [
        (["shard", "part-a"], 8),
        (["train-a", "train-b"], 8),
        (["glint-train", "glint-val"], None),
        (["train", "extra"], None),
        (["test"], 4),
    ],
)
def test_names_that_say_no_split_are_one_set(tmp_path, prefixes, images):
    folder = write_splits("webdataset", tmp_path / "shards", prefixes)
    if images is None:
        with pytest.raises(UserError, match="has several splits"):
            open_source(folder)
    else:
        assert len(open_source(folder)) == images


def test_the_splits_of_a_dataset_dict_are_its_folders(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    parts = {
        name: datasets.Dataset.from_dict(
            {"image": [{"bytes": picture(label), "path": None}], "label": [label]}, features=features
        )
        for label, name in enumerate(("first", "second"))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"several splits: first \(1 file\), second \(1 file\)"):
        open_source(tmp_path / "saved")
    assert open_source(tmp_path / "saved", split="second").identity_names == ["1"]


def test_a_split_is_of_no_use_where_there_are_none(tmp_path):
    folder = data_files.folder_of(tmp_path / "faces", CONTENT[:2])
    with pytest.raises(UserError, match=r"has folder data, which have no splits; drop --data\.split"):
        open_source(folder, split="train")
    with pytest.raises(UserError, match=r"the embedded glyphs have no splits to choose from; drop --data\.split"):
        open_data(DataConfig(split="train"), 0)


# ---------------------------------------------------------------------------------------------------- decoding


def variants():
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8))
    for name, image, settings in (
        ("4:2:0", noise, {"subsampling": 2}),
        ("4:4:4", noise, {"subsampling": 0, "quality": 95}),
        ("grey", noise.convert("L"), {}),
        ("progressive", noise, {"progressive": True}),
        ("CMYK", noise.convert("CMYK"), {}),
        ("odd", noise.crop((0, 0, 23, 17)), {}),
    ):
        out = io.BytesIO()
        image.save(out, "JPEG", **settings)
        yield name, out.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [30, 17])
def test_both_decoders_give_the_same_pixels(monkeypatch, size, channels):
    assert decode.simplejpeg is not None
    for name, data in variants():
        fast, slow = (np.zeros((size, size, channels), np.uint8) for _ in range(2))
        decode_into(data, fast)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "simplejpeg", None)
            decode_into(data, slow)
        assert np.array_equal(fast, slow), name
        assert torch.equal(torch.from_numpy(fast).permute(2, 0, 1), pixels(data, size, channels)), name


@pytest.mark.parametrize("turbo", [True, False])
def test_bombs_and_strange_kinds_are_refused_by_their_header(monkeypatch, turbo):
    if not turbo:
        monkeypatch.setattr(decode, "simplejpeg", None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    place = np.zeros((10, 10, 3), np.uint8)
    for kind in ("JPEG", "PNG"):
        for action in (lambda data: decode_into(data, place), read_header):
            with pytest.raises((ValueError, Warning), match="decompression bomb"), warnings.catch_warnings():
                action(picture(0, kind, size=20))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    with pytest.raises(ValueError, match="cannot identify the"):
        decode_into(postscript, place)


def test_a_jpeg_that_is_cut_short_is_unreadable_with_either_decoder(monkeypatch, tmp_path):
    content = [(0, picture(0)), (0, picture(1)[:-60])]
    dataset = open_source(data_files.folder_of(tmp_path / "faces", content), 20, 3)
    with pytest.raises(UnreadableImage, match="truncated"):
        dataset.load(1)
    monkeypatch.setattr(decode, "simplejpeg", None)
    with pytest.raises(UnreadableImage, match="truncated"):
        dataset.load(1)


# ---------------------------------------------------------------------------------------------------- feeding


def test_mirroring_alone_moves_pixels_and_computes_none():
    from partial_fc.training.data.augment import augment, to_float

    config = AugmentConfig(
        rotation=0, translation=0, scale_min=1, scale_max=1, shear=0, flip_probability=0.5, blur_probability=0, contrast=0, brightness=0,
        erase_probability=0, noise_std=0,
    )  # fmt: skip
    images = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    found = augment(images, torch.arange(40), seed=1, epoch=0, config=config)
    plain = to_float(images)
    mirrored = [not torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
    assert 8 < sum(mirrored) < 32
    assert torch.equal(images, before)
    for each, (a, b) in zip(mirrored, zip(found, plain, strict=True), strict=True):
        assert torch.equal(a, b.flip(2) if each else b)
    general = augment(
        images, torch.arange(40), seed=1, epoch=0, config=AugmentConfig(**{**vars(config), "translation": 1e-12})
    )
    torch.testing.assert_close(general, found, atol=2e-5, rtol=0)


def test_workers_are_chosen_by_cores_and_device(monkeypatch, tmp_path):
    faces, glyphs = open_source(data_files.folder_of(tmp_path / "f", CONTENT[:2])), GlyphIdentities(identities=1)
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [
        choose_workers(faces, ranks, cuda) for ranks, cuda in ((1, True), (4, True), (16, True), (1, False), (8, False))
    ] == [
        8,
        3,
        0,
        4,
        1,
    ]
    assert (choose_workers(glyphs, 1, False), choose_workers(glyphs, 2, True)) == (0, 7)
    assert BatchLoader(faces, batch_size=2, workers=None).workers == 4


@pytest.mark.parametrize(
    ("device", "ranks", "local", "expected"),
    [
        ("cuda", 8, "4", (3, True)),
        ("cuda", 8, None, (1, True)),
        ("cuda", 1, None, (8, True)),
        ("cpu", 4, None, (3, False)),
    ],
)
def test_training_and_evaluation_are_fed_alike(device, ranks, local, expected, monkeypatch, tmp_path):
    """By the ranks of this machine, for the device, and with the settings' batches ahead."""
    faces = open_source(data_files.folder_of(tmp_path / "f", CONTENT))
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    accelerator = SimpleNamespace(device=torch.device(device), process_index=ranks - 1, num_processes=ranks)
    config = RunConfig(data=DataConfig(prefetch=5, on_error="raise"), train=TrainConfig(batch_size=8))
    trainer = SimpleNamespace(config=config, accelerator=accelerator, data=SimpleNamespace(train=faces))
    for found in (evaluation_loader(faces, accelerator, config), Trainer._loader(trainer)):
        assert (found.workers, found.pin, found.prefetch, found.on_error, found.rank, found.world) == (
            *expected, 5, "raise", ranks - 1, ranks,
        )  # fmt: skip
    config.data.workers = 0
    assert evaluation_loader(faces, accelerator, config).workers == 0
    for command in ("verify", "templates", "identify", "retrieve"):
        assert protocol_parser(command).get_default("workers") is None, "by the cores"


# ---------------------------------------------------------------------------------------------------- a whole run


def test_a_run_names_what_is_damaged_and_finds_out_if_its_data_change(tmp_path, capsys):
    """Trained from shards with a sample that has no label; then a shard is replaced, and the run is asked to go on."""
    content = [(label, picture(10 * label + each)) for label in range(6) for each in range(4)]
    data_files.shards(tmp_path / "faces", content, each=12)
    data_files.write_tar(tmp_path / "faces" / "more.tar", [("lonely.jpg", picture(500))])
    run = [
        "--data.folder",
        str(tmp_path / "faces"),
        "--output.folder",
        str(tmp_path / "run"),
        "--data.image_size",
        "16",
    ]
    run += ["--data.holdout_identities", "2", "--train.batch_size", "8", "--train.cpu", "true", "--train.epochs", "1"]
    run += ["--output.log_every", "1"]
    assert main(["train", *run]) == 0
    rows = RunFolder(tmp_path / "run").history()
    assert len(rows) == 2 and all(0 <= row["data_wait"] <= 1 for row in rows)
    assert RunFolder(tmp_path / "run").unreadable() == {"more.tar/lonely (there is no label: neither .cls nor .json)"}
    noted = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (noted["training"]["images"], noted["holdout"]["images"]) == (16, 8)
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    with (tmp_path / "faces" / "more.tar").open("ab") as file:
        file.write(bytes(10240))
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "the data have changed since the run began: more.tar of the training set was" in last
        or "more.tar of the holdout set was" in last
    )
    assert "remove" in last and "data.json" in last


def write_packed(folder, channels=3, side=16, held_out=([4, 5], [])):
    """Six identities of four images, each of another source."""
    folder.mkdir()
    np.save(
        folder / "images.npy", np.random.default_rng(0).integers(0, 256, (24, channels, side, side), dtype=np.uint8)
    )
    np.save(folder / "labels.npy", np.repeat(np.arange(6), 4).astype(np.int32))
    np.save(folder / "sources.npy", np.tile(np.arange(4), 6).astype(np.int32))
    held = dict(zip(("identities", "sources"), held_out, strict=True))
    write_index(folder, [f"id{n}" for n in range(6)], list("abcd"), held, {})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch on colour pictures of 16 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    data_files.folder_of(folder / "faces", CONTENT)
    run = ["--data.folder", str(folder / "faces"), "--output.folder", str(folder / "run"), "--data.image_size", "16"]
    assert (
        main(["train", *run, "--train.batch_size", "8", "--train.cpu", "true", "--train.epochs", "1", "--seed", "1"])
        == 0
    )
    return folder / "run"


def test_a_run_is_evaluated_on_any_format_and_what_is_damaged_is_named(trained, tmp_path, capsys):
    content = [
        (key, data_files.record(data_files.image_data(label, data))) for key, (label, data) in enumerate(CONTENT)
    ]
    content += [(key, data_files.record(data_files.image_data(0.5, picture(0)))) for key in range(24, 28)]
    data_files.write_records(tmp_path / "records", content)

    def evaluate(*arguments):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        code = main(["evaluate", str(trained), "--output", str(out), *map(str, arguments)])
        return code, capsys.readouterr().err.strip().splitlines()[-1:], out

    code, _, out = evaluate("--data", tmp_path / "records")
    assert code == 0
    assert len((out / "unreadable.txt").read_text().splitlines()) == 4
    figures = json.loads((out / "metrics.json").read_text())
    assert (figures["unreadable_images"], figures["evaluations"][0]["images"]) == (4, 24)
    code, (said,), _ = evaluate("--data", tmp_path / "records", "--on_error", "raise")
    assert code == 2 and "cannot read train.rec#24" in said and said.endswith("or pass --on_error skip")

    data_files.parquet(tmp_path / "hub", CONTENT)
    for path in (tmp_path / "hub" / "data").iterdir():
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.rename_columns(["image", "who"]).replace_schema_metadata(None), path)
    code, (said,), _ = evaluate("--data", tmp_path / "hub")
    assert code == 2 and said.endswith("choose one with --label_column")
    assert evaluate("--data", tmp_path / "hub", "--label_column", "who", "--source_format", "parquet")[0] == 0
    code, (said,), _ = evaluate("--split", "train")
    assert code == 2 and "--split applies to the data set of --data" in said


@pytest.mark.parametrize(
    ("held_out", "names"),
    [(([4, 5], []), {"seen": 8}), (([4, 5], [0, 1]), {"seen": 4, "new": 4}), (([], []), {"train": 24})],
)
def test_a_run_is_evaluated_on_what_a_packed_set_holds_out(trained, tmp_path, held_out, names, mistake):
    packed = write_packed(tmp_path / "packed", held_out=held_out)
    out = tmp_path / "out"
    assert main(["evaluate", str(trained), "--data", str(packed), "--output", str(out)]) == 0
    figures = json.loads((out / "metrics.json").read_text())["evaluations"]
    assert {each["name"]: each["images"] for each in figures} == names
    other = write_packed(tmp_path / "grey", channels=1)
    assert "have the shape (1, 16, 16), but the backbone takes (3, 16, 16)" in mistake(
        "evaluate", str(trained), "--data", str(other), "--output", str(tmp_path / "no")
    )


def test_a_packed_set_is_inspected_split_by_split_and_not_converted(tmp_path, capsys, mistake):
    packed = write_packed(tmp_path / "packed", held_out=([4, 5], [3]))
    images = np.load(packed / "images.npy")
    images[1] = images[0]
    np.save(packed / "images.npy", images)
    assert main(["data", "inspect", str(packed)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line in ("train", "seen", "new")] == ["train", "seen", "new"]
    assert "12 raw; 768 bytes" in out and "16 x 16 (12)" in out and "id0 in a = id0 in b" in out
    assert main(["data", "inspect", str(packed), "--split", "seen"]) == 0
    assert "images                6" in capsys.readouterr().out
    assert "has no split 'test', only train, seen, new" in mistake("data", "inspect", str(packed), "--split", "test")
    assert "only data sets of encoded images can be converted" in mistake(
        "data", "convert", str(packed), str(tmp_path / "out"), "--format", "list"
    )
