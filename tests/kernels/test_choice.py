"""Which kernels serve a forward: modes, the environment, the rule, and what is said where none does."""

from __future__ import annotations

import copy
import dataclasses
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from common import any_message_of, needs

from partial_fc import ArcFace, PartialFC, RowOptimizer, doctor
from partial_fc.kernels import choice, launch
from partial_fc.kernels.choice import VARIABLE, Case, choose, mode_of

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
CASE = Case(
    device=CPU, rows=torch.float32, stats=torch.float32, product=torch.bfloat16, width=512, centers=1, normalize=True,
    bounded=True, ruled=False, binary=False, bias=False, smoothing=False, metrics=False, correction=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _asked_anew():
    choose.cache_clear()
    choice.triton_problem.cache_clear()
    yield
    choose.cache_clear()
    choice.triton_problem.cache_clear()


@pytest.mark.parametrize(
    ("given", "variable", "mode"),
    [
        ("auto", None, "auto"),
        ("auto", "", "auto"),
        ("auto", "off", "off"),
        ("auto", "interpret", "interpret"),
        ("off", "interpret", "off"),
        ("interpret", "off", "interpret"),
    ],
)
def test_the_environment_wins_over_auto(given, variable, mode, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    assert mode_of(given) == mode


@pytest.mark.parametrize("given", ["on", "AUTO", "", None, True, 1])
def test_a_mode_that_does_not_exist(given):
    said = any_message_of(PartialFC, 4, 9, kernels=given)
    assert said == f"ValueError: kernels must be one of auto, off, interpret, not {given!r}"
    head = PartialFC(4, 9)
    assert any_message_of(setattr, head, "kernels", given) == said


@pytest.mark.parametrize("given", ["auto", "off", "interpret"])
def test_a_variable_that_says_nothing(given, monkeypatch):
    monkeypatch.setenv(VARIABLE, "yes")
    said = any_message_of(PartialFC, 4, 9, kernels=given)
    assert said == f"ValueError: the environment variable {VARIABLE} must be one of auto, off, interpret, not 'yes'"


def on_a_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: str | None = "3.9.0") -> None:
    def version(name: str) -> str:
        if triton is None:
            raise choice.PackageNotFoundError(name)
        return triton

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(choice, "version", version)


@pytest.mark.parametrize(
    ("capability", "triton", "said"),
    [
        ((7, 5), "3.9.0", "they are for cards of capability 8.0 on, and this one has 7.5"),
        ((9, 0), None, "triton is not installed: pip install 'partial_fc[kernels]'"),
        ((9, 0), "3.5.1", "they need triton 3.6, and 3.5.1 is installed"),
        ((8, 0), "3.6.0", ""),
        ((9, 0), "3.10.0+git1234", ""),
    ],
)
def test_machines(capability, triton, said, monkeypatch):
    on_a_card(monkeypatch, capability, triton)
    found = choose("auto", dataclasses.replace(CASE, device=CARD))
    assert found.rows == (not said)
    assert not said or str(found) == f"none ({said})"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stats": torch.float64, "rows": torch.float64}, "statistics are float32, and here they are float64"),
        ({"width": 16385}, "a program holds whole rows of at most 16384 numbers, not 16385"),
        ({"width": 1}, ""),
        ({"rows": torch.bfloat16}, ""),
        ({"product": torch.float16, "ruled": True, "centers": 3}, ""),
        ({"normalize": False, "bias": True, "bounded": False}, ""),
    ],
)
def test_rows(changes, said, monkeypatch):
    on_a_card(monkeypatch, (9, 0))
    found = choose("auto", dataclasses.replace(CASE, device=CARD, **changes))
    assert found.rows == (not said)
    assert not said or found.reason == said
    assert found.directions == (
        None if said or changes.get("normalize") is False else changes.get("product", torch.bfloat16)
    )


def test_other_devices():
    assert choose("auto", CASE).reason == "they are for NVIDIA cards, and the rows are on cpu"
    assert choose("off", CASE).reason == "kernels are off"
    far = dataclasses.replace(CASE, device=CARD)
    assert choose("interpret", far).reason == "the interpreter is for rows on a CPU, and these are on cuda:0"
    assert choose("interpret", CASE).rows


