"""Optimizers by name and learning-rate schedules: the papers' formulas, exact resumption, invalid settings."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import args
from launched import logged
from torch import Tensor, nn

from partial_fc import ArcFace, PartialFC, RowWiseAdagrad, load_checkpoint, save_checkpoint
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import RunConfig, keep_still_rows, to_config
from partial_fc.training.errors import UserError
from partial_fc.training.optimizers import Optimizers, OptimizerSettings
from partial_fc.training.schedules import HeadScheduleConfig, ScheduleConfig, build_schedules, learning_rate_factor
from partial_fc.training.settings_parser import plain_settings
from partial_fc.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
NAMES = tuple(OptimizerSettings.names)
RATES = {
    "SGD": 0.1,
    "LookaheadSGD": 0.1,
    "LARS": 5.0,
    "Adagrad": 0.1,
    "RowWiseAdagrad": 0.1,
    "Adadelta": 5.0,
    "ASGD": 0.1,
}
OF_HEAD = {"Adafactor": OptimizerSettings("SGD", {"lr": 0.1, "momentum": 0.9})}  # it has factors of the whole matrix


def optimizers(name: str, factor: float = 1.0, **arguments: Any) -> Optimizers:
    """As settings say; weight decay of all that have it."""
    decay = {"weight_decay": 5e-4} if "weight_decay" in OptimizerSettings.takes(name, "optimizer") else {}
    momentum = {"momentum": 0.9} if name in ("SGD", "LARS", "LookaheadSGD") else {}
    settings = OptimizerSettings(name, {**decay, **momentum, **arguments})
    return Optimizers(settings, OF_HEAD.get(name), factor)


class Run:
    """A small network and a head that learn to tell 12 points apart."""

    def __init__(self, name: str) -> None:
        self.backbone = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8))
        for i, parameter in enumerate(self.backbone.parameters()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
        self.head = PartialFC(8, 12, ArcFace(scale=8.0, margin=0.1), sample_rate=0.5)
        config = optimizers(name, lr=RATES.get(name, 0.02))
        self.optimizers = [config.build(self.backbone.parameters()), config.build_head(self.head)]
        self.schedules = build_schedules(ScheduleConfig(warmup_epochs=1), HeadScheduleConfig(), self.optimizers, 4, 15)

    def step(self) -> float:
        x = torch.randn(12, 5, generator=torch.Generator().manual_seed(5))
        loss = self.head(self.backbone(x), torch.arange(12))
        loss.backward()
        for each in (*self.optimizers, *self.schedules):
            each.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return float(loss.detach())

    def named(self) -> dict[str, Any]:
        things = {"optimizer": self.optimizers, "schedule": self.schedules}
        return {f"{what}{i}": each for what, two in things.items() for i, each in enumerate(two)} | {
            "b": self.backbone,
            "h": self.head,
        }


@pytest.mark.parametrize("name", NAMES)
def test_every_name_learns_and_goes_on_exactly(name, tmp_path):
    """Saved after a step within a period of Lookahead, and loaded into a run that has made no step."""
    run = Run(name)
    losses = [run.step() for _ in range(9)]
    save_checkpoint(tmp_path, **run.named())
    losses += [run.step() for _ in range(51)]
    assert losses[-1] < 0.7 * losses[0], losses
    again = Run(name)
    load_checkpoint(tmp_path, **again.named())
    assert [again.step() for _ in range(51)] == losses[9:]
    for mine, theirs in zip(
        [*again.backbone.parameters(), again.head.weight], [*run.backbone.parameters(), run.head.weight], strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_HEAD])
def test_a_head_has_the_same_step_without_norms(name):
    config = optimizers(name, 0.1, lr=0.5)
    cls, options = config.head_class()
    assert options["lr"] == pytest.approx(0.05)
    assert options.get("weight_decay") == config.optimizer.init_args.get("weight_decay")
    without = {"LARS": "SGD", "LAMB": "AdamW", "LookaheadSGD": "SGD", "LookaheadAdamW": "AdamW", "Ranger": "RAdam"}
    without |= {"AdaBelief": "AdamW", "Yogi": "Adam"}
    assert cls is (RowWiseAdagrad if name == "RowWiseAdagrad" else getattr(torch.optim, without.get(name, name)))
    if name not in without:
        backbone = config.build([nn.Parameter(torch.zeros(1))])
        assert type(backbone) is cls and all(backbone.defaults[k] == v for k, v in options.items() if k != "lr")
    config.head_optimizer, config.head_lr_factor = OptimizerSettings("SGD", {"lr": 0.3}), 1.0
    assert config.head_class() == (torch.optim.SGD, {"lr": 0.3})
    config.check()


def test_rangers_head_is_radam_with_decoupled_weight_decay():
    cls, options = optimizers("Ranger", lr=0.5).head_class()
    assert (cls, options["decoupled_weight_decay"]) == (torch.optim.RAdam, True)
    assert "betas" not in options


def test_a_head_has_the_betas_of_the_backbone():
    betas = {"betas": (0.8, 0.9)}
    for name in ("LAMB", "LookaheadAdamW", "AdaBelief", "Yogi", "AdamW"):
        assert list(optimizers(name, **betas).head_class()[1]["betas"]) == [0.8, 0.9]


# ---------------------------------------------------------------------------------------------------- formulas


def problem() -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 4), (3,)]
    start = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return start, [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(7)]


def moved(config: Optimizers) -> list[list[Tensor]]:
    """The parameters after each step of `problem`."""
    start, steps = problem()
    parameters = [nn.Parameter(p.clone()) for p in start]
    optimizer, after = config.build(parameters), []
    for grads in steps:
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        after.append([p.detach().clone() for p in parameters])
    return after


def lamb(w: Tensor, grads: list[Tensor], lr: float, decay: float) -> list[Tensor]:
    """Algorithm 2 of 1904.00962 (v3: without correction of the bias), phi(z) = min(z, 10)."""
    m, v, after = torch.zeros_like(w), torch.zeros_like(w), []
    for g in grads:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        r = m / (v.sqrt() + 1e-6) + decay * w
        w = w - lr * min(float(w.norm()), 10.0) / float(r.norm()) * r
        after.append(w)
    return after


def lars(w: Tensor, grads: list[Tensor], lr: float, decay: float, trust: float) -> list[Tensor]:
    """Algorithm 1 of 1708.03888, the learning rate on the momentum as in torch's SGD."""
    v, after = torch.zeros_like(w), []
    for g in grads:
        local = trust * w.norm() / (g.norm() + decay * w.norm())
        v = 0.9 * v + local * (g + decay * w)
        w = w - lr * v
        after.append(w)
    return after


