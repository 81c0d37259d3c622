"""What `torch.optim.Optimizer` promises besides a step: each works with a `RowOptimizer`, or is refused in words."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from typing import Any

import pytest
import torch
from common import any_message_of, local
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from partial_fc import ArcFace, PartialFC, RowOptimizer, Softmax, load_checkpoint, save_checkpoint
from partial_fc.engines.joint import JointOptimizer
from partial_fc.rows import ClassRows

CLASSES, WIDTH = 13, 6
KINDS = {
    "sampled": (0.5, {}),
    "exact": (1.0, {}),
    "in backward": (1.0, {"update_in_backward": True}),
    "master": (1.0, {"low_precision": "master"}),
    "stochastic": (0.5, {"low_precision": "stochastic"}),
}


def build(kind: str = "sampled", cls: Any = torch.optim.SGD, **options: Any) -> tuple[PartialFC, RowOptimizer]:
    rate, modes = KINDS[kind]
    dtype = torch.bfloat16 if "low_precision" in modes else None
    head = PartialFC(WIDTH, CLASSES, ArcFace(scale=16.0), sample_rate=rate, dtype=dtype)
    if cls is torch.optim.SGD:
        options = {"momentum": 0.9, **options}
    return head, RowOptimizer(cls, head, **{"lr": 0.1, **modes, **options})


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, WIDTH, generator=generator), torch.randint(0, CLASSES, (5,), generator=generator)


def train(head: PartialFC, optimizer: torch.optim.Optimizer, first: int, steps: int, rank: int = 0) -> None:
    for step in range(first, first + steps):
        head(*batch(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(head: PartialFC) -> Tensor:
    return local(head.weight.detach()).clone()


# ---------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_one_group_and_options_may_be_set_in_it(kind):
    head, optimizer = build(kind)
    other = nn.Parameter(torch.zeros(3))
    words = "another RowOptimizer for another head or center loss, and a torch optimizer for any other parameter"
    for group in ({"params": [other]}, {"params": other, "lr": 0.5}, {"params": [head.weight]}, {"params": []}):
        assert words in any_message_of(optimizer.add_param_group, group)
    assert len(optimizer.param_groups) == len(optimizer.state_dict()["param_groups"]) == 1
    train(head, optimizer, 0, 1)
    before = weights(head)
    optimizer.param_groups[0]["lr"] = 0.0
    train(head, optimizer, 1, 1)
    assert torch.equal(weights(head), before)
    optimizer.param_groups = [{"lr": 0.2, "params": [other]}]  # options are taken, the parameters are the head's
    assert optimizer.param_groups[0]["params"] is head.class_rows.trainable
    train(head, optimizer, 2, 1)
    assert not torch.equal(weights(head), before)

    def replaced() -> None:
        optimizer.param_groups = [*optimizer.param_groups, {"params": [other], "lr": 0.1}]

    assert words in any_message_of(replaced)
    for change in (
        lambda each: each.param_groups.append({"params": [other], "lr": 0.1}),
        lambda each: each.param_groups[0].update(params=[other]),
    ):
        head, optimizer = build(kind)
        change(optimizer)
        before = weights(head)
        head(*batch(0)).backward()
        assert "were replaced" in any_message_of(optimizer.step)
        assert kind == "in backward" or torch.equal(weights(head), before)


def test_state_may_be_replaced_and_cleared():
    for forget in (
        lambda optimizer: optimizer.state.clear(),
        lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
        lambda optimizer: setattr(optimizer, "state", {}),
    ):
        (head, optimizer), (other, fresh) = build(), build()
        train(head, optimizer, 0, 2)
        assert "momentum_buffer" in optimizer.state[head.weight]
        forget(optimizer)
        other.load_state_dict(head.state_dict())
        train(head, optimizer, 2, 2)
        train(other, fresh, 2, 2)
        assert torch.equal(weights(head), weights(other))


# ---------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_steps_are_called_once_and_for_the_optimizer_that_users_see(kind):
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("all", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: seen.append(("all after", optimizer))),
    ]
    try:
        head, optimizer = build(kind)
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("before", optimizer)))
        after = optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(("after", optimizer)))
        train(head, optimizer, 0, 2)
        once = [("all", optimizer), ("before", optimizer), ("after", optimizer), ("all after", optimizer)]
        assert seen == 2 * once
        after.remove()
        train(head, optimizer, 2, 1)
        assert seen[8:] == [each for each in once if each[0] != "after"]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_state_dicts_are_called(tmp_path, kind):
    head, optimizer = build(kind)
    train(head, optimizer, 0, 2)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda each: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda each, state: {**state, "version": 3})
    optimizer.register_state_dict_post_hook(lambda each, state: seen.append("after"), prepend=True)
    state = optimizer.state_dict()
    assert state["version"] == 3 and seen == ["before", "after"]

    another_head, another = build(kind)

    def check(each: RowOptimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(state.pop("version"))
        return {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.7}]}

    another.register_load_state_dict_pre_hook(check)
    another.register_load_state_dict_post_hook(lambda each: seen.append(each.param_groups[0]["lr"]))
    another.load_state_dict(copy.deepcopy(state))
    assert seen[2:] == [3, 0.7]
    assert state["version"] == 3 and state["param_groups"][0]["lr"] == 0.1  # what was given stays as it is
    save_checkpoint(tmp_path, head=head, head_optimizer=optimizer)
    load_checkpoint(tmp_path, head=another_head, head_optimizer=another)
    assert seen[-2:] == [3, 0.7]
    another.param_groups[0]["lr"] = 0.1
    train(head, optimizer, 2, 2)
    train(another_head, another, 2, 2)
    assert torch.equal(weights(head), weights(another_head))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {"state": state["state"]}, "it is no state of an optimizer"),
        (lambda state: {**state, "param_groups": 2 * state["param_groups"]}, "groups of 1 and 1 parameters"),
        (lambda state: {**state, "param_groups": [{**state["param_groups"][0], "params": [0, 1]}]}, "groups of 2"),
        (lambda state: {**state, "state": {5: {}}}, "it has state of 5, which is in none of its groups"),
        (lambda state: {**state, "state": {0: {"exp_avg": torch.zeros(CLASSES, WIDTH)}}}, "of another optimizer"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_and_nothing_changes(change, words):
    head, optimizer = build()
    train(head, optimizer, 0, 2)
    optimizer.catch_up()
    before = optimizer.state[head.weight]["momentum_buffer"].clone()
    assert words in any_message_of(optimizer.load_state_dict, change(optimizer.state_dict()))
    assert torch.equal(optimizer.state[head.weight]["momentum_buffer"], before)


def test_state_by_the_names_of_parameters_is_loaded():
    (head, optimizer), (_, another) = build(), build()
    train(head, optimizer, 0, 2)
    state = optimizer.state_dict()
    named = {
        "state": {"weight": state["state"][0]},
        "param_groups": [{**state["param_groups"][0], "params": ["weight"]}],
    }
    another.load_state_dict(named)
    theirs = another.state[another.class_rows.main]["momentum_buffer"]
    assert torch.equal(theirs, optimizer.state[head.weight]["momentum_buffer"])


# ---------------------------------------------------------------------------------------------------- a step


def test_zero_grad_may_keep_zeros():
    """As torch's: gradients of all rows become zeros, with which momentum goes on; row gradients are forgotten."""
    head, optimizer = build("exact")
    dense = nn.Parameter(head.weight.detach().clone())
    plain = torch.optim.SGD([dense], lr=0.1, momentum=0.9)
    head(*batch(0)).backward()
    dense.grad = head.weight.grad.clone()
    optimizer.step(), plain.step()
    optimizer.zero_grad(set_to_none=False), plain.zero_grad(set_to_none=False)
    assert not head.weight.grad.any()
    optimizer.step(), plain.step()
    torch.testing.assert_close(head.weight.detach(), dense.detach())
    head, optimizer = build("sampled")
    head(*batch(0)).backward()
    optimizer.zero_grad(set_to_none=False)
    before = weights(head)
    optimizer.step()
    assert head.row_grad is None and torch.equal(weights(head), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_computes_the_loss(kind):
    (head, optimizer), (other, plain) = build(kind), build(kind)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = head(*batch(0))
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    theirs = other(*batch(0))
    theirs.backward()
    plain.step()
    assert torch.equal(loss, theirs) and torch.equal(weights(head), weights(other))


OPTIONS = {
    "maximize": (torch.optim.SGD, {"maximize": True}),
    "nesterov": (torch.optim.SGD, {"nesterov": True, "weight_decay": 0.1}),
    "foreach": (torch.optim.SGD, {"foreach": True}),
    "not fused": (torch.optim.AdamW, {"fused": False}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "a tensor": (torch.optim.Adam, {"lr": torch.tensor(0.1)}),
    "a tensor, SGD": (torch.optim.SGD, {"lr": torch.tensor(0.1)}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_torch_work_and_are_saved(tmp_path, name):
    cls, options = OPTIONS[name]
    options = {**options, **({"momentum": 0.9} if cls is torch.optim.SGD else {})}
    head, optimizer = build("exact", cls, **options)
    dense = nn.Parameter(head.weight.detach().clone())
    plain = cls([dense], **{"lr": 0.1, **options})
    for step in range(3):
        head(*batch(step)).backward()
        dense.grad = head.weight.grad.clone()
        optimizer.step(), plain.step()
        optimizer.zero_grad()
    torch.testing.assert_close(head.weight.detach(), dense.detach())
    save_checkpoint(tmp_path, head=head, head_optimizer=optimizer)
    another_head, another = build("exact", cls, **options)
    load_checkpoint(tmp_path, head=another_head, head_optimizer=another)
    assert another.param_groups[0]["lr"] == 0.1
    for each in (optimizer, another):
        each.param_groups[0]["lr"] = each.param_groups[0]["lr"] * 0.5
    train(head, optimizer, 3, 2)
    train(another_head, another, 3, 2)
    assert torch.equal(weights(head), weights(another_head))


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_options_that_cannot_work_are_refused(option):
    assert f"{option}=True is" in any_message_of(build, "exact", torch.optim.Adam, **{option: True})
    optimizer = build("exact", torch.optim.Adam)[1]
    state = optimizer.state_dict()
    state["param_groups"][0][option] = True
    assert f"{option}=True is" in any_message_of(optimizer.load_state_dict, state)


def test_what_only_a_gpu_has_is_left_out_of_trials_on_the_cpu(monkeypatch):
    """Rows that say they are on a GPU: the class gets the option, and what is tried on the CPU does without."""
    monkeypatch.setattr(ClassRows, "home", torch.device("cuda", 0))
    optimizer = build("exact", torch.optim.Adam, capturable=True)[1]
    assert optimizer.inner.defaults["capturable"] and optimizer.param_groups[0]["capturable"]
    template = optimizer.state_template()
    assert template["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.check_state(template)
    head, plain = build("exact", torch.optim.Adam, fused=True)
    assert plain.inner.defaults["fused"]
    of_another_device = PartialFC(WIDTH, CLASSES, device="meta")
    assert RowOptimizer(torch.optim.Adam, of_another_device, fused=True).inner.defaults["fused"]
    assert "fused" in any_message_of(RowOptimizer, torch.optim.Adadelta, head, fused=True)


SCHEDULES: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2)]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch 2.6 to 2.8 warn of their own SequentialLR
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("joint", [False, True])
def test_schedules_change_rate_and_momentum_as_of_any_optimizer(name, joint):
    head, optimizer = build("exact")
    dense, backbone = nn.Parameter(head.weight.detach().clone()), nn.Parameter(torch.ones(2))
    plain = torch.optim.SGD([dense], lr=0.1, momentum=0.9)
    scheduled: torch.optim.Optimizer = optimizer
    if joint:
        scheduled = JointOptimizer(torch.optim.SGD([backbone], lr=0.1, momentum=0.9), optimizer)
    ours, theirs = SCHEDULES[name](scheduled), SCHEDULES[name](plain)
    for step in range(6):
        head(*batch(step)).backward()
        dense.grad = head.weight.grad.clone()
        scheduled.step(), plain.step()
        scheduled.zero_grad()
        metric = (1.0,) if name == "ReduceLROnPlateau" else ()
        ours.step(*metric), theirs.step(*metric)
        mine, own = optimizer.param_groups[0], plain.param_groups[0]
        assert (mine["lr"], mine["momentum"]) == (own["lr"], own["momentum"])
    torch.testing.assert_close(head.weight.detach(), dense.detach())


# ---------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_and_its_optimizer_are_copied_together(kind):
    head, optimizer = build(kind)
    schedule = lr_scheduler.StepLR(optimizer, 100)
    optimizer.register_step_post_hook(lambda *_: None)
    train(head, optimizer, 0, 2)
    schedule.step()
    copied_head, copied = copy.deepcopy((head, optimizer))
    assert copied.class_rows is copied_head.class_rows and copied_head.class_rows.live_optimizer is copied
    assert copied.param_groups[0]["params"] is copied_head.class_rows.trainable
    before = weights(head)
    train(copied_head, copied, 2, 2)
    assert torch.equal(weights(head), before)  # nothing is shared
    train(head, optimizer, 2, 2)
    assert torch.equal(weights(head), weights(copied_head))
    alone = copy.deepcopy(optimizer)  # of rows of its own, as torch's are
    train(head, optimizer, 4, 1)
    assert "momentum_buffer" in alone.state[alone.class_rows.main]


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_is_not_pickled(kind):
    optimizer = build(kind)[1]
    joint = JointOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), optimizer)
    for each in (optimizer, joint):
        for use in (pickle.dumps, copy.copy):
            words = any_message_of(use, each)
            assert "cannot be pickled or copied by copy.copy" in words and "save_checkpoint" in words
    assert repr(optimizer).startswith("RowOptimizer (\nParameter Group 0\n") and "lr: 0.1" in repr(optimizer)


def test_averages_of_weights_and_batch_statistics():
    backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    update_bn([batch(0)[0]], backbone)
    for options in ({}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True}):
        head, optimizer = build("sampled")
        average = AveragedModel(head, **options)
        first = weights(head)
        average.update_parameters(head)  # copies
        train(head, optimizer, 0, 2)
        average.update_parameters(head)
        torch.testing.assert_close(weights(average.module), (first + weights(head)) / 2)
        assert average.module.class_rows.live_optimizer is None


