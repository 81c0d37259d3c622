"""The end of an epoch: only whole steps are trained, and data sets that are too small are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from partial_fc.training.cli.main import train_parser
from partial_fc.training.config import RunConfig, to_config
from partial_fc.training.data.loader import Batch, BatchLoader
from partial_fc.training.errors import UserError
from partial_fc.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SMALL = ["--data.identities", "60", "--train.batch_size", "64", "--train.accumulation", "4", "--output.log_every", "1"]


def settings(folder: Path, *more: str) -> RunConfig:
    config: RunConfig = to_config(
        train_parser(),
        ["--config", str(ROOT / "configs/quickstart.yaml"), "--output.folder", str(folder), *SMALL, *more],
    )
    return config


def test_micro_batches_that_make_no_whole_step_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    """Of each epoch's micro-batches so many cannot be read that two of the others make no step: no gradient of theirs
    waits at its end."""
    trainer = Trainer(settings(tmp_path / "run", "--train.epochs", "2", "--center.weight", "0.01"))
    whole, accumulation = len(trainer.loader), 4
    steps = whole // accumulation - 1
    unreadable = whole - (steps * accumulation + 2)
    iterate = BatchLoader.iterate

    def damaged(loader: BatchLoader, start: int = 0) -> Iterator[Batch]:
        for place, batch in enumerate(iterate(loader, start), start):
            few = slice(1 if place < unreadable else None)
            yield Batch(batch.images[few], batch.labels[few], batch.indices[few], [])

    monkeypatch.setattr(BatchLoader, "iterate", damaged)
    seen: list[list[int]] = [[]]
    trainer.head.register_forward_hook(lambda head, given, _: seen[-1].append(len(given[0].labels)))
    saved: list[tuple[int, bool]] = []

    def save(metric: float | None = None) -> None:
        assert trainer.center is not None
        pending: list[Any] = [p.grad for p in trainer.engine.model.parameters()]
        pending += [trainer.head.class_rows.grad_rows, trainer.head.weight.grad, trainer.center._pending]
        saved.append(
            (trainer.progress.step, all(p is None or (isinstance(p, torch.Tensor) and not p.any()) for p in pending))
        )
        seen.append([])

    monkeypatch.setattr(trainer, "_save", save)
    trainer.train()
    trainer.close()
    assert saved == [(steps, True), (2 * steps, True)]
    assert [len(epoch) for epoch in seen] == [steps * accumulation] * 2 + [0] and set(seen[0]) == {16}
    assert trainer.progress.left_out == 2 * (unreadable + 2)
    count = len(trainer.data.train)
    taken = whole // accumulation * 64
    out = capsys.readouterr().out
    assert taken < count and f"an epoch uses {taken:,} of {count:,} images" in out
    assert "a smaller" not in out, "few are left out"
    assert out.startswith("training on the CPU, as --train.cpu says\n")


def test_a_batch_that_leaves_out_many_images_is_told(tmp_path, monkeypatch, capsys):
    trainer = Trainer(settings(tmp_path / "run", "--train.epochs", "1", "--train.batch_size", "400"))
    count = len(trainer.data.train)
    assert 440 < count < 800
    monkeypatch.setattr(trainer, "_train_epoch", lambda epoch, bar: None)
    monkeypatch.setattr(trainer, "_save", lambda metric=None: None)
    trainer.train()
    trainer.close()
    left = f"(a step takes 400, and {count - 400} are left over; a smaller --train.batch_size leaves out fewer)"
    assert left in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train.batch_size", "100000", "--train.accumulation", "1"], "fewer than one batch of 100000"),
        (
            ["--train.batch_size", "2000", "--train.accumulation", "100"],
            "training images are fewer than one batch of 2000",
        ),
        (
            ["--train.batch_size", "4", "--train.accumulation", "4"],
            "fewer than 2 images for each of 1 ranks and 4 micro-batches",
        ),
    ],
)
def test_a_data_set_or_batch_that_is_too_small_is_one_clear_error(tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        Trainer(settings(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()
