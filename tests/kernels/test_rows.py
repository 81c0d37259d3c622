"""Row kernels, in Triton's interpreter, against float64: functions, and whole training steps of a head."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import local, needs
from fuzz_cases import run_case
from fuzz_dense import NearJump, check
from fuzz_draw import case_of
from runner import Ranks
from side_by_side import small_tiles
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_proof

from partial_fc import ArcFace, CenterLoss, PartialFC, RowOptimizer, Softmax, SubCenterArcFace, clip_grad_norm_
from partial_fc.batch.row_sums import Pads
from partial_fc.kernels import choice, launch, rows
from partial_fc.kernels.choice import VARIABLE
from partial_fc.kernels.update import Memory, Numbers, step_rows
from partial_fc.optim.kernel_step import without_pads
from partial_fc.optim.rounding import round_at_random

pytestmark = needs("triton")
HALF = torch.bfloat16
APART = 1e-4  # of two runs in float32: after some steps at scale 64 each is up to 4e-5 off float64
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> None:
    launch.prepare("interpret")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that were launched, in their order; a failure of one is an error."""
    names: list[str] = []

    def ran(name: str, call: Callable[[], Any], like: Tensor) -> bool:
        call()
        names.append(name)
        return True

    for module in ("rows", "update"):
        monkeypatch.setattr(f"partial_fc.kernels.{module}.ran", ran)
    return names


