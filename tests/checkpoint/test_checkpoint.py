"""Checkpoints are read at any world size, are complete or not visible at all, and loading runs no code."""

from __future__ import annotations

import collections
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shards import local, part_of, two_by_two
from torch import Tensor, nn

from partial_fc import (
    ArcFace,
    CenterLoss,
    CurricularFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace2,
    SubCenterArcFace,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.checkpoint.safe_reader import SafeReader

D = 5


def build(classes: int, optimizer: str) -> tuple[PartialFC, RowOptimizer, nn.Module, torch.optim.Optimizer]:
    head = PartialFC(
        D, classes, Softmax() if optimizer == "adamw" else ArcFace(), 0.5, init_std=1.0, dtype=torch.float64
    )
    cls: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    options = {"lr": 0.1} if optimizer == "adamw" else {"lr": 0.1, "momentum": 0.9}
    torch.manual_seed(0)
    backbone = nn.Linear(3, D).double()
    return head, RowOptimizer(cls, head, **options), backbone, cls(backbone.parameters(), **options)


def train(rank: int, world: int, parts: tuple[Any, ...], start: int, steps: int, classes: int) -> list[float]:
    head, head_optimizer, backbone, optimizer = parts
    losses = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, classes, (12,), generator=generator)
        part = part_of(12, rank, world)
        loss = head(backbone(x[part]), labels[part])
        loss.backward()
        for p in backbone.parameters():
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(p.grad)
            p.grad /= world
        for o in (optimizer, head_optimizer):
            o.step()
            o.zero_grad()
        losses.append(loss.item())
    return losses


def named(parts: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("head", "head_optimizer", "backbone", "optimizer"), parts, strict=True))


def save(rank: int, world: int, path: str, classes: int, kind: str) -> tuple[list[float], Tensor]:
    parts = build(classes, kind)
    train(rank, world, parts, 0, 3, classes)
    save_checkpoint(path, **named(parts))
    weight = local(parts[0].weight).detach().clone()
    return train(rank, world, parts, 3, 3, classes), weight


def load(rank: int, world: int, path: str, classes: int, kind: str) -> tuple[list[float], Tensor]:
    parts = build(classes, kind)
    load_checkpoint(path, **named(parts))
    weight = local(parts[0].weight).detach().clone()
    return train(rank, world, parts, 3, 3, classes), weight


@pytest.mark.parametrize(
    ("kind", "classes", "written_by"),
    [
        ("sgd", 23, 1),
        ("adamw", 23, 3),
        ("adamw", 3, 4),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sgd", 23, 2), ("adamw", 23, 2), ("sgd", 3, 4))),
    ],
)
def test_any_world_size_reads_what_any_other_wrote(ranks, tmp_path, kind, classes, written_by):
    path = str(tmp_path / "checkpoint")
    results = ranks(written_by).run(save, path, classes, kind)
    expected, weight = results[0][0], torch.cat([w for _, w in results])
    for world in (1, 2, 3, 4, 5):
        again = ranks(world).run(load, path, classes, kind)
        assert torch.equal(torch.cat([w for _, w in again]), weight)
        for losses, _ in again:
            assert losses == (expected if world == written_by else pytest.approx(expected, rel=1e-12))
    losses, alone = load(0, 1, path, classes, kind)  # without a process group
    assert torch.equal(alone, weight)
    assert losses == pytest.approx(expected, rel=1e-12)


def stateful(group: Any = None) -> dict[str, Any]:
    """Everything that has a state of its own: a margin with statistics, a trained offset, both kinds of centers, K
    centers a class."""
    options: Any = {"init_std": 1.0, "dtype": torch.float64, "group": group}
    curricular, sphere = (
        PartialFC(D, 11, CurricularFace(momentum=0.5), **options),
        PartialFC(D, 11, SphereFace2(), **options),
    )
    sub = PartialFC(D, 11, SubCenterArcFace(centers=2), 0.5, **options)
    paper, gradient = CenterLoss(D, 11, **options), CenterLoss(D, 11, update="gradient", **options)
    things = {"curricular": curricular, "sphere": sphere, "sub": sub, "paper": paper, "gradient": gradient}
    trained = {n: RowOptimizer(torch.optim.AdamW, t, lr=0.1) for n, t in things.items() if n != "paper"}
    return {**things, **{f"{name}_optimizer": optimizer for name, optimizer in trained.items()}}


