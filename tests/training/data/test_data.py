"""Data sets and batches: their contents, their order, their parts on each rank, and messages about bad input."""

import io
import multiprocessing
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from partial_fc.training.data import (
    DataConfig,
    FolderIdentities,
    GlyphIdentities,
    IdentityDataset,
    UnreadableImage,
    decode_picture,
    open_data,
    scan_folder,
    split_identities,
)
from partial_fc.training.data.augment import AugmentConfig, augment, to_float
from partial_fc.training.data.formats import embedded_glyphs as glyphs_module
from partial_fc.training.data.loader import Batch, BatchLoader
from partial_fc.training.errors import UserError


def write_folder(root, identities=6, images=4, size=10):
    """identities x images small colour pictures, named so that sorting matters; returns the root."""
    rng = np.random.default_rng(0)
    for identity in range(identities):
        folder = root / f"person{identity:02d}"
        folder.mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "faces")


def everything(loader, start_batch=0):
    return list(loader.iterate(start_batch))


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)
        assert a.unreadable == b.unreadable


# ---------------------------------------------------------------------------------------------------- glyphs


@pytest.mark.parametrize(("split", "identities", "designs"), [("train", 1000, 10), ("seen", 300, 10), ("new", 300, 6)])
def test_glyph_splits_have_their_counts_and_shapes(split, identities, designs):
    glyphs = GlyphIdentities(split)
    assert glyphs.num_identities == identities == len(set(glyphs.identity_names))
    assert len(glyphs) == identities * designs
    assert glyphs.labels.dtype == torch.int64
    assert torch.equal(glyphs.labels.bincount(), torch.full((identities,), designs))
    assert glyphs.image_shape == (1, 32, 32)
    image = glyphs.load(len(glyphs) - 1)
    assert image.shape == (1, 32, 32)
    assert image.dtype == torch.uint8


def test_evaluation_glyphs_share_no_identity_and_no_image_with_training():
    train, seen, new = GlyphIdentities("train"), GlyphIdentities("seen"), GlyphIdentities("new")
    assert not set(train.identity_names) & set(seen.identity_names)
    assert seen.identity_names == new.identity_names
    pictures = [{data.load(i).numpy().tobytes() for i in range(len(data))} for data in (train, seen, new)]
    assert not pictures[0] & pictures[1]
    assert not pictures[0] & pictures[2]
    assert not pictures[1] & pictures[2]


def test_glyphs_are_unpacked_as_the_format_says():
    """U+4E8C is two horizontal strokes: ink in the rows of the strokes, none between them, white on black."""
    glyphs = GlyphIdentities("train")
    character = glyphs.identity_names.index("U+4E8C")
    index = character * 10 + 4
    assert glyphs.name_of(index) == "glyph U+4E8C design 4"
    assert int(glyphs.labels[index]) == character
    image = glyphs.load(index)[0]
    assert image.max() > 200
    assert image[0].max() == 0
    rows = (image > 127).sum(1) > 12
    strokes = int((rows[1:] & ~rows[:-1]).sum())
    assert strokes == 2
    assert set(image.unique().tolist()) <= {17 * level for level in range(16)}


def test_names_of_new_glyphs_count_designs_from_ten():
    glyphs = GlyphIdentities("new", identities=2)
    assert len(glyphs) == 12
    assert glyphs.name_of(0).endswith("design 10")
    assert glyphs.name_of(11) == f"glyph {glyphs.identity_names[1]} design 15"


def test_fewer_glyph_identities_are_the_first_ones():
    some, all_ = GlyphIdentities("train", identities=7), GlyphIdentities("train")
    assert some.identity_names == all_.identity_names[:7]
    assert torch.equal(some.load(69), all_.load(69))


def test_a_damaged_asset_says_to_install_again(tmp_path, monkeypatch):
    broken = tmp_path / "glyphs.npz.xz"
    broken.write_bytes(b"nothing of the kind")
    monkeypatch.setattr(glyphs_module, "_GLYPHS", broken)
    glyphs_module._read_glyphs.cache_clear()
    with pytest.raises(UserError, match=r"glyphs\.npz\.xz cannot be read .*; reinstall the package"):
        GlyphIdentities("train")


# ---------------------------------------------------------------------------------------------------- folder