def lookahead_sgd(w: Tensor, grads: list[Tensor], lr: float, decay: float, k: int, alpha: float) -> list[Tensor]:
    """Algorithm 1 of 1907.08610: slow weights begin as the initial ones and move every k steps."""
    slow, v, after = w, torch.zeros_like(w), []
    for step, g in enumerate(grads, 1):
        v = 0.9 * v + g + decay * w
        w = w - lr * v
        if step % k == 0:
            slow = slow + alpha * (w - slow)
            w = slow
        after.append(w)
    return after


FORMULAS = [
    (optimizers("LAMB", lr=0.05, weight_decay=0.1), lambda w, g: lamb(w, g, 0.05, 0.1)),
    (optimizers("LARS", lr=2.0, weight_decay=0.1), lambda w, g: lars(w, g, 2.0, 0.1, 0.001)),
    (
        optimizers("LARS", lr=0.5, weight_decay=0.1, trust_coefficient=0.02),
        lambda w, g: lars(w, g, 0.5, 0.1, 0.02),
    ),
    (optimizers("LookaheadSGD", lr=0.1, weight_decay=0.1), lambda w, g: lookahead_sgd(w, g, 0.1, 0.1, 5, 0.5)),
    (
        optimizers("LookaheadSGD", lr=0.1, weight_decay=0.1, lookahead_steps=3, lookahead_alpha=0.8),
        lambda w, g: lookahead_sgd(w, g, 0.1, 0.1, 3, 0.8),
    ),
]


