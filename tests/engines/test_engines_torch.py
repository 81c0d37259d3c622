"""Plain DDP and FSDP2, with the head beside the wrapped module and inside it, against one dense process; and what they
refuse."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import engines_common as common
import pytest
import torch
from engines_common import (
    ACCUMULATION,
    MAX_NORM,
    STEPS,
    D,
    Joint,
    Result,
    compare,
    compare_resumed,
    finish,
    my_part,
    new_head,
    optimizers,
)
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from partial_fc import (
    CenterLoss,
    PartialFC,
    RowOptimizer,
    SphereFace2,
    clip_grad_norm_,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.engines.ddp import ignore_heads
from partial_fc.engines.heads import head_names, head_parameters, heads_of, without_heads
from partial_fc.engines.joint import JointOptimizer
from partial_fc.engines.needs import need, need_methods


def train_ddp(rank: int, world: int, inside: bool, rate: float, bf16: bool, uneven: bool = False) -> Result:
    joint = Joint(rate)
    head = joint.head
    if inside:
        ignore_heads(joint)
        model = DistributedDataParallel(joint)
    else:
        model = DistributedDataParallel(joint.backbone)
    both = optimizers(joint.backbone.parameters(), head)
    norms, selected = [], []
    for index in range(STEPS * ACCUMULATION):
        images, labels = my_part(index, rank, world, uneven=uneven)
        boundary = (index + 1) % ACCUMULATION == 0
        with contextlib.nullcontext() if boundary else model.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(images, labels) if inside else head(model(images), labels)
            (loss / ACCUMULATION).backward()
        selected.append(head.selected)
        if boundary:
            norms.append(clip_grad_norm_(joint.parameters(), head, max_norm=MAX_NORM))
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
    return finish(joint.backbone, head, norms, selected)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("world", [2, 3])
def test_ddp_equals_one_dense_process(ranks, world, rate, inside):
    compare(ranks(world).run(train_ddp, inside, rate, False))


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_ddp_with_uneven_batches(ranks, inside):
    compare(ranks(2).run(train_ddp, inside, 1.0, False, True))


# Products of bf16 numbers are off by 2^-8 of themselves at most, and the weights of this run move by less than 1 in all
BF16_TOLERANCE = 1e-2


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_ddp_under_bf16_autocast(ranks, inside):
    error = compare(ranks(2).run(train_ddp, inside, 1.0, True), tolerance=BF16_TOLERANCE)
    assert error > 1e-5, "autocast took part"


def buffers_of_an_inner_head(rank: int, world: int) -> tuple[list[str], list[str], bool]:
    """DDP broadcasts buffers before each forward; a head's are not its to touch."""
    joint = Joint()
    joint.head.register_buffer("mine", torch.full((2,), float(rank)))
    before = joint.backbone[0].weight.detach().clone()
    names = ignore_heads(joint)
    model = DistributedDataParallel(joint)
    model(*my_part(0, rank, world)).backward()
    assert torch.equal(joint.head.mine, torch.full((2,), float(rank)))
    assert torch.equal(joint.backbone[0].weight, before)
    return names, sorted(head_names(joint)), joint.head.weight.grad is not None


def test_ddp_leaves_the_buffers_of_an_inner_head_alone(ranks):
    for names, expected, trained in ranks(2).run(buffers_of_an_inner_head):
        assert names == expected == ["head.mine", "head.weight"]
        assert trained


def test_the_heads_of_a_module_and_the_rest():
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 4), "b": nn.ModuleDict({"h": PartialFC(4, 9, SphereFace2()), "c": CenterLoss(4, 9)})}
    )
    assert list(heads_of(model)) == ["b.h", "b.c"]
    assert head_names(model) >= {"b.h.weight", "b.h.margin.offset", "b.c.centers"}
    assert head_parameters(model) == {*model["b"]["h"].parameters(), *model["b"]["c"].parameters()}
    assert set(without_heads(model)) == {"a.weight", "a.bias"}
    assert set(without_heads(model["a"])) == {"weight", "bias"}
    with pytest.raises(ValueError, match="no PartialFC or CenterLoss in this Linear"):
        ignore_heads(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="do not wrap it"):
        ignore_heads(PartialFC(4, 9))


# ---------------------------------------------------------------------------------------------------- FSDP2


