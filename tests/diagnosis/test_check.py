"""check_margin: correct margins of a user pass, and each kind of mistake is found."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from runner import forking
from torch import Tensor

from partial_fc import CurricularFace, ElasticFace, Margin, SubCenterArcFace, check_margin
from partial_fc.margins.base import Positives


class Own(Margin):
    """Ten lines: a margin that grows with the embedding's length, and a rule for hard negatives."""

    def __init__(self, scale: float = 16.0, m: float = 0.02) -> None:
        super().__init__(scale)
        self.m = m

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        return cosine - self.m * positives.norm

    def negative(self, cosine: Tensor, target: Tensor) -> Tensor:
        return torch.where(cosine > target, cosine + 0.1 * cosine**2, cosine)


class MixesSamples(Margin):
    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        return cosine - 0.3 * cosine.mean()


class OwnCosinesOnly(Margin):
    """Its state is the mean of the cosines that a rank happens to own."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__(16.0)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        self.mean.copy_(positives.mean(cosine))
        return cosine - 0.1


class Fails(Margin):
    def target(self, cosine: Tensor, positives: Positives) -> Tensor:
        raise KeyError("the reason")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are forked, not started anew."""
    context = forking()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("margin", [Own(), CurricularFace(16.0), SubCenterArcFace()])
def test_right_margins_pass(margin, capsys):
    check_margin(margin, worlds=(2,))
    assert f"{type(margin).__name__}: loss, gradients and state equal the dense reference" in capsys.readouterr().out


@pytest.mark.slow
def test_at_all_worlds(capsys):
    check_margin(ElasticFace(plus=True))
    assert "on 1, 2, 3 ranks" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("margin", "worlds", "message"),
    [
        (MixesSamples(), (1,), "1 ranks, step 0: the gradient of embeddings"),
        (OwnCosinesOnly(), (1, 2), "2 ranks, step 0: buffer mean is off by"),
    ],
)
def test_mistakes_are_found(margin, worlds, message):
    with pytest.raises(AssertionError, match=message.replace("[", r"\[")) as caught:
        check_margin(margin, worlds=worlds)
    assert "does not match its formula" in str(caught.value)
    if len(worlds) > 1:
        assert "1 ranks" not in str(caught.value)


@pytest.mark.usefixtures("quick")
def test_a_failing_rank_and_a_wrong_argument_say_what():
    with pytest.raises((RuntimeError, KeyError), match="the reason"):
        check_margin(Fails(), worlds=(2,))
    with pytest.raises(TypeError, match="margin must be an instance of a Margin such as ArcFace"):
        check_margin(Own)  # type: ignore[arg-type]
