"""Identification equals plain loops: rank-k of mated probes and DIR at FPIR, for any tile size and number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from partial_fc.training.errors import UserError
from partial_fc.training.protocols import Result, identify_embeddings

Case = dict[str, Tensor]


def exact(generator: torch.Generator, centres: Tensor, flips: float) -> Tensor:
    """Noisy copies of ±1/4 vectors of length 1: products are exact in any order, and ties are common."""
    return centres * (1 - 2 * (torch.rand(centres.shape, generator=generator) < flips).float())


def a_case(signs: bool, seed: int = 0) -> Case:
    """40 enrolled identities of 1 to 4 images, 90 mated probes, 70 others, 60 distractors."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(110, 16, generator=generator)
    if signs:
        centres = torch.where(centres > 0, 0.25, -0.25)

    def images(identities: Tensor) -> Tensor:
        if signs:
            return exact(generator, centres[identities], 0.2)
        return centres[identities] + 0.9 * torch.randn(len(identities), 16, generator=generator)

    enrolled = torch.randint(0, 40, (100,), generator=generator)
    enrolled[:40] = torch.arange(40)
    probes = torch.cat(
        (torch.randint(0, 40, (90,), generator=generator), torch.randint(40, 80, (70,), generator=generator))
    )
    probes = probes[torch.randperm(160, generator=generator)]
    strangers = torch.randint(80, 110, (60,), generator=generator)
    return {
        "gallery": images(enrolled),
        "gallery_labels": 3 * enrolled - 20,
        "probes": images(probes) * (1 if signs else 5),
        "probe_labels": 3 * probes - 20,
        "distractors": images(strangers),
        "distractor_labels": 3 * strangers - 20,
    }


def by_loops(
    case: Case, ranks: tuple[int, ...], fpirs: tuple[float, ...]
) -> tuple[dict[int, float], dict[float, float | None]]:
    """Every probe with every enrolled image, identities and distractors one by one, in float64."""

    def unit(rows: Tensor) -> np.ndarray:
        array = rows.double().numpy()
        return array / np.linalg.norm(array, axis=1, keepdims=True)

    gallery, probes, distractors = (unit(case[name]) for name in ("gallery", "probes", "distractors"))
    labels = case["gallery_labels"].tolist()
    better, own_scores, strangers = [], [], []
    for probe, label in zip(probes, case["probe_labels"].tolist(), strict=True):
        scores: dict[object, float] = {}
        for row, name in zip(gallery, labels, strict=True):
            scores[name] = max(scores.get(name, -math.inf), float(row @ probe))
        for i, row in enumerate(distractors):
            scores["distractor", i] = float(row @ probe)
        if label in scores:
            own = scores.pop(label)
            better.append(sum(score >= own - 1e-6 for score in scores.values()))
            own_scores.append(own)
        else:
            strangers.append(max(scores.values()))
    closed = {k: sum(each < k for each in better) / len(better) for k in ranks}
    opened: dict[float, float | None] = {}
    for fpir in fpirs:
        # every threshold that can matter: just above a stranger's score, or below all
        possible = [-2.0, *(score + 1e-9 for score in strangers)]
        good = [t for t in possible if sum(score >= t for score in strangers) <= fpir * len(strangers) + 1e-9]
        least = min(good)
        found = sum(b == 0 and own >= least for b, own in zip(better, own_scores, strict=True)) / len(better)
        opened[fpir] = found if fpir * len(strangers) + 1e-6 >= 1 else None
    return closed, opened


@pytest.mark.parametrize("signs", [False, True], ids=["random", "with ties"])
@pytest.mark.parametrize("tile", [3, 16, 1000])
def test_figures_are_those_of_loops(signs, tile):
    case = a_case(signs)
    closed, opened = by_loops(case, (1, 5, 10, 20), (0.1, 0.01))
    result = identify_embeddings(**case, name="megaface", tile=tile, progress=True)
    assert {k: result.figures[f"rank-{k}"] for k in closed} == pytest.approx(closed)
    assert (result.figures["dir@1e-1"], result.figures["dir@1e-2"]) == (pytest.approx(opened[0.1]), opened[0.01])
    assert opened[0.01] is None and 0 < opened[0.1] < closed[1] < closed[20]  # type: ignore[operator]
    assert result.counts == {"mated probes": 90, "other probes": 70, "identities": 40, "distractors": 60}
    assert result.curves["cmc"][0] == (1, closed[1]) and len(result.curves["cmc"]) == 100
    fpirs = [fpir for fpir, _ in result.curves["dir"]]
    assert fpirs == sorted(set(fpirs)) and fpirs[0] > 0 and result.curves["dir"][-1] == (1, closed[1])
    assert [dir for _, dir in result.curves["dir"]] == pytest.approx(list(by_loops(case, (), tuple(fpirs))[1].values()))