def test_a_folder_is_read_in_the_order_of_names(folder):
    (folder / "notes.txt").write_text("no image")
    (folder / "person00" / "notes.txt").write_text("no image")
    (folder / ".cache").mkdir()
    faces = FolderIdentities(folder, image_size=8, channels=3)
    assert faces.identity_names == [f"person{i:02d}" for i in range(6)]
    assert faces.labels.tolist() == [i for i in range(6) for _ in range(4)]
    assert [faces.name_of(i) for i in (0, 3, 4, 23)] == [
        "person00/0.png",
        "person00/3.png",
        "person01/0.png",
        "person05/3.png",
    ]
    assert faces.load(5).shape == faces.image_shape == (3, 8, 8)


def test_pictures_keep_their_pixels_and_are_converted_as_asked(tmp_path):
    root = tmp_path / "kinds"
    (root / "a").mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    grey = pixels[:, :, 0]
    Image.fromarray(pixels).save(root / "a" / "0.png")
    Image.fromarray(pixels).save(root / "a" / "1.BMP")
    Image.fromarray(grey).save(root / "a" / "2.png")
    Image.fromarray(grey.astype(np.uint16) * 256).save(root / "a" / "3.png")
    Image.fromarray(np.zeros((30, 50, 3), np.uint8) + 7).save(root / "a" / "4.jpeg")
    colour = FolderIdentities(root, image_size=12, channels=3)
    assert np.array_equal(colour.load(0).permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(colour.load(1).permute(1, 2, 0).numpy(), pixels)
    greys = FolderIdentities(root, image_size=12, channels=1)
    assert np.array_equal(greys.load(2)[0].numpy(), grey)
    assert np.array_equal(greys.load(3)[0].numpy(), grey), "16 bits become 8 by their high byte"
    assert torch.equal(greys.load(4), torch.full((1, 12, 12), 7, dtype=torch.uint8))


def test_damaged_pictures_are_named_with_a_reason(folder, monkeypatch):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (folder / "person00" / "0.png").write_bytes(b"not a picture")
    (folder / "person00" / "1.png").write_bytes(b"")
    (folder / "person00" / "2.jpg").write_bytes(whole.getvalue()[:400])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)
    faces = FolderIdentities(folder, image_size=8, channels=3)
    reasons = {}
    for index in (0, 1, 2, 4):
        with pytest.raises(UnreadableImage) as caught:
            faces.load(index)
        reasons[caught.value.path] = caught.value.reason
    assert list(reasons) == ["person00/0.png", "person00/1.png", "person00/2.jpg", "person00/3.png"]
    assert "cannot identify" in reasons["person00/0.png"]
    assert "decompression bomb" in reasons["person00/3.png"]
    assert all("\n" not in reason and reason for reason in reasons.values())


def test_a_picture_that_only_warns_of_its_size_is_refused_without_a_warning(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)  # 100 pixels: above the limit, below twice the limit
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(UnreadableImage, match="decompression bomb"):
            FolderIdentities(folder, image_size=8, channels=3).load(0)
    assert seen == []


