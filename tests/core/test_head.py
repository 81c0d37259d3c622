"""PartialFC beside its numbers: errors, kept state, initial weights, precision, wrappers, public names."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import message_of, needs
from dense_losses import Loss, share_of
from near import near
from runner import RankFailure
from shards import local, row_gradient, selected_by_all, two_by_two, whole
from torch import Tensor, nn
from watching import Allocations

import partial_fc
from partial_fc import AdaFace, ArcFace, NonFiniteError, NormFace, PartialFC, RowOptimizer, Softmax, gather
from partial_fc.sampling import mix
from partial_fc.tiers.initial import PAIRS, initial_rows, rows_of

D = 6


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("labels", [torch.tensor([0, 10]), torch.tensor([-1, 3])])
def test_without_a_group_a_bad_label_raises_too(labels):
    with pytest.raises(ValueError, match="valid are 0 to 9"):
        PartialFC(D, 10)(torch.randn(2, D), labels)


def test_the_same_width_everywhere_but_not_the_heads():
    with pytest.raises(ValueError, match=r"width 7.*embedding_size 6"):
        PartialFC(D, 10)(torch.randn(2, D + 1), torch.zeros(2, dtype=torch.int64))


def test_two_label_extremes_are_judged_with_any_ignore_index():
    head = PartialFC(D, 10, ignore_index=255)
    assert math.isfinite(head(torch.randn(3, D), torch.tensor([0, 255, 9])).item())
    with pytest.raises(ValueError, match="labels\\[2\\] is 254"):
        head(torch.randn(3, D), torch.tensor([0, 255, 254]))


def test_validate_first_looks_at_the_first_batch_only():
    head = PartialFC(D, 10, Softmax(), validate="first")
    bad = torch.full((2, D), float("nan"))
    with pytest.raises(NonFiniteError):
        head(bad, torch.zeros(2, dtype=torch.int64))
    assert math.isnan(head(bad, torch.zeros(2, dtype=torch.int64)).item())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"embedding_size": 0}, "embedding_size"),
        ({"num_classes": 0}, "num_classes"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"sample_rate": math.nan}, "sample_rate"),
        ({"init_std": -1.0}, "init_std"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"reduction": "median"}, "reduction"),
        ({"validate": "sometimes"}, "validate"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
        ({"logits_budget": -1}, "logits_budget"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        PartialFC(**{"embedding_size": D, "num_classes": 10, **arguments})


def build_different_heads(rank: int, world: int) -> str:
    return message_of(lambda: PartialFC(D, 10, seed=rank))


def test_different_seeds_raise_on_every_rank(ranks):
    texts = ranks(2).run(build_different_heads)
    assert len(set(texts)) == 1
    assert "seed is 0 on rank 0 and 1 on rank 1" in texts[0]


# -------------------------------------------------------------------------------------------------- non-finite policies


def test_log_goes_on(caplog):
    head = PartialFC(D, 10, Softmax(), on_nonfinite="log")
    loss = head(torch.full((1, D), float("inf")), torch.tensor([3]))
    assert not math.isfinite(loss.item())
    assert "embeddings[0] (label 3) holds a NaN or infinity" in caplog.text


# ---------------------------------------------------------------------------------------------------- rows and state


def untouched_rows(rank: int, world: int, optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any]) -> int:
    """Rows that a step did not draw keep weight and state bit for bit, though they have momentum from before."""
    head = PartialFC(D, 64, ArcFace(), 0.25, init_std=1.0)
    optimizer = RowOptimizer(optimizer_class, head, **options)
    still = 0
    for _ in range(8):
        head(torch.randn(3, D), torch.randint(0, 64, (3,))).backward()
        before = local(head.weight).detach().clone()
        state = {
            k: local(v).clone() for k, v in optimizer.state[head.weight].items() if isinstance(v, Tensor) and v.ndim
        }
        optimizer.step()
        optimizer.zero_grad()
        rest = torch.ones(len(before), dtype=torch.bool)
        rest[head.selected - head.shards.lo] = False
        assert torch.equal(local(head.weight)[rest], before[rest])
        assert not torch.equal(local(head.weight)[~rest], before[~rest])
        for key, value in state.items():
            assert torch.equal(local(optimizer.state[head.weight][key])[rest], value[rest])
            still += int((value[rest] != 0).sum())
    return still


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    ],
)
def test_rows_that_were_not_drawn_keep_weight_and_state(ranks, world, optimizer_class, options):
    assert all(count > 0 for count in ranks(world).run(untouched_rows, optimizer_class, options))


def test_gradients_of_micro_batches_add_up_over_different_rows():
    head = PartialFC(D, 40, ArcFace(), 0.2, dtype=torch.float64, init_std=1.0)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1)
    alone = []
    for accumulate in (False, True):
        head.forward_count = 0
        head.zero_grad()
        total = torch.zeros(40, D, dtype=torch.float64)
        for k in range(3):
            generator = torch.Generator().manual_seed(k)
            x = torch.randn(4, D, generator=generator, dtype=torch.float64)
            head(x, torch.randint(0, 40, (4,), generator=generator)).backward()
            if not accumulate:
                assert head.row_grad is not None
                total[head.row_grad[0]] += head.row_grad[1]
                head.zero_grad()
        if accumulate:
            assert head.row_grad is not None
            total[head.row_grad[0]] = head.row_grad[1]
            assert len(head.row_grad[0]) > 8
        alone.append(total)
    optimizer.zero_grad()
    assert head.row_grad is None
    near(alone[0], alone[1])


def test_row_gradients_that_no_optimizer_takes_raise():
    head = PartialFC(D, 40, sample_rate=0.2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    head(torch.randn(2, D), torch.tensor([1, 2])).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="RowOptimizer"):
        head(torch.randn(2, D), torch.tensor([1, 2]))


def test_evaluation_uses_all_classes_and_moves_nothing():
    head = PartialFC(D, 40, sample_rate=0.2, dtype=torch.float64)
    x, labels = torch.randn(5, D, dtype=torch.float64), torch.arange(5)
    head.eval()
    first = head(x, labels)
    assert len(head.selected) == 40
    assert head(x, labels) == first
    assert head.get_extra_state()["step"] == 0
    torch.testing.assert_close(first.detach(), Loss("ArcFace")(x, head.weight.detach(), labels))


def test_target_angle_is_the_angle_without_the_margin():
    head = PartialFC(2, 2, ArcFace())
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    head(torch.tensor([[1.0, 1.0], [0.0, 3.0], [5.0, 0.0]]), torch.tensor([0, 1, -100]))
    assert head.target_angle.item() == pytest.approx(math.pi / 8, abs=1e-3)


# --------------------------------------------------------------------------------------------------- weights and layout


def initial_weights(rank: int, world: int, classes: int) -> Tensor:
    weight = local(PartialFC(D, classes, seed=4).weight).detach().clone()
    torch.manual_seed(7)  # the same on every rank, as in many scripts
    assert torch.equal(local(PartialFC(D, classes, seed=4).weight), weight), "the global seed counts"
    return weight


@pytest.mark.parametrize("classes", [2, 7, 2500])
def test_initial_weights_are_the_same_at_every_world_size(ranks, classes):
    single = PartialFC(D, classes, seed=4).weight.detach()
    assert torch.unique(single, dim=0).shape[0] == classes
    for world in (1, 2, 3, 4):
        parts = ranks(world).run(initial_weights, classes)
        assert [len(p) for p in parts] == [
            max(0, min(-(-classes // world), classes - r * -(-classes // world))) for r in range(world)
        ]
        assert torch.equal(torch.cat(parts), single)
    assert not torch.equal(PartialFC(D, classes, seed=5).weight.detach(), single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_drawn_into_their_place_block_by_block(dtype):
    head = PartialFC(8, 5000, seed=3, init_std=0.5, dtype=dtype)
    with torch.no_grad():
        head.weight.zero_()
    with Allocations() as made:
        head.reset_parameters()
    assert made.elements <= 2 * PAIRS  # and no copy of the shard in host memory
    expected = torch.tensor([drawn_row(3, i, 8, 0.5) for i in range(0, 5000, 123)])
    assert torch.allclose(head.weight[::123].float(), expected.to(dtype).float(), rtol=1e-6, atol=1e-9)


def drawn_row(seed: int, class_id: int, width: int, std: float) -> list[float]:
    """One initial row by whole numbers and the math library: SplitMix64, then Box and Muller."""
    row: list[float] = []
    for pair in range((width + 1) // 2):
        bits = ((class_id * ((width + 1) // 2) + pair) * 0x9E3779B97F4A7C15 + mix(seed, 0x696E6974)) % 2**64
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        bits ^= bits >> 31
        radius = std * math.sqrt(-2 * math.log(((bits >> 32) + 0.5) / 2**32))
        angle = (bits % 2**30 + 0.5 - 2**29) / 2**30 * math.pi / 2
        x, y = math.cos(angle) * (1 - 2 * (bits >> 31 & 1)), math.sin(angle)
        row += [radius * y, radius * x] if bits >> 30 & 1 else [radius * x, radius * y]
    return row[:width]


@pytest.mark.parametrize("width", [1, 3, 130])
def test_a_row_is_the_same_alone_and_in_any_block(width):
    whole = initial_rows(0, 3000, (width,), std=0.7, seed=5)
    ids = torch.tensor([0, 2999, 1234, 1])
    assert torch.equal(rows_of(ids, (width,), std=0.7, seed=5), whole[ids])
    assert torch.equal(initial_rows(1233, 1236, (width,), std=0.7, seed=5), whole[1233:1236])
    far = 2**33 + 7
    expected = torch.tensor([drawn_row(5, far, width, 0.7)])
    assert torch.allclose(rows_of(torch.tensor([far]), (width,), std=0.7, seed=5), expected, rtol=1e-6, atol=1e-9)


def test_initial_numbers_are_normal_and_independent():
    x = initial_rows(0, 20_000, (20,), std=1.0, seed=1).double()
    n = x.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float(x.pow(power).mean()) - expected) < 4 * math.sqrt(variance / n)
    for a, b in ((x[:, ::2], x[:, 1::2]), (x[1:], x[:-1]), (x, initial_rows(0, 20_000, (20,), std=1.0, seed=2))):
        assert abs(float((a * b).mean())) < 4 / math.sqrt(a.numel())
        assert abs(float((a.square() * b.square()).mean()) - 1) < 4 * math.sqrt(8 / a.numel())


def test_a_margin_is_put_where_the_rows_are():
    """The head was built on another device than that of its rows."""
    head = PartialFC(8, 50, AdaFace(), device="meta").to_empty(device="cpu")
    head.reset_parameters()
    head.margin = AdaFace(margin=0.3)
    assert {buffer.device.type for buffer in head.margin.buffers()} == {"cpu"}
    head(torch.randn(4, 8), torch.arange(4))


def casts(rank: int, world: int) -> None:
    head = PartialFC(D, 7, sample_rate=0.5).double()
    assert head.weight.dtype == torch.float64
    assert head.weight.shape == (7, D)
    assert head.class_rows.parameters["weight"] is head.weight
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=1.0)
    before = local(head.weight).detach().clone()
    head(torch.randn(3, D, dtype=torch.float64), torch.tensor([0, 3, 6])).backward()
    optimizer.step()
    assert not torch.equal(local(head.weight), before) or not len(before)
    copied = copy.deepcopy(head)
    assert torch.equal(local(copied.weight), local(head.weight))
    head.to("meta")
    assert head.weight.device.type == "meta"


def test_casts_moves_and_copies_keep_the_shards(ranks):
    ranks(3).run(casts)


def replicated_mesh(rank: int, world: int, rate: float) -> list[float]:
    """4 ranks as 2 replicas of 2 shards against all 4 as shards: the same numbers."""
    options: dict[str, Any] = {"dtype": torch.float64, "init_std": 1.0}
    heads = [PartialFC(D, 11, ArcFace(scale=8.0), rate, group=g, **options) for g in (two_by_two(), None)]
    optimizers = [RowOptimizer(torch.optim.SGD, h, lr=0.5, momentum=0.9) for h in heads]
    losses = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        n = (rank + step) % 3
        data = (
            torch.randn(n, D, generator=generator, dtype=torch.float64),
            torch.randint(0, 11, (n,), generator=generator),
        )
        grads = []
        for head, optimizer in zip(heads, optimizers, strict=True):
            x = data[0].clone().requires_grad_()
            loss = head(x, data[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            grads.append(x.grad)
        near(grads[0], grads[1])
        assert losses[-1] == pytest.approx(losses[-2], rel=1e-12)
    near(whole(heads[0].weight), whole(heads[1].weight))
    return losses


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_replicas_of_shards_equal_one_set_of_shards(ranks, rate):
    results = ranks(4).run(replicated_mesh, rate)
    assert all(r == results[0] for r in results)


# ---------------------------------------------------------------------------------------------------- batches


def joint_heads(rank: int, world: int) -> None:
    """Two heads on one gathered batch: gradients are the sum of each head's alone."""
    heads = [
        PartialFC(D, c, m, dtype=torch.float64, init_std=1.0) for c, m in ((9, ArcFace(scale=8.0)), (5, Softmax()))
    ]
    x = torch.randn(2 + rank, D, dtype=torch.float64)
    labels = torch.randint(0, 5, (2 + rank,))
    alone = []
    for head in heads:
        leaf = x.clone().requires_grad_()
        head(leaf, labels).backward()
        alone.append(leaf.grad)
        head.zero_grad()
    leaf = x.clone().requires_grad_()
    batch = gather(leaf, labels)
    (heads[0](batch) + 0.5 * heads[1](batch)).backward()
    near(leaf.grad, alone[0] + 0.5 * alone[1])


