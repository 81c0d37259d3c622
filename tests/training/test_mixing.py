"""Several data sets in one run: the share of each in a batch at every world size, and heads that equal dense ones."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from functools import partial

import data_files
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import args
from launched import logged
from PIL import Image
from torch import Tensor

from partial_fc import gather
from partial_fc.distributed.shards import local_part
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import MarginSettings, RunConfig, to_config
from partial_fc.training.data import DataConfig, IdentityDataset, open_data
from partial_fc.training.data.config import MixedSet, check_mix
from partial_fc.training.data.loader import BatchLoader
from partial_fc.training.data.samplers import make_sampler
from partial_fc.training.errors import UserError
from partial_fc.training.mixing import ExtraHeads, MixedIdentities, MixedSampler, mixed, shares
from partial_fc.training.run import RunFolder


class Numbers(IdentityDataset):
    def __init__(self, identities: int, images: int, start: int = 0, side: int = 2) -> None:
        self.labels = torch.arange(identities).repeat_interleave(images)
        self.identity_names, self.image_shape, self.start = [f"i{i}" for i in range(identities)], (1, side, side), start

    def name_of(self, index: int) -> str:
        return f"{self.start}:{index}"

    def load(self, index: int) -> Tensor:
        return torch.full(self.image_shape, (self.start + index) % 256, dtype=torch.uint8)


def three() -> MixedIdentities:
    return MixedIdentities({"main": Numbers(12, 5), "b": Numbers(3, 4, 100), "c": Numbers(5, 2, 200)}, [1.0, 0.5, 0.25])


def test_a_batch_has_of_each_set_by_its_weight():
    assert shares([1, 1], 8) == [4, 4] and shares([1.0, 0.5, 0.25], 14) == [8, 4, 2]
    assert shares([2, 1], 10) == [7, 3] and sum(shares([1, 1, 1], 10)) == 10
    with pytest.raises(UserError, match=r"no sample for a data set of weight 0\.01"):
        shares([1.0, 0.01], 8)


def test_mixed_images_and_labels_are_those_of_their_sets():
    data = three()
    assert (len(data), data.num_identities) == (60 + 12 + 10, 20)
    assert data.labels.unique().tolist() == list(range(20))
    assert data.identity_names[0] == "i0" and data.identity_names[12] == "b/i0" and data.identity_names[19] == "c/i4"
    for index, name, value, label in (
        (59, "0:59", 59, 11),
        (60, "100:0", 100, 12),
        (71, "100:11", 111, 14),
        (72, "200:0", 200, 15),
    ):
        assert (
            data.name_of(index) == name and int(data.load(index)[0, 0, 0]) == value and int(data.labels[index]) == label
        )
    with pytest.raises(UserError, match="images of different shapes"):
        MixedIdentities({"main": Numbers(2, 2), "b": Numbers(2, 2, side=3)}, [1, 1])


def test_every_world_and_every_resumption_has_the_same_mixed_batches_and_sets_go_on_at_their_own_pace():
    data, make = three(), partial(make_sampler, "shuffled")
    sampler = MixedSampler(data, 14, 3, make)
    assert sampler.counts == [8, 4, 2] and sampler.length == 60 // 8 * 14
    taken = []
    for epoch in range(4):
        slots = sampler.order(epoch)
        assert len(set(slots.tolist())) == len(slots)
        images = slots.reshape(7, 14) % len(data)
        for row in images:
            assert np.histogram(row, [0, 60, 72, 83])[0].tolist() == [8, 4, 2]
            for part in np.array_split(row, 2):  # a rank's
                assert np.histogram(part, [0, 60, 72, 83])[0].tolist() == [4, 2, 1]
        taken.append(images)
        main_images = images[images < 60]
        assert len(set(main_images.tolist())) == 56
    b = np.concatenate(taken)
    b = b[(b >= 60) & (b < 72)]
    for own_epoch in range(len(b) // 12):  # three batches of four are an epoch of it, across the epochs of main
        assert sorted(b[12 * own_epoch : 12 * own_epoch + 12].tolist()) == list(range(60, 72))

    def walk(world: int, start: int) -> list[list[int]]:
        passes = []
        for rank in range(world):
            loader = BatchLoader(data, batch_size=14, rank=rank, world=world, sampler=MixedSampler(data, 14, 3, make))
            loader.set_epoch(2)
            passes.append([batch.indices.tolist() for batch in loader.iterate(start)])
        return [list(itertools.chain(*parts)) for parts in zip(*passes, strict=True)]

    assert walk(1, 0) == taken[2].tolist()
    assert walk(3, 4) == taken[2].tolist()[4:]
    with pytest.raises(UserError, match="the data set b has fewer images than its 24 of a batch"):
        MixedSampler(data, 84, 3, make)


# ---------------------------------------------------------------------------------------------------- heads


def mixed_config() -> RunConfig:
    config = RunConfig()
    config.train.batch_size = 14
    config.backbone.embedding_size = 6
    config.head.margin = MarginSettings("CosFace", {"scale": 8.0})
    config.data.mix = [MixedSet("b", weight=0.5, m=0.1), MixedSet("c", weight=0.25, scale=4.0)]
    return config


def heads_on_ranks(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """(rows that this rank holds, gradient) of each head after a backward, then the losses and the gradient of the
    embeddings."""
    torch.manual_seed(0)
    data, config = three(), mixed_config()
    labels = torch.tensor([0, 11, 3, 7, 7, 2, 5, 9, 12, 14, 13, 12, 15, 19])
    x = torch.randn(14, 6, dtype=torch.float64)
    parts = slice(14 * rank // world, 14 * (rank + 1) // world)
    extra = ExtraHeads(config, data, torch.device("cpu"))
    head = config.head.build(6, torch.full((12,), 5), 0, torch.device("cpu"))
    for each in (head, *extra.heads.values()):
        each.double()
        with torch.no_grad():  # known rows: of class c at place i, sin(c + 3 i)
            rows = torch.arange(each.num_classes, dtype=torch.float64)[each.selected]
            local_part(each.weight).copy_(torch.sin(rows[:, None] + 3 * torch.arange(6)))
    mine = x[parts].clone().requires_grad_()
    losses = extra.losses(head, gather(mine, extra.labels(labels[parts], head.ignore_index)))
    losses["loss"].backward()
    found = []
    for each in (head, *extra.heads.values()):
        assert each.weight.grad is not None
        found.append((each.selected, local_part(each.weight.grad)))
    assert mine.grad is not None
    return [
        *found,
        (torch.stack([losses[n].detach() for n in ("loss", "loss_main", "loss_b", "loss_c")]), mine.grad / world),
    ]


def test_mixed_heads_equal_dense_ones_at_every_world_size(ranks):
    torch.manual_seed(0)
    labels = torch.tensor([0, 11, 3, 7, 7, 2, 5, 9, 12, 14, 13, 12, 15, 19])
    x = torch.randn(14, 6, dtype=torch.float64, requires_grad=True)
    weights, own = [], []
    for classes, first, margin, scale in ((12, 0, 0.35, 8.0), (3, 12, 0.1, 8.0), (5, 15, 0.35, 4.0)):
        w = torch.sin(torch.arange(classes, dtype=torch.float64)[:, None] + 3 * torch.arange(6)).requires_grad_()
        of_set = (labels >= first) & (labels < first + classes)
        targets = labels[of_set] - first
        cosines = F.normalize(x[of_set]) @ F.normalize(w).T
        own.append(F.cross_entropy(scale * (cosines - margin * F.one_hot(targets, classes).double()), targets))
        weights.append(w)
    total = (8 * own[0] + 4 * own[1] + 2 * own[2]) / 14
    total.backward()
    assert x.grad is not None
    for world in (1, 2, 3):
        found = ranks(world).run(heads_on_ranks, timeout=120)
        for place, w in enumerate(weights):
            rows = torch.cat([each[place][0] for each in found])
            assert rows.tolist() == list(range(len(w)))
            assert w.grad is not None
            torch.testing.assert_close(torch.cat([each[place][1] for each in found]), w.grad, atol=1e-9, rtol=1e-9)
        for each in found:
            torch.testing.assert_close(each[3][0], torch.stack([total, *own]).detach(), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(torch.cat([each[3][1] for each in found]), x.grad, atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([MixedSet("main")], "a set named 'main'"),
        ([MixedSet("a"), MixedSet("a")], "a unique name"),
        ([MixedSet("a b")], "named 'a b'"),
        ([MixedSet("a", weight=0.0)], r"the weight of a is 0\.0"),
    ],
)
def test_sets_that_cannot_be_mixed_say_so(sets, message):
    with pytest.raises(UserError, match=message):
        check_mix(sets)


@pytest.mark.slow
def test_a_mixed_run_goes_on_exactly_and_evaluates_as_any(tmp_path, capsys):
    for identity in range(6):
        (tmp_path / f"other/p{identity}").mkdir(parents=True)
        for k in range(4):
            Image.new("L", (32, 32), 30 * identity + 5 * k).save(tmp_path / f"other/p{identity}/{k}.png")
    mix = json.dumps([{"name": "other", "folder": str(tmp_path / "other"), "weight": 0.25}])
    settings = [
        "--data.identities",
        "20",
        "--data.mix",
        mix,
        *args("--train.batch_size 50 --train.epochs 2 --train.cpu true"),
    ]
    settings += ["--backbone.embedding_size", "8", "--output.log_every", "1", "--train.checkpoint_steps", "3"]
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(["train", *settings, "--output.folder", str(run)]) == 0
    rows = logged(run)
    assert len(rows) == 2 * (200 // 40)
    for row in rows:
        assert row["loss"] == pytest.approx(0.8 * row["loss_main"] + 0.2 * row["loss_other"], rel=1e-4)
    assert rows[-1]["loss_other"] < rows[0]["loss_other"]
    with (run / "labels_other.csv").open(newline="") as file:
        assert [row["identity"] for row in csv.DictReader(file)] == [f"p{i}" for i in range(6)]
    assert len((run / "labels.csv").read_text().splitlines()) == 21
    steps = RunFolder(run).checkpointer().steps()
    shutil.copytree(run, again)
    shutil.rmtree(again / f"checkpoints/step-{steps[-1]:09d}")
    assert main(["train", "--resume", str(again)]) == 0
    assert f"step {steps[-2]}" in capsys.readouterr().out
    assert logged(again) == rows
    for wrong in (["--center.weight", "0.1"], ["--head.replicas", "2"]):
        with pytest.raises(UserError, match=r"--data\.mix cannot be joined"):
            to_config(train_parser(), [*settings, *wrong])


def test_a_mixed_set_has_a_format_columns_and_a_split_of_its_own(tmp_path):
    import pyarrow.parquet

    content = data_files.samples(2, 2)
    data_files.insightface(tmp_path / "records", content)
    (tmp_path / "records" / "id0").mkdir()  # so that `auto` is not all that works
    parquet = {
        "image": [{"bytes": data, "path": None} for _, data in content],
        "who": [f"n{label}" for label, _ in content],
    }
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table(parquet), tmp_path / "hub" / f"{split}-00000.parquet")
    config = RunConfig()
    config.data = DataConfig(folder=str(tmp_path / "records"), format="recordio", image_size=20)
    config.data.mix = [
        MixedSet("b", str(tmp_path / "hub"), format="parquet", image_column="image", label_column="who", split="train")
    ]
    together = mixed(config, open_data(config.data, 0).train)
    assert isinstance(together, MixedIdentities)
    assert together.identity_names == ["0", "1", "b/n0", "b/n1"]
    assert {name: len(each) for name, each in together.sets.items()} == {"main": 4, "b": 4}
    config.data.mix = [MixedSet("c")]  # the embedded glyphs, grey beside colour
    with pytest.raises(UserError, match="images of different shapes"):
        mixed(config, open_data(config.data, 0).train)


def test_files_that_a_mixed_set_does_not_read_are_told_with_its_name(tmp_path):
    for folder in ("ours", "theirs"):
        for number, (identity, content) in enumerate(data_files.samples(2, 2)):
            path = tmp_path / folder / f"id{identity}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (tmp_path / folder / "id0" / f"{folder}.heic").write_bytes(b"of a phone")
    config = RunConfig()
    config.data = DataConfig(folder=str(tmp_path / "ours"), image_size=20)
    config.data.mix = [MixedSet("b", str(tmp_path / "theirs"))]
    of_ours, of_theirs = mixed(config, open_data(config.data, 0).train).notes
    assert of_ours.startswith("1 files in sub-folders are not read") and of_theirs == f"b: {of_ours}"
