"""Kernels are tried where they are first used: right ones pass, wrong ones are found, named and replaced."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from common import needs
from runner import Ranks
from shards import local
from torch import Tensor

from partial_fc import ArcFace, PartialFC, RowOptimizer, Softmax, doctor
from partial_fc.kernels import launch, logits, rows, small_problems, trial, update
from partial_fc.kernels.choice import Case
from partial_fc.kernels.small_problems import Compared, MovesCase, StepCase
from partial_fc.kernels.update import Memory, Numbers

pytestmark = needs("triton")
CPU, SINGLE, HALF = torch.device("cpu"), torch.float32, torch.bfloat16
CASE = Case(
    device=CPU, rows=SINGLE, stats=SINGLE, product=HALF, width=24, centers=1, normalize=True, bounded=True, ruled=False,
    binary=False, bias=False, smoothing=False, metrics=False, correction=False,
)  # fmt: skip
# where the arguments of a kernel have what it writes, and how often a trial launches it
WRITES = {
    "gather_rows": (2, 2),
    "project_rows": (4, 2),
    "catch_up_rows": (4, 1),
    "step_rows": (2, 1),
    "tile_exponentials": (6, 3),
    "stream_forward": (5, 1),
    "stream_backward": (6, 1),
}


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> None:
    launch.prepare("interpret")


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "failed", {})
    monkeypatch.setattr(trial, "_tried", set())


@pytest.fixture
def _tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TRIED_ON", {"cpu"})


class Changed:
    """A module of device code with one kernel that is called in another way: change(launch, its arguments)."""

    def __init__(self, module: Any, kernel: str, change: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        self.module, self.kernel, self.change = module, kernel, change

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.module, name)
        return real if name != self.kernel else self

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        real = getattr(self.module, self.kernel)[grid]
        return lambda *given, **options: self.change(lambda *changed: real(*changed, **options), given)


def changed(
    kernel: str, change: Callable[[Callable[..., Any], tuple[Any, ...]], Any], patch: pytest.MonkeyPatch
) -> None:
    whole = launch.device_code
    for module in (rows, update, logits):
        patch.setattr(module, "device_code", lambda name: Changed(whole(name), kernel, change))


def a_little(last: Tensor) -> None:
    last.mul_(1.02)


def to_nan(last: Tensor) -> None:
    last.view(-1)[-1] = torch.nan


def spoilt(kernel: str, spoil: Callable[[Tensor], Any], patch: pytest.MonkeyPatch) -> list[str]:
    """Have the last numbers that a kernel writes spoilt; return a list that grows with its launches."""
    launches: list[str] = []

    def change(launched: Callable[..., Any], given: tuple[Any, ...]) -> None:
        launches.append(kernel)
        launched(*given)
        written = given[WRITES[kernel][0]]
        if written.numel():
            spoil(written[-1])

    changed(kernel, change, patch)
    return launches


def run(mode: Any, width: int = 20, rate: float = 0.4, early: bool = False) -> tuple[PartialFC, list[Tensor]]:
    """Four steps: losses, gradients of embeddings, rows and momentum. Rows miss steps, and are moved late."""
    torch.manual_seed(0)
    head = PartialFC(width, 61, ArcFace(), sample_rate=rate, kernels=mode, dtype=SINGLE)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, update_in_backward=early)
    found = []
    for _ in range(4):
        x, labels = torch.randn(13, width, requires_grad=True), torch.randint(0, 61, (13,))
        loss = head(x, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert x.grad is not None
        found += [loss.detach(), x.grad]
    return head, [*found, head.weight.detach(), optimizer.state_dict()["state"][0]["momentum_buffer"]]


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.abs().max())


def right(found: list[Compared]) -> None:
    assert found and not launch.failed
    assert not [(each, float(each.error)) for each in found if not each.error <= each.limit]


# ------------------------------------------------------------------------------------------------ the kernels are right


@pytest.mark.parametrize("width", [1, 24, 100])
@pytest.mark.parametrize("product", [SINGLE, HALF, torch.float16])
def test_kernels_of_rows_pass(width: int, product: torch.dtype):
    for stored, smoothing in ((SINGLE, True), (HALF, False), (torch.float16, False)):
        case = dataclasses.replace(CASE, width=width, product=product, rows=stored, smoothing=smoothing)
        found = small_problems.of_rows(case)
        right(found)
        assert {each.kernel for each in found} == {"gather_rows", "project_rows"}
    right(small_problems.of_rows(dataclasses.replace(CASE, width=width, rows=torch.float16, normalize=False)))


@pytest.mark.parametrize(("width", "product"), [(1, SINGLE), (24, HALF), (100, HALF)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metrics": True, "sampled": True},
        {"bounded": False, "normalize": False, "bias": True},
        {"bounded": False, "metrics": True},
    ],
)
def test_kernels_of_logits_pass(width: int, product: torch.dtype, options: dict[str, Any]):
    case = dataclasses.replace(CASE, width=width, product=product, **options)
    tiles, stream = small_problems.of_tiles(case), small_problems.of_stream(case)
    right(tiles + stream)
    assert {each.kernel for each in tiles} == {"tile_exponentials"}
    assert {each.kernel for each in stream} == {"stream_forward", "stream_backward"}


def memory(width: int, stored: torch.dtype, states: int, *, master: bool, taken: bool) -> Memory:
    of = lambda dtype: torch.zeros(2, width, dtype=dtype)  # noqa: E731
    stored = SINGLE if master else stored
    copies = tuple(of(SINGLE) for _ in range(1 + states)) if taken else ()
    return Memory(of(stored), tuple(of(stored) for _ in range(states)), copies, of(HALF) if master else None)


NUMBERS = [
    Numbers(0.1, 0.0, 1.0, 0.0),
    Numbers(0.1, 0.9, 1.0, 0.1, nesterov=True, maximize=True),
    Numbers(0.1, 0.1, 0.99, 0.1, adam=True),
    Numbers(0.1, 0.1, 0.99, 0.1, adam=True, decoupled=True, factors=torch.ones(2)),
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=["sgd", "momentum", "adam", "adamw"])
def test_steps_pass(numbers: Numbers):
    states = 2 if numbers.adam else int(numbers.a > 0)
    for low, (gather, taken), through in itertools.product(
        (None, "master", "stochastic"), ((False, False), (True, False), (True, True)), (False, True)
    ):
        stored = HALF if low == "stochastic" else SINGLE
        given = memory(24, stored, states, master=low == "master", taken=taken)
        how = {"gather": gather, "stochastic": low == "stochastic", "through": through and low != "master"}
        found = small_problems.of_step(StepCase.of(torch.zeros(2, 24), given, numbers, **how))
        right(found)
        assert len(found) == 1 + states + (low is not None)


def test_missed_steps_pass():
    for stored, made, of in itertools.product(((SINGLE,), (HALF, SINGLE)), (None, SINGLE, HALF), (SINGLE, HALF)):
        right(small_problems.of_moves(MovesCase(CPU, 24, stored, made, of)))


@pytest.mark.parametrize(
    "around",
    [
        nullcontext,
        torch.inference_mode,
        lambda: torch.autocast("cpu", HALF),
        lambda: torch.device("meta"),
    ],
)
@pytest.mark.usefixtures("_tried_here")
def test_whatever_is_set_around_it(around: Callable[[], AbstractContextManager[Any]]):
    """The trial passes, random numbers go on as they were, and so does the recording of gradients."""
    found, state, given = (
        trial.Kernels(True, True, True),
        torch.get_rng_state(),
        memory(24, HALF, 2, master=True, taken=False),
    )
    adam = StepCase.of(torch.zeros(2, 24), given, NUMBERS[3], gather=True, stochastic=False, through=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with around():
            assert trial.proven(found, CASE) is found
            assert trial.step_tried(lambda: adam, CPU)
            assert trial.moves_tried(lambda: MovesCase(CPU, 24, (SINGLE, SINGLE), HALF, SINGLE), CPU)
    finally:
        torch.set_default_dtype(before)
    assert len(trial._tried) == 5 and not launch.failed
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_steps_of_a_head_are_what_was_tried(monkeypatch: pytest.MonkeyPatch):
    """The same numbers with a trial before and without; on a CPU there is none by itself."""
    for early in (False, True):
        rate = 1.0 if early else 0.4
        monkeypatch.setattr(trial, "TRIED_ON", {"cuda"})
        _, without = run("interpret", rate=rate, early=early)
        assert not trial._tried and not trial.tried_on(CPU)
        monkeypatch.setattr(trial, "TRIED_ON", {"cpu"})
        head, tried = run("interpret", rate=rate, early=early)
        assert all(torch.equal(a, b) for a, b in zip(without, tried, strict=True))
        moved = {"moves"} if rate < 1 else set()
        assert {family for family, _ in trial._tried} == {"rows", "tiles", "stream", "step"} | moved
        assert trial.tried_on(CPU) and head.kernels_in_use == "rows, tiles and stream" and not launch.failed
        trial._tried.clear()


@pytest.mark.usefixtures("_tried_here")
def test_once_for_each_that_is_compiled(monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    problems = dict(trial.PROBLEMS)

    def counted(family: str) -> Callable[[Case], list[Compared]]:
        return lambda case: made.append(family) or problems[family](case)  # type: ignore[func-returns-value]

    monkeypatch.setattr(trial, "PROBLEMS", {family: counted(family) for family in problems})
    of_step = trial.of_step
    monkeypatch.setattr(trial, "of_step", lambda case: made.append("step") or of_step(case))  # type: ignore[func-returns-value]
    run("interpret", rate=1.0)
    first = ["rows", "tiles", "stream", "step"]
    assert made == first
    run("interpret", rate=1.0)
    assert made == first  # another head, the same code
    run("interpret", width=12, rate=1.0)
    assert made == 2 * first  # D is part of it


# ------------------------------------------------------------------------------------------------ a kernel is wrong


@pytest.fixture(scope="module")
def want() -> list[Tensor]:
    return run("off")[1]


@pytest.mark.parametrize(
    ("kernel", "spoil"), [*((name, a_little) for name in WRITES), ("project_rows", to_nan), ("stream_forward", to_nan)]
)
@pytest.mark.usefixtures("_tried_here")
def test_a_wrong_kernel_is_found(
    kernel: str, spoil: Callable[[Tensor], Any], want: list[Tensor], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    launches = spoilt(kernel, spoil, monkeypatch)
    with caplog.at_level(logging.WARNING, "partial_fc"):
        head, got = run("interpret")
    assert len(launches) == WRITES[kernel][1]  # none but those of the trial
    (said,) = [each.getMessage() for each in caplog.records]
    assert said.startswith(
        f"the kernel {kernel} failed, plain PyTorch takes its place from here on: in its trial on cpu"
    )
    assert "at D = 20, " in said and f"differ from plain PyTorch by {'nan' if spoil is to_nan else ''}" in said
    assert list(launch.failed) == [kernel]
    # two runs in float32, of four steps at scale 64
    assert max(off(a, b) for a, b in zip(got, want, strict=True)) < 1e-4
    in_use = {
        "gather_rows": "none (gather_rows has failed)",
        "project_rows": "none (project_rows has failed)",
        "tile_exponentials": "rows and stream",
        "stream_forward": "rows and tiles",
        "stream_backward": "rows and tiles",
    }
    assert head.kernels_in_use == in_use.get(kernel, "rows, tiles and stream")
    if kernel in trial.KERNELS["rows"]:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # no kernel is left
    if kernel in trial.KERNELS["stream"]:
        assert head.logits_mode == "kept"  # which a stream would have been in place of


@pytest.mark.parametrize(("kernel", "first"), [("tile_exponentials", 3), ("stream_forward", 2), ("stream_backward", 2)])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.usefixtures("_tried_here")
def test_other_targets_are_found(kernel: str, first: int, bounded: bool, monkeypatch: pytest.MonkeyPatch):
    """Those of the sample before are left out, in place of each sample's own."""

    def change(launched: Callable[..., Any], given: tuple[Any, ...]) -> None:
        launched(*given[:first], given[first].roll(1), *given[first + 1 :])

    changed(kernel, change, monkeypatch)
    trial.proven(trial.Kernels(True, True, True), dataclasses.replace(CASE, bounded=bounded))
    assert list(launch.failed) == [kernel]


