"""What the plan says of kernels: the mode, the bytes and operations by hand, times that no card can undercut."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from partial_fc import Plan, plan
from partial_fc.planning.predicted import CARDS

N, S = 4096, 1_000_000


def made(width: int, budget: int = 0, **changed: Any) -> Plan:
    given = {"autocast": torch.bfloat16, "logits_budget": budget, **changed}
    return plan(S, width, 1, N, **given)


@pytest.mark.parametrize(
    ("width", "budget", "modes", "kernels"),
    [
        (128, 1 << 40, ("streamed", "streamed", "kept"), "rows, tiles and stream"),
        (256, 1 << 40, ("kept", "kept", "kept"), "rows, tiles and stream"),
        (256, 0, ("streamed", "streamed", "tiled"), "rows, tiles and stream"),
        (512, 0, ("tiled", "tiled", "tiled"), "rows and tiles"),
    ],
)
def test_the_mode_is_the_rules(width: int, budget: int, modes: tuple[str, ...], kernels: str):
    found = made(width, budget).with_kernels
    assert tuple(p.card for p in found) == tuple(card.name for card in CARDS) == ("H100", "H200", "A100")
    assert tuple(p.mode for p in found) == modes
    assert [p.kernels for p in found] == [kernels, kernels, "rows"]


def test_bytes_and_operations_by_hand():
    kept, streamed = made(512, 1 << 40).with_kernels[0], made(128).with_kernels[0]
    assert kept.operations == 3 * 2 * N * S * 512
    # fp32 rows and momentum, bf16 products: exponentials written and read twice; gathered 4 + 2, read twice 2 each
    by_hand = {"logits": 3 * N * S * 2, "class rows": S * 512 * (6 + 4), "row gradients": S * 512 * (2 * 2 + 4 + 4)}
    assert kept.traffic == {**by_hand, "update": S * 512 * (4 + 8 + 8)}
    assert streamed.operations == 4 * 2 * N * S * 128
    assert (
        streamed.traffic["logits"] == 8 * 4 * 8 * N * 129
    )  # 8 launches of 131,072 rows; 32 blocks of samples, so 4 splits


@pytest.mark.parametrize("width", [64, 100, 128, 256, 512, 1024])
@pytest.mark.parametrize("budget", [0, 1 << 40])
def test_no_time_is_below_what_the_card_can_do(width: int, budget: int):
    for card, p in zip(CARDS, made(width, budget).with_kernels, strict=True):
        peak = p.operations / (card.processors * card.clock * card.matrix)
        assert p.slowest >= p.fastest > 1e3 * max(peak, sum(p.traffic.values()) / card.memory / 3)
        assert p.plain > p.fastest


def test_where_there_is_nothing_to_predict():
    for changed in ({"autocast": None}, {"autocast": torch.float16}, {"device": "cpu"}, {"dtype": torch.float64}):
        assert made(128, **changed).with_kernels == ()
        assert "with kernels" not in str(made(128, **changed))


def test_text_and_dictionary():
    found = made(128, sample_rate=0.1)
    assert "predicted from data sheets, not measured" in str(found)
    assert f"H100: {found.with_kernels[0].fastest:.2f} to" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["with_kernels"][2]["card"] == "A100"
    assert found.with_kernels[0].traffic["steps that rows missed"] > 0
