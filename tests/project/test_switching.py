"""The pages for those who come from other trainers: their Python runs, in order, with stand-ins for what a reader has.

docs/from-insightface.md is run in tests/weights/test_from_insightface.py, which compares what comes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import needs

from partial_fc import ArcFace, PartialFC, RowOptimizer
from partial_fc.training.cli.main import train_parser
from partial_fc.training.config import to_config

DOCS = Path(__file__).parents[2] / "docs"
D, C = 8, 30


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 6, generator=generator), torch.randint(0, C, (4,), generator=generator)) for _ in range(count)
    ]


def metric_learning(folder: Path) -> dict[str, Any]:
    from pytorch_metric_learning.losses import SubCenterArcFaceLoss

    model = torch.nn.Linear(6, D)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loader": batches(),
        "embedding_size": D,
        "num_classes": C,
        "loss_func": SubCenterArcFaceLoss(num_classes=C, embedding_size=D, sub_centers=3),
    }


def fast_reid(folder: Path) -> dict[str, Any]:
    model = torch.nn.Linear(6, D)
    torch.save({"model": {"heads.weight": torch.randn(C, D)}}, folder / "model.pth")
    heads = SimpleNamespace(CLS_LAYER="ArcSoftmax", SCALE=64, MARGIN=0.35, NUM_CLASSES=C, EMBEDDING_DIM=D)
    config = SimpleNamespace(
        HEADS=heads,
        LOSSES=SimpleNamespace(CE=SimpleNamespace(EPSILON=0.1)),
        WEIGHTS=str(folder / "model.pth"),
    )
    return {
        "cfg": SimpleNamespace(MODEL=config, SOLVER=SimpleNamespace(BASE_LR=0.1)),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": [{"images": x, "targets": y} for x, y in batches()],
    }


def wespeaker(folder: Path) -> dict[str, Any]:
    model = torch.nn.Linear(6, D)
    update = {
        "initial_margin": 0.0, "final_margin": 0.2, "increase_start_epoch": 2, "fix_start_epoch": 3, "increase_type": "exp",
    }  # fmt: skip
    projection = {"scale": 32.0, "easy_margin": False, "K": 3, "k_top": 5, "mp": 0.06}
    return {
        "configs": {"projection_args": projection, "margin_update": update},
        "model": model,
        "embed_dim": D,
        "num_class": C,
        "epoch_iter": 2,
        "dataloader": [{"feat": x, "label": y} for x, y in batches(6)],
    }


def engines(folder: Path) -> dict[str, Any]:
    from partial_fc import clip_grad_norm_, gather

    head = PartialFC(D, C, ArcFace())
    return {
        "torch": torch,
        "backbone": torch.nn.Linear(6, D),
        "loader": batches(),
        "head": head,
        "head_optimizer": RowOptimizer(torch.optim.SGD, head, lr=0.1),
        "gather": gather,
        "clip_grad_norm_": clip_grad_norm_,
    }


PAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "from-metric-learning.md": metric_learning,
    "from-fast-reid.md": fast_reid,
    "from-wespeaker.md": wespeaker,
    "engines.md": engines,
}


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=needs("pytorch_metric_learning")) if "metric" in p else p for p in PAGES]
)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(page, PAGES[page](tmp_path))
    if page == "from-metric-learning.md":
        theirs = names["loss_func"].W.detach().T.view(C, 3, D)
        assert torch.equal(names["head"].weight.detach(), theirs)
        chosen = theirs[torch.arange(C), names["found"].centers.clamp(min=0)]
        assert torch.equal(names["one"].weight.detach(), chosen)
    if page == "from-fast-reid.md":
        saved = torch.load(tmp_path / "model.pth")["model"]["heads.weight"]
        assert torch.equal(names["head"].weight.detach(), saved)
    if page == "from-wespeaker.md":
        assert names["margins"].steps == 6 and names["head"].margin.margin == 0.2
        assert names["head"].inter_topk_penalty == pytest.approx(0.06)
        assert torch.equal(names["tuned"].weight.detach(), names["head"].weight.detach())
        assert names["tuned"].margin.margin == 0.5


def test_circle_softmax_is_a_margin(tmp_path):
    """In one process: the class of the page is not importable by others."""
    names = run("from-fast-reid.md", fast_reid(tmp_path))
    margin = names["CircleSoftmax"](8.0, 0.25)
    cosine = torch.tensor([0.9, -0.5])
    expected = torch.tensor([0.35 * (0.9 - 0.75), 1.75 * (-0.5 - 0.75)])
    torch.testing.assert_close(margin.target(cosine, None), expected)
    others = torch.tensor([[0.5, -0.9]])
    torch.testing.assert_close(margin.negative(others, cosine), torch.tensor([[0.75 * 0.25, 0.0]]))


SETTINGS = [
    "--head.margin ArcFace --head.margin.gradient straight_through --head.margin.past_pi plain",
    "--head.margin CosFace --head.margin.margin 0.4 --head.interclass_filter 0.4 --head.sample_rate 0.2",
    "--schedule.shape polynomial --schedule.power 2 --schedule.warmup_epochs 1 --train.epochs 20 --train.accumulation 2",
    "--evaluation.verification [lfw.bin,cfp_fp.bin] --evaluation.every_steps 2000 --seed 2048 --data.workers 2",
    "--head.margin SubCenterArcFace --head.margin.centers 3 --head.inter_topk 5 --head.inter_topk_penalty 0.06",
    "--head.margin SphereFace --head.margin.annealing 5 --head.margin.normalize_embeddings false --head.margin.scale 1 "
    "--head.margin_schedule.argument annealing --head.margin_schedule.start 1000 --head.margin_schedule.shape harmonic "
    "--head.margin_schedule.end_epochs 5",
    "--head.margin SphereFace2 --head.margin.kind arc --head.margin.scale 32",
    "--head.margin ArcFace --head.margin.past_pi joined --head.margin.easy_margin true",
    "--data.sampler pk --data.images_per_identity 4 --head.label_smoothing 0.1 --train.clip_norm 5 --head_lr_factor 1",
    "--head.margin_schedule.start 0.5 --head.margin_schedule.begin_epochs 0 --head.margin_schedule.end_epochs 1 "
    "--head.margin.margin 0.5 --head.inter_topk 0 --optimizer.lr 0.0001 --train.epochs 5",
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_settings_that_the_pages_name_can_be_given(settings, monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    to_config(train_parser(), ["--config", "configs/quickstart.yaml", *settings.split()])
