"""The metrics of a head equal a dense computation and are the same on every rank."""

from __future__ import annotations

import pytest
import torch
from dense_losses import turned, unit
from shards import samples_of, selected_by_all
from side_by_side import small_tiles

from partial_fc import ArcFace, CosFace, Margin, PartialFC, Softmax, margins
from partial_fc.tiers.initial import initial_rows

D, C = 8, 23
COUNTS = (5, 3, 0, 4)


def measured(
    rank: int, world: int, margin: Margin, rate: float, budget: int | None, beyond: float | None, low: bool
) -> None:
    head = PartialFC(
        D, C, margin, rate, init_std=1.0, metrics=True, logits_budget=budget, interclass_filter=beyond,
        dtype=torch.float32 if low else torch.float64,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    n = sum(COUNTS[:world])
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, C, (n,), generator=generator)
    w = initial_rows(0, C, tuple(head.weight.shape[1:]), std=1.0, seed=0).double()
    x[1] = (w[labels[1]] if w.ndim == 2 else w[labels[1], 0]) * 4  # one that is near its class,
    x[1, 0] += 0.1  # and not so near that its angle is nothing but rounding
    labels[2] = -100
    here = samples_of(COUNTS, rank)
    with small_tiles(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        head(x[here].to(head.weight.dtype), labels[here])

    chosen = torch.zeros(C, dtype=torch.bool)
    chosen[selected_by_all(head)] = True
    some = labels >= 0
    x, labels = x[some], labels[some]
    if margin.normalize:
        logits = torch.einsum("nd,ckd->nck", unit(x)[0], unit(w.view(C, -1, D))[0]).amax(2)
    else:
        logits = x @ w.T
    target = logits.gather(1, labels[:, None])[:, 0]
    target = target.clamp(-1, 1) if margin.normalize else target
    others = logits.masked_fill(~chosen, -torch.inf).scatter(1, labels[:, None], -torch.inf)
    if beyond is not None:
        others = others.masked_fill(others > beyond, -torch.inf)
    hardest = others.amax(1)
    expected = {"accuracy": (target > hardest).double().mean(), "embedding_norm": x.norm(dim=1).mean()}
    lowered = {ArcFace: lambda c: turned(c, 1.0, 0.5), CosFace: lambda c: c - 0.35}.get(type(margin), lambda c: c)
    if type(margin) in (ArcFace, CosFace, Softmax):
        expected["margin_met"] = (lowered(target) > hardest).double().mean()
    if isinstance(margin, margins.SphereFace2):  # every class is a decision
        z = margin.scale * (2 * ((target + 1) / 2) ** 3 - 1 - 0.4) + margin.offset.to_local().item()  # type: ignore[operator]
        expected["margin_met"] = (z > 0).double().mean()
    if margin.normalize:
        angles = torch.acos(target).sort().values
        expected |= {"target_angle": angles.mean(), "hardest_angle": torch.acos(hardest).mean()}
        for share in (10, 50, 90):
            place = share / 100 * (len(angles) - 1)
            low_at, part = int(place), place - int(place)
            expected[f"target_angle_p{share}"] = (
                angles[low_at] * (1 - part) + angles[min(low_at + 1, len(angles) - 1)] * part
            )
    found = head.metrics
    assert found.keys() == expected.keys() | {"margin_met"}
    assert not margin.normalize or 0 < expected["accuracy"] <= 1
    for name, value in expected.items():
        tolerance = 1e-2 if low else 1e-9
        torch.testing.assert_close(
            found[name].double(), value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def all_measured(rank: int, world: int) -> None:
    for rate, budget in ((1.0, None), (0.4, 0), (0.4, None), (1.0, 0)):
        for margin in (
            ArcFace(),
            CosFace(scale=90.0),
            margins.SubCenterArcFace(),
            margins.CurricularFace(),
            margins.SphereFace2(9.0),
        ):
            measured(rank, world, margin, rate, budget, None, False)
            measured(rank, world, margin, rate, budget, 0.2, False)
        measured(rank, world, Softmax(), rate, budget, None, False)
        measured(rank, world, ArcFace(), rate, budget, None, True)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_metrics_are_those_of_the_global_batch(ranks, world):
    ranks(world).run(all_measured)


def test_without_the_flag_nothing_is_measured():
    head = PartialFC(D, C)
    head(torch.randn(3, D), torch.arange(3))
    assert head._measured is not None
    assert head._measured.hardest is None
    with pytest.raises(RuntimeError, match="built with metrics=True"):
        _ = head.metrics
    assert head.target_angle > 0


def test_a_batch_without_samples_has_no_metrics():
    head = PartialFC(D, C, metrics=True)
    head(torch.randn(2, D), torch.tensor([-100, -100]))
    assert all(value.isnan() for value in head.metrics.values())
    head(torch.randn(0, D), torch.empty(0, dtype=torch.int64))
    assert all(value.isnan() for value in head.metrics.values())