def test_without_triton_auto_and_off_are_as_before(monkeypatch):
    on_a_card(monkeypatch, (9, 0), None)
    for mode in ("auto", "off"):
        head = PartialFC(4, 9, kernels=mode)
        head(torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 3])).backward()
        assert head.kernels == mode and head.kernels_in_use == ""
    with pytest.raises(ImportError) as caught:
        PartialFC(4, 9, kernels="interpret")
    assert str(caught.value) == (
        'kernels="interpret" runs kernels in Triton\'s interpreter, but triton is not installed: pip install '
        "'partial_fc[kernels]'"
    )


def test_a_step_does_not_import_triton_by_itself():
    """Nor anything that a kernel would need: the choice alone is asked."""
    step = (
        "import sys, torch, partial_fc\n"
        "assert 'triton' not in sys.modules and 'numpy' not in vars(partial_fc)\n"
        "head = partial_fc.PartialFC(4, 9)\n"
        "head(torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 3])).backward()\n"
        "assert not any(name.startswith('partial_fc.kernels.device') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", step], check=True)


@needs("triton")
def test_a_process_that_has_triton_without_its_interpreter(monkeypatch):
    late = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import triton, partial_fc\n"
        "try:\n    partial_fc.PartialFC(4, 9, kernels='interpret')\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", late], check=True, capture_output=True, text=True).stdout
    assert f"start the process with {VARIABLE}=interpret" in said


@needs("triton")
def test_an_interpreter_that_fails_is_refused(monkeypatch):
    launch.prepare("interpret")
    common = launch.device_code("common")

    class Fails:
        def __getitem__(self, grid: Any) -> Any:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(common, "counted", Fails())
    said = any_message_of(PartialFC, 4, 9, kernels="interpret")
    assert said.startswith("RuntimeError: ") and "install numpy<2.4, or a newer triton" in said


@needs("triton")
def test_what_is_in_use_is_said_once(caplog):
    head = PartialFC(8, 20, ArcFace(), kernels="interpret")
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    with caplog.at_level(logging.INFO, "partial_fc"):
        for _ in range(3):
            head(torch.randn(4, 8), torch.tensor([1, 2, 3, 4])).backward()
            optimizer.step()
            optimizer.zero_grad()
    said = [each.getMessage() for each in caplog.records if "kernels" in each.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"kernels in use: {head.kernels_in_use}")
    assert head.kernels_in_use == "rows, tiles and stream" and head.logits_mode == "streamed"
    # float64 is not served: plain PyTorch, and that is said as well
    head.double()
    with caplog.at_level(logging.INFO, "partial_fc"):
        head(torch.randn(4, 8, dtype=torch.float64), torch.tensor([1, 2, 3, 4])).backward()
    assert head.kernels_in_use == "none (statistics are float32, and here they are float64)"
    assert head.class_rows.kernels is None
    assert "kernels in use: none (statistics are float32, and here they are float64)" in caplog.text
    head.kernels = "off"
    assert head.kernels == "off" and head.class_rows.kernels is None


@needs("triton")
def test_a_copy_and_a_cast_go_on(monkeypatch):
    head = PartialFC(8, 20, ArcFace(), sample_rate=0.5, kernels="interpret")
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)

    def step(head: PartialFC, optimizer: RowOptimizer) -> None:
        head(torch.ones(4, 8, requires_grad=True), torch.tensor([1, 2, 3, 4])).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(head, optimizer)
    twin, of_twin = copy.deepcopy((head, optimizer))
    for each in ((head, optimizer), (twin, of_twin)):
        step(*each)
        each[1].catch_up()
    assert torch.equal(head.weight, twin.weight) and twin.kernels == "interpret"
    head.to(torch.bfloat16)
    assert head.class_rows.kernels is None  # until the next forward chooses
    step(head, optimizer)
    assert head.kernels_in_use.startswith("rows")


@needs("triton")
def test_the_doctor_says_which(monkeypatch):
    model = torch.nn.Linear(6, 8)
    for mode, expected in (
        ("off", 'none (kernels="off")'),
        ("interpret", "rows"),
        ("auto", "none (the rows are on a CPU)"),
    ):
        head = PartialFC(8, 20, ArcFace(), kernels=mode)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), RowOptimizer(torch.optim.SGD, head, lr=0.1)]
        batch = torch.randn(4, 6), torch.tensor([1, 2, 3, 4])
        report = doctor(model, head, optimizers, batch=batch)
        assert report["kernels"].ok and report["kernels"].words.startswith(expected), str(report)
    monkeypatch.setitem(launch.failed, "gather_rows", "RuntimeError: out of registers")
    check = doctor(model, head, optimizers, batch=batch)["kernels"]
    assert check.ok is False and "gather_rows (RuntimeError: out of registers)" in check.words