def test_without_distractors_and_with_a_threshold_that_holds_what_it_says():
    case = a_case(False)
    with_them = identify_embeddings(**case, name="all")
    del case["distractors"], case["distractor_labels"]
    alone = identify_embeddings(**case, name="gallery alone")
    assert alone.figures["rank-1"] > with_them.figures["rank-1"]  # type: ignore[operator]
    assert alone.counts["distractors"] == 0 and len(alone.curves["cmc"]) == 40 and alone.curves["cmc"][-1] == (40, 1)
    gallery, probes = (torch.nn.functional.normalize(case[name], dim=1) for name in ("gallery", "probes"))
    mated = torch.isin(case["probe_labels"], case["gallery_labels"])
    top = (probes[~mated] @ gallery.T).amax(1)
    threshold = alone.thresholds["dir@1e-1"]
    assert threshold is not None and int((top >= threshold).sum()) == 7


def test_closed_set_alone_has_no_dir():
    case = a_case(False)
    mated = torch.isin(case["probe_labels"], case["gallery_labels"])
    result = identify_embeddings(
        case["gallery"], case["gallery_labels"], case["probes"][mated], case["probe_labels"][mated], name="x"
    )
    assert result.figures["dir@1e-1"] is None and result.figures["rank-1"] is not None and "—" in result.summary()


def test_embeddings_that_are_all_alike_identify_nobody():
    labels = torch.arange(10)
    result = identify_embeddings(torch.ones(10, 4), labels, torch.ones(20, 4), torch.arange(20), name="one point")
    assert (
        result.figures["rank-1"],
        result.figures["rank-5"],
        result.figures["rank-10"],
        result.figures["dir@1e-1"],
    ) == (0, 0, 1, 0)


@pytest.mark.parametrize("tile", [3, 7, 1000])
def test_a_distractor_that_is_the_gallery_image_ties_in_any_tile(tile):
    """Products of the same two rows in tiles of other shapes differ in their last bits, which must not decide."""
    generator = torch.Generator().manual_seed(1)
    gallery, probes = torch.randn(50, 128, generator=generator), torch.randn(200, 128, generator=generator)
    labels = torch.arange(200) % 50
    result = identify_embeddings(
        gallery, torch.arange(50), probes, labels, name="x", distractors=gallery.flip(0), tile=tile
    )
    assert result.figures["rank-1"] == 0 and result.figures["rank-20"] > 0  # type: ignore[operator]


def on_ranks(rank: int, world: int, case: Case, tile: int) -> tuple[Result, int]:
    calls = []

    def reduce(part: Tensor) -> Tensor:
        calls.append(part.numel())
        torch.distributed.all_reduce(part)
        return part

    return identify_embeddings(**case, name="megaface", tile=tile, rank=rank, world=world, reduce=reduce), max(calls)


def test_every_number_of_ranks_gives_the_same(ranks):
    case = a_case(True)
    alone = identify_embeddings(**case, name="megaface", tile=16)
    for world in (2, 3):
        for result, largest in ranks(world).run(on_ranks, case, 16):
            assert result == alone
            assert largest == 160, "one number a probe"


def test_no_product_is_larger_than_a_tile(monkeypatch):
    from partial_fc.training.protocols import identification

    shapes = []
    original = identification.cosine_tile
    monkeypatch.setattr(identification, "cosine_tile", lambda a, b: shapes.append((len(a), len(b))) or original(a, b))
    case = a_case(False)
    case["gallery_labels"][:60] = 1000  # more images than a tile has
    case["probe_labels"][:3] = 1000
    identify_embeddings(**case, name="x", tile=16)
    assert max(max(shape) for shape in shapes) == 16
    closed, _ = by_loops(case, (1,), ())
    assert identify_embeddings(**case, name="x", tile=16).figures["rank-1"] == pytest.approx(closed[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe_labels": torch.full((160,), 7777)}, "no probe is of an identity in the gallery"),
        (
            {"gallery": torch.zeros(0, 16), "gallery_labels": torch.zeros(0, dtype=torch.int64)},
            "no probe is of an identity",
        ),
        ({"distractor_labels": torch.full((60,), 1)}, "the distractors have the label 1, which is among the probes"),
        ({"probes": torch.ones(160, 8)}, r"the probe embeddings have shape \[160, 8\]; give \[n, 16\]"),
        ({"probes": torch.ones(16)}, "probe"),
        ({"probe_labels": torch.ones(3, dtype=torch.int64)}, "one integer for each of the 160"),
        ({"gallery_labels": torch.ones(100)}, "one integer for each"),
        ({"distractors": torch.full((60, 16), torch.nan)}, "60 of 60 embeddings are not finite"),
        ({"tile": 0}, "tile is 0"),
    ],
)
def test_bad_input_is_a_user_error(change, message):
    with pytest.raises(UserError, match=message):
        identify_embeddings(**{**a_case(False), **change}, name="x")