@pytest.fixture
def rows_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernels of logits, whose bits are not those of plain PyTorch."""
    monkeypatch.setattr(choice, "tiles_problem", lambda *given: "rows alone")
    choice.choose.cache_clear()
    yield
    choice.choose.cache_clear()


def off(got: Tensor, want: Tensor) -> float:
    """The largest error over the largest number."""
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-300)) if want.numel() else 0.0


def rows_of(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    v = torch.randn(count, width).to(dtype)
    if count > 2:
        v[1], v[2] = 0.0, v[2] * 1e-3
    return v


def directions(v: Tensor) -> tuple[Tensor, Tensor]:
    length = v.double().norm(dim=1, keepdim=True)
    inverse = torch.where(length > 1e-12, 1 / length, 0.0)
    return v.double() * inverse, inverse


@pytest.mark.parametrize("width", [1, 20, 512, 700, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16])
def test_directions_of_rows(width, dtype, called):
    count = 11
    v, index = rows_of(count, width, dtype), torch.tensor([10, 3, 3, 1, 0])
    for picked in (None, index):
        n, source = (count, v) if picked is None else (len(index), v[index])
        wide, inverse = torch.full((n, width), torch.nan), torch.full((n, 1), torch.nan)
        assert rows.gather_rows(v, picked, wide, inverse)
        want, want_inverse = directions(source)
        assert off(wide, want) < 3e-7 and off(inverse, want_inverse) < 3e-7
        half = torch.full((n, 2 * width), torch.nan, dtype=HALF)[:, :width]  # a view in wider memory
        assert rows.gather_rows(v, picked, half, inverse)
        assert torch.equal(half, wide.to(HALF))
        assert rows.gather_rows(v, picked, half, None)
        assert torch.equal(half, source.to(HALF))
    assert called == ["gather_rows"] * 6


def test_rows_that_are_not_finite():
    v = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [3.0, 4.0]])
    out, inverse = torch.empty(3, 2), torch.empty(3, 1)
    assert rows.gather_rows(v, None, out, inverse)
    assert out[0].isnan().all() and out[1, 0].isnan() and out[2].tolist() == pytest.approx([0.6, 0.8])
    assert torch.equal(out, v * inverse) or out[0].isnan().any()


@pytest.mark.parametrize("width", [1, 33, 512])
def test_gradients_through_the_lengths(width, called):
    v, index = rows_of(9, width), torch.tensor([8, 0, 1, 5])
    for picked, dtype in ((None, torch.float32), (index, torch.float32), (index, HALF)):
        source = v if picked is None else v[picked]
        g = torch.randn(len(source), width).to(dtype)
        unit, inverse = directions(source)
        want = (g.double() - (g.double() * unit).sum(1, keepdim=True) * unit) * inverse
        original = g.clone()
        out = g.float() if dtype == torch.float32 else torch.empty(len(source), width)
        grad = out if dtype == torch.float32 else g  # one memory, where it can be
        assert rows.project_rows(grad, v, picked, inverse.float(), out)
        size = float((original.double() * inverse).abs().max())
        assert float((out.double() - want).abs().max()) < 1e-6 * size  # all of it is along the row where D is 1
    assert called == ["project_rows"] * 3


@pytest.mark.parametrize("state", [True, False])
def test_missed_steps(state, called):
    v, m, index = rows_of(7, 24), torch.randn(7, 24), torch.tensor([6, 2, 2, 0, 5])
    factors = torch.rand(5, 4 if state else 1)
    tensors, outs = ([v, m] if state else [v]), [torch.empty(5, 24) for _ in range(2 if state else 1)]
    unit, inverse = torch.empty(5, 24, dtype=HALF), torch.empty(5, 1)
    assert rows.catch_up_rows(tensors, index, factors, outs, (unit, inverse), torch.float32)
    f, wide = factors.double()[:, :, None], [t[index].double() for t in tensors]
    want = (
        [f[:, 0] * wide[0] + f[:, 1] * wide[1], f[:, 2] * wide[0] + f[:, 3] * wide[1]] if state else [f[:, 0] * wide[0]]
    )
    assert all(off(mine, theirs) < 3e-7 for mine, theirs in zip(outs, want, strict=True))
    assert off(unit, directions(outs[0])[0]) < 2**-8 and off(inverse, directions(outs[0])[1]) < 3e-7
    # those of rows that are stored in half precision
    assert rows.catch_up_rows(tensors, index, factors, outs, (unit, inverse), HALF)
    assert off(inverse, directions(outs[0].to(HALF))[1]) < 3e-7
    assert called == ["catch_up_rows"] * 2


def test_rows_beyond_two_to_the_31(tmp_path, called):
    """Sparse files of which a few pages are touched."""
    width, count = 64, (1 << 31) // 64 + 5000
    index = torch.tensor([3, (1 << 31) // 64 - 1, count - 1])
    big, momentum = (
        torch.from_file(str(tmp_path / name), shared=True, size=count * width, dtype=HALF).view(count, width)
        for name in ("rows", "momentum")
    )
    big[index], g = torch.randn(3, width).to(HALF), torch.randn(3, width)
    out, inverse = torch.empty(3, width), torch.empty(3, 1)
    assert rows.gather_rows(big, index, out, inverse)
    assert off(out, directions(big[index])[0]) < 3e-7
    before = big[index].double()
    assert step_rows(g, Memory(big, (momentum,)), Numbers(0.5, 0.9, 1.0, 0.0), index, 0, None)
    assert off(momentum[index], g.double()) < 2**-8 and off(big[index], before - 0.5 * g.double()) < 2**-7
    assert called == ["gather_rows", "step_rows"]


def test_random_rounding_has_the_bits_of_the_plain_path(called):
    lo, key, width = (1 << 40) + 7, 0x1234567890ABCDEF, 37
    v = torch.randn(6, width).to(HALF)
    v[0, 0], v[1, 1] = torch.inf, torch.nan
    index, g, mine = torch.tensor([5, 0, 1]), torch.randn(3, width), v.clone()
    assert step_rows(g, Memory(mine, ()), Numbers(1e-3, 0.0, 1.0, 0.0), index, 0, (lo, key))
    moved = v[index].float() - 1e-3 * g
    want = round_at_random(moved, lo + index, key).to(HALF)
    assert torch.equal(mine[index].nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(mine[2:5], v[2:5])


def test_corrections_of_adam_that_are_on_the_card(called):
    """The step count of a fused Adam is on the card, where the host does not read it."""
    found = []
    for on_card in (False, True):
        torch.manual_seed(0)
        v, m, s, g = torch.randn(4, 9), torch.randn(4, 9), torch.rand(4, 9), torch.randn(4, 9)
        known: dict[str, Any] = {"by_rate": 0.3, "by_root": 1.7}
        how: dict[str, Any] = {"factors": torch.tensor([0.3, 1.7])} if on_card else known
        assert step_rows(g, Memory(v, (m, s)), Numbers(0.1, 0.1, 0.99, 0.0, adam=True, eps=1e-3, **how), None, 0, None)
        found.append((v, m, s))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert called == ["step_rows"] * 2


def run(
    mode: Any, cls: Any, options: dict[str, Any], rate: float = 1.0, steps: int = 4, **more: Any
) -> dict[str, Tensor]:
    """Losses, gradients, rows and state of a few steps."""
    torch.manual_seed(0)
    low, clip = more.pop("low_precision", None), more.pop("clip", None)
    early, margin, dtype = more.pop("early", False), more.pop("margin", ArcFace), more.pop("dtype", None)
    classes = more.pop("classes", 61)
    head = PartialFC(20, classes, margin(), sample_rate=rate, kernels=mode, dtype=dtype, **more)
    optimizer = RowOptimizer(cls, head, low_precision=low, update_in_backward=early, **options)
    found = {}
    for step in range(steps):
        x, labels = torch.randn(13, 20, requires_grad=True), torch.randint(0, classes, (13,))
        labels[3:5] = labels[2]
        loss = head(x, labels)
        loss.backward()
        if clip is not None:
            found[f"norm {step}"] = clip_grad_norm_([], head, max_norm=clip).detach()
        optimizer.step()
        optimizer.zero_grad()
        found |= {f"loss {step}": loss.detach(), f"x {step}": x.grad}
    state = optimizer.state_dict()["state"][0]
    found |= {key: torch.as_tensor(value).float() for key, value in state.items()}
    return {**found, "rows": head.weight.detach().float()}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SGD, {"lr": 0.1}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (SGD, {"lr": torch.tensor(0.1), "momentum": 0.9, "dampening": 0.3, "maximize": True}),
        (ADAM, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}),
        (ADAMW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "eps": 1e-3}),
    ],
)
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("low", [None, "master", "stochastic"])
def test_steps_are_those_of_the_class(cls, options, rate, low, called, rows_alone):
    if cls is ADAM and rate < 1:
        options = {**options, "weight_decay": 0.0}  # else rows stand still: its decay enters the state
    more = {"low_precision": low, "dtype": None if low is None else HALF}
    plain, mine = run("off", cls, options, rate, **more), run("interpret", cls, options, rate, **more)
    assert called.count("step_rows") == (4 if cls is SGD and not options.get("momentum") else 3)
    moves = cls is SGD and rate < 1 and ("momentum" in options or "weight_decay" in options)
    assert ("catch_up_rows" in called) == moves
    assert plain.keys() == mine.keys()
    for name, want in plain.items():
        # in bfloat16 numbers are the same until one is rounded the other way, which then is in all that follows
        assert off(mine[name], want.double()) < (APART if low is None else 5e-2), name


def test_pads_are_stepped_once(called):
    """A row may stand in a step twice, as pads of a forward on a card."""
    index, pads = torch.tensor([0, 4, 2, 4, 4]), Pads(2, torch.tensor([False, True, True]))
    v, m, g = torch.ones(6, 3), torch.zeros(6, 3), torch.ones(5, 3)
    kept = without_pads(index, pads, 0, 5)
    assert kept.tolist() == [0, 4, 2, -1, -1] and without_pads(index[1:], pads, 1, 5).tolist() == [4, 2, -1, -1]
    of_two = Pads(0, torch.tensor([False, False, True]), torch.tensor([0, 1, 0]))  # of two micro-batches
    assert without_pads(torch.tensor([4, 2, 4]), of_two, 0, 3).tolist() == [4, 2, -1]
    assert step_rows(g, Memory(v, (m,)), Numbers(0.5, 0.9, 1.0, 0.0), kept, 0, None)
    assert v[:, 0].tolist() == [0.5, 1.0, 0.5, 1.0, 0.5, 1.0] and m[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("low", [None, "stochastic", "master"])
@pytest.mark.parametrize("budget", [None, 0])
def test_rows_that_move_in_the_backward(low, budget, called, rows_alone):
    """One kernel from the product to the moved rows, but in the first step; float32 master rows have a gradient."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    more: dict[str, Any] = {"low_precision": low, "dtype": None if low is None else HALF, "early": True}
    with small_tiles():
        plain = run("off", SGD, options, logits_budget=budget, classes=150, **more)
        mine = run("interpret", SGD, options, logits_budget=budget, classes=150, **more)
    tiles = 3
    assert called.count("project_rows") == tiles * (4 if low == "master" else 1)
    assert called.count("step_rows") == tiles * 3
    for name, want in plain.items():
        assert off(mine[name], want.double()) < (APART if low is None else 5e-2), name


