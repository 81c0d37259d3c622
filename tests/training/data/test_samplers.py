"""The order of an epoch: what each sampler promises, at every world size and after every resumption; mapped labels."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from common import args
from PIL import Image

from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import to_config
from partial_fc.training.data import DataConfig, GlyphIdentities, IdentityDataset, open_data
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.data.labels import LabelMap
from partial_fc.training.data.loader import BatchLoader
from partial_fc.training.data.samplers import ClassAware, IdentityBalanced, Sampler, Shuffled, make_sampler
from partial_fc.training.errors import UserError
from partial_fc.training.mixing import sampler_of

TAIL = torch.repeat_interleave(
    torch.arange(40), torch.tensor([1] * 10 + [2] * 10 + [7] * 15 + [60] * 5)
)  # a long tail, 435 images
TAIL = TAIL[torch.randperm(len(TAIL), generator=torch.Generator().manual_seed(0))]  # in no order


class Numbers(IdentityDataset):
    """Images that say which they are."""

    image_shape = (1, 2, 2)

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels, self.identity_names = labels, [str(i) for i in range(int(labels.max()) + 1)]

    def name_of(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> torch.Tensor:
        return torch.full((1, 2, 2), 100 + index % 50, dtype=torch.uint8)


def samplers(batch: int, seed: int = 3) -> dict[str, Sampler]:
    return {
        "shuffled": Shuffled(TAIL, batch, seed),
        "pk": IdentityBalanced(TAIL, batch, seed, 4),
        "class_aware": ClassAware(TAIL, batch, seed, 0.5),
    }


def batches(
    sampler: Sampler, epoch: int, batch: int, world: int, start: int = 0, workers: int = 0
) -> list[tuple[list[int], torch.Tensor]]:
    """(images of each global batch, their pixels), put together from all ranks' parts."""
    passes = []
    for rank in range(world):
        config = AugmentConfig()
        loader = BatchLoader(
            Numbers(TAIL),
            batch_size=batch,
            rank=rank,
            world=world,
            seed=3,
            augment=config,
            sampler=sampler,
            workers=workers,
        )
        loader.set_epoch(epoch)
        passes.append(list(loader.iterate(start)))
    whole = []
    for parts in zip(*passes, strict=True):
        assert all(torch.equal(part.labels, TAIL[part.indices]) for part in parts)
        sizes = [len(part.indices) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        whole.append((torch.cat([p.indices for p in parts]).tolist(), torch.cat([p.images for p in parts])))
    return whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", ["shuffled", "pk", "class_aware"])
def test_resuming_in_mid_epoch_at_another_world_size_goes_on_exactly(name):
    alone = batches(samplers(24)[name], 2, 24, 1)
    assert len(alone) == samplers(24)[name].length // 24 >= 6
    for world, start, workers in ((3, 4, 0), (2, 5, 1)):
        torch.manual_seed(world)  # the global state has no part in it
        rest = batches(samplers(24)[name], 2, 24, world, start, workers)  # a sampler of its own: as in another process
        for (mine, pixels), (theirs, others) in zip(rest, alone[start:], strict=True):
            assert mine == theirs and torch.equal(pixels, others)
    other_epoch, other_seed = samplers(24)[name].order(3), samplers(24, seed=4)[name].order(2)
    assert not np.array_equal(other_epoch, samplers(24)[name].order(2)) and not np.array_equal(
        other_seed, samplers(24)[name].order(2)
    )


def test_pk_has_each_identity_once_an_epoch_and_comes_to_all_images_in_turn():
    sampler, n = IdentityBalanced(TAIL, 24, 3, 4), len(TAIL)
    assert sampler.length == 40 // 6 * 24
    left_out = []
    for epoch in range(5):
        slots = sampler.order(epoch)
        identities = []
        for batch in slots.reshape(-1, 6, 4):
            images = torch.from_numpy(batch) % n
            own = TAIL[images]
            assert (own == own[:, :1]).all(), "an identity's images are beside one another"
            assert len(own[:, 0].unique()) == 6
            identities += own[:, 0].tolist()
            for identity, row in zip(own[:, 0].tolist(), images.tolist(), strict=True):
                count = int((identity == TAIL).sum())
                assert len(set(row)) == min(4, count), "images come again only where there are too few"
                assert max(Counter(row).values()) == -(-4 // min(4, count))
        assert len(set(identities)) == len(identities) == 36
        left_out.append(tuple(sorted(set(range(40)) - set(identities))))
        assert len(set(slots.tolist())) == len(slots), "an image that comes again has a slot of its own"
    assert len(set(left_out)) > 1
    whole = IdentityBalanced(torch.arange(6).repeat_interleave(8), 24, 0, 4)  # 8 images: two epochs to see each once
    twice = np.concatenate([whole.order(0), whole.order(1)]) % 48
    assert sorted(twice.tolist()) == list(range(48))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_class_aware_draws_classes_by_the_power_of_their_counts(exponent):
    sampler, n = ClassAware(TAIL, 24, 3, exponent), len(TAIL)
    sizes = torch.bincount(TAIL).double()
    expected = n * sizes**exponent / (sizes**exponent).sum()
    total = torch.zeros(40, dtype=torch.float64)
    epochs = 200
    for epoch in range(epochs):
        slots = torch.from_numpy(sampler.order(epoch))
        assert len(slots) == n == len(slots.unique())
        drawn = torch.bincount(TAIL[slots % n], minlength=40).double()
        assert ((drawn - expected).abs() < 1 + 1e-6).all(), "rounded up or down, no further"
        total += drawn
        if epoch < 3:
            times = torch.bincount(slots % n, minlength=n)
            for label in range(40):
                of_class = times[label == TAIL]
                assert of_class.max() - of_class.min() <= 1, "no image again before all have come"
    # the mean over epochs of a number that is rounded by chance: its standard error is at most 0.5 / sqrt(epochs)
    assert ((total / epochs - expected).abs() < 5 * 0.5 / epochs**0.5).all()
    if exponent == 1:
        assert torch.equal(torch.bincount(slots % n), torch.ones(n, dtype=torch.int64))


def test_an_image_that_comes_again_in_an_epoch_is_augmented_anew():
    labels = torch.arange(4).repeat_interleave(2)
    loader = BatchLoader(
        Numbers(labels),
        batch_size=16,
        seed=1,
        augment=AugmentConfig(),
        sampler=IdentityBalanced(labels, 16, 1, 4),
        drop_last=True,
    )
    (batch,) = loader
    for image in range(8):
        first, second = batch.images[batch.indices == image]
        assert not torch.equal(first, second)
    plain = next(iter(BatchLoader(Numbers(labels), batch_size=8, seed=1, augment=AugmentConfig())))
    for image in range(8):  # the first time it is what the shuffled epoch has
        assert torch.equal(batch.images[batch.indices == image][0], plain.images[plain.indices == image][0])


def test_the_shuffled_order_is_what_it_was():
    """Runs of earlier versions go on: these are the first images of a shuffled epoch then."""
    loader = BatchLoader(GlyphIdentities("train", identities=10), batch_size=10, seed=5)
    loader.set_epoch(1)
    key = np.random.SeedSequence([5, 1, 1]).generate_state(1, np.uint64)[0]
    expected = np.random.Generator(np.random.Philox(key=int(key))).permutation(100)
    assert torch.cat([batch.indices for batch in loader]).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pk", 24, {"images_per_identity": 5}), "5 does not divide the batch of 24"),
        (("pk", 200, {}), "50 identities x 4 images needs more identities than the 40"),
        (("class_aware", 24, {"class_exponent": 2.0}), "class_exponent is 2.0; give 0"),
    ],
)
def test_samplers_that_cannot_be_say_so(arguments, message):
    name, batch, settings = arguments
    with pytest.raises(UserError, match=message):
        make_sampler(name, TAIL, batch, 0, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images_per_identity": 2}, "has no effect with --data.sampler shuffled .it is for pk"),
        ({"sampler": "pk", "class_exponent": 0.1}, "has no effect with --data.sampler pk"),
        ({"sampler": "pk", "images_per_identity": 0}, "give at least 1"),
        ({"sampler": "class_aware", "class_exponent": -1.0}, "class_exponent is -1.0"),
        ({"min_images": 0}, "min_images is 0; give at least 1"),
    ],
)
def test_settings_of_another_sampler_or_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**settings)