def test_bad_folders_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"absent does not exist; check --data\.folder"):
        scan_folder(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file; --data\.folder needs a folder"):
        scan_folder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no sub-folders; put the images of each identity"):
        scan_folder(tmp_path / "empty")
    (tmp_path / "empty" / "nobody").mkdir()
    with pytest.raises(UserError, match=r"no sub-folder of the data folder .*empty has an image; the first is nobody"):
        scan_folder(tmp_path / "empty")


def test_identities_without_images_are_left_out_and_named_or_refused(tmp_path):
    root = write_folder(tmp_path / "faces")
    (root / "nobody1").mkdir()
    (root / "nobody2").mkdir()
    (root / "nobody2" / "notes.txt").write_text("")
    write_folder(root / "val", identities=2)
    faces = open_data(DataConfig(folder=str(root)), 0).train
    assert faces.identity_names == [f"person{n:02d}" for n in range(6)]
    assert list(faces.skipped) == [
        "nobody1 (there is no image in it)",
        "nobody2 (there is no image in it)",
        f"val (its images are one level deeper: give {root / 'val'} to use them)",
    ]
    with pytest.raises(
        UserError,
        match=r"cannot read nobody1 \(there is no image in it\), and 2 more like it; fix or remove it, or pass",
    ):
        open_data(DataConfig(folder=str(root), on_error="raise"), 0)


def test_splits_above_the_identities_are_explained(tmp_path):
    for split in ("train", "val"):
        write_folder(tmp_path / "faces" / split, identities=2)
    with pytest.raises(
        UserError, match=r"images of the data folder .*faces are one level deeper; give .*faces/train or .*faces/val$"
    ):
        open_data(DataConfig(folder=str(tmp_path / "faces")), 0)


def test_holding_out_is_drawn_by_the_seed_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    kept, held = split_identities(50, 10, seed=3)
    assert len(held) == 10
    assert sorted(kept + held) == list(range(50))
    torch.manual_seed(2)
    np.random.seed(2)
    assert split_identities(50, 10, seed=3) == (kept, held)
    assert split_identities(50, 10, seed=4)[1] != held
    assert set(held) < set(split_identities(50, 20, seed=3)[1]), "more held out hold the same ones, and more"
    assert split_identities(50, 0, seed=3) == (list(range(50)), [])


def test_open_data_splits_a_folder(folder):
    config = DataConfig(folder=str(folder), holdout_identities=2, identities=3, image_size=8, channels=1)
    splits = open_data(config, seed=5)
    holdout = splits.evaluation["holdout"]
    assert splits.train.num_identities == 3
    assert holdout.num_identities == 2
    assert not set(splits.train.identity_names) & set(holdout.identity_names)
    assert splits.train.labels.unique().tolist() == [0, 1, 2]
    assert holdout.labels.tolist() == [0] * 4 + [1] * 4
    whole = FolderIdentities(folder, image_size=8, channels=1)
    names = [whole.name_of(i) for i in range(len(whole))]
    for part in (splits.train, holdout):
        for index in range(len(part)):
            assert part.name_of(index).startswith(part.identity_names[int(part.labels[index])] + "/")
            assert torch.equal(part.load(index), whole.load(names.index(part.name_of(index))))
    assert list(open_data(DataConfig(folder=str(folder)), seed=0).evaluation) == []
    assert open_data(DataConfig(folder=str(folder)), seed=0).train.image_shape == (3, 112, 112)


def test_open_data_gives_the_glyphs():
    splits = open_data(DataConfig(identities=20), seed=0)
    assert splits.train.num_identities == 20
    assert {name: len(part) for name, part in splits.evaluation.items()} == {"seen": 3000, "new": 1800}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"identities": 1001},
            r"1001 identities were asked for, but there are 1000 in the embedded glyphs \(train\); lower",
        ),
        ({"holdout_identities": 5}, r"have their own held-out identities; drop --data\.holdout_identities"),
        ({"image_size": 64}, r"are grey, 32 pixels wide; drop --data\.image_size"),
        ({"identities": 0}, r"--data\.identities is 0; give at least 1"),
        ({"workers": -1}, r"--data\.workers is -1; give at least 0"),
        ({"channels": 2}, r"--data\.channels is 2; give 1 \(grey\) or 3 \(colour\)"),
        (
            {"folder": "FOLDER", "identities": 7},
            r"7 identities were asked for, but there are 6 in the data folder .*; lower",
        ),
        (
            {"folder": "FOLDER", "identities": 5, "holdout_identities": 2},
            "5 identities were asked for, but there are 4 in",
        ),
        ({"folder": "FOLDER", "holdout_identities": 6}, "holding out 6 of 6 identities leaves none to train on; lower"),
    ],
)
def test_requests_that_the_data_cannot_meet_say_so(folder, settings, message):
    if settings.get("folder"):
        settings = settings | {"folder": str(folder)}
    with pytest.raises(UserError, match=message) as caught:
        open_data(DataConfig(**settings), seed=0)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- batches


def test_images_are_scaled_and_carry_their_labels():
    glyphs = GlyphIdentities("train", identities=5)
    for batch in BatchLoader(glyphs, batch_size=10):
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert torch.equal(batch.labels, glyphs.labels[batch.indices])
        expected = torch.stack([glyphs.load(i) for i in batch.indices.tolist()])
        torch.testing.assert_close(batch.images, (expected / 255 - 0.5) / 0.5)
        assert batch.unreadable == []


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [32, 31])
def test_every_world_sees_the_same_global_batches(batch_size, drop_last):
    glyphs = GlyphIdentities("train", identities=13)
    config = AugmentConfig()

    def walk(world):
        loaders = [
            BatchLoader(
                glyphs, batch_size=batch_size, rank=rank, world=world, seed=4, augment=config, drop_last=drop_last
            )
            for rank in range(world)
        ]
        passes = []
        for loader in loaders:
            loader.set_epoch(2)
            passes.append(everything(loader))
        assert {len(p) for p in passes} == {len(loaders[0])}
        for parts in zip(*passes, strict=True):
            sizes = [len(part.indices) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            images, labels, indices = (
                torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "indices")
            )
            yield Batch(images, labels, indices, [])

    alone = list(walk(1))
    assert [len(b.indices) for b in alone[:-1]] == [batch_size] * (len(alone) - 1)
    for world in (2, 3):
        assert_equal_batches(list(walk(world)), alone)