@pytest.mark.parametrize("margin", [ArcFace, Softmax])
@pytest.mark.usefixtures("_tried_here")
def test_rows_that_are_written_beside_its_own(margin: Any, monkeypatch: pytest.MonkeyPatch):
    """A row that nobody asked for, in the memory behind the result."""
    spoilt(
        "gather_rows",
        lambda last: torch.as_strided(last, (1,), (1,), last.storage_offset() + 2 * len(last)).fill_(1),
        monkeypatch,
    )
    case = dataclasses.replace(CASE, normalize=margin is ArcFace)
    assert str(trial.proven(trial.Kernels(True, True, True), case)) == "none (gather_rows has failed)"
    assert "numbers beside its own differ" in launch.failed["gather_rows"]


@pytest.mark.usefixtures("_tried_here")
def test_rounding_with_other_bits_is_found(monkeypatch: pytest.MonkeyPatch):
    """To the nearest in place of at random: each number is within the limit, the bits are not those that are drawn."""
    rounded = update.step_rows

    def to_nearest(*given: Any) -> bool:
        return rounded(*given[:5], None, *given[6:])

    monkeypatch.setattr(small_problems, "step_rows", to_nearest)
    how = {"gather": False, "stochastic": True, "through": False}
    case = StepCase.of(torch.zeros(2, 24), memory(24, HALF, 1, master=False, taken=False), NUMBERS[1], **how)
    assert trial.step_tried(lambda: case, CPU)
    assert "bits of rounded rows" in launch.failed["step_rows"]