def test_two_heads_share_one_gather(ranks):
    ranks(3).run(joint_heads)


def weighted(rank: int, world: int, rate: float) -> None:
    """Soft labels and sample weights, gradients included."""
    head = PartialFC(D, 7, ArcFace(scale=8.0), rate, dtype=torch.float64, init_std=1.0)
    generator = torch.Generator().manual_seed(2)
    n, each = 5, 3
    x_all = torch.randn(n * world, D, generator=generator, dtype=torch.float64)
    labels_all = torch.randint(0, 7, (n * world, each), generator=generator)  # some name a class twice
    label_weights = torch.rand(n * world, each, generator=generator, dtype=torch.float64).softmax(1)
    sample_weights = torch.rand(n * world, generator=generator, dtype=torch.float64)
    here = slice(rank * n, (rank + 1) * n)
    x = x_all[here].clone().requires_grad_()
    batch = gather(x, labels_all[here], label_weights=label_weights[here], sample_weights=sample_weights[here])
    loss = head(batch)
    loss.backward()
    ids = selected_by_all(head)
    x_all.requires_grad_()
    share = share_of(labels_all, 7, label_weights)[0][:, ids]
    reference = Loss("ArcFace", {"scale": 8.0})
    expected = reference(x_all, whole(head.weight)[ids], share, ids, sample_weights=sample_weights)
    expected.backward()
    assert x_all.grad is not None
    near([loss.detach(), x.grad], [expected.detach(), x_all.grad[here] * world])


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_soft_labels_and_sample_weights(ranks, rate):
    ranks(2).run(weighted, rate)


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_low_precision_products_stay_near_float64(dtype, rate):
    """Errors of a few roundings of the products: the target's cosine, the exponentials' sums and what is accumulated
    are float32."""
    errors = []
    for margin in (ArcFace(), NormFace(scale=30.0)):
        head, exact = (PartialFC(64, 500, margin, rate, dtype=d, init_std=0.1) for d in (torch.float32, torch.float64))
        x = torch.randn(32, 64).requires_grad_()
        x64 = x.detach().double().requires_grad_()
        labels = torch.randint(0, 500, (32,))
        with torch.autocast("cpu", dtype):
            loss = head(x.to(dtype), labels)
        assert loss.dtype == torch.float32
        loss.backward()
        exact(x64, labels).backward()
        assert x.grad is not None and x64.grad is not None
        for mine, expected in ((x.grad, x64.grad), (row_gradient(head), row_gradient(exact))):
            errors.append((mine.double() - expected).norm() / expected.norm())
    assert max(errors) < (0.03 if dtype == torch.bfloat16 else 0.005), errors


