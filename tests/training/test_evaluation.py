"""The tiled evaluation equals brute force: all pairs written out, scikit-learn's ROC, plain loops."""

import json
import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve
from torch import Tensor
from torch.nn import functional as F

from partial_fc import gather
from partial_fc.training import evaluation, results
from partial_fc.training.errors import UserError
from partial_fc.training.evaluation import (
    BINS,
    FARS,
    FOLDS,
    PairHistograms,
    evaluate_embeddings,
    pair_histograms,
    rank1,
)
from partial_fc.training.protocols.pairs import Pairs, folds_of, score_pairs
from partial_fc.training.report import hardest

RESOLUTION = 2 / BINS


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def faces(identities: int = 40, images: int = 10, noise: float = 1.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters whose genuine and impostor cosines overlap, in shuffled order, labels neither sorted nor dense."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(identities).repeat_interleave(images)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(identities, 24, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), 24, generator=generator), 7 * labels - 50


def all_pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (float64) and genuineness of every pair i < j, by brute force."""
    unit = F.normalize(embeddings.double(), dim=1)
    i, j = torch.triu_indices(len(unit), len(unit), 1)
    return (unit[i] * unit[j]).sum(1), labels[i] == labels[j]


def test_counts_are_those_of_all_pairs():
    embeddings, labels = faces()
    cosines, genuine = all_pairs(embeddings, labels)
    pairs = pair_histograms(embeddings, labels, tile=64)
    assert pairs.counts.shape == (2, FOLDS, BINS)
    assert pairs.counts.dtype == torch.int64
    assert (pairs.genuine_pairs, pairs.impostor_pairs) == (int(genuine.sum()), int((~genuine).sum()))
    for row, chosen in ((0, genuine), (1, ~genuine)):
        histogram = torch.histc(cosines[chosen], 1024, -1, 1)
        coarse = pairs.counts[row].sum(0).view(1024, -1).sum(1)
        # A cosine within float32 rounding of an edge may fall to either side of it.
        assert (histogram.cumsum(0) - coarse.cumsum(0)).abs().max() <= 2


def test_tar_at_far_is_that_of_scikit_learn_within_a_bin():
    embeddings, labels = faces()
    cosines, genuine = all_pairs(embeddings, labels)
    false_accepts, true_accepts, _ = roc_curve(genuine, cosines, drop_intermediate=False)
    pairs = pair_histograms(embeddings, labels)
    for far in (0.3, 0.1, 1e-2, 1e-3):
        expected = true_accepts[false_accepts <= far].max()
        tar, threshold = pairs.tar_at_far(far), pairs.threshold_at_far(far)
        assert tar is not None
        assert threshold is not None
        # All that quantisation can move are the genuine pairs within one bin of the threshold.
        near = int(((cosines - threshold).abs() <= RESOLUTION)[genuine].sum())
        assert abs(tar - expected) * pairs.genuine_pairs <= near + 1e-6
        assert float((cosines[~genuine] >= threshold + 1e-7).double().mean()) <= far


def test_eer_is_where_the_curves_of_scikit_learn_cross():
    embeddings, labels = faces()
    cosines, genuine = all_pairs(embeddings, labels)
    false_accepts, true_accepts, _ = roc_curve(genuine, cosines, drop_intermediate=False)
    crossing = abs(false_accepts + true_accepts - 1).argmin()
    expected = (false_accepts[crossing] + 1 - true_accepts[crossing]) / 2
    assert pair_histograms(embeddings, labels).eer() == pytest.approx(expected, abs=1 / int(genuine.sum()))


def test_eer_is_interpolated_within_a_bin():
    counts = torch.zeros(2, FOLDS, BINS, dtype=torch.int64)
    counts[0, 0, 400], counts[0, 0, 1000] = 30, 70
    counts[1, 0, 500], counts[1, 0, 1000] = 60, 40
    # From edge 1000 (FAR 0.4, FRR 0.3) to edge 1001 (FAR 0, FRR 1) the two meet after 1/11 of the way.
    assert PairHistograms(counts).eer() == pytest.approx(0.4 * 10 / 11)


def test_min_dcf_is_the_least_cost_over_all_thresholds():
    embeddings, labels = faces()
    cosines, genuine = all_pairs(embeddings, labels)
    pairs = pair_histograms(embeddings, labels)
    for p_target, c_miss, c_fa in ((0.01, 1.0, 1.0), (0.05, 1.0, 1.0), (0.5, 10.0, 1.0)):
        false_accepts, true_accepts, _ = roc_curve(genuine, cosines, drop_intermediate=False)
        costs = c_miss * p_target * (1 - true_accepts) + c_fa * (1 - p_target) * false_accepts
        expected = costs.min() / min(c_miss * p_target, c_fa * (1 - p_target))
        assert pairs.min_dcf(p_target, c_miss, c_fa) == pytest.approx(expected, rel=1e-2)
        assert 0 < expected < 1
    with pytest.raises(ValueError, match="p_target must be in"):
        pairs.min_dcf(1.0)


def test_min_dcf_by_hand():
    counts = torch.zeros(2, FOLDS, BINS, dtype=torch.int64)
    counts[0, 0, 400], counts[0, 0, 1000] = 30, 70
    counts[1, 0, 500], counts[1, 0, 1000] = 999, 1
    # Above bin 500: 0.3 missed and 0.001 accepted, 0.01 · 0.3 + 0.99 · 0.001 over 0.01.
    assert PairHistograms(counts).min_dcf() == pytest.approx(0.3 + 0.099)
    assert PairHistograms(counts.flip(0)).min_dcf() == 1, "no threshold is better than to reject all"


def test_ten_fold_accuracy_is_that_of_a_naive_implementation():
    embeddings, labels = faces(identities=23, images=6)
    unit = F.normalize(embeddings, dim=1)
    cosines = (unit @ unit.T).tolist()
    number = {label: i for i, label in enumerate(sorted(set(labels.tolist())))}
    sorted_bins: dict[tuple[int, bool], list[int]] = {(fold, kind): [] for fold in range(10) for kind in (True, False)}
    for i in range(len(labels)):
        for j in range(i):
            a, b = number[int(labels[i])], number[int(labels[j])]
            sorted_bins[min(a, b) % 10, a == b].append(math.floor((cosines[i][j] + 1) / 2 * BINS))
    scores = []
    for fold in range(10):
        trained = {
            kind: np.concatenate([sorted_bins[k, kind] for k in range(10) if k != fold]) for kind in (True, False)
        }
        tested = {kind: np.array(sorted_bins[fold, kind]) for kind in (True, False)}
        accepted = {
            kind: len(bins) - np.searchsorted(np.sort(bins), np.arange(BINS + 1)) for kind, bins in trained.items()
        }
        # In integers: TAR - FAR times both numbers of pairs.
        quality = accepted[True] * len(trained[False]) - accepted[False] * len(trained[True])
        best = np.flatnonzero(quality == quality.max())
        threshold = best[len(best) // 2]
        scores.append(((tested[True] >= threshold).mean() + (tested[False] < threshold).mean()) / 2)
    accuracy = pair_histograms(embeddings, labels).accuracy()
    assert accuracy is not None
    assert accuracy == pytest.approx((np.mean(scores), np.std(scores)), abs=1e-9)


def test_of_equally_good_thresholds_the_middle_one_is_tested():
    counts = torch.zeros(2, FOLDS, BINS, dtype=torch.int64)
    counts[0, 1:, 100_000], counts[1, 1:, 10] = 3, 5  # on these folds every edge from 11 to 100,000 is perfect
    counts[0, 0, 60_000], counts[1, 0, 40_000] = 3, 5  # and this one is told apart by the middle of them only
    assert PairHistograms(counts).accuracy() == (1, 0)


def test_accuracy_is_none_without_two_kinds_of_pairs_in_any_fold():
    embeddings = torch.eye(4)
    assert pair_histograms(embeddings, torch.tensor([0, 0, 1, 1])).accuracy() is None


def test_rank1_is_that_of_plain_loops():
    embeddings, labels = faces(identities=30, images=5)
    embeddings = torch.cat([embeddings, torch.randn(9, 24, generator=torch.Generator().manual_seed(1))])
    labels = torch.cat([labels, torch.arange(1000, 1009)])  # single images: distractors
    unit = F.normalize(embeddings, dim=1)
    gallery: dict[int, Tensor] = {}
    probes = []
    for image, label in zip(unit, labels.tolist(), strict=True):
        if label in gallery:
            probes.append((image, label))
        else:
            gallery[label] = image
    hits = sum(max(gallery, key=lambda name: float(image @ gallery[name])) == label for image, label in probes)
    assert 0 < hits < len(probes) == 120
    for tile in (7, 64, len(labels)):
        assert rank1(embeddings, labels, tile=tile) == (hits, 120)


@pytest.mark.parametrize("tile", [7, 64, 299])
def test_figures_do_not_depend_on_the_tile(tile: int):
    # 16 coordinates of ±1/4 have length 1 and exact products in any order of summation: the figures must be equal.
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(300) % 37
    signs = torch.randint(0, 2, (37, 16), generator=generator)[labels] ^ (
        torch.rand(300, 16, generator=generator) < 0.2
    )
    exact = (2 * signs - 1) / 4
    whole = evaluate_embeddings(exact, labels, name="faces", tile=300)
    assert 0 < whole.eer < 0.5
    assert evaluate_embeddings(exact, labels, name="faces", tile=tile) == whole


@pytest.mark.parametrize("tile", [7, 64])
def test_figures_depend_on_the_tile_by_rounding_only(tile: int):
    embeddings, labels = faces()
    whole, tiled = (evaluate_embeddings(embeddings, labels, name="faces", tile=size) for size in (len(labels), tile))
    assert tiled.rank1 == whole.rank1
    assert tiled.accuracy == pytest.approx(whole.accuracy, abs=2e-4)
    assert tiled.eer == pytest.approx(whole.eer, abs=2e-4)
    for far in ("1e-2", "1e-3"):
        assert tiled.tar[far] == pytest.approx(whole.tar[far], abs=1.01 / whole.genuine_pairs)
        assert tiled.thresholds[far] == pytest.approx(whole.thresholds[far], abs=1.01 * RESOLUTION)


def test_sums_over_three_ranks_are_one_rank():
    embeddings, labels = faces()
    alone = evaluate_embeddings(embeddings, labels, name="faces", tile=50)
    shares = [pair_histograms(embeddings, labels, tile=50, rank=rank, world=3) for rank in range(3)]
    assert all(share.genuine_pairs + share.impostor_pairs > 0 for share in shares)
    assert torch.equal((shares[0] + shares[1] + shares[2]).counts, pair_histograms(embeddings, labels, tile=50).counts)
    found = [rank1(embeddings, labels, tile=50, rank=rank, world=3) for rank in range(3)]
    sums = {2: torch.tensor([sum(column) for column in zip(*found, strict=True)])}
    sums[shares[0].counts.numel()] = shares[0].counts + shares[1].counts + shares[2].counts
    for rank in range(3):
        together = evaluate_embeddings(
            embeddings, labels, name="faces", tile=50, rank=rank, world=3, reduce=lambda part: sums[part.numel()]
        )
        assert together == alone


def test_a_reduction_in_place_is_seen_by_the_figures():
    embeddings, labels = faces()
    first, second = (pair_histograms(embeddings, labels, tile=50, rank=rank, world=2) for rank in range(2))
    first.eer()
    first.counts.add_(second.counts)
    assert first.eer() == pair_histograms(embeddings, labels, tile=50).eer()


def test_perfect_separation():
    centres = torch.eye(50)
    labels = torch.arange(50).repeat_interleave(4)
    result = evaluate_embeddings(centres[labels] * 3, labels, name="faces")
    assert (result.eer, result.accuracy, result.accuracy_std, result.rank1) == (0, 1, 0, 1)
    assert (result.tar["1e-2"], result.tar["1e-3"]) == (1, 1)
    assert result.roc[-1] == (1, 1)


def test_random_embeddings_are_at_chance():
    embeddings = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    result = evaluate_embeddings(embeddings, torch.arange(400) % 40, name="noise")
    assert result.eer == pytest.approx(0.5, abs=0.03)
    assert result.accuracy == pytest.approx(0.5, abs=0.03)


def test_one_point_accepts_all_pairs_together_or_not_at_all():
    result = evaluate_embeddings(torch.ones(60, 8), torch.arange(60) % 6, name="collapsed")
    assert result.tar["1e-2"] == 0
    assert result.eer == pytest.approx(0.5)
    zeros = evaluate_embeddings(torch.zeros(60, 8), torch.arange(60) % 6, name="zeros")
    assert zeros.tar["1e-2"] == 0


def test_a_far_of_fewer_than_ten_false_accepts_is_a_dash():
    counts = torch.zeros(2, FOLDS, BINS, dtype=torch.int64)
    counts[0, 0, BINS // 2 + 5 : BINS // 2 + 7] = 50
    counts[1, 0, :1000] = 1
    pairs = PairHistograms(counts)
    assert pairs.tar_at_far(1e-2) == 1  # 1,000 impostors: ten expected
    assert pairs.tar_at_far(1e-3) is None
    assert pairs.threshold_at_far(1e-3) is None
    counts[1, 0, 0] = 0
    assert PairHistograms(counts).tar_at_far(1e-2) is None  # 999


def test_ties_never_take_the_far_above_the_one_asked():
    counts = torch.zeros(2, FOLDS, BINS, dtype=torch.int64)
    counts[0, 0, 900:910] = 10
    counts[1, 0, 100] = 980
    counts[1, 0, 905] = 20  # a bin of 2 % of the impostors
    pairs = PairHistograms(counts)
    assert pairs.tar_at_far(1e-2) == pytest.approx(0.4)  # bins 906..909
    assert pairs.threshold_at_far(1e-2) == -1 + 906 * RESOLUTION
    assert pairs.tar_at_far(2e-2) == 1


def test_roc_points_rise_and_are_few():
    result = evaluate_embeddings(*faces(identities=60), name="faces")
    far, tar = zip(*result.roc, strict=True)
    assert list(far) == sorted(set(far))
    assert list(tar) == sorted(tar)
    assert 100 < len(far) <= 500
    assert far[0] > 0
    assert result.roc[-1] == (1, 1)
    pairs = pair_histograms(*faces(identities=60))
    for share, accepted in result.roc[::25]:
        if share * pairs.impostor_pairs >= 10:
            assert pairs.tar_at_far(share) == accepted


def test_no_product_is_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch):
    products = []
    genuine_product = evaluation.cosine_tile

    def spy(rows: Tensor, columns: Tensor) -> Tensor:
        products.append((len(rows), len(columns)))
        return genuine_product(rows, columns)

    monkeypatch.setattr(evaluation, "cosine_tile", spy)
    embeddings, labels = faces()
    pairs = pair_histograms(embeddings, labels, tile=32)
    assert len(products) == 13 * 14 / 2
    rank1(embeddings, labels, tile=32)
    assert max(max(shape) for shape in products) == 32
    assert pairs.counts.numel() == 2 * FOLDS * BINS


def test_to_dict_is_json_and_summary_has_every_figure():
    result = evaluate_embeddings(*faces(identities=12, images=4), name="small set", progress=True)
    fields = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert fields["tar"].keys() == fields["thresholds"].keys() == FARS.keys()
    assert fields["tar"]["1e-5"] is None
    assert len(fields["genuine_histogram"]) == len(fields["impostor_histogram"])
    assert sum(fields["genuine_histogram"]) == fields["genuine_pairs"] == 72
    assert fields["roc"][-1] == [1, 1]
    assert not {"roc", "genuine_histogram", "impostor_histogram"} & result.to_dict(curves=False).keys()
    text = result.summary()
    for part in ("small set", "48 images", "12 identities", "1,056 impostor", "TAR @ FAR 1e-5", "—", "EER", "rank-1"):
        assert part in text
    assert f"{100 * result.eer:.2f} %" in text


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.ones(1, 4), torch.zeros(1), "no pair"),
        (torch.ones(0, 4), torch.zeros(0), "no pair"),
        (torch.ones(3, 4), torch.arange(3), "no genuine pair"),
        (torch.ones(3, 4), torch.zeros(3), "one identity"),
        (torch.ones(3, 4), torch.zeros(4), "do not match"),
        (torch.ones(3), torch.zeros(3), "do not match"),
        (torch.tensor([[1.0], [math.nan], [math.inf]]), torch.tensor([0, 0, 1]), "2 of 3 embeddings are not finite"),
    ],
)
def test_bad_input_is_a_user_error(embeddings: Tensor, labels: Tensor, message: str):
    for function in (pair_histograms, rank1):
        with pytest.raises(UserError, match=message):
            function(embeddings, labels)
    with pytest.raises(UserError, match=message):
        evaluate_embeddings(embeddings, labels, name="faces")


def test_a_tile_of_nothing_is_a_user_error():
    with pytest.raises(UserError, match="tile is 0"):
        evaluate_embeddings(*faces(), name="faces", tile=0)


# ---------------------------------------------------------------------------------------------------- devices


class Seen(Exception):
    """Enough was seen."""


def test_tiles_are_compared_on_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    """The meta device, on which nothing can be counted, stands for a GPU."""
    seen: list[str] = []

    def note(*tensors: Tensor) -> Tensor:
        seen.extend(each.device.type for each in tensors if isinstance(each, Tensor) and each.is_floating_point())
        raise Seen

    embeddings, labels = faces(identities=6, images=4)
    pairs = Pairs(torch.arange(0, 24, 2), torch.arange(1, 24, 2), torch.arange(12) % 2 == 0, folds_of(12))
    meta = torch.device("meta")
    monkeypatch.setattr(evaluation, "cosine_tile", note)
    monkeypatch.setattr(hardest, "_hardest", note)
    monkeypatch.setattr(torch.linalg, "vecdot", note)
    for compare in (
        lambda: pair_histograms(embeddings, labels, device=meta),
        lambda: rank1(embeddings, labels, device=meta),
        lambda: hardest.hardest_pairs(embeddings, labels, device=meta),
        lambda: score_pairs(embeddings, pairs, device=meta),
    ):
        with pytest.raises(Seen):
            compare()
    assert seen == ["meta"] * 7, seen


def test_a_run_asks_for_its_own_device(monkeypatch: pytest.MonkeyPatch):
    gpu, asked = torch.device("cuda", 1), []
    embeddings, labels = faces(identities=6, images=4)
    run = SimpleNamespace(device=gpu, process_index=0, num_processes=1, is_main_process=True)
    data, config = SimpleNamespace(labels=labels), SimpleNamespace(evaluation=SimpleNamespace(tile=64))

    def evaluate(*_: Any, device: torch.device, **__: Any) -> str:
        asked.append(device)
        return "figures"

    def pairs(*_: Any, device: torch.device, **__: Any) -> tuple[list[Any], list[Any]]:
        asked.append(device)
        return [], []

    monkeypatch.setattr(results, "embed_images", lambda *_, **__: (embeddings, torch.arange(24)))
    monkeypatch.setattr(results, "evaluate_embeddings", evaluate)
    monkeypatch.setattr(hardest, "hardest_pairs", pairs)
    monkeypatch.setattr(hardest, "note_pairs", lambda *_: None)
    found = results.evaluate_sets(torch.nn.Identity(), {"faces": data}, run, config, SimpleNamespace(path=None))
    assert found == ["figures"] and asked == [gpu, gpu]


def rows_in_blocks(rank: int, world: int, counts: list[int]) -> tuple[Tensor, Tensor, int]:
    """Embeddings of all ranks, their positions, and the largest number of rows that was on the device at once."""
    start = sum(counts[:rank])
    positions = torch.arange(start, start + counts[rank]).flip(0)
    embeddings = positions[:, None].float() * torch.ones(3)
    seen: list[int] = []

    def noting(*tensors: Tensor) -> Any:
        batch = gather(*tensors)
        seen.append(len(batch.labels))
        return batch

    run: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=world)
    with mock.patch.object(results, "BLOCK", 4), mock.patch.object(results, "gather", noting):
        found = results.gather_rows(embeddings, positions, run)
    return *found, max(seen)


@pytest.mark.parametrize("counts", [[10, 0, 3], [1, 2, 1], [0, 0, 0]])
def test_embeddings_travel_in_blocks(ranks: Any, counts: list[int]):
    for embeddings, positions, largest in ranks(3).run(rows_in_blocks, counts):
        assert positions.tolist() == list(range(sum(counts))) == embeddings[:, 2].tolist()
        assert embeddings.shape == (sum(counts), 3) and largest <= 3 * 4