def train_stateful(named: dict[str, Any], steps: range, rank: int, world: int) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 11, (12,), generator=generator)
        part = part_of(12, rank, world)
        for thing in list(named.values())[:5]:
            loss = thing(x[part], labels[part])
            losses.append(loss.item())
            if loss.requires_grad:
                loss.backward()
        named["paper"].step()
        for optimizer in list(named.values())[5:]:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def save_stateful(rank: int, world: int, path: str, mesh: bool) -> list[float]:
    named = stateful(two_by_two() if mesh else None)
    train_stateful(named, range(2), rank, world)
    save_checkpoint(path, **named)
    return train_stateful(named, range(2, 5), rank, world)


def load_stateful(rank: int, world: int, path: str, mesh: bool) -> list[float]:
    named = stateful(two_by_two() if mesh else None)
    load_checkpoint(path, **named)
    return train_stateful(named, range(2, 5), rank, world)


@pytest.mark.parametrize("written_by", ["2 ranks", "2 x 2 ranks"])
def test_every_kind_of_state_goes_on_at_any_world_size(ranks, tmp_path, written_by):
    """On a mesh replicas hold the same rows, which are written once."""
    mesh = written_by == "2 x 2 ranks"
    expected = ranks(4 if mesh else 2).run(save_stateful, str(tmp_path), mesh)[0]
    assert len(set(expected)) == 15
    data = next(tmp_path.glob("data-*"))
    listed = sum(info.length for info in SafeReader(data).read_metadata().storage_data.values())
    assert listed == sum(file.stat().st_size for file in data.glob("*.distcp")), "nothing is written twice"
    for world, on_mesh in ((1, False), (2, False), (3, False), (4, True)):
        for losses in ranks(world).run(load_stateful, str(tmp_path), on_mesh):
            assert losses == pytest.approx(expected, rel=1e-11)


def test_saved_alone_loads_on_ranks(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("partial_fc.checkpoint.layout.ROW_BLOCK_BYTES", 64)
    path = str(tmp_path / "checkpoint")
    expected, weight = save(0, 1, path, 23, "sgd")
    again = ranks(3).run(load, path, 23, "sgd")
    assert torch.equal(torch.cat([w for _, w in again]), weight)
    assert again[0][0] == pytest.approx(expected, rel=1e-12)


def save_in_small_blocks(rank: int, world: int, path: str) -> None:
    import partial_fc.checkpoint.layout

    before, partial_fc.checkpoint.layout.ROW_BLOCK_BYTES = partial_fc.checkpoint.layout.ROW_BLOCK_BYTES, 2 * D * 8
    try:
        save_checkpoint(path, head=PartialFC(D, 23, seed=3, dtype=torch.float64))
    finally:
        partial_fc.checkpoint.layout.ROW_BLOCK_BYTES = before


def test_rows_are_written_in_blocks(ranks, tmp_path):
    ranks(3).run(save_in_small_blocks, str(tmp_path))
    head = PartialFC(D, 23, seed=4, dtype=torch.float64)
    load_checkpoint(tmp_path, head=head)
    assert torch.equal(head.weight, PartialFC(D, 23, seed=3, dtype=torch.float64).weight)


def test_a_second_save_replaces_the_first_and_a_torn_one_does_not(tmp_path, monkeypatch):
    head = PartialFC(D, 7)
    save_checkpoint(tmp_path, head=head)
    first = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.add_(1)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("partial_fc.checkpoint.save_load.os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, head=head)
    other = PartialFC(D, 7, seed=1)
    load_checkpoint(tmp_path, head=other)
    assert torch.equal(other.weight, first)
    save_checkpoint(tmp_path, head=head)
    load_checkpoint(tmp_path, head=other)
    assert torch.equal(other.weight, head.weight)
    assert len(list(tmp_path.glob("data-*"))) == 1


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_checkpoint(tmp_path, head=PartialFC(D, 7))
    save_checkpoint(tmp_path / "a", head=PartialFC(D, 7))
    with pytest.raises(ValueError, match=r"head/weight has shape \[7, 5\], but the shape here is \[8, 5\]"):
        load_checkpoint(tmp_path / "a", head=PartialFC(D, 8))
    with pytest.raises(ValueError, match="has no center; it has head"):
        load_checkpoint(tmp_path / "a", center=PartialFC(D, 7))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "below", head=PartialFC(D, 7))
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path / "a", head=PartialFC(D, 7))


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    save_checkpoint(tmp_path / "a", head=PartialFC(D, 7))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({"format": 1, "data": "../a", "names": ["head"]}))
    with pytest.raises(ValueError, match="not a folder next to it"):
        load_checkpoint(tmp_path / "b", head=PartialFC(D, 7))