# ---------------------------------------------------------------------------------------------------- labels


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """a: 1 image, b: 4, c: 2, d: 5, e: 3, and one with a comma, 6."""
    for name, count in {"a": 1, "b": 4, "c": 2, "d": 5, "e": 3, "f, g": 6}.items():
        (tmp_path / "people" / name).mkdir(parents=True)
        for k in range(count):
            Image.new("L", (8, 8), 20 * k + 10).save(tmp_path / "people" / name / f"{k}.png")
    return tmp_path / "people"


def settings_of(people: Path, **more: object) -> DataConfig:
    return DataConfig(folder=str(people), image_size=8, channels=1, **more)  # type: ignore[arg-type]


def test_identities_with_few_images_are_left_out_and_the_others_numbered_anew(people):
    data = open_data(settings_of(people, min_images=3), 0)
    assert data.train.identity_names == ["b", "d", "e", "f, g"]
    assert torch.bincount(data.train.labels).tolist() == [4, 5, 3, 6]
    assert data.label_map is not None
    assert data.label_map.labels.tolist() == [-1, 0, -1, 1, 2, 3] and data.label_map.images.tolist() == [
        1,
        4,
        2,
        5,
        3,
        6,
    ]
    few = open_data(settings_of(people, min_images=4, identities=2), 0)
    assert few.train.identity_names == ["b", "d"]
    held = open_data(settings_of(people, min_images=3, holdout_identities=2), 0)
    assert set(held.evaluation["holdout"].identity_names) == set(
        open_data(settings_of(people, holdout_identities=2), 0).evaluation["holdout"].identity_names
    ), "who is held out does not depend on the filter"
    assert not set(held.train.identity_names) & set(held.evaluation["holdout"].identity_names)
    with pytest.raises(UserError, match=r"no identity has 7 images \(the largest has 6\)"):
        open_data(settings_of(people, min_images=7), 0)
    with pytest.raises(UserError, match=r"5 identities were asked for, but there are 4 in .* with too few images"):
        open_data(settings_of(people, min_images=3, identities=5), 0)
    with pytest.raises(UserError, match=r"no identity has 11 images"):
        open_data(DataConfig(min_images=11), 0)


