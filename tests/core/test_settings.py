"""Settings that are set after a loss or an optimizer was built: checked as at construction, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from partial_fc import ArcFace, CenterLoss, PartialFC, RowOptimizer, Softmax, gather

D, C = 8, 40
SGD = torch.optim.SGD


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100)
    return torch.randn(16, D, generator=generator), torch.randint(0, C, (16,), generator=generator)


def head_of(rate: float = 1.0, **more: object) -> PartialFC:
    return PartialFC(D, C, ArcFace(scale=16.0), rate, init_std=0.3, seed=2, **more)  # type: ignore[arg-type]


HEAD_SETTINGS = {  # name: value that may be set, values that may not, words of the error
    "on_nonfinite": ("skip", ["Skip"], "on_nonfinite must be one of"),
    "validate": ("first", ["alwys", None], "validate must be one of"),
    "reduction": ("sum", ["total", None], "reduction must be one of"),
    "ignore_index": (255, [None, "x", 2.5], "ignore_index"),
    "label_smoothing": (0.1, [1.0, -0.1, None, float("nan")], "label_smoothing must be"),
    "interclass_filter": (0.4, [2.0, "x", float("nan")], "interclass_filter"),
    "inter_topk": (2, [-1, 0.5, None], "inter_topk"),
    "inter_topk_penalty": (0.1, [-0.1, 4.0], "inter_topk_penalty"),
    "logits_budget": (0, [-1, "1 GiB"], "logits_budget"),
    "class_weights": (torch.ones(C), [torch.ones(C + 1), -torch.ones(C), torch.ones(C, requires_grad=True)], "class_weights"),
    "seed": (3, ["x"], "seed must be"),
    "init_std": (0.1, [-1.0], "init_std must be"),
    "sampling_correction": ("none", ["importnce"], "sampling_correction must be one of"),
    "kernels": ("off", ["on"], "kernels"),
    "num_classes": (C, [C + 1], r"expand\(\)"),
    "embedding_size": (D, [D + 1], "build another loss"),
    "margin": (ArcFace(scale=8.0), [None, Softmax()], "margin"),
}  # fmt: skip


def test_settings_are_checked_when_they_are_set():
    for name, (good, bad, words) in HEAD_SETTINGS.items():
        head = head_of()
        for value in bad:
            with pytest.raises((ValueError, TypeError), match=words):
                setattr(head, name, value)
        x = batch()[0].requires_grad_()
        before = head(x, batch()[1])
        setattr(head, name, good)
        assert head(x, batch()[1]).isfinite(), (name, before)
    head = head_of()
    head.label_smoothing, head.class_weights = 0.1, torch.linspace(0.5, 2.0, C)
    as_built = head_of(label_smoothing=0.1, class_weights=torch.linspace(0.5, 2.0, C))
    assert torch.equal(head(*batch()), as_built(*batch()))


def test_every_attribute_is_a_setting_or_a_result():
    results = {"class_changes", "class_rows", "forward_count", "kernels_in_use", "logits_mode", "selected_rows"}
    free = {"collect_metrics", "scale_embedding_grad", "training", "neighbours"}  # true or false; a table that is drawn
    head = head_of()
    public = {name for name in (*vars(head), *head._buffers) if not name.startswith("_")}
    assert public - results - free == {*HEAD_SETTINGS} - {n for n in HEAD_SETTINGS if n in dir(type(head))} - {"margin"}
    center = CenterLoss(D, C)
    for name, value in {"alpha": 1.5, "update": "gradient", "reduction": "no", "num_classes": 1}.items():
        with pytest.raises(ValueError, match=name if name != "num_classes" else "expand"):
            setattr(center, name, value)
    center.alpha = 1
    assert center.alpha == 1.0


def test_settings_of_an_optimizer_are_checked_when_they_are_set():
    optimizer = RowOptimizer(SGD, head_of(0.3), lr=0.1)
    optimizer.low_precision = None
    with pytest.raises(ValueError, match="low_precision is None since"):
        optimizer.low_precision = "master"


def test_weights_that_want_a_gradient_are_refused():
    head, (x, labels) = head_of(), batch()
    weights = torch.ones(len(labels), requires_grad=True)
    with pytest.raises(ValueError, match="sample_weights require grad"):
        gather(x, labels, sample_weights=weights)
    with torch.no_grad():
        assert head(gather(x, labels, sample_weights=weights)).isfinite()


def test_an_update_in_backward_of_a_sampled_head_is_refused():
    head = head_of(0.3)
    optimizer = RowOptimizer(SGD, head, lr=0.1)
    optimizer.update_in_backward = True
    with pytest.raises(RuntimeError, match="this head is sampled"):
        head(batch()[0].requires_grad_(), batch()[1])
