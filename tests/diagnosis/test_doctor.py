"""doctor() names each wrong wiring on every rank, accepts correct wiring, and leaves a run unchanged."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from common import args
from forked import succeed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc import ArcFace, CurricularFace, PartialFC, Report, RowOptimizer, Softmax, doctor
from partial_fc.training.optimizers import Optimizers, OptimizerSettings

ROOT = Path(__file__).parents[2]
D, C = 6, 11
SGD = {"lr": 0.1, "momentum": 0.9}


def backbone(width: int = D, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, width))


def data(rank: int, n: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(n, 4, generator=generator), torch.randint(0, C, (n,), generator=generator)


def alone(*arguments: Any, **options: Any) -> PartialFC:
    """A head of this process, as if it was built before the process group."""
    with mock.patch("partial_fc.distributed.ranks.dist.is_initialized", return_value=False):
        return PartialFC(*arguments, **options)


class Whole(nn.Module):
    """A model with the head inside."""

    def __init__(self, head: PartialFC) -> None:
        super().__init__()
        self.backbone, self.head = backbone(), head

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(x), labels)


class DeepSpeedEngine(nn.Module):
    """What is known of the real one by its name; it needs a machine of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Deaf(torch.amp.GradScaler):
    """Looks at this rank's part of a gradient only."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [
            p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            for g in optimizer.param_groups
            for p in g["params"]
        ]
        bad = any(not bool(g.isfinite().all()) for g in grads if g is not None)
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {
            torch.device("cpu"): torch.tensor(float(bad))
        }


def agreed(report: Report) -> Report:
    """Every rank has the same report."""
    if dist.is_initialized():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, str(report))
        assert len(set(everyone)) == 1, everyone
    return report


# ---------------------------------------------------------------------------------------------------- right


def right(rank: int, world: int, kind: str) -> None:
    torch.manual_seed(rank)
    rate = 0.5 if "sampled" in kind else 1.0
    margin = {
        "softmax": Softmax(),
        "softmax scaler": Softmax(),
        "curricular": CurricularFace(scale=8.0, momentum=0.5),
    }.get(kind, ArcFace(scale=8.0))
    options: dict[str, Any] = {}
    mesh = None
    if kind == "mesh":
        mesh = dist.init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    head = PartialFC(D, C, margin, rate, group=mesh, dtype=torch.float64 if kind == "double" else None)
    model: nn.Module = backbone(dropout=0.3)
    if kind == "double":
        model = model.double()
    parameters = list(model.parameters())
    if kind == "inside":
        model = Whole(head)
        parameters = list(model.backbone.parameters())  # type: ignore[arg-type,union-attr]
        names = [f"head.{name}" for name, _ in head.named_parameters()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    if kind == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        parameters = list(model.parameters())
    else:
        model = DistributedDataParallel(model, gradient_as_bucket_view=kind == "views")
    if kind == "compiled":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    optimizers: list[Any] = [torch.optim.AdamW(parameters, lr=0.01)]
    if kind == "softmax":
        optimizers = [torch.optim.SGD([*parameters, *head.parameters()], lr=0.1)]
    else:
        optimizers.append(RowOptimizer(torch.optim.SGD, head, update_in_backward=kind == "in backward", **SGD))
    if "scaler" in kind:
        options["scaler"] = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, labels = data(rank, n=5 + rank)
    report = agreed(doctor(model, head, optimizers, batch=(x.to(next(model.parameters()).dtype), labels), **options))
    assert report.ok, str(report)
    skipped = [check.name for check in report.checks if check.ok is None]
    unseen = ["replicas", "gradient scale"] if kind == "FSDP2" else []
    assert skipped == unseen + ([] if "scaler" in kind else ["found_inf"]), str(report)
    report.raise_if_wrong()
    assert (
        f"{len(report.checks)} checks on {world} rank" in str(report)
        and "no problems found" in str(report)
        and "✗" not in str(report)
    )


KINDS = ["rows", "sampled", "softmax", "curricular", "inside", "scaler", "sampled scaler", "in backward", "views"]
KINDS += ["double", "mesh", "FSDP2", "compiled"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_right_wiring_is_all_right(ranks, world, kind):
    ranks(world).run(right, kind)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_one_process_without_a_group(rate):
    model, head = backbone(), PartialFC(D, C, sample_rate=rate)
    optimizers = [torch.optim.SGD(model.parameters(), **SGD), RowOptimizer(torch.optim.SGD, head, **SGD)]
    report = doctor(model, head, optimizers, batch=data(0))
    assert report.ok, str(report)
    made_up = doctor(model, head, optimizers, input_shape=(4,))
    assert made_up.ok and made_up["gradient scale"].ok and made_up["labels"].ok is None
    without = doctor(model, head, optimizers)
    assert without.ok and without["head gradient"].ok and without["backbone gradient"].ok is None
    assert "give batch=(inputs, labels)" in without["backbone gradient"].words
    assert report.to_dict()["checks"][0] == {
        "name": "group",
        "ok": True,
        "words": "the head is on 1 rank",
        "mend": "",
    }
    plain = PartialFC(D, C, Softmax())
    both = torch.optim.SGD([*model.parameters(), *plain.parameters()], lr=0.1)
    assert doctor(model, plain, both, batch=data(0)).ok
    with pytest.raises(TypeError, match="PartialFC, not Linear with 0"):
        doctor(model, nn.Linear(2, 2), both)
    with pytest.raises(TypeError, match="optimizers must be torch optimizers, not str"):
        doctor(model, plain, ["sgd"])  # type: ignore[list-item]


# ---------------------------------------------------------------------------------------------------- wrong


def wrong(rank: int, world: int, kind: str) -> tuple[list[str], str]:
    """(names of the checks that are wrong, the report) of one wrong wiring.

    A head refuses DDP and FSDP2 while they wrap it; here it does not notice, as with an engine that it does not know.
    """
    with mock.patch("partial_fc.sharded_module.refuse"):
        return _wrong(rank, world, kind)


def _wrong(rank: int, world: int, kind: str) -> tuple[list[str], str]:
    torch.manual_seed(rank)
    model: nn.Module = backbone(5 if kind == "width" else D)
    rate = 0.5 if kind == "sampled in a plain one" else 1.0
    build = (
        alone if kind in ("before the group", "head in DDP", "head inside DDP", "FSDP2", "all in FSDP2") else PartialFC
    )
    head = build(
        D,
        C,
        ArcFace(scale=8.0),
        rate,
        scale_embedding_grad=kind != "scale",
        device="meta" if kind == "device" else None,
    )
    given: nn.Module = head
    parameters = list(model.parameters())
    options: dict[str, Any] = {"batch": data(rank)}
    if kind == "head in DDP":
        given = DistributedDataParallel(head)
    elif kind == "head inside DDP":
        model = DistributedDataParallel(Whole(head))
    elif kind == "DeepSpeed":
        model = DeepSpeedEngine(Whole(head))
    elif kind == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(head)
    elif kind == "all in FSDP2":
        from torch.distributed.fsdp import fully_shard

        model = Whole(head)
        fully_shard(model)
        parameters = list(model.backbone.parameters())  # type: ignore[union-attr,arg-type]
    elif kind == "other group":
        model = DistributedDataParallel(model, process_group=[dist.new_group([r]) for r in range(world)][rank])
    elif kind not in ("not averaged", "labels"):
        model = DistributedDataParallel(model)
    if kind == "replicas" and rank == world - 1:
        with torch.no_grad():
            parameters[0][0, 0] += 1e-6
    if kind == "seed":
        head.seed = rank
    if kind == "labels":
        options["batch"][1][-1] = C if rank == world - 1 else 0
    if kind in ("detached", "forward", "tuple"):
        options["embed"] = {"detached": detached, "forward": failing, "tuple": pair}[kind]
    own = (
        RowOptimizer(torch.optim.SGD, head, **SGD)
        if kind not in ("sampled in a plain one", "no head optimizer")
        else None
    )
    optimizers: list[Any] = [torch.optim.SGD(parameters[1:] if kind == "one left out" else parameters, lr=0.1), own]
    if kind == "in two":
        optimizers.append(torch.optim.SGD(head.parameters(), lr=0.1))
    elif kind == "two of rows":
        optimizers.append(RowOptimizer(torch.optim.SGD, head, **SGD))
    elif kind == "sampled in a plain one":
        optimizers[1] = torch.optim.SGD(head.parameters(), lr=0.1)
    elif kind == "backbone in two":
        optimizers.append(torch.optim.Adam(parameters[:1]))
    elif kind == "not given":
        optimizers.pop()
    elif kind == "stale":
        optimizers[1] = RowOptimizer(torch.optim.SGD, head, lr=0.0)
    elif kind == "deaf scaler":
        options["scaler"] = Deaf("cpu")
    elif kind == "one optimizer and a scaler":
        own = None
        optimizers = [torch.optim.SGD([*parameters, *head.parameters()], lr=0.1)]
        options["scaler"] = torch.amp.GradScaler("cpu")
    report = agreed(doctor(model, given, [o for o in optimizers if o is not None], **options))
    with pytest.raises(RuntimeError) as caught:
        report.raise_if_wrong()
    assert (not report.ok and "fix: " in str(report)) or kind in ("labels", "forward")
    return [check.name for check in report.checks if check.ok is False], f"{report}\n{caught.value}"


def detached(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).detach()


def failing(model: nn.Module, inputs: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError("no such layer")
    return model(inputs)


def pair(model: nn.Module, inputs: Tensor) -> Any:
    return model(inputs), None


WRONG = {  # kind: (checks that are wrong, what their words hold), at any world size
    "no head optimizer": (["head optimizer"], "none of the given optimizers holds the head's weight"),
    "not given": (["head optimizer"], "the head's RowOptimizer is not among the given optimizers"),
    "in two": (["head optimizer"], "are in 2 optimizers (RowOptimizer, SGD)"),
    "two of rows": (["head optimizer"], "are in 2 optimizers (RowOptimizer, RowOptimizer)"),
    "sampled in a plain one": (["head optimizer"], "the sampled head's parameters are in SGD"),
    "one left out": (["backbone optimizer"], "1 of 6 parameters are in no optimizer: 0.weight"),
    "backbone in two": (["backbone optimizer"], "1 of 6 parameters are in two optimizers: 0.weight"),
    "before the group": (["group"], "built before the process group"),
    "head in DDP": (["group", "wrapping"], "the head is inside DistributedDataParallel"),
    "head inside DDP": (["group", "wrapping", "backbone optimizer"], "the head is inside DistributedDataParallel"),
    "DeepSpeed": (["wrapping"], "the head is inside a DeepSpeed engine"),
    "FSDP2": (["group", "wrapping"], "the head is inside FSDP2"),
    "all in FSDP2": (["group", "wrapping"], "the head is inside FSDP2"),
    "device": (["device"], "the head is on meta, the backbone on cpu"),
    "width": (["forward"], "embeddings are [5, 5], the head expects [N, 6]"),
    "tuple": (["forward"], "the model returns tuple, not a tensor"),
    "forward": (["forward"], "raises KeyError: 'no such layer'"),
    "labels": (["labels"], "label 11 is out of range: valid are 0 to 10"),
    "detached": (["backbone gradient"], "no gradient reaches the backbone's parameters"),
    "one optimizer and a scaler": (["found_inf"], "the scaler cannot unscale the backbone's optimizer: "),
    "stale": (["steps"], "two steps did not change the head"),
}
WRONG_ON_TWO = {
    "other group": (["group"], "the head is on ranks [0, 1], but the backbone's gradients are averaged over ranks [0]"),
    "scale": (["gradient scale"], "is 0.5 times that of one process"),
    "not averaged": (["gradient scale", "steps"], "differ between ranks: nothing averages them"),
    "replicas": (["replicas"], "at the start the backbone's 0.weight differs between rank 0 and rank 1"),
    "seed": (["settings"], "ranks disagree: seed is 0 on rank 0 and 1 on rank 1"),
    "deaf scaler": (["found_inf"], "an infinity in the head's gradient on one rank is not detected on rank 0"),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [*WRONG, *WRONG_ON_TWO])
def test_wrong_wiring_is_named(ranks, world, kind):
    if world == 1 and kind in WRONG_ON_TWO:
        pytest.skip("one rank cannot be wrong so")
    names, words = {**WRONG, **WRONG_ON_TWO}[kind]
    for found, text in ranks(world).run(wrong, kind):
        assert found == names, text
        assert words in text, text


def test_what_accelerate_was_given_is_seen():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, head = backbone(), PartialFC(D, C)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), RowOptimizer(torch.optim.SGD, head, **SGD)]
    model, optimizers[0] = accelerator.prepare(model, optimizers[0])
    report = doctor(model, head, optimizers, batch=data(0), accelerator=accelerator)
    assert report.ok, str(report)
    prepared = accelerator.prepare(optimizers[1])
    report = doctor(model, head, [optimizers[0], prepared], batch=data(0))
    assert "the head's RowOptimizer was passed to accelerator.prepare" in report["wrapping"].words
    report = doctor(model, head, optimizers, batch=data(0), accelerator=accelerator)
    assert "the head's RowOptimizer was passed to accelerator.prepare" in report["wrapping"].words
    accelerator.free_memory()
    accelerator.prepare(head)
    report = doctor(model, head, optimizers, batch=data(0), accelerator=accelerator)
    assert "the head was passed to accelerator.prepare" in report["wrapping"].words
    accelerator.free_memory()


# ------------------------------------------------------------------------------------------ refused without being asked


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_second_optimizer_of_rows_is_refused_by_the_first(rate):
    head = PartialFC(D, C, sample_rate=rate)
    first = RowOptimizer(torch.optim.SGD, head, **SGD)
    second = RowOptimizer(torch.optim.SGD, head, **SGD)
    head(torch.randn(3, D), torch.arange(3)).backward()
    second.step()
    with pytest.raises(RuntimeError, match="another RowOptimizer was built for this head after this one"):
        first.step()


def replaced(rank: int, world: int) -> None:
    head = PartialFC(D, C)
    head.weight = nn.Parameter(head.weight.detach().clone())
    with pytest.raises(RuntimeError, match="another tensor was put in the place of this PartialFC's weight"):
        head(torch.randn(3, D), torch.arange(3))


@pytest.mark.parametrize("world", [1, 2])
def test_a_weight_that_was_replaced_is_refused(ranks, world):
    ranks(world).run(replaced)


# ---------------------------------------------------------------------------------------------------- nothing has moved


def train(rank: int, world: int, kind: str, look: bool) -> list[Any]:
    """Losses, weights and state of a short run, with the doctor looking in between or not, once with gradients
    pending."""
    margin = CurricularFace(scale=8.0, momentum=0.3) if kind == "curricular" else ArcFace(scale=8.0)
    head = PartialFC(D, C, margin, 0.5 if kind == "sampled" else 1.0)
    model = DistributedDataParallel(backbone(dropout=0.3), gradient_as_bucket_view=True)
    optimizers: list[Any] = [
        OptimizerSettings("Ranger" if kind == "ranger" else "AdamW", {"lr": 0.01, "weight_decay": 5e-4}).build(
            "optimizer", list(model.parameters())
        )
    ]
    optimizers.append(RowOptimizer(torch.optim.Adam, head, lr=0.05, update_in_backward=kind == "in backward"))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if kind != "in backward" else None
    torch.manual_seed(rank)
    found: list[Any] = []

    def visit() -> None:
        if look:
            report = doctor(model, head, optimizers, batch=data(7 + rank), scaler=scaler)
            assert report.ok, str(report)

    for step in range(5):
        if step in (0, 3):
            visit()
        loss = head(model(data(10 * step + rank)[0]), data(10 * step + rank)[1])
        loss.backward()
        if step == 2 and kind != "in backward":
            visit()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for each in (*optimizers, *schedules):
            each.step()
        for each in optimizers:
            each.zero_grad()
        found.append(loss.item())
    found += [
        copy.deepcopy(model.module.state_dict()),
        copy.deepcopy(optimizers[0].state_dict()),
        torch.rand(3),
        head.forward_count,
    ]
    found.append([t.to_local().clone() for t in (head.weight, optimizers[1].state[head.weight]["exp_avg"])])
    found += [b.clone() for b in head.buffers()] + [len(optimizers[1].state), head.class_rows.lost]
    found.append(None if scaler is None else scaler.state_dict())
    return found


def same(rank: int, world: int, kind: str) -> None:
    mine, theirs = (torch.utils._pytree.tree_leaves(train(rank, world, kind, look)) for look in (True, False))
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["all", "sampled", "curricular", "in backward", "ranger"])
def test_nothing_of_a_run_has_moved(ranks, world, kind):
    ranks(world).run(same, kind)


# ---------------------------------------------------------------------------------------------------- of a run


def test_a_run_of_the_application(tmp_path, monkeypatch, capsys, mistake):
    """In one process: 0 and nothing is made; 1 with a run that someone has changed; 2 for bad settings."""
    from partial_fc.training.cli.main import main

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "in use").write_text("")
    settings = [*args("--data.identities 30 --train.batch_size 64 --train.cpu true --output.folder"), str(folder)]
    settings += args("--head.sample_rate 0.5 --optimizer LAMB --optimizer.lr 0.01")
    assert main(["doctor", *settings]) == 0
    out = capsys.readouterr().out
    assert "no problems found" in out and "✓ gradient scale" in out
    assert [p.name for p in folder.iterdir()] == ["in use"]
    build = Optimizers.build
    monkeypatch.setattr(
        Optimizers,
        "build",
        lambda self, parameters: build(self, list(parameters)[1:] or [nn.Parameter(torch.ones(1))]),
    )
    assert main(["doctor", *settings, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in found["checks"] if check["ok"] is False] == ["backbone optimizer"]
    assert "sample_rate" in mistake("doctor", *settings, "--head.sample_rate", "2")


def test_a_run_of_the_application_on_two_ranks(tmp_path):
    command = [*args("doctor configs/quickstart.yaml --train.batch_size 32 --output.folder"), str(tmp_path / "run")]
    out = succeed(*command, "--train.mixed_precision", "bf16", "--head.sample_rate", "0.5")
    assert out.count("15 checks on 2 ranks: no problems found") == 1, out
    assert not (tmp_path / "run").exists()


def test_the_python_of_the_page_runs(capsys):
    page = (ROOT / "docs/doctor.md").read_text()
    code, printed = (
        re.search(rf"```{language}\n(.*?)```", page, re.DOTALL).group(1) for language in ("python", "text")
    )  # type: ignore[union-attr]
    exec(compile(code, "doctor.md", "exec"), {})
    mine = [line[:60] for line in capsys.readouterr().out.splitlines()]
    assert mine == [line[:60] for line in printed.splitlines()]