def test_kept_and_tiled_logits_give_the_same_numbers(monkeypatch):
    monkeypatch.setitem(partial_fc.softmax.tiles.TILE_BYTES, "cpu", 1)  # tiles of 64 rows
    results = []
    for budget in (0, 1 << 30):
        torch.manual_seed(0)
        head = PartialFC(D, 1000, ArcFace(), dtype=torch.float64, logits_budget=budget, init_std=1.0)
        x = torch.randn(9, D, dtype=torch.float64).requires_grad_()
        loss = head(x, torch.randint(0, 1000, (9,)))
        loss.backward()
        results.append((loss.detach(), x.grad, head.weight.grad))
    for tiled, kept in zip(*results, strict=True):
        near(tiled, kept)


@pytest.mark.parametrize("scale", [64.0, 80.0, 90.0, 3000.0])
@pytest.mark.parametrize("budget", [0, None])
def test_large_scales_neither_overflow_nor_lose_gradients(scale, budget):
    """Cosines of ±1 at scales on both sides of where float32 needs the maximum taken off."""
    heads = [PartialFC(D, 9, NormFace(scale), dtype=d, logits_budget=budget) for d in (torch.float32, torch.float64)]
    directions = torch.eye(D)[[0, 0, 0, 1, 2, 3, 4, 5, 5]] * torch.tensor([1.0, 1, -1, 1, 1, 1, 1, 1, -1])[:, None]
    inputs = torch.eye(D)[[0, 1, 5]] + 0.01
    results = []
    for head in heads:
        with torch.no_grad():
            head.weight.copy_(directions)
        x = inputs.to(head.weight.dtype).detach().clone().requires_grad_()
        loss = head(x, torch.tensor([0, 2, 8]))
        loss.backward()
        assert x.grad is not None and head.weight.grad is not None
        results.append([loss.detach().double(), x.grad.double(), head.weight.grad.double()])
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=3e-4 * max(1.0, scale / 64), atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_angles_of_zero_and_pi_have_finite_gradients(dtype, cosine):
    head = PartialFC(D, 3, ArcFace(), dtype=dtype, init_std=1.0)
    x = (cosine * head.weight.detach()[:2]).clone().requires_grad_()
    loss = head(x, torch.tensor([0, 1]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert x.grad is not None and bool(x.grad.isfinite().all()) and bool(local(head.weight.grad).isfinite().all())


def test_a_zero_embedding_has_finite_loss_and_no_gradient():
    head = PartialFC(D, 3)
    x = torch.zeros(1, D, requires_grad=True)
    head(x, torch.tensor([1])).backward()
    assert x.grad is not None and not x.grad.any()


# ---------------------------------------------------------------------------------------------------- who may wrap it


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(D, D)
        self.head = PartialFC(D, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(x), labels)


def wrap_in_ddp(rank: int, world: int) -> str:
    return message_of(
        lambda: nn.parallel.DistributedDataParallel(Model())(torch.randn(2, D), torch.tensor([0, 1])).backward()
    )


def prepare_with_accelerate(rank: int, world: int) -> str:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    return message_of(lambda: accelerator.prepare(Model())(torch.randn(2, D), torch.tensor([0, 1])).backward())


@pytest.mark.parametrize("wrap", [wrap_in_ddp, pytest.param(prepare_with_accelerate, marks=needs("accelerate"))])
def test_a_wrapped_head_raises_instead_of_training_wrongly(ranks, wrap):
    texts = ranks(2).run(wrap)
    assert all("DistributedDataParallel was given a PartialFC (head.weight)" in text for text in texts), texts


# ---------------------------------------------------------------------------------------------------- the package


def test_the_core_imports_torch_alone():
    code = (
        "import sys, torch, torch.distributed.tensor, torch.distributed.checkpoint.state_dict_saver; before = set(sys.modules); "
        "import partial_fc; names = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(names - {'partial_fc', 'torch'} - set(sys.stdlib_module_names))); "
        "print([m for m in sys.modules if m.startswith('partial_fc.training')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]


def test_public_names():
    assert sorted(partial_fc.__all__) == [
        "AdaFace",
        "AdaptiveMargin",
        "ArcFace",
        "CenterLoss",
        "Checkpointer",
        "CombinedMargin",
        "CosFace",
        "CurricularFace",
        "DivergenceError",
        "DivergenceWatch",
        "ElasticFace",
        "FileRows",
        "GlobalBatch",
        "HostRows",
        "JoinedBatches",
        "MagFace",
        "Margin",
        "MarginSchedule",
        "Neighbours",
        "NonFiniteError",
        "NormFace",
        "Outliers",
        "PartialFC",
        "Plan",
        "Predictions",
        "PreemptionGuard",
        "Progress",
        "RandomState",
        "RankFiles",
        "RankMissing",
        "Report",
        "RowOptimizer",
        "RowWiseAdagrad",
        "Softmax",
        "SphereFace",
        "SphereFace2",
        "SubCenterArcFace",
        "check_gradients",
        "check_margin",
        "class_mapping",
        "clip_grad_norm_",
        "doctor",
        "export_weights",
        "gather",
        "import_weights",
        "load_checkpoint",
        "naming_the_missing",
        "outliers",
        "plan",
        "save_checkpoint",
    ]
    assert all(hasattr(partial_fc, name) for name in partial_fc.__all__)


def fail_on_one_rank(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_the_runner_prints_the_failing_ranks_traceback(ranks):
    with pytest.raises(RankFailure, match="rank 1 of 2") as caught:
        ranks(2).run(fail_on_one_rank)
    assert "KeyError: 'the reason'" in str(caught.value)
