"""A run of insightface goes on here, by the lines of docs/from-insightface.md, as it would have gone on there.

Its loop is written here as one dense float64 process, from its formulas: cos(arccos t + m) without a gradient through
it, a scale of 64, the mean over the global batch, SGD over backbone and class weights, clipping of the backbone alone,
a polynomial schedule with warm-up. Its files are one for each of three ranks.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from near import assert_near
from shards import classes_of, local, part_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

PAGE = Path(__file__).parents[2] / "docs/from-insightface.md"
C, D, WIDTH, N, BEFORE, AFTER = 23, 8, 6, 6, 5, 4
LR, TOTAL, WARMUP, DECAY = 0.1, 30, 3, 5e-4


class PolynomialLRWarmup(torch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, then a power of the share that is left, from step to step; it leaves the first step as it is."""

    def __init__(
        self, optimizer: Any, warmup_iters: int, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1
    ) -> None:
        self.warmup_iters, self.total_iters, self.power = warmup_iters, total_iters, power
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        t, rest = self.last_epoch, self.total_iters - self.last_epoch
        if 0 < t <= self.warmup_iters:
            return [base * t / self.warmup_iters for base in self.base_lrs]
        factor = (rest / (rest + 1)) ** self.power if 0 < t <= self.total_iters else 1.0
        return [group["lr"] * factor for group in self.optimizer.param_groups]


class Loader(list[tuple[Tensor, ...]]):
    """Batches, with the sampler that the loop tells of the epoch."""

    sampler = SimpleNamespace(set_epoch=lambda epoch: None)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(N, WIDTH, generator=generator, dtype=torch.float64), torch.randint(
        0, C, (N,), generator=generator
    )


def their_loop(folder: Path, ranks: int) -> tuple[Tensor, Tensor, list[float]]:
    """Train; write the files of each rank after some steps; return backbone, class weights and norms at the end."""
    generator = torch.Generator().manual_seed(99)
    backbone = nn.Parameter(torch.randn(D, WIDTH, generator=generator).double())
    fc = nn.Parameter(0.01 * torch.randn(C, D, generator=generator).double())
    groups: list[dict[str, Any]] = [{"params": [backbone]}, {"params": [fc], "lr": LR / 2}]
    opt = torch.optim.SGD(groups, lr=LR, momentum=0.9, weight_decay=DECAY)
    scheduler = PolynomialLRWarmup(opt, WARMUP, TOTAL)
    norms = []
    for step in range(BEFORE + AFTER):
        if step == BEFORE:
            write(folder, ranks, backbone, fc, opt, scheduler)
        images, labels = batch(step)
        cosines = (F.normalize(images @ backbone.T) @ F.normalize(fc).T).clamp(-1, 1)
        own = cosines.gather(1, labels[:, None])
        moved = own + (torch.cos(torch.acos(own) + 0.5) - own).detach()
        F.cross_entropy(64 * cosines.scatter(1, labels[:, None], moved), labels).backward()
        norms.append(float(nn.utils.clip_grad_norm_([backbone], 5)))
        opt.step()
        opt.zero_grad()
        scheduler.step()
    return backbone.detach(), fc.detach(), norms


def write(folder: Path, ranks: int, backbone: Tensor, fc: Tensor, opt: Any, scheduler: Any) -> None:
    whole = opt.state_dict()
    start = 0
    for rank in range(ranks):
        stop = start + C // ranks + (rank < C % ranks)
        state = {0: whole["state"][0], 1: {"momentum_buffer": whole["state"][1]["momentum_buffer"][start:stop].clone()}}
        content = {
            "epoch": 1,
            "global_step": BEFORE,
            "state_dict_backbone": {"weight": backbone.detach().clone()},
            "state_dict_softmax_fc": {"weight": fc.detach()[start:stop].clone()},
            "state_optimizer": {"state": state, "param_groups": whole["param_groups"]},
            "state_lr_scheduler": scheduler.state_dict(),
        }
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
        start = stop