@pytest.mark.usefixtures("_tried_here")
def test_a_trial_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Without memory it is made later, and plain PyTorch computes until then; another error is the kernels' end."""
    x, labels = torch.randn(4, 8), torch.tensor([1, 2, 3, 4])
    head, plain = (PartialFC(8, 20, ArcFace(), kernels=mode) for mode in ("interpret", "off"))  # type: ignore[arg-type]
    of_rows = trial.PROBLEMS["rows"]

    def full(case: Case) -> list[Compared]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(trial.PROBLEMS, "rows", full)
    assert torch.equal(head(x, labels), plain(x, labels))
    assert head.kernels_in_use == "none (there is no memory to try them)" and not launch.failed
    monkeypatch.setitem(trial.PROBLEMS, "rows", of_rows)
    head(x, labels)
    assert head.kernels_in_use == "rows, tiles and stream" and not launch.failed

    def broken(case: Case) -> list[Compared]:
        raise RuntimeError("cuBLAS")

    monkeypatch.setitem(trial.PROBLEMS, "tiles", broken)
    head, other = PartialFC(12, 20, ArcFace(), kernels="interpret"), torch.randn(4, 12)
    head(other, labels)
    assert head.kernels_in_use == "rows and stream"
    assert launch.failed == {"tile_exponentials": "its trial on cpu failed: RuntimeError: cuBLAS"}
    assert [each.levelname for each in caplog.records] == ["WARNING"] * 2


