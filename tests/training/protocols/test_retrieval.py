"""Retrieval against plain loops and scikit-learn's average precision, with cameras, ties and queries that have no
answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from partial_fc.training.cli.protocols import open_command_tasks, protocol_parser
from partial_fc.training.errors import UserError
from partial_fc.training.protocols import Result, retrieve_embeddings

Case = dict[str, Tensor]


def a_case(signs: bool, cameras: bool = True, seed: int = 0) -> Case:
    """50 queries and 200 gallery images of 12 identities, 4 cameras; some junk; two queries without an answer."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(14, 16, generator=generator)
    labels, others = torch.randint(0, 12, (50,), generator=generator), torch.randint(0, 12, (200,), generator=generator)
    labels[[4, 9]] = 13  # nowhere in the gallery
    if signs:
        centres = torch.where(centres > 0, 0.25, -0.25)
        queries, gallery = (
            centres[y] * (1 - 2 * (torch.rand(len(y), 16, generator=generator) < 0.25).float())
            for y in (labels, others)
        )
    else:
        queries, gallery = (centres[y] + 1.5 * torch.randn(len(y), 16, generator=generator) for y in (labels, others))
    others[::17] = -1
    case = {"queries": queries, "query_labels": labels, "gallery": gallery, "gallery_labels": others}
    if cameras:
        case |= {
            name: torch.randint(0, 4, (n,), generator=generator)
            for name, n in (("query_cameras", 50), ("gallery_cameras", 200))
        }
    return case


def by_loops(case: Case, ks: tuple[int, ...], itself: bool = False) -> tuple[dict[str, float], list[int]]:
    """(figures, queries without an answer): a ranking of each query, irrelevant images first where scores are equal."""
    unit = {name: case[name].double().numpy() for name in ("queries", "gallery")}
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in unit.items()}
    cameras = (case.get("query_cameras"), case.get("gallery_cameras"))
    lists: dict[str, list[float]] = {}
    missing = []
    for i, label in enumerate(case["query_labels"].tolist()):
        scored = []
        for j, other in enumerate(case["gallery_labels"].tolist()):
            same_camera = cameras[0] is not None and int(cameras[0][i]) == int(cameras[1][j])  # type: ignore[index]
            if other < 0 or (itself and i == j) or (other == label and same_camera):
                continue
            scored.append((round(float(unit["queries"][i] @ unit["gallery"][j]), 9), other == label))
        ranking = [relevant for _, relevant in sorted(scored, key=lambda each: (-each[0], each[1]))]
        total = sum(ranking)
        if not total:
            missing.append(i)
            continue
        places = [place for place, relevant in enumerate(ranking, 1) if relevant]
        precisions = [r / place for r, place in enumerate(places, 1)]
        figures = {
            "mAP": sum(precisions) / total,
            "R-precision": sum(place <= total for place in places) / total,
            "mAP@R": sum(p for p, place in zip(precisions, places, strict=True) if place <= total) / total,
            **{f"cmc@{k}": float(places[0] <= k) for k in ks},
            **{f"recall@{k}": sum(place <= k for place in places) / total for k in ks},
        }
        if len({score for score, _ in scored}) == len(scored):  # without ties scikit-learn's is the same
            scores, relevant = zip(*scored, strict=True)
            assert figures["mAP"] == pytest.approx(average_precision_score(relevant, scores))
            lists.setdefault("compared", []).append(1)
        for key, value in figures.items():
            lists.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) if key != "compared" else len(values) for key, values in lists.items()}, missing


@pytest.mark.parametrize("signs", [False, True], ids=["random", "with ties"])
@pytest.mark.parametrize("cameras", [False, True], ids=["no cameras", "cameras"])
@pytest.mark.parametrize("tile", [5, 64, 1000])
def test_figures_are_those_of_loops_and_scikit_learn(signs, cameras, tile):
    case = a_case(signs, cameras)
    expected, missing = by_loops(case, (1, 5, 10))
    assert expected.pop("compared", 0) == (0 if signs else 48)
    result = retrieve_embeddings(**case, name="market", tile=tile, progress=True)
    assert result.figures == pytest.approx(expected)
    assert missing == [4, 9]
    assert result.counts == {"queries": 48, "queries without an answer": 2, "gallery": 200, "junk": 12}
    assert "no relevant image for the queries 4, 9" in result.summary()
    assert 0 < expected["mAP"] < 1 and expected["cmc@1"] < expected["cmc@10"]