OTHERS: list[tuple[Any, dict[str, Any]]] = [
    (ADAM, {"lr": 0.01, "amsgrad": True, "eps": 1e-3}),
    (torch.optim.RMSprop, {"lr": 0.01, "eps": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.01, "eps": 0.1}),
]


@pytest.mark.parametrize(("cls", "options"), OTHERS)
def test_other_optimizers_step_by_themselves(cls, options, called, rows_alone):
    plain, mine = run("off", cls, options), run("interpret", cls, options)
    assert "step_rows" not in called and "project_rows" in called
    assert all(off(mine[name], want.double()) < APART for name, want in plain.items())


@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.3}, {"logits_budget": 0}, {"early": True}])
def test_two_runs_are_equal_bit_for_bit(options):
    options = dict(options)
    rate = options.pop("sample_rate", 1.0)
    first, second = (run("interpret", SGD, {"lr": 0.1, "momentum": 0.9}, rate, steps=3, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("margin", [ArcFace, Softmax, SubCenterArcFace])
@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_errors_at_scale_64(margin, product):
    """Beside dense float64: float32 is exact to 2e-6, bfloat16 to at most 1.5 times the error of plain PyTorch."""
    errors: dict[str, dict[str, float]] = {}
    torch.manual_seed(3)
    X, W, labels = torch.randn(17, 48), torch.randn(53, 48), torch.randint(0, 53, (17,))
    found = {}
    for mode, dtype in (("dense", torch.float64), ("off", torch.float32), ("interpret", torch.float32)):
        head = PartialFC(48, 53, margin(), kernels="off" if mode == "dense" else mode, dtype=dtype)
        rows_of_classes = W if margin is not SubCenterArcFace else torch.stack((W, W.roll(1, 1), W.roll(2, 1)), 1)
        with torch.no_grad():
            head.weight.copy_(rows_of_classes)
        x = X.clone().to(dtype).requires_grad_()
        half = torch.autocast("cpu", HALF, enabled=product == "bfloat16" and mode != "dense")
        with half:
            loss = head(x, labels)
        loss.backward()
        found[mode] = {"loss": loss.detach(), "x": x.grad, "rows": head.weight.grad}
    for mode in ("off", "interpret"):
        errors[mode] = {name: off(found[mode][name], found["dense"][name]) for name in ("loss", "x", "rows")}
    for name, error in errors["interpret"].items():
        # what rounding of the operands leaves of a loss is a thousandth of its resolution, by chance more or less
        low = max(1.5 * errors["off"][name], 5e-4)
        assert error < (2e-6 if product == "float32" else low), (name, errors)


@pytest.mark.parametrize(("early", "count"), [(False, 12), (True, 4)])
def test_cases_equal_the_dense_reference(early, count):
    """Margins, sampling with correction, filters, smoothing, weights, accumulation, clipping, as they are drawn, in one
    process. early: rows move in the backward."""
    drawn = (case_of(number) for number in itertools.count())
    chosen = (case for case in drawn if case.kernels and case.world == 0 and case.early == early)
    compared = 0
    for case in itertools.islice(chosen, 2 * count):
        with contextlib.suppress(NearJump):
            check(case, [run_case(0, 1, case)])
            compared += 1
        if compared == count:
            break
    assert compared > count // 2


PROOF = [
    gpu_proof.Case(margin, "float32", rate=0.3, classes=90, width=12, counts=(14,)) for margin in gpu_proof.MARGINS
]
PROOF += [
    gpu_proof.Case(dtype="float32", tiled=True, in_backward=True, classes=150, width=12, counts=(14,)),
    gpu_proof.Case(dtype="float32", optimizer="adamw", classes=90, width=12, counts=(14,)),
    gpu_proof.Case(dtype="float32", rate=0.3, corrected=True, classes=90, width=12, counts=(14,)),
    gpu_proof.Case("CosFace", "float32", smoothing=0.1, class_weights=True, classes=90, width=12, counts=(14,)),
    gpu_proof.Case("NormFace", "float32", beyond=0.3, classes=90, width=12, counts=(14,)),
]


@pytest.mark.parametrize("case", PROOF, ids=str)
def test_steps_with_rows_that_miss_some(case, called, monkeypatch):
    """All rows after every step, also those that were not selected, beside a dense float64 run."""
    monkeypatch.setenv(VARIABLE, "interpret")
    errors = gpu_proof.errors_of(case, torch.device("cpu"))
    assert max(errors.values()) < gpu_proof.TOLERANCES["float32"], errors
    assert "step_rows" in called and ("catch_up_rows" in called) == (case.rate < 1)


def test_hard_negatives_metrics_and_a_retained_graph(called):
    for rate, more in ((0.2, {"hard_negatives": 2, "hard_negatives_every": 1}), (1.0, {"metrics": True})):
        found = []
        for mode in ("off", "interpret"):
            torch.manual_seed(1)
            head = PartialFC(12, 40, ArcFace(), sample_rate=rate, kernels=mode, **more)
            optimizer = RowOptimizer(SGD, head, lr=0.1, momentum=0.9)
            for _ in range(3):
                x, labels = torch.randn(9, 12, requires_grad=True), torch.randint(0, 40, (9,))
                loss = head(x, labels)
                loss.backward(retain_graph=True)
                loss.backward()  # directions are made again
                optimizer.step()
                optimizer.zero_grad()
            found.append((loss.detach(), x.grad, head.weight.detach().clone()))
        assert all(off(mine, want.double()) < APART for want, mine in zip(*found, strict=True))


def test_a_center_loss_is_as_before(called):
    loss = CenterLoss(8, 20)
    RowOptimizer(SGD, loss, lr=0.1)
    loss(torch.randn(4, 8, requires_grad=True), torch.tensor([1, 2, 3, 4])).backward()
    assert called == []


@pytest.mark.parametrize("broken", ["gather_rows", "project_rows", "step_rows", "catch_up_rows"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_kernel_that_fails_is_replaced(broken, after, monkeypatch, caplog):
    """At its first launch, or later, in the middle of a step: the numbers are right, and one warning names it."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    more: dict[str, Any] = {"logits_budget": 0}
    rate = 1.0 if broken == "gather_rows" else 0.4  # else directions are made when rows are taken
    want = run("off", SGD, options, rate, **more)
    whole_code, count = launch.device_code, [0]

    class Broken:
        def __init__(self, module: Any) -> None:
            self.module = module

        def __getattr__(self, name: str) -> Any:
            kernel = getattr(self.module, name)
            if name == broken:
                count[0] += 1
                if count[0] > after:
                    raise RuntimeError("out of registers")
            return kernel

    for module in ("rows", "update"):
        monkeypatch.setattr(f"partial_fc.kernels.{module}.device_code", lambda name: Broken(whole_code(name)))
    monkeypatch.setattr(launch, "failed", {})
    with caplog.at_level(logging.WARNING, "partial_fc"), small_tiles():
        mine = run("interpret", SGD, options, rate, **more)
    said = [each.getMessage() for each in caplog.records if "failed" in each.getMessage()]
    expected = f"the kernel {broken} failed, plain PyTorch takes its place from here on: RuntimeError: out of registers"
    assert said == [expected] and count[0] == after + 1
    assert all(off(mine[name], each.double()) < APART for name, each in want.items())


def numbers_of_a_run(rank: int, world: int, mode: str) -> tuple[Tensor, Tensor, Tensor, str]:
    head = PartialFC(12, 41, ArcFace(), sample_rate=0.5, kernels=mode)  # type: ignore[arg-type]
    optimizer = RowOptimizer(SGD, head, lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x, labels = torch.randn(8, 12, generator=generator), torch.randint(0, 41, (8,), generator=generator)
        here = slice(rank * 8 // world, (rank + 1) * 8 // world)
        loss = head(x[here].requires_grad_(), labels[here])
        loss.backward()
        norm = clip_grad_norm_([], head, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.catch_up()
    return loss.detach(), norm, local(head.weight).detach().clone(), head.kernels_in_use


def test_any_number_of_ranks_gives_the_same_run(ranks: Callable[[int], Ranks]):
    loss, norm, weight, used = numbers_of_a_run(0, 1, "interpret")
    found = ranks(2).run(numbers_of_a_run, "interpret")
    assert used == found[0][3] and used.startswith("rows")
    assert off(found[0][0], loss.double()) < 1e-6 and off(found[0][1], norm.double()) < 1e-6
    assert off(torch.cat([each[2] for each in found]), weight.double()) < 1e-6


def one_rank_differs(rank: int, world: int) -> str:
    try:
        PartialFC(4, 9, kernels="interpret" if rank else "off")
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_differ_are_refused(ranks: Callable[[int], Ranks]):
    first, second = ranks(2).run(one_rank_differs)
    assert first == second and "kernels is off on rank 0 and interpret on rank 1" in first