def test_the_map_of_labels_can_be_read_back(tmp_path):
    LabelMap.of(["a", 'q"uote', "co,mma", "new\nline"], torch.tensor([0, 1, 1, 3]), kept=[3, 1]).write(
        tmp_path / "labels.csv"
    )
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["label"], r["identity"], r["source_label"], r["images"]) for r in rows] == [
        ("", "a", "0", "1"),
        ("1", 'q"uote', "1", "2"),
        ("", "co,mma", "2", "0"),
        ("0", "new\nline", "3", "1"),
    ]


def test_a_run_uses_the_sampler_and_saves_its_labels(people, tmp_path):
    settings = ["--data.folder", str(people), *args("--data.image_size 8 --data.channels 1 --data.min_images 3")]
    settings += args("--data.sampler pk --data.images_per_identity 2 --train.batch_size 4 --train.epochs 2")
    settings += ["--train.cpu", "true", "--backbone.embedding_size", "8", "--output.log_every", "1"]
    assert main(["train", *settings, "--output.folder", str(tmp_path / "run"), "--check"]) == 0
    assert main(["train", *settings, "--output.folder", str(tmp_path / "run")]) == 0
    with (tmp_path / "run/labels.csv").open(newline="") as file:
        labels = {row["identity"]: row["label"] for row in csv.DictReader(file)}
    assert labels == {"a": "", "b": "0", "c": "", "d": "1", "e": "2", "f, g": "3"}
    assert json.loads((tmp_path / "run/metrics.json").read_text())["training"]["steps"] == 4, (
        "2 epochs of 4 identities, 2 a batch"
    )
    glyphs = to_config(
        train_parser(), ["--data.sampler", "class_aware", "--data.class_exponent", "0", "--train.accumulation", "2"]
    )
    sampler = sampler_of(glyphs, GlyphIdentities("train", identities=9))
    assert isinstance(sampler, ClassAware) and (sampler.exponent, sampler.batch_size) == (0.0, 128)


def test_the_embedded_glyphs_labels_are_saved_too(tmp_path):
    settings = ["--data.identities", "20", "--train.batch_size", "100", "--train.epochs", "1", "--train.cpu", "true"]
    assert main(["train", *settings, "--output.folder", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run/labels.csv").read_text().splitlines()
    assert lines[0] == "label,identity,source_label,images" and len(lines) == 21
    assert lines[3] == f"2,{GlyphIdentities('train').identity_names[2]},2,10"