@pytest.mark.parametrize("tile", [7, 1000])
def test_a_set_searched_in_itself_leaves_each_image_out_of_its_own_answer(tile):
    case = a_case(False)
    only = {"queries": case["gallery"], "query_labels": case["gallery_labels"].abs()}
    expected, missing = by_loops(
        {**only, "gallery": only["queries"], "gallery_labels": only["query_labels"]}, (1, 5, 10), itself=True
    )
    del expected["compared"]
    result = retrieve_embeddings(**only, name="products", tile=tile)
    assert result.figures == pytest.approx(expected) and missing == []


def test_equal_scores_count_against_the_query():
    gallery_labels = torch.tensor([0, 1, 0, 1, 1])
    result = retrieve_embeddings(
        torch.ones(1, 4), torch.tensor([0]), torch.ones(5, 4), gallery_labels, name="one point"
    )
    assert result.figures["mAP"] == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert (result.figures["cmc@1"], result.figures["cmc@5"], result.figures["recall@1"]) == (0, 1, 0)


@pytest.mark.parametrize("tile", [3, 7, 1000])
def test_an_irrelevant_copy_of_the_relevant_image_ties_in_any_tile(tile):
    generator = torch.Generator().manual_seed(1)
    gallery, queries = torch.randn(50, 128, generator=generator), torch.randn(200, 128, generator=generator)
    labels = torch.arange(200) % 50
    twice = torch.cat((gallery, gallery)), torch.cat((torch.arange(50), torch.arange(50) + 1000))
    result = retrieve_embeddings(queries, labels, *twice, name="x", tile=tile)
    assert result.figures["cmc@1"] == 0 and result.figures["cmc@10"] > 0  # type: ignore[operator]


def on_ranks(rank: int, world: int, case: Case) -> Result:
    def reduce(part: Tensor) -> Tensor:
        torch.distributed.all_reduce(part)
        return part

    return retrieve_embeddings(**case, name="market", tile=16, rank=rank, world=world, reduce=reduce)


def test_every_number_of_ranks_gives_the_same(ranks):
    case = a_case(True)
    alone = retrieve_embeddings(**case, name="market", tile=16)
    for world in (2, 3):
        assert ranks(world).run(on_ranks, case) == [alone] * world


def test_no_product_is_larger_than_a_tile(monkeypatch):
    from partial_fc.training.protocols import retrieval

    shapes = []
    original = retrieval.cosine_tile
    monkeypatch.setattr(retrieval, "cosine_tile", lambda a, b: shapes.append((len(a), len(b))) or original(a, b))
    retrieve_embeddings(**a_case(False), name="x", tile=8)
    assert max(max(shape) for shape in shapes) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_labels": torch.full((50,), 77)}, "no query has a relevant image"),
        ({"gallery_labels": torch.full((200,), -1)}, "no query has a relevant image"),
        ({"query_cameras": None}, "cameras of queries and gallery, or of neither"),
        ({"gallery_labels": None}, "give labels of the gallery too"),
        ({"gallery": torch.ones(200, 3)}, r"give \[n, 16\]"),
        ({"gallery_cameras": torch.ones(3, dtype=torch.int64)}, "gallery camera labels"),
        ({"queries": torch.full((50, 16), torch.inf)}, "50 of 50 embeddings are not finite"),
        ({"tile": 0}, "tile is 0"),
    ],
)
def test_bad_input_is_a_user_error(change, message):
    with pytest.raises(UserError, match=message):
        retrieve_embeddings(**{**a_case(False), **change}, name="x")


def test_a_flat_folder_without_a_label_is_told_of_the_pattern(tmp_path):
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "0001_c1.jpg").write_bytes(b"")
    asked = protocol_parser("retrieve").parse_args(["run", "--query", str(tmp_path / "query")])
    with pytest.raises(
        UserError, match=r"has no sub-folders; .*, or give --label REGEX, which finds the identity in the file name"
    ):
        open_command_tasks("retrieve", asked, (3, 112, 112))