def test_an_epoch_has_every_sample_exactly_once():
    glyphs = GlyphIdentities("train", identities=10)
    loaders = [BatchLoader(glyphs, batch_size=32, rank=rank, world=3, drop_last=False) for rank in range(3)]
    indices = torch.cat([batch.indices for loader in loaders for batch in loader])
    assert indices.sort().values.tolist() == list(range(100))
    dropped = torch.cat([batch.indices for batch in BatchLoader(glyphs, batch_size=32)])
    assert len(dropped) == len(dropped.unique()) == 96


def test_the_order_follows_seed_and_epoch_and_not_the_global_state():
    glyphs = GlyphIdentities("train", identities=10)

    def order(seed, epoch, **settings):
        loader = BatchLoader(glyphs, batch_size=20, seed=seed, **settings)
        loader.set_epoch(epoch)
        return torch.cat([batch.indices for batch in loader]).tolist()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = order(0, 0)
    assert torch.equal(torch.get_rng_state(), state), "a pass draws nothing from the global state"
    torch.manual_seed(2)
    assert order(0, 0) == first
    assert order(0, 1) != first
    assert order(1, 0) != first
    assert order(0, 3, shuffle=False) == list(range(100))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resuming_in_mid_epoch_gives_the_rest_of_the_pass(workers):
    glyphs = GlyphIdentities("train", identities=10)
    loader = BatchLoader(glyphs, batch_size=16, seed=1, augment=AugmentConfig(), workers=workers)
    loader.set_epoch(3)
    whole = everything(loader)
    assert len(whole) == len(loader) == 6
    assert_equal_batches(everything(loader, start_batch=4), whole[4:])
    assert everything(loader, start_batch=6) == []
    abandoned = loader.iterate()
    assert_equal_batches([next(abandoned)], whole[:1])
    assert_equal_batches(everything(loader, start_batch=1), whole[1:])
    with pytest.raises(ValueError, match="start_batch is 7; the epoch has 6 batches"):
        loader.iterate(7)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing_over_several_epochs(folder):
    (folder / "person02" / "1.png").write_bytes(b"damaged")
    faces = FolderIdentities(folder, image_size=8, channels=3)
    settings = {"batch_size": 5, "seed": 2, "augment": AugmentConfig(), "drop_last": False}
    alone, helped = BatchLoader(faces, **settings), BatchLoader(faces, workers=2, **settings)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        assert_equal_batches(everything(helped), everything(alone))


def test_augmentation_is_that_of_the_samples_place_in_the_data_set():
    glyphs = GlyphIdentities("train", identities=3)
    loader = BatchLoader(glyphs, batch_size=6, seed=9, augment=AugmentConfig())
    loader.set_epoch(4)
    batch = next(iter(loader))
    plain = torch.stack([glyphs.load(i) for i in batch.indices.tolist()])
    expected = augment(plain, batch.indices, seed=9, epoch=4, config=AugmentConfig())
    assert torch.equal(batch.images, expected)
    assert not torch.equal(batch.images, to_float(plain))