def our_loop(rank: int, world: int, folder: str) -> tuple[Tensor, Tensor]:
    """The page's first block builds; its second reads the files; its loop goes on, clipping the backbone alone."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    build, start, loop = blocks[0].partition("for epoch in")
    clip = "clip_grad_norm_(backbone.parameters(), head, max_norm=5, scaler=amp)"
    assert clip in loop
    loop = loop.replace(clip, "torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)")
    read = blocks[1]
    torch.set_default_dtype(torch.float64)
    try:
        backbone: nn.Module = nn.Linear(WIDTH, D, bias=False)
        if world > 1:
            backbone = DistributedDataParallel(backbone)
            read = read.replace("backbone.load_state_dict", "backbone.module.load_state_dict")
        here = part_of(N, rank, world)
        names: dict[str, Any] = {
            "backbone": backbone,
            "device": torch.device("cpu"),
            "PolynomialLRWarmup": PolynomialLRWarmup,
            "train_loader": Loader(tuple(t[here] for t in batch(BEFORE + step)) for step in range(AFTER)),
            "cfg": SimpleNamespace(
                margin_list=(1.0, 0.5, 0.0), embedding_size=D, num_classes=C, sample_rate=1.0, lr=LR, fp16=False,
                weight_decay=DECAY, total_step=TOTAL, warmup_step=WARMUP, gradient_acc=1, output=folder, num_epoch=2,
            ),
        }  # fmt: skip
        for block in (build, read, start + loop):
            exec(compile(block, PAGE.name, "exec"), names)
        assert (names["start_epoch"], names["global_step"]) == (1, BEFORE + AFTER)
        assert [each.last_epoch for each in names["lr_schedulers"]] == [BEFORE + AFTER] * 2
        (weight,) = (p.detach() for p in backbone.parameters())
        return weight.clone(), local(names["head"].weight.detach()).clone()
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_page_has_the_configuration():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block == (PAGE.parents[1] / "configs/insightface.yaml").read_text()


def test_a_run_goes_on_as_there(ranks, tmp_path):
    backbone, fc, norms = their_loop(tmp_path, 3)
    assert max(norms[BEFORE:]) > 5, "clipping has an effect"
    alone = our_loop(0, 1, str(tmp_path))
    for world, results in ((1, [alone]), (2, ranks(2).run(our_loop, str(tmp_path)))):
        for rank, (weight, rows) in enumerate(results):
            assert_near(f"backbone on {world} ranks", weight, backbone)
            assert_near(f"class weights on {world} ranks", rows, fc[classes_of(C, rank, world)])


@pytest.mark.slow
def test_the_example_runs_and_goes_on_from_files_of_ranks(tmp_path):
    from forked import succeed

    from partial_fc.training.backbones import build_backbone

    run = ("examples/from_insightface.py", str(tmp_path))
    losses = [float(each) for each in re.findall(r"epoch \d: loss (\d+\.\d+)", succeed(*run, "", "3", timeout=170))]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert (tmp_path / "fc.safetensors").exists() and (tmp_path / "model.pt").exists()
    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=(1, 32, 32), embedding_size=128)
    group = {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "dampening": 0, "nesterov": False}
    for rank in range(3):
        rows = torch.randn(334 if rank == 0 else 333, 128)
        content = {
            "epoch": 2,
            "state_dict_backbone": backbone.state_dict(),
            "state_dict_softmax_fc": {"weight": rows},
            "state_optimizer": {
                "state": {len(list(backbone.parameters())): {"momentum_buffer": torch.zeros_like(rows)}},
                "param_groups": [
                    {**group, "params": list(range(len(list(backbone.parameters()))))},
                    {**group, "params": [len(list(backbone.parameters()))]},
                ],
            },
        }
        torch.save(content, tmp_path / f"checkpoint_gpu_{rank}.pt")
    out = succeed(*run, str(tmp_path), "3", timeout=170)
    assert re.findall(r"epoch (\d): loss", out) == ["3"]