@pytest.mark.parametrize(
    ("config", "reference"), FORMULAS, ids=lambda v: v.optimizer.name if isinstance(v, Optimizers) else ""
)
def test_steps_are_those_of_the_papers(config, reference):
    start, steps = problem()
    expected = zip(*(reference(w, [grads[i] for grads in steps]) for i, w in enumerate(start)), strict=True)
    for step, (mine, theirs) in enumerate(zip(moved(config), expected, strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=f"step {step}")


def test_a_learning_rate_reaches_what_looks_ahead_after_loading():
    """torch-optimizer's own class keeps groups of its own after load_state_dict, and the schedule has no effect."""
    p = nn.Parameter(torch.ones(2))
    optimizer = optimizers("LookaheadSGD", lr=0.1, momentum=0.0, weight_decay=0.0).build([p])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    changes = []
    for _ in range(3):
        before = p[0].item()
        p.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
        changes.append(before - p[0].item())
    assert changes == pytest.approx([0.1, 0.05, 0.025])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("--optimizer LARS --optimizer.weight_decay 0", "LARS: no step is scaled without weight decay"),
        ("--optimizer LARS --optimizer.trust_coefficient 0", "trust_coefficient is 0.0; give a number above 0"),
        ("--optimizer LAMB --optimizer.lr 0", "--optimizer LAMB: Invalid learning rate: 0"),
        ("--optimizer.lr -1", "--optimizer SGD: Invalid learning rate: -1.0"),
        ("--optimizer.weight_decay -1", "--optimizer SGD: Invalid weight_decay value: -1.0"),
        ("--optimizer.trust_coefficient 0.1", "SGD has no argument trust_coefficient; it takes lr, momentum"),
        ("--optimizer Ranger --optimizer.lookahead_steps 0", "lookahead_steps is 0; give at least 1"),
        ("--optimizer Ranger --optimizer.lookahead_alpha 2", "give a share in (0, 1]"),
        ("--optimizer torch.optim.LBFGS", "LBFGS needs a closure in each step"),
        ("--optimizer sdg", "--optimizer is sdg; choose one of SGD, Adam, AdamW"),
        ("--optimizer pathlib.Path", "pathlib.Path is not a subclass of Optimizer"),
        ("--head_optimizer LAMB", "--head_optimizer LAMB, of the head: LAMB moves a row by what other rows hold"),
        ("--optimizer Adafactor", "--optimizer Adafactor, of the head: Adafactor moves a row by what other rows hold"),
        ("--head_optimizer.lr 3", "--head_optimizer.lr needs the class that it is an argument of"),
        (
            "--head_optimizer SGD --head_lr_factor 3",
            "--head_lr_factor is 3.0, which has no effect with --head_optimizer",
        ),
        ("--head_skipped_rows frozen", "frozen"),
        ("--head_lr_factor -1", "--head_lr_factor is -1.0; give at least 0"),
        ("--schedule.shape multistep", "needs --schedule.milestones"),
        ("--schedule.shape step", "needs --schedule.every"),
        ("--schedule.every 2", "--schedule.every is 2.0, which has no effect with --schedule.shape cosine"),
        ("--schedule.shape multistep --schedule.milestones [8,4]", "each later than the one before"),
        ("--schedule.by epoch --schedule.warmup_epochs 0.5", "must be whole epochs"),
        (
            "--schedule.warmup_epochs 2 --train.epochs 2",
            "--schedule.warmup_epochs is 2 of 2, so that the learning rate would rise until",
        ),
        ("--head_schedule.warmup_epochs 13", "--head_schedule.warmup_epochs is 13 of 12"),
        ("--schedule.final 2", "at most 1"),
        ("--schedule.drop -1", "--schedule.drop is -1.0; give at least 0"),
        ("--head_schedule.shape step", "--head_schedule.shape step needs --head_schedule.every"),
    ],
)
def test_what_cannot_be_is_one_line(settings, expected, capsys, tmp_path):
    assert main(["train", *settings.split(), "--output.folder", str(tmp_path / "run"), "--check"]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_optimizer", None)
    monkeypatch.delitem(sys.modules, "partial_fc.training.more_optimizers")
    words = r"--optimizer LAMB needs the package torch-optimizer: pip install 'partial_fc\[optimizers\]'"
    with pytest.raises(UserError, match=words):
        optimizers("LAMB").check()
    with pytest.raises(UserError, match=words):
        to_config(train_parser(), ["--optimizer", "LAMB"])
    optimizers("AdamW").check()


# ---------------------------------------------------------------------------------------------------- schedules


def test_schedules_by_step():
    cosine = learning_rate_factor(ScheduleConfig("cosine", warmup_epochs=0.5), 10, 4)
    assert [cosine(s) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert cosine(5) == 1.0 and cosine(40) == pytest.approx(0, abs=1e-12)
    values = [cosine(s) for s in range(5, 41)]
    assert values == sorted(values, reverse=True)
    polynomial = learning_rate_factor(ScheduleConfig("polynomial", power=2.0, warmup_epochs=0), 10, 1)
    assert polynomial(5) == pytest.approx(0.25)
    assert learning_rate_factor(ScheduleConfig("polynomial", power=1.0, warmup_epochs=0, final=0.2), 10, 1)(
        5
    ) == pytest.approx(0.6)
    assert learning_rate_factor(ScheduleConfig("constant", warmup_epochs=0), 10, 1)(9) == 1.0
    step = learning_rate_factor(ScheduleConfig("step", warmup_epochs=0, every=1.5, drop=0.5), 10, 4)
    assert [step(s) for s in (0, 14, 15, 29, 30)] == [1.0, 1.0, 0.5, 0.5, 0.25]
    multi = learning_rate_factor(ScheduleConfig("multistep", warmup_epochs=1, milestones=[2, 2.5]), 10, 4)
    assert [multi(s) for s in (4, 9, 10, 19, 20, 24, 25)] == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(("epochs", "expected"), [(1, 0.1), (4, 0.025), (20, 0.01)])
def test_a_short_run_warms_up_for_a_tenth_of_it(epochs, expected):
    """A run of one epoch would otherwise rise until it ends."""
    factor = learning_rate_factor(ScheduleConfig(), 100, epochs)
    assert [factor(s) for s in range(2)] == pytest.approx([expected, 2 * expected])
    assert factor(min(100, 10 * epochs)) == 1.0
    assert factor(100 * epochs - 1) < 0.01


def test_schedules_by_epoch_stand_still_within_one():
    cosine = learning_rate_factor(ScheduleConfig("cosine", warmup_epochs=2, by="epoch"), 3, 6)
    values = [cosine(s) for s in range(18)]
    assert values[::3] == values[1::3] == values[2::3]
    assert values[::3] == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    multi = learning_rate_factor(ScheduleConfig("multistep", warmup_epochs=0, by="epoch", milestones=[1, 3]), 3, 4)
    assert [multi(s) for s in range(12)] == pytest.approx([1] * 3 + [0.1] * 6 + [0.01] * 3)


def test_a_head_may_have_a_schedule_of_its_own():
    backbone = ScheduleConfig("multistep", milestones=[2.0], drop=0.5, warmup_epochs=0)
    assert HeadScheduleConfig().over(backbone) == backbone
    assert HeadScheduleConfig(shape="cosine").over(backbone) == ScheduleConfig("cosine", warmup_epochs=0, drop=0.5)
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=rate) for rate in (0.1, 1.0)]
    schedules = build_schedules(backbone, HeadScheduleConfig(shape="constant", warmup_epochs=0.5), optimizers, 4, 4)
    rates = []
    for _ in range(10):
        rates.append([float(s.get_last_lr()[0]) for s in schedules])
        for each in (*optimizers, *schedules):
            each.step()
    assert [b for b, _ in rates] == pytest.approx([0.1] * 8 + [0.05] * 2)
    assert [h for _, h in rates] == pytest.approx([0.5] + [1.0] * 9)