def test_a_last_batch_may_leave_a_rank_without_samples():
    glyphs = GlyphIdentities("train", identities=1)  # 10 images in batches of 9: the last has one
    parts = [everything(BatchLoader(glyphs, batch_size=9, rank=r, world=3, drop_last=False))[-1] for r in range(3)]
    assert [len(part.labels) for part in parts] == [0, 0, 1]
    assert parts[0].images.shape == (0, 1, 32, 32)
    assert parts[0].images.dtype == torch.float32
    assert parts[0].indices.dtype == torch.int64
    with_augmentation = BatchLoader(glyphs, batch_size=9, world=3, drop_last=False, augment=AugmentConfig())
    assert everything(with_augmentation)[-1].images.shape == (0, 1, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_unreadable_images_are_skipped_and_named_or_refused(folder, workers):
    (folder / "person01" / "2.png").write_bytes(b"damaged")
    faces = FolderIdentities(folder, image_size=8, channels=3)
    skipping = BatchLoader(faces, batch_size=6, workers=workers, augment=AugmentConfig())
    batches = everything(skipping)
    assert sum(len(batch.indices) for batch in batches) == 23
    assert sorted(len(batch.images) for batch in batches) == [5, 6, 6, 6]
    named = [name for batch in batches for name in batch.unreadable]
    assert len(named) == 1
    assert named[0].startswith("person01/2.png (cannot identify")
    others = set(multiprocessing.active_children())  # ranks of other tests
    refusing = BatchLoader(faces, batch_size=6, workers=workers, on_error="raise")
    with pytest.raises(UserError, match=r"cannot read the image person01/2\.png .*--data\.on_error skip") as caught:
        everything(refusing)
    assert "\n" not in str(caught.value)
    assert set(multiprocessing.active_children()) == others, "the traceback that is still held keeps no worker alive"


def test_a_batch_of_unreadable_images_is_empty(tmp_path):
    root = tmp_path / "faces"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(b"damaged")
    loader = BatchLoader(FolderIdentities(root, image_size=8, channels=3), batch_size=2, augment=AugmentConfig())
    (batch,) = loader
    assert batch.images.shape == (0, 3, 8, 8)
    assert len(batch.unreadable) == 2


class Deadly(IdentityDataset):
    """Loading ends the process, as the kernel does with one that takes too much memory."""

    labels = torch.zeros(4, dtype=torch.int64)
    identity_names = ("nobody",)
    image_shape = (1, 2, 2)

    def name_of(self, index):
        return str(index)

    def load(self, index):
        os._exit(9)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_that_dies_is_a_users_error():
    with pytest.raises(UserError, match=r"a process that loads images died .*lower --data\.workers"):
        everything(BatchLoader(Deadly(), batch_size=2, workers=1))


def test_batches_that_cannot_be_made_are_refused():
    glyphs = GlyphIdentities("train", identities=1)
    with pytest.raises(UserError, match="the data set has 10 images, fewer than one batch of 11; lower the batch size"):
        BatchLoader(glyphs, batch_size=11)
    assert len(BatchLoader(glyphs, batch_size=11, drop_last=False)) == 1
    with pytest.raises(UserError, match="the batch size is 0; give at least 1"):
        BatchLoader(glyphs, batch_size=0)
    with pytest.raises(UserError, match="a batch of 2 cannot be divided among 3 ranks; give at least 3"):
        BatchLoader(glyphs, batch_size=2, world=3)
    with pytest.raises(ValueError, match="rank is 2 of world size 2"):
        BatchLoader(glyphs, batch_size=4, rank=2, world=2)


def test_a_batch_moves_to_a_device():
    batch = next(iter(BatchLoader(GlyphIdentities("train", identities=1), batch_size=4)))
    moved = batch.to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.indices.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("pixels", "kind", "readable"),
    [
        (np.linspace(0, 1, 256, dtype=np.float32), "TIFF", False),
        (np.linspace(0, 255, 256, dtype=np.float32), "TIFF", False),
        (np.arange(256, dtype=np.int32), "TIFF", False),
        (np.arange(256, dtype=np.uint16) * 257, "TIFF", True),
        (np.arange(256, dtype=np.uint16) * 257, "PNG", True),
        (np.arange(256, dtype=np.uint16) * 257, "PPM", True),
        (np.arange(256, dtype=np.uint8), "TIFF", True),
    ],
)
def test_pixels_that_do_not_say_what_is_white_are_unreadable(pixels, kind, readable):
    """A float TIFF of 0 to 1 would become black all over."""
    data = io.BytesIO()
    Image.fromarray(pixels.reshape(16, 16)).save(data, kind)
    if readable:
        assert decode_picture(data.getvalue(), (1, 16, 16), "it").flatten().tolist() == list(range(256))
        return
    with pytest.raises(UnreadableImage, match=r"it \(its pixels are .* save it with 8 or 16 bits\)"):
        decode_picture(data.getvalue(), (1, 16, 16), "it")
