"""`train --check` refuses what the run itself would refuse, and no more; both in the same words, with nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched import tiny_run

from partial_fc.training.cli.main import main


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over 32 images of four identities, with two more held out."""
    root = tmp_path_factory.mktemp("check")
    return tiny_run(root, data={"holdout_identities": 2, "workers": 0}, output={"trackers": []})


BEST = "--evaluation.every 1 --evaluation.best"
MISTAKES = {
    "--train.batch_size 1": "--train.batch_size 1 leaves fewer than 2 images for each of 1 ranks",
    "--train.batch_size 8 --train.accumulation 8": "and 8 micro-batches, which batch normalisation needs",
    "--train.batch_size 64": "32 training images are fewer than one batch of 64",
    "--head.sample_rate 0.5 --head.hard_negatives 30": "--head.hard_negatives is 30; with 4 identities it can be at most 3",
    "--head.sample_rate 0.5 --head.sample_block 10000": "--head.sample_block is 10000; with 4 identities",
    "--optimizer AdamW --optimizer.capturable true": "--optimizer.capturable is for a GPU",
    "--optimizer AdamW --optimizer.capturable true --head_optimizer SGD --head_optimizer.lr 0.1": "is on the CPU",
    "--head_optimizer AdamW --head_optimizer.capturable true": "--head_optimizer.capturable is for a GPU",
    "--head.margin partial_fc.Margin": "Margin defines no target(cosine, positives), which every margin needs",
    "--head.margin partial_fc.AdaptiveMargin --head.margin.scale 0": "scale must be a positive number",
    f"{BEST} holdout/tar@1e-2": "needs 1,000 pairs of different identities, and the holdout set has 64",
    f"{BEST} holdout/tar@1e-5": "needs 1,000,000 pairs of different identities",
    "--data.mix [{name:a,folder:x,wieght:2}]": "data.mix",
    "--data.mix [{name:a,folder:nowhere}]": "the set a of --data.mix: the data folder nowhere does not exist; check its",
    "--data.mix [{name:a,identities:5000,folder:{data}}]": "the set a of --data.mix: 5000 identities were asked for",
}


@pytest.mark.parametrize("check", [["--check"], []])
@pytest.mark.parametrize("given", MISTAKES)
def test_the_check_refuses_what_the_run_refuses(settings, tmp_path, mistake, given, check):
    data = str(settings.parent / "images")
    given_settings = [each.replace(":", ": ").replace("{data}", data) for each in given.split()]
    line = mistake("train", settings, "--output.folder", tmp_path / "run", *given_settings, *check)
    assert MISTAKES[given] in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given",
    [
        "--train.batch_size 2 --train.accumulation 1",
        f"{BEST} holdout/eer",
        "--head.sample_rate 0.5 --head.sample_block 4",
    ],
)
def test_the_check_takes_what_a_run_takes(settings, tmp_path, given):
    assert main(["train", str(settings), "--output.folder", str(tmp_path / "run"), *given.split(), "--check"]) == 0


def test_hard_negatives_of_a_mixed_set_are_checked_by_its_own_classes(settings, tmp_path, mistake):
    few = tmp_path / "few"
    few.mkdir()
    for name in ("id0", "id1"):
        (few / name).symlink_to(settings.parent / "images" / name)
    mix = f"[{{name: few, folder: {few}}}]"
    start = ["train", settings, "--output.folder", tmp_path / "run", "--data.mix", mix, "--check"]
    line = mistake(*start, "--head.sample_rate", "0.5", "--head.hard_negatives", "2")
    assert "--head.hard_negatives is 2; with 2 identities it can be at most 1" in line