# ---------------------------------------------------------------------------------------------------- in a run


def test_a_run_with_ranger_and_two_schedules_goes_on_exactly(tmp_path):
    """On Accelerate, which wraps the backbone's optimizer, and from a saved config.yaml."""
    settings = ["--data.identities", "30", "--train.batch_size", "64", "--train.epochs", "2", "--train.cpu", "true"]
    settings += args("--optimizer Ranger --optimizer.lr 0.005 --head_schedule.shape constant --train.keep_last 2")
    settings += ["--head.margin.scale", "16", "--output.log_every", "1"]
    folder = tmp_path / "run"
    trainer = Trainer(to_config(train_parser(), [*settings, "--output.folder", str(folder)]))
    assert trainer.schedules[0].lr_lambdas[0](7) < trainer.schedules[1].lr_lambdas[0](7) == 1.0
    trainer.train()
    trainer.close()
    rows = logged(folder)
    assert rows[-1]["loss"] < rows[0]["loss"]
    newest = max((folder / "checkpoints").glob("step-*"))
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    again = Trainer(to_config(train_parser(), ["--config", str(folder / "config.yaml")]), resume=True)
    again.train()
    again.close()
    assert logged(folder) == rows


def test_what_skipped_rows_do_reaches_the_heads_optimizer(monkeypatch):
    given = []
    monkeypatch.setattr(
        "partial_fc.training.optimizers.RowOptimizer", lambda cls, head, **options: given.append(options)
    )
    for asked in ([], ["--head_skipped_rows", "dense"], ["--head_skipped_rows", "still"]):
        given.clear()
        to_config(train_parser(), [*asked, "--head_optimizer", "SGD", "--head_optimizer.lr", "0.3"])
        assert given == [{"lr": 0.3, **({"skipped_rows": asked[1]} if asked else {})}]


def test_rows_of_a_run_that_was_saved_before_stand_still(tmp_path):
    configs = RunConfig(), RunConfig()
    configs[0].head.sample_rate = 0.1
    saved = tmp_path / "config.yaml"
    for text, expected in (("head_skipped_rows: null", None), ("head_lr_factor: 1.0", "still")):
        saved.write_text(f"{text}\n")
        keep_still_rows(saved, *configs)
        assert [config.head_skipped_rows for config in configs] == [expected, None]


def test_settings_that_were_saved_before_load(tmp_path):
    """A config.yaml without the fields that came later."""
    old = plain_settings(RunConfig())
    for name in ("head_schedule", "head_optimizer", "head_lr_factor", "head_skipped_rows"):
        del old[name]
    old["optimizer"] = {"name": "sgd", "lr": 0.1, "head_lr_factor": 1.0, "momentum": 0.9, "weight_decay": 0.0005}
    old["schedule"] = {"shape": "polynomial", "power": 2.0, "warmup_epochs": 0.3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(old))))
    config = to_config(train_parser(), ["--config", str(tmp_path / "config.yaml")])
    assert config == RunConfig(schedule=ScheduleConfig("polynomial", 2.0, 0.3))