def sharded(world: int, inside: bool, rate: float = 1.0) -> tuple[Joint, nn.Module]:
    """The joint module and the part of it that FSDP2 wraps."""
    joint = Joint(rate)
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(joint.backbone[0], mesh=mesh)
    if inside:
        fully_shard(joint, mesh=mesh, ignored_params=head_parameters(joint))
        return joint, joint
    fully_shard(joint.backbone, mesh=mesh)
    return joint, joint.backbone


def fsdp_steps(
    rank: int, world: int, joint: Joint, wrapped: Any, both: Any, steps: range
) -> tuple[list[Tensor], list[Tensor]]:
    norms, selected = [], []
    for index in range(steps.start * ACCUMULATION, steps.stop * ACCUMULATION):
        images, labels = my_part(index, rank, world)
        boundary = (index + 1) % ACCUMULATION == 0
        wrapped.set_requires_gradient_sync(boundary)
        (joint(images, labels) / ACCUMULATION).backward()
        selected.append(joint.head.selected)
        if boundary:
            norms.append(clip_grad_norm_(joint.parameters(), joint.head, max_norm=MAX_NORM))
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
    return norms, selected


def train_fsdp2(rank: int, world: int, inside: bool, rate: float) -> Result:
    joint, wrapped = sharded(world, inside, rate)
    both = optimizers(joint.backbone.parameters(), joint.head)
    norms, selected = fsdp_steps(rank, world, joint, wrapped, both, range(STEPS))
    assert isinstance(joint.backbone[0].weight, DTensor), "the backbone is sharded"
    return finish(joint.backbone, joint.head, norms, selected)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("world", [2, 3])
def test_fsdp2_equals_one_dense_process(ranks, world, rate, inside):
    compare(ranks(world).run(train_fsdp2, inside, rate))


SAVED_AFTER = 2
KINDS = {"sgd": (torch.optim.SGD, common.SGD), "adamw": (torch.optim.AdamW, {"lr": 0.05})}


def fsdp_parts(world: int, inside: bool, kind: str) -> tuple[Joint, nn.Module, dict[str, Any]]:
    joint, wrapped = sharded(world, inside)
    cls, options = KINDS[kind]
    backbone_optimizer = cls(joint.backbone.parameters(), **options)
    head_optimizer = common.RowOptimizer(cls, joint.head, **options)
    named: dict[str, Any] = {"model": joint} if inside else {"backbone": joint.backbone, "head": joint.head}
    return joint, wrapped, {**named, "optimizer": backbone_optimizer, "head_optimizer": head_optimizer}


def fsdp_save(rank: int, world: int, path: str, inside: bool, kind: str) -> Result:
    joint, wrapped, named = fsdp_parts(world, inside, kind)
    both = named["optimizer"], named["head_optimizer"]
    fsdp_steps(rank, world, joint, wrapped, both, range(SAVED_AFTER))
    save_checkpoint(path, **named)
    norms, selected = fsdp_steps(rank, world, joint, wrapped, both, range(SAVED_AFTER, STEPS))
    return finish(joint.backbone, joint.head, norms, selected)


def fsdp_resume(rank: int, world: int, path: str, inside: bool, kind: str) -> Result:
    joint, wrapped, named = fsdp_parts(world, inside, kind)
    both = named["optimizer"], named["head_optimizer"]
    load_checkpoint(path, **named)
    for parameter, state in both[0].state.items():
        for key, value in state.items():
            assert key == "step" or (isinstance(value, DTensor) and value.placements == parameter.placements), key
    norms, selected = fsdp_steps(rank, world, joint, wrapped, both, range(SAVED_AFTER, STEPS))
    return finish(joint.backbone, joint.head, norms, selected)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_fsdp2_run_is_resumed_at_any_world_size(ranks, tmp_path, kind, inside):
    straight = ranks(2).run(fsdp_save, str(tmp_path), inside, kind)
    for world in (2, 3, 1):
        compare_resumed(straight, ranks(world).run(fsdp_resume, str(tmp_path), inside, kind))


# ---------------------------------------------------------------------------------------------------- what is refused


