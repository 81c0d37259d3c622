"""Kernels of logits in Triton's interpreter against dense float64: losses, gradients, sums, in every mode."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_losses import Loss, share_of, taken_of, unit
from runner import Ranks
from shards import classes_of, local, positions, samples_of
from side_by_side import random_margins
from torch import Tensor

from partial_fc import PartialFC, RowOptimizer, gather, margins
from partial_fc.kernels import choice, launch, logits
from partial_fc.softmax import kernel_tiles
from partial_fc.softmax.corrections import Correction
from partial_fc.softmax.draws import Slots

pytestmark = pytest.mark.skipif(bool(choice.triton_problem()), reason="needs triton, which has the interpreter")

N, C, D = 21, 70, 24
COUNTS = [1, 5, 900, 40, 3] + [7 * i for i in range(C - 5)]
MAGFACE = {"l_a": 3.0, "u_a": 6.0, "l_m": 0.45, "u_m": 0.8, "penalty_weight": 3.0}
MARGINS: dict[str, dict[str, Any]] = {
    "ArcFace": {},
    "CosFace": {},
    "CombinedMargin": {"m1": 1.0, "m2": 0.3, "m3": 0.2},
    "NormFace": {},
    "SphereFace": {},
    "AdaFace": {},
    "MagFace": MAGFACE,
    "ElasticFace": {"deviation": 0.1},
    "AdaptiveMargin": {"class_counts": COUNTS},
    "Softmax": {},
}
# float32 at a scale of 64; the largest error over the largest value
LIMIT = 2e-6


def use(mode: str) -> int | None:
    """Make the rule choose a mode, and return the budget that it takes."""
    choice.STREAM_INSTEAD = 128 if mode == "streamed" else 0
    choice.STREAM_WIDEST = 256 if mode == "streamed" else 0
    choice.choose.cache_clear()
    return 0 if mode == "tiled" else None


@pytest.fixture(autouse=True)
def _rule() -> Iterator[None]:
    """The rule as it is, and no kernel that has failed."""
    before = choice.STREAM_INSTEAD, choice.STREAM_WIDEST
    launch.failed.clear()
    yield
    assert not launch.failed
    choice.STREAM_INSTEAD, choice.STREAM_WIDEST = before
    choice.choose.cache_clear()


def off(got: Tensor, want: Tensor) -> float:
    """The largest error over the largest value."""
    return ((got.detach().double() - want).abs().max() / want.abs().max()).item() if want.numel() else 0.0


def batch(n: int = N, classes: int = C, width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, labels (one ignored, some alike, one of the last class), rows of classes."""
    generator = torch.Generator().manual_seed(n * classes + width)
    x, w = torch.randn(n, width, generator=generator), torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator)
    labels[-1] = classes - 1
    if n > 4:
        labels[1], labels[3] = -100, labels[2]
    return x, labels, w


def made(
    name: str, mode: str, kernels: str = "interpret", width: int = D, classes: int = C, **options: Any
) -> PartialFC:
    given = {**({} if name == "Softmax" else {"scale": 64.0}), **MARGINS[name]}
    budget = use(mode)
    margin = getattr(margins, name)(**given)
    return PartialFC(width, classes, margin, kernels=kernels, logits_budget=budget, dtype=torch.float32, **options)  # type: ignore[arg-type]


def forward_and_backward(head: PartialFC, x: Tensor, labels: Tensor, w: Tensor, **given: Any) -> list[Tensor]:
    """The loss, and the gradients of embeddings, rows and biases."""
    with torch.no_grad():
        local(head.weight).copy_(w)
    leaf = x.clone().requires_grad_()
    loss = head(gather(leaf, labels, **given)) if given else head(leaf, labels)
    loss.backward()
    assert leaf.grad is not None and head.weight.grad is not None
    bias = [] if head.bias is None or head.bias.grad is None else [local(head.bias.grad)]
    return [loss.detach(), leaf.grad, local(head.weight.grad), *bias]