# ---------------------------------------------------------------------------------------------------- joined


def test_a_joint_optimizer_keeps_the_protocol(tmp_path):
    head, optimizer = build()
    first, later = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    backbone = torch.optim.SGD([first], lr=0.1, momentum=0.9)
    joint = JointOptimizer(backbone, optimizer)
    seen: list[str] = []
    joint.register_step_pre_hook(lambda *_: seen.append("before"))
    joint.register_step_post_hook(lambda *_: seen.append("after"))
    joint.register_state_dict_post_hook(lambda each, state: {**state, "version": 1})
    joint.register_load_state_dict_pre_hook(lambda each, state: seen.append(state.pop("version")))
    joint.add_param_group({"params": later, "lr": 0.5})
    assert [group["lr"] for group in joint.param_groups] == [0.1, 0.1, 0.5]
    assert joint.param_groups[1] is optimizer.param_groups[0] and joint.param_groups[2] is backbone.param_groups[1]
    assert "parameters of a head" in any_message_of(joint.add_param_group, {"params": [head.weight]})
    head(*batch(0)).backward()
    first.grad, later.grad = torch.ones(2), torch.ones(2)
    before = weights(head)
    joint.step()
    assert later.tolist() == [0.5, 0.5] and not torch.equal(weights(head), before)
    joint.load_state_dict(joint.state_dict())
    assert seen == ["before", "after", 1]
    for named in ({"optimizer": joint}, {"optimizer": joint, "head": head}):
        words = any_message_of(save_checkpoint, tmp_path, **named)
        assert "optimizer cannot be saved alone" in words and "head_optimizer=optimizer.heads[0]" in words
    save_checkpoint(tmp_path, optimizer=joint, head_optimizer=optimizer)
    load_checkpoint(tmp_path, optimizer=joint)
    assert seen[3:] == [1]
    joint.zero_grad()
    parts = copy.deepcopy((joint, head))
    assert parts[0].heads[0].class_rows is parts[1].class_rows and len(parts[0].param_groups) == 3