def test_damaged_files_are_named(tmp_path):
    save_checkpoint(tmp_path, head=PartialFC(D, 7))
    data = next(tmp_path.glob("data-*"))
    shard = next(data.glob("*.distcp"))
    for file in (data / ".metadata", shard):
        whole = file.read_bytes()
        head = PartialFC(D, 7, seed=9)
        file.write_bytes(whole[:100])
        with pytest.raises(
            ValueError, match=rf"is incomplete: .*{file.name} has 100 bytes of {len(whole)}; copy it again"
        ):
            load_checkpoint(tmp_path, head=head)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=f"{file.name} is missing"):
            load_checkpoint(tmp_path, head=head)
        assert torch.equal(head.weight, PartialFC(D, 7, seed=9).weight)
        file.write_bytes(whole)
    for file, words in ((data / ".metadata", r"\.metadata is damaged"), (shard, "cannot be read")):
        whole = file.read_bytes()
        file.write_bytes(bytes(len(whole)))  # the right size, and not what was written
        with pytest.raises((OSError, ValueError), match=words):
            load_checkpoint(tmp_path, head=PartialFC(D, 7))
        file.write_bytes(whole)


def test_neighbours_of_a_checkpoint_stay(tmp_path):
    for name in ("data-train", "data-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    (tmp_path / "data-0009").write_text("a file")
    for _ in range(2):
        save_checkpoint(tmp_path, head=PartialFC(D, 7))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "data-0009",
        "data-0011",
        "data-1",
        "data-train",
        "manifest.json",
    ]


class State:
    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_states_are_plain_values_or_refused_before_anything_is_replaced(tmp_path):
    plain = State(
        lr=np.float64(0.1), steps=(1, 2), nested=[{"a": torch.ones(2)}], counter=collections.Counter([3, 3]), none=None
    )
    save_checkpoint(tmp_path, plain=plain)
    with pytest.raises(TypeError, match="odd"):
        save_checkpoint(tmp_path, odd=State(path=Path("x")))
    other = State(nested=[{"a": torch.zeros(2)}])
    load_checkpoint(tmp_path, plain=other)
    assert other.state["lr"] == 0.1 and other.state["steps"] == (1, 2) and other.state["counter"][3] == 2
    assert torch.equal(other.state["nested"][0]["a"], torch.ones(2))


def load_where_one_rank_sees_nothing(rank: int, world: int, path: str) -> str:
    try:
        load_checkpoint(path if rank == 0 else path + "-elsewhere", head=PartialFC(D, 7))
    except OSError as error:
        return str(error)
    return "loaded"


def test_a_folder_that_one_rank_does_not_see_is_an_error_on_all(ranks, tmp_path):
    save_checkpoint(tmp_path / "a", head=PartialFC(D, 7))
    texts = ranks(2).run(load_where_one_rank_sees_nothing, str(tmp_path / "a"))
    assert len(set(texts)) == 1
    assert texts[0].startswith("rank 1: no complete checkpoint")


def _believe_sizes(folder: Path) -> None:
    """Make the manifest agree with files that were changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: (folder / manifest["data"] / name).stat().st_size for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_metadata_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "a", head=PartialFC(D, 7))
    data = next((tmp_path / "a").glob("data-*"))
    (data / ".metadata").write_bytes(pickle.dumps(Malicious()))
    _believe_sizes(tmp_path / "a")
    with pytest.raises(ValueError, match="do not trust this file"):
        load_checkpoint(tmp_path / "a", head=PartialFC(D, 7))
    assert not Path("ran").exists()