def dense(name: str, x: Tensor, labels: Tensor, w: Tensor, drawn: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The same of one dense float64 process. labels: ids, or the share of each class."""
    call = {key: options.pop(key) for key in ("sample_weights",) if key in options}
    settings = {**({} if name == "Softmax" else {"scale": 64.0}), **MARGINS[name]}
    loss_of = Loss(name, settings, **options)
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    bias = torch.zeros(len(w), dtype=torch.float64, requires_grad=True) if name == "Softmax" else None
    loss = loss_of(x, w, labels, bias=bias, drawn=drawn, **call)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in (x, w, bias) if leaf is not None and leaf.grad is not None)]


def check(got: list[Tensor], want: list[Tensor], limit: float = LIMIT) -> None:
    assert len(got) == len(want)
    errors = [off(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= limit, errors


@pytest.mark.parametrize("mode", ["streamed", "tiled", "kept"])
@pytest.mark.parametrize("name", MARGINS)
def test_every_margin_equals_dense_float64(name: str, mode: str):
    x, labels, w = batch()
    head = made(name, mode)
    drawn = random_margins(head, x.double(), w.double(), labels) if name == "ElasticFace" else None
    got = forward_and_backward(head, x, labels, w)
    assert head.logits_mode == mode
    assert "tiles" in head.kernels_in_use
    check(got, dense(name, x, labels, w, drawn))


@pytest.mark.parametrize("mode", ["streamed", "tiled", "kept"])
def test_options_of_the_loss(mode: str):
    x, labels, w = batch()
    weights = torch.rand(C, generator=torch.Generator().manual_seed(1)) + 0.1
    head = made("CosFace", mode, label_smoothing=0.1, class_weights=weights, metrics=True)
    got = forward_and_backward(head, x, labels, w)
    check(got, dense("CosFace", x, labels, w, smoothing=0.1, class_weights=weights.double()))
    for margin in ("CosFace", "Softmax"):
        both = [made(margin, mode, kernels, metrics=True) for kernels in ("interpret", "off")]
        for each in both:
            forward_and_backward(each, x, labels, w)
        seen, wanted = (each.metrics for each in both)
        assert seen.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.allclose(seen[name], value, rtol=1e-4, atol=1e-4), name
    of_samples = torch.rand(N, generator=torch.Generator().manual_seed(2)) + 0.1
    got = forward_and_backward(made("Softmax", mode, label_smoothing=0.2), x, labels, w, sample_weights=of_samples)
    check(got, dense("Softmax", x, labels, w, smoothing=0.2, sample_weights=of_samples.double()))


@pytest.mark.parametrize("mode", ["streamed", "tiled"])
def test_several_labels_a_sample(mode: str):
    """One of two is ignored in one sample; in another both are the same."""
    x, labels, w = batch()
    both = torch.stack((labels.clamp(min=0), labels.flip(0).clamp(min=0)), 1)
    both[5, 1], both[6, 1] = -100, both[6, 0]
    shares = torch.rand(N, 1, generator=torch.Generator().manual_seed(1))
    shares = torch.cat((shares, 1 - shares), 1)
    got = forward_and_backward(made("ArcFace", mode), x, both, w, label_weights=shares)
    check(got, dense("ArcFace", x, share_of(both, C, shares.double())[0], w))


@pytest.mark.parametrize("mode", ["streamed", "tiled", "kept"])
@pytest.mark.parametrize(("n", "classes", "width"), [(1, 1, 7), (1, 65, 40), (32, 64, 16), (17, 33, 100)])
def test_shapes(n: int, classes: int, width: int, mode: str):
    """One row, one sample, whole blocks and a piece more; D that no block and no address divides."""
    x, labels, w = batch(n, classes, width)
    got = forward_and_backward(made("ArcFace", mode, width=width, classes=classes), x, labels, w)
    want = dense("ArcFace", x, labels, w)
    if classes == 1:
        assert all(each.abs().max() < 1e-5 for each in (*got, *want))
    else:
        check(got, want, 4e-6)  # few numbers, of which one may be all of a sum


@pytest.mark.parametrize("mode", ["streamed", "tiled", "kept"])
def test_bfloat16_is_as_near_as_plain_pytorch(mode: str):
    x, labels, w = batch()
    want = dense("ArcFace", x, labels, w)
    errors = []
    for kernels in ("interpret", "off"):
        with torch.autocast("cpu", torch.bfloat16):
            got = forward_and_backward(made("ArcFace", mode, kernels), x, labels, w)
        errors.append([off(a, b) for a, b in zip(got, want, strict=True)])
    assert all(ours <= max(1.5 * plain, 5e-4) for ours, plain in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("mode", ["streamed", "tiled", "kept"])
def test_a_scale_that_leaves_the_range_of_exponentials(mode: str):
    """At a scale of 200 a sum of exponentials has no bound: it is taken relative to the largest logit."""
    x, labels, w = batch()
    use(mode)
    head = PartialFC(
        D, C, margins.CosFace(scale=200.0), kernels="interpret", logits_budget=use(mode), dtype=torch.float32
    )
    got = forward_and_backward(head, x, labels, w)
    want = Loss("CosFace", {"scale": 200.0})
    exact, rows = x.double().requires_grad_(), w.double().requires_grad_()
    loss = want(exact, rows, labels)
    loss.backward()
    assert head.kernels_in_use.startswith("rows") and exact.grad is not None and rows.grad is not None
    check(got, [loss.detach(), exact.grad, rows.grad], 2e-5)  # a logit of 200 has three times the rounding of 64


@pytest.mark.parametrize("mode", ["streamed", "tiled"])
def test_rows_in_bfloat16(mode: str):
    x, labels, w = batch()
    want = dense("CosFace", x, labels, w.bfloat16())
    errors = []
    for kernels in ("interpret", "off"):
        budget = use(mode)
        head = PartialFC(D, C, margins.CosFace(), kernels=kernels, logits_budget=budget, dtype=torch.bfloat16)  # type: ignore[arg-type]
        got = forward_and_backward(head, x, labels, w.bfloat16())
        errors.append([off(a, b) for a, b in zip(got, want, strict=True)])
    assert all(ours <= max(1.5 * plain, 5e-4) for ours, plain in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("mode", ["streamed", "tiled", "kept"])
def test_the_same_bits_in_two_runs(mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_tiles, "STREAM_BYTES", 64 * 4 * D)  # two launches
    x, labels, w = batch()
    runs = [forward_and_backward(made("ArcFace", mode), x, labels, w) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    check(runs[0], dense("ArcFace", x, labels, w))


@pytest.mark.parametrize("mode", ["streamed", "tiled", "kept"])
@pytest.mark.parametrize("correction", ["none", "importance"])
def test_sampled_rows(mode: str, correction: Any):
    x, labels, w = batch()
    head = made("CosFace", mode, sample_rate=0.5, sampling_correction=correction)
    with torch.no_grad():
        local(head.weight).copy_(w)
    leaf = x.clone().requires_grad_()
    loss = head(leaf, labels)
    loss.backward()
    chosen = head.selected
    assert len(chosen) < C and head.row_grad is not None and leaf.grad is not None
    loss_of = Loss("CosFace", {"scale": 64.0})
    exact, rows = x.double().requires_grad_(), w[chosen].double().requires_grad_()
    taken = taken_of(chosen, labels, C, 0.5) if correction == "importance" else None
    want = loss_of(exact, rows, positions(labels, chosen, C), chosen, taken=taken)
    want.backward()
    assert exact.grad is not None and rows.grad is not None
    check([loss, leaf.grad, head.row_grad[1]], [want.detach(), exact.grad, rows.grad])


@pytest.mark.parametrize("mode", ["streamed", "tiled"])
@pytest.mark.parametrize("name", ["ArcFace", "Softmax"])
def test_rows_updated_in_backward(name: str, mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_tiles, "STREAM_BYTES", 64 * 4 * D)
    x, labels, w = batch()
    want = dense(name, x, labels, w)
    head = made(name, mode)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.5, update_in_backward=True)
    with torch.no_grad():
        local(head.weight).copy_(w)
    head(x.clone().requires_grad_(), labels).backward()
    optimizer.step()
    assert off(local(head.weight), w.double() - 0.5 * want[2]) <= LIMIT
    if head.bias is not None:
        assert off(local(head.bias), -0.5 * want[3]) <= LIMIT


def in_shards(rank: int, world: int, mode: str) -> None:
    before = choice.STREAM_INSTEAD, choice.STREAM_WIDEST
    try:
        check_shards(rank, world, mode)
    finally:  # other tests use this process
        choice.STREAM_INSTEAD, choice.STREAM_WIDEST = before
        choice.choose.cache_clear()


def check_shards(rank: int, world: int, mode: str) -> None:
    for counts, classes in (((5, 3), C), ((8, 0), 1)):  # a rank without samples, and without rows
        x, labels, w = batch(8, classes)
        here, mine = samples_of(counts, rank), classes_of(classes, rank, world)
        head = made("CosFace", mode, classes=classes)
        got = forward_and_backward(head, x[here], labels[here], w[mine])
        want = dense("CosFace", x, labels, w)
        if classes > 1:
            check([got[0], got[1] / world, got[2]], [want[0], want[1][here], want[2][mine]])
        else:
            assert all(each.abs().max() < 1e-5 for each in got if each.numel())
    assert not launch.failed


@pytest.mark.parametrize("mode", ["streamed", "kept"])
def test_two_ranks(ranks: Callable[[int], Ranks], mode: str):
    ranks(2).run(in_shards, mode)


# -------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", ["ArcFace", "Softmax"])
@pytest.mark.parametrize(
    ("mode", "kernel"),
    [
        ("streamed", "stream_forward"),
        ("streamed", "stream_backward"),
        ("tiled", "tile_exponentials"),
        ("kept", "tile_exponentials"),
    ],
)
@pytest.mark.parametrize("after", [0, 1])
def test_a_kernel_that_fails(
    name: str, mode: str, kernel: str, after: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """From the first launch on, or from the second: plain PyTorch takes its place, and the numbers are right."""
    launched = 0

    def failing(module: str, called: str, *given: Any) -> bool:
        nonlocal launched
        launched += called == kernel
        if called != kernel or launched <= after:
            return really(module, called, *given)

        def fail() -> None:
            raise RuntimeError("out of registers")

        return launch.ran(kernel, fail, torch.empty(0))

    really = logits._ran
    monkeypatch.setattr(logits, "_ran", failing)
    monkeypatch.setattr(kernel_tiles, "STREAM_BYTES", 64 * 4 * D)
    x, labels, w = batch()
    with caplog.at_level(logging.WARNING, "partial_fc"):
        got = forward_and_backward(made(name, mode), x, labels, w)
    assert kernel in launch.failed or (mode == "kept" and after)
    assert len(caplog.records) == len(launch.failed)
    assert not launch.failed or f"the kernel {kernel} failed" in caplog.text
    launch.failed.clear()
    check(got, dense(name, x, labels, w), 2e-5)  # plain PyTorch adds in another order than the forward's kernel did


# -------------------------------------------------------------------------------------------------- kernel by kernel


class Given:
    """Operands of one launch, and what dense float64 makes of them. Logits are bounded or not; rows begin at `a`."""

    def __init__(
        self, n: int, rows: int, width: int, dtype: torch.dtype, *, online: bool, labels: int = 1, a: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(n + rows)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        x, w = unit(draw(n, width))[0].float(), unit(draw(rows, width))[0].float()
        x, w, self.scale = (9 * x, 9 * w, 1.0) if online else (x, w, 64.0)
        self.x, self.w, self.a, self.online = x, w.to(dtype), a, online
        first = torch.randint(-1, rows, (n, labels), generator=generator)
        first[0] = rows - 1
        self.column = draw(rows)
        self.column[rows // 3] = -math.inf  # a pad
        self.d = draw(n)
        self.first = torch.where(first >= 0, first + a, -1).flatten()
        z = self.scale * (x.to(dtype).double() @ self.w.double().T) + self.column
        for i, places in enumerate(first.tolist()):
            for place in places:
                if place >= 0:
                    z[i, place] = -math.inf
        self.largest = z.amax(1)
        self.e = (z - (self.largest[:, None] if online else 0.0)).exp()
        self.lse = z.logsumexp(1)
        self.p = (z - self.lse[:, None]).exp()
        self.operands = logits.Operands(x, dtype, self.first, self.scale, online=online, hardest=True)


BLOCKS = {"small": logits.SMALL, "tile": logits.TILE, "stream": logits.STREAM[128], "rows": logits.STREAM_ROWS[64]}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("blocks", "n", "rows", "width", "labels", "a"),
    [("small", 37, 77, 40, 2, 1000), ("tile", 140, 300, 72, 1, 5), ("stream", 130, 260, 128, 1, 0)],
)
def test_each_kernel(
    blocks: str, n: int, rows: int, width: int, labels: int, a: int, dtype: torch.dtype, online: bool,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(logits, "SMALL", BLOCKS[blocks]._replace(depth=BLOCKS[blocks].depth or 64))
    given = Given(n, rows, width, dtype, online=online, labels=labels, a=a)
    low = dtype == torch.bfloat16
    few, some = (1e-5, 1e-2) if low else (8e-6, 8e-6)
    operands, column = given.operands, given.column
    e = kernel_tiles.exponentials_like(given.w, n, rows, dtype)
    e.fill_(math.nan)
    count, columns = operands.blocks_of(rows)
    maxima = torch.full((count, n), math.nan)
    found = operands.tile(given.w, a, column, e, maxima=maxima)
    streamed = operands.stream(given.w, a, column)
    assert found is not None and streamed is not None and found.largest is not None and streamed.weighted is not None
    for each in (found, streamed):
        assert off(each.total, given.e.sum(1)) < few
        assert each.largest is not None and off(each.largest / logits.LOG2E, given.largest) < few
    assert off(streamed.weighted, given.e @ given.w.double()) < some
    smaller = torch.exp2(maxima.double() - found.largest.double()).T.repeat_interleave(columns, 1)[:, :rows]
    assert off(e * smaller if online else e, given.e) < some
    shift = (given.lse * logits.LOG2E).float()
    assert operands.tile(given.w, a, column, e, shift=shift, sums=False) is not None
    assert off(e, given.p) < max(some, 2e-5)
    factor = given.d if online else (given.d * (-given.lse).exp()).float()
    out, sums = torch.full((rows, width), math.nan), torch.full((rows,), math.nan)
    assert operands.stream_rows(given.w, a, column, shift if online else None, factor, out, sums)
    p = given.p * given.d.double()[:, None]
    assert off(sums, p.sum(0)) < max(few, 2e-5)
    assert off(out, given.scale * (p.T @ given.x.to(dtype).double())) < max(some, 2e-5)


def test_rows_beyond_two_to_the_31(tmp_path: Any):
    """A gradient whose rows stand 2**29 numbers apart, in a sparse file."""
    given = Given(5, 7, 16, torch.float32, online=True)
    out = torch.from_file(str(tmp_path / "rows"), shared=True, size=7 << 29).view(7, 1 << 29)[:, :16]
    near, shift = torch.empty(7, 16), (given.lse * logits.LOG2E).float()
    for each in (out, near):
        assert given.operands.stream_rows(given.w, 0, given.column, shift, given.d, each, None)
    assert torch.equal(out, near)
    assert near.abs().sum(1).min() > 0 or given.column.isinf().sum() == 1


def test_pads_take_no_part():
    """Slots behind the window of a sampled forward, as on a card, where some are pads: their column is -inf."""
    none = torch.zeros(3, dtype=torch.bool)
    slots = Slots(
        4, torch.tensor([1, 5, 9]), torch.tensor([False, True, False]), torch.zeros(3, dtype=torch.int64), none
    )
    rows: Any = SimpleNamespace(bias=None, weight=torch.zeros(7, 2), dtype=torch.float32)
    selection: Any = SimpleNamespace(correction=None, slots=slots)
    state: Any = SimpleNamespace(selection=selection, row_tiles=rows)
    inf = math.inf
    for (a, b), wanted in (((0, 7), [0, 0, 0, 0, 0, -inf, 0]), ((2, 6), [0, 0, 0, -inf]), ((5, 7), [-inf, 0])):
        column = kernel_tiles.column_of(state, a, b)
        assert column is not None
        assert column.tolist() == wanted
    assert kernel_tiles.column_of(state, 0, 4) is None
    selection.correction = Correction.of(torch.arange(7.0), 1, late=False)
    column = kernel_tiles.column_of(state, 3, 7)
    assert column is not None
    assert column.tolist() == [3, 4, -inf, 6]


def test_splits_cover_all_rows():
    for samples, rows in ((1, 1), (1024, 100_000), (4096, 16384), (8192, 8192), (5, 300), (20_000, 999)):
        for blocks in (logits.TILE, *logits.STREAM.values()):
            splits, each = logits.splits_of(samples, rows, blocks)
            assert splits * each >= rows > (splits - 1) * each
            assert each % blocks.rows == 0
            assert splits <= logits.PROGRAMS
    assert logits.splits_of(4096, 16384, logits.TILE)[0] == 4  # 32 blocks of samples: 128 programs


def case(**changed: Any) -> choice.Case:
    usual = {
        "device": torch.device("cuda"), "rows": torch.float32, "stats": torch.float32, "product": torch.bfloat16,
        "width": 128, "centers": 1, "normalize": True, "bounded": True, "ruled": False, "binary": False, "bias": False,
        "smoothing": False, "metrics": False, "correction": False,
    }  # fmt: skip
    return choice.Case(**{**usual, **changed})


@pytest.mark.parametrize(
    ("changed", "capability", "tiles", "stream"),
    [
        ({}, (9, 0), "", ""),
        ({"width": 512}, (9, 0), "", "D up to 256"),
        ({"normalize": False, "bounded": False, "bias": True}, (9, 0), "", ""),
        ({"metrics": True}, (9, 0), "", ""),
        ({"correction": True, "smoothing": True}, (9, 0), "", ""),
        ({}, (8, 0), "capability 9.0", "capability 9.0"),
        ({}, (10, 0), "capability 9.0", "capability 9.0"),
        ({"product": torch.float32}, (9, 0), "products are float32", "products are float32"),
        ({"product": torch.float16, "bounded": False}, (9, 0), "float16", "float16"),
        ({"ruled": True}, (9, 0), "look at each logit", "look at each logit"),
        ({"binary": True}, (9, 0), "look at each logit", "look at each logit"),
        ({"centers": 3, "ruled": True}, (9, 0), "look at each logit", "look at each logit"),
        ({"metrics": True, "correction": True}, (9, 0), "corrected", "corrected"),
    ],
)
def test_the_rule(changed: dict[str, Any], capability: tuple[int, int], tiles: str, stream: str):
    for found, wanted in (
        (choice.tiles_problem(case(**changed), capability), tiles),
        (choice.stream_problem(case(**changed), capability), stream),
    ):
        assert (wanted in found) if wanted else not found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SubCenterArcFace", {}), ("CurricularFace", {}), ("SphereFace2", {}), ("ArcFace", {"interclass_filter": 0.3}),
        ("ArcFace", {"sample_rate": 0.5, "sampling_correction": "importance", "metrics": True}),
    ],
)  # fmt: skip
def test_what_is_not_served_falls_back(name: str, options: dict[str, Any]):
    """The numbers are those without kernels of logits, and the head says which kernels it uses."""
    use("streamed")
    x, labels, w = batch()
    found = []
    for kernels in ("interpret", "off"):
        head = PartialFC(D, C, getattr(margins, name)(scale=16.0), kernels=kernels, dtype=torch.float32, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            rows = w if head.weight.ndim == 2 else w[:, None].expand(head.weight.shape)
            local(head.weight).copy_(rows)
        leaf = x.clone().requires_grad_()
        loss = head(leaf, labels)
        loss.backward()
        assert leaf.grad is not None
        assert head.logits_mode != "streamed"
        found.append([loss.detach().double(), leaf.grad.double()])
        assert head.kernels_in_use == ("rows" if kernels == "interpret" else "")
    check(found[0], found[1], 1e-5)