# ---------------------------------------------------------------------------------------------------- by name


class Model(nn.Module):
    def __init__(self, seed: int, rate: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Linear(4, WIDTH)
        self.head = PartialFC(WIDTH, CLASSES, Softmax(), sample_rate=rate, seed=seed)


MODELS = (  # sample rate, options
    (0.5, {}),
    (0.5, {"full_state_dict": True}),
    (1.0, {"cpu_offload": True}),
    (1.0, {"full_state_dict": True, "cpu_offload": True}),
)
OPTIMIZERS = (  # sample rate, modes, steps before
    (0.5, {}, 0),
    (1.0, {}, 1),
    (1.0, {"update_in_backward": True}, 0),
    (0.5, {"low_precision": "master"}, 1),
)


def models_by_name(rank: int, world: int) -> None:
    for rate, options in MODELS:
        first, second = Model(1, rate), Model(2, rate)
        first.head.forward_count = 7
        if options.get("cpu_offload") and options.get("full_state_dict") and world > 1:
            options = {**options, "broadcast_from_rank0": True}  # rank 0 alone has it
        asked = StateDictOptions(**options)
        if "broadcast_from_rank0" in options:
            state = get_model_state_dict(first, options=asked)
        else:
            own = torch.optim.SGD(first.backbone.parameters(), lr=0.1, momentum=0.9)
            state, of_backbone = get_state_dict(first, own, options=asked)
            assert set(of_backbone["state"]) == {"backbone.weight", "backbone.bias"}
        if options.get("full_state_dict") and (rank == 0 or "broadcast_from_rank0" not in options):
            assert tuple(state["head.weight"].shape) == (CLASSES, WIDTH) and type(state["head.weight"]) is Tensor
        set_model_state_dict(second, state, options=asked)
        for name, value in first.head.named_parameters():
            assert torch.equal(local(value), local(second.head.get_parameter(name))), (name, options)
        assert torch.equal(first.backbone.weight, second.backbone.weight)
        assert "broadcast_from_rank0" in options or second.head.forward_count == 7


def optimizers_by_name(rank: int, world: int) -> list[str]:
    words = []
    flat = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True, cpu_offload=True)
    empty: dict[str, Any] = {"state": {}, "param_groups": []}
    for rate, modes, steps in OPTIMIZERS:
        model = Model(1, rate)
        if "low_precision" in modes:
            model.head.bfloat16()
        optimizer = RowOptimizer(torch.optim.Adam, model.head, lr=0.1, **modes)
        own = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
        for _ in range(steps):
            model.head(model.backbone(torch.ones(3, 4)), torch.tensor([1, 5, 12])).backward()
            optimizer.step()
            optimizer.zero_grad(), own.zero_grad()
        before = {k: copy.deepcopy(v) for k, v in optimizer.state[model.head.weight].items()}
        for each in (optimizer, JointOptimizer(own, optimizer)):
            words += [
                any_message_of(get_optimizer_state_dict, model, each, options=flat),
                any_message_of(get_optimizer_state_dict, model.backbone, each),
                any_message_of(get_state_dict, model, [own, each]),
                any_message_of(set_optimizer_state_dict, model, each, empty),
            ]
        assert optimizer.param_groups[0]["lr"] == 0.1 and all(p.grad is None for p in model.parameters())
        after = optimizer.state[model.head.weight]
        assert before.keys() == after.keys()
        assert all(torch.equal(local(before[k]), local(after[k])) for k in before)
    return words


def by_name(rank: int, world: int) -> list[str]:
    models_by_name(rank, world)
    return optimizers_by_name(rank, world)


def test_state_by_name_is_for_models(ranks):
    """torch.distributed.checkpoint.state_dict: models work, optimizers of heads are refused."""
    first, second = ranks(2).run(by_name)
    assert first == second
    for words in (by_name(0, 1), first):
        assert len(words) == 8 * len(OPTIMIZERS)
        for text in words:
            assert text.startswith("RuntimeError: torch.distributed.checkpoint.state_dict cannot save or load a")
            assert "partial_fc.save_checkpoint(path, head=head, head_optimizer=optimizer)" in text
            assert "the backbone's optimizer alone" in text