def wrong_wiring(rank: int, world: int) -> dict[str, str]:
    mesh, named_mesh = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    listed_on_another = Joint()
    ignore_heads(listed_on_another)
    attempts = {
        "DDP(model)": lambda: DistributedDataParallel(Joint()),
        "DDP(head)": lambda: DistributedDataParallel(new_head()),
        "DDP without the first synchronisation": lambda: DistributedDataParallel(Joint(), init_sync=False),
        "DDP around the module with the list": lambda: DistributedDataParallel(nn.Sequential(listed_on_another)),
        "DDP(center loss)": lambda: DistributedDataParallel(nn.Sequential(nn.Linear(3, D), CenterLoss(D, 9))),
        "fully_shard(model)": lambda: fully_shard(Joint(), mesh=mesh),
        "fully_shard(head)": lambda: fully_shard(new_head(), mesh=mesh),
        "fully_shard(head) of another mesh": lambda: fully_shard(new_head(), mesh=named_mesh),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except RuntimeError as error:
            said[name] = str(error)
    return said


def test_a_head_that_an_engine_would_wrap_is_refused_in_words(ranks):
    first, second = ranks(2).run(wrong_wiring)
    assert first == second, "the same on every rank"
    for name, text in first.items():
        engine, way = (
            ("DistributedDataParallel", "ignore_heads")
            if name.startswith("DDP")
            else ("fully_shard", "ignored_params=")
        )
        assert text.startswith(engine) and "split over the ranks already" in text and way in text, (name, text)
        assert ("CenterLoss (1.centers)" if "center" in name else "PartialFC (") in text, (name, text)


# ------------------------------------------------------------------------------------------- ZeroRedundancyOptimizer


def with_zero(rank: int, world: int, rate: float) -> tuple[Tensor, str]:
    """Weights of a backbone after three steps, its optimizer sharded or not, and what is said about rows in it."""
    weights = []
    for sharded in (False, True):
        joint = Joint(rate)
        model = DistributedDataParallel(joint.backbone)
        own, heads = optimizers(joint.backbone.parameters(), joint.head)
        if sharded:
            options = {k: v for k, v in own.defaults.items() if k in ("lr", "momentum", "weight_decay")}
            own = ZeroRedundancyOptimizer(joint.backbone.parameters(), type(own), **options)
        for index in range(3):
            images, labels = my_part(index, rank, world, uneven=False)
            joint.head(model(images), labels).backward()
            own.step(), heads.step()
            own.zero_grad(), heads.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in joint.backbone.parameters()]))
    assert torch.equal(*weights), "beside a RowOptimizer"
    head = PartialFC(D, 10)
    of_rows = ZeroRedundancyOptimizer(head.parameters(), torch.optim.SGD, lr=0.1)
    head(torch.ones(2, D, requires_grad=True), torch.tensor([0, 1])).backward()
    try:
        of_rows.step()
    except NotImplementedError as error:
        return weights[1], str(error)
    return weights[1], ""


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_a_sharded_optimizer_of_torch_is_for_the_backbone(ranks, rate):
    (first, said), (second, also) = ranks(2).run(with_zero, rate)
    assert torch.equal(first, second)
    assert said == also and "broadcast" in said, "rows are no copies that a rank could send to others"


# ------------------------------------------------------------------------------------------- engines that are not there


def test_an_engine_that_is_missing_or_too_old_says_what_to_install(monkeypatch):
    need("torch", "2.6")
    with pytest.raises(
        ModuleNotFoundError, match=r"no-such-engine is not installed: pip install 'partial_fc\[engines\]'"
    ):
        need("no-such-engine", "1.0")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.9.1")
    need("transformers", "4.9")
    for oldest in ("4.24", "5.0"):
        with pytest.raises(RuntimeError, match=f"transformers 4.9.1 is too old: {oldest} or newer"):
            need("transformers", oldest)


def test_a_method_that_an_engine_no_longer_has_is_told_of():
    """The engine would not call what the adapter puts in its place."""

    class Engine:
        def save(self) -> None: ...

    class Own(Engine):
        def save(self) -> None: ...

        def _clip(self) -> None: ...

        def _helper(self) -> None: ...

    need_methods("torch", Engine, Own, "_clip", "_helper")
    with pytest.raises(RuntimeError, match=r"torch [\d.+a-z]+ has no Engine._clip, so Own would train or save wrongly"):
        need_methods("torch", Engine, Own, "_helper")