@pytest.mark.usefixtures("_tried_here")
def test_the_doctor_reports_it(monkeypatch: pytest.MonkeyPatch):
    model = torch.nn.Linear(6, 8)

    def report() -> Any:
        head = PartialFC(8, 20, ArcFace(), kernels="interpret")
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), RowOptimizer(torch.optim.SGD, head, lr=0.1)]
        return doctor(model, head, optimizers, batch=(torch.randn(4, 6), torch.tensor([1, 2, 3, 4])))["kernels"]

    monkeypatch.setattr("partial_fc.diagnosis.doctor.failed_kernels", launch.failed)
    right = report()
    assert right.ok and right.words == "rows, tiles and stream, tried beside plain PyTorch on cpu"
    trial._tried.clear()
    spoilt("stream_backward", a_little, monkeypatch)
    wrong = report()
    assert (
        wrong.ok is False and "stream_backward (in its trial on cpu at D = 8, gradients of rows differ" in wrong.words
    )


def one_of_them_is_wrong(rank: int, world: int, kernel: str) -> tuple[Tensor, Tensor, str]:
    """A few steps of all ranks, of which the last finds a kernel wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "failed", {})
        patch.setattr(trial, "_tried", set())
        patch.setattr(trial, "TRIED_ON", {"cpu"})
        if rank == world - 1 and world > 1:
            spoilt(kernel, a_little, patch)
        head = PartialFC(12, 41, ArcFace(), sample_rate=0.5, kernels="interpret")
        optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            x, labels = torch.randn(8, 12, generator=generator), torch.randint(0, 41, (8,), generator=generator)
            here = slice(rank * 8 // world, (rank + 1) * 8 // world)
            loss = head(x[here].requires_grad_(), labels[here])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.catch_up()
        return loss.detach(), local(head.weight).detach().clone(), head.kernels_in_use


@pytest.mark.parametrize(
    "kernel", ["stream_forward", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gather_rows", "step_rows"))]
)
def test_ranks_may_differ(kernel: str, ranks: Callable[[int], Ranks]):
    loss, weight, used = one_of_them_is_wrong(0, 1, kernel)
    first, last = ranks(2).run(one_of_them_is_wrong, kernel)
    assert first[2] == used == "rows, tiles and stream" and (last[2] != used or kernel == "step_rows")
    assert off(first[0], loss) < 1e-6 and torch.equal(first[0], last[0])
    assert off(torch.cat([first[1], last[1]]), weight) < 1e-6