def test_the_core_and_plain_ddp_import_no_engine():
    code = "import sys, partial_fc, partial_fc.engines.ddp, partial_fc.engines.joint; print([n for n in ENGINES if n in sys.modules])"
    code = code.replace("ENGINES", "('accelerate', 'deepspeed', 'transformers', 'lightning')")
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def with_frozen_backbone(rank: int, world: int) -> list[Any]:
    """As docs/engines.md has it: no DDP, no gradient of embeddings, the head's steps as in one process."""
    torch.manual_seed(0)
    backbone = nn.Linear(6, D).double().requires_grad_(False)
    head = PartialFC(D, 11, dtype=torch.float64, init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    refused = ""
    try:
        DistributedDataParallel(backbone)
    except RuntimeError as error:
        refused = str(error)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 11, (6,), generator=generator)
        here = slice(rank * 6 // world, (rank + 1) * 6 // world)
        with torch.no_grad():
            embeddings = backbone(images[here])
        head(embeddings, labels[here]).backward()
        clip_grad_norm_([], head, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
    weight = head.weight.detach()
    return [refused, weight.to_local() if isinstance(weight, DTensor) else weight]


def test_a_frozen_backbone_stays_outside_ddp(ranks):
    (_, alone) = ranks(1).run(with_frozen_backbone)[0]
    results = ranks(2).run(with_frozen_backbone)
    torch.testing.assert_close(torch.cat([rows for _, rows in results]), alone, rtol=0, atol=1e-12)
    assert all("is not needed when a module" in refused for refused, _ in results)


def wrongly_joined(rank: int, world: int, rate: float) -> list[str]:
    joint = Joint(rate)
    sgd = torch.optim.SGD(joint.backbone.parameters(), lr=0.1)
    rows = RowOptimizer(torch.optim.SGD, joint.head, lr=0.1)
    said = []
    for parts in (
        (torch.optim.SGD(joint.parameters(), lr=0.1), rows),
        (sgd, rows, rows),
        (rows,),
        (JointOptimizer(sgd, rows), rows),
        (sgd, torch.optim.SGD(joint.head.parameters(), lr=0.1)),
    ):
        try:
            JointOptimizer(*parts)
            said.append("nothing")
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_rows_that_would_move_twice_are_not_joined(ranks, rate):
    for said in ranks(2).run(wrongly_joined, rate):
        for text, words in zip(
            said,
            [
                "the backbone's optimizer has parameters of a head, which the RowOptimizer of that head steps",
                "a RowOptimizer is given twice",
                "the first optimizer is a RowOptimizer",
                "the first optimizer is a JointOptimizer",
                "a JointOptimizer takes a RowOptimizer for each head, not SGD",
            ],
            strict=True,
        ):
            assert text.startswith(words)


def torch_on_rows(rank: int, world: int) -> dict[str, str]:
    """What docs/engines.md lists among torch's own errors, over the rows of an exact head."""
    averager = PeriodicModelAverager(period=1)
    made: dict[str, Any] = {
        "fused SGD": lambda rows: torch.optim.SGD(rows, lr=0.1, fused=True),
        "fused Adagrad": lambda rows: torch.optim.Adagrad(rows, lr=0.1, fused=True),
        "Adafactor": lambda rows: torch.optim.Adafactor(rows, lr=0.1),
        "Rprop": lambda rows: torch.optim.Rprop(rows, lr=0.1),
        "LBFGS": lambda rows: torch.optim.LBFGS(rows, lr=0.1),
        "PostLocalSGD": lambda rows: PostLocalSGDOptimizer(torch.optim.SGD(rows, lr=0.1), averager),
    }
    said = {}
    for name, build in made.items():
        head = new_head()
        optimizer = build(head.parameters())

        def loss(head: PartialFC = head) -> Tensor:
            value = head(torch.ones(2, D), torch.tensor([1, 2]))
            value.backward()
            return value

        try:
            optimizer.step(loss) if name == "LBFGS" else (loss(), optimizer.step())
            said[name] = "nothing"
        except (RuntimeError, NotImplementedError) as error:
            said[name] = str(error)
    parameters = [*common.backbone().parameters(), *new_head().parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        torch.nn.utils.clip_grad_value_(parameters, 0.1, foreach=True)
        said["by value"] = "nothing"
    except RuntimeError as error:
        said["by value"] = str(error)
    return said


def test_what_torch_cannot_do_with_rows_is_its_own_error_on_all_ranks(ranks):
    for said in ranks(2).run(torch_on_rows):
        for name, words in {
            "fused SGD": "sharding strategy",
            "fused Adagrad": "sharding strategy",
            "Adafactor": "placement changes",
            "Rprop": "placement changes",
            "LBFGS": "Cannot flatten unevenly sharded tensor",
            "PostLocalSGD": "Cannot flatten unevenly sharded tensor",
            "by value": "got mixed torch.Tensor and DTensor",
        }.items():
            assert words in said[name], f"{name}: {said[name]}"
