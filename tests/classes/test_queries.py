"""topk and nearest_classes against one dense float64 matrix of cosines: shards of every kind, tiles of every size,
ties, errors, memory."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from common import any_message_of, needs
from shards import local, two_by_two
from torch import Tensor
from watching import Allocations

from partial_fc import CenterLoss, NonFiniteError, NormFace, PartialFC, Softmax, SubCenterArcFace
from partial_fc.classes import best_classes, queries, query_arguments

D = 7
CLASSES = [1, 3, 10, 83]
HUGE = 64 << 20


def rows_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_cosines(x: Tensor, w: Tensor) -> Tensor:
    """`[n, m]` float64 of `x [n, D]` or `[n, K, D]`, `w [m, D]` or `[m, K, D]`; the largest over centers."""
    x, w = x.double(), w.double()
    x, w = (each[:, None] if each.ndim == 2 else each for each in (x, w))
    cosines = torch.einsum("nad,mbd->nmab", x, w)
    lengths = x.pow(2).sum(2).sqrt()[:, None, :, None] * w.pow(2).sum(2).sqrt()[None, :, None, :]
    return torch.where(lengths > 0, cosines / lengths.clamp(min=1e-300), 0.0).flatten(2).max(2).values


def check(found: Any, cosines: Tensor, k: int, atol: float) -> None:
    """The k largest of each row of `cosines`; where two are nearer than rounding either may be named."""
    ids, values = found
    assert ids.dtype == torch.int64 and ids.shape == values.shape == (len(cosines), k)
    assert not values.requires_grad
    expected = cosines.sort(dim=1, descending=True).values[:, :k]
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(cosines.gather(1, ids), expected, rtol=0, atol=2 * atol)
    assert bool((values[:, :-1] >= values[:, 1:]).all())
    assert all(len(set(row)) == k for row in ids.tolist())


def filled(loss: Any, whole: Tensor) -> tuple[Any, int, int]:
    """The loss with these rows; the classes of this rank."""
    (parameter,) = (p for name, p in loss.named_parameters() if name in ("weight", "centers"))
    lo, hi = loss.shards.lo, loss.shards.hi
    local(parameter.detach()).copy_(whole[lo:hi])
    return loss, lo, hi


def build(kind: str, C: int) -> tuple[Any, float]:
    """(loss, tolerance of its cosines)."""
    if kind == "float64":
        return PartialFC(D, C, dtype=torch.float64), 1e-13
    if kind == "bfloat16":
        return PartialFC(D, C, dtype=torch.bfloat16), 1e-6
    if kind == "subcenter":
        return PartialFC(D, C, SubCenterArcFace(centers=3)), 1e-6
    if kind == "sampled":
        return PartialFC(D, C, NormFace(), sample_rate=0.3), 1e-6
    if kind == "centers":
        return CenterLoss(D, C), 1e-6
    return PartialFC(D, C, Softmax()), 1e-6


KINDS = ("softmax", "float64", "bfloat16", "subcenter", "sampled", "centers")


def _compare(rank: int, world: int, kind: str, samples: list[int]) -> None:
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    queries.QUERIES = query_arguments.BLOCK = 6  # small, so that every branch is taken at these sizes
    best_classes.BIN, best_classes.COLUMN_BIN, best_classes.ROWS_AT_ONCE = 4, 2, 40
    for C in CLASSES:
        loss, atol = build(kind, C)
        shape = (C, 3, D) if kind == "subcenter" else (C, D)
        whole = rows_of(C, *shape).to(dtype)
        loss, lo, hi = filled(loss, whole)
        x = rows_of(100 + rank, samples[rank], D).to(torch.float64 if kind == "float64" else torch.float32)
        cosines, between = dense_cosines(x, whole), dense_cosines(whole[lo:hi], whole)
        between[torch.arange(hi - lo), torch.arange(lo, hi)] = -math.inf
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in loss.state_dict().items()}
        for k in {1, min(C, 3), max(1, C - 1), C} if C < 20 else {3, C - 1}:
            for tile_bytes in {3: (1, HUGE), 10: (250, HUGE), 83: (1600, HUGE)}.get(C, (HUGE,)):
                loss.train(k % 2 == 0)
                check(loss.topk(x, k, tile_bytes=tile_bytes), cosines, k, atol)
                if k < C:
                    check(loss.nearest_classes(k, tile_bytes=tile_bytes), between, k, atol)
        for name, value in loss.state_dict().items():
            of_before = before[name]
            if isinstance(value, Tensor):
                assert torch.equal(local(value), local(of_before))
            else:
                assert value == of_before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("world", "samples"),
    [(2, [5, 0]), *(pytest.param(len(n), n, marks=pytest.mark.slow) for n in ([13], [0, 9, 2], [1, 4, 2, 20]))],
)
def test_equal_to_a_dense_matrix(ranks, world, samples, kind):
    ranks(world).run(_compare, kind, samples, timeout=150)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_a_dense_matrix_without_a_group(kind, monkeypatch):
    for module, name in (
        (queries, "QUERIES"),
        (query_arguments, "BLOCK"),
        (best_classes, "BIN"),
        (best_classes, "COLUMN_BIN"),
        (best_classes, "ROWS_AT_ONCE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored afterwards
    _compare(0, 1, kind, [13])


def _of_default_groups(rank: int, world: int) -> None:
    """Tiles with several whole groups and an end that is in none."""
    whole = rows_of(5, 1003, D)
    head, lo, hi = filled(PartialFC(D, 1003, NormFace()), whole.float())
    x = rows_of(6 + rank, 33, D).float()
    between = dense_cosines(whole[lo:hi].float(), whole.float())
    between[torch.arange(hi - lo), torch.arange(lo, hi)] = -math.inf
    for tile_bytes in (4 * 330**2, HUGE):
        for k in (1, 4):
            check(head.topk(x, k, tile_bytes=tile_bytes), dense_cosines(x, whole.float()), k, 1e-6)
            check(head.nearest_classes(k, tile_bytes=tile_bytes), between, k, 1e-6)


def test_groups_of_32():
    _of_default_groups(0, 1)


def test_groups_of_32_on_two_ranks(ranks):
    ranks(2).run(_of_default_groups)


# -------------------------------------------------------------------------------------- ties and rows without direction


def _ties(rank: int, world: int) -> None:
    """Rows of ±1 along axes: all cosines are -1, 0 or 1 exactly, and most are equal."""
    C, small = 600, torch.eye(D)
    whole = small[torch.arange(C) % D] * torch.where(torch.arange(C) % 3 == 0, -1.0, 1.0)[:, None]
    whole[17], whole[590] = 0.0, 1e-14  # no direction
    for dtype in (torch.float32, torch.float64):
        head, lo, hi = filled(PartialFC(D, C, NormFace(), dtype=dtype), whole.to(dtype))
        x = torch.cat((small * 3, torch.zeros(1, D), -small)).to(dtype)
        cosines, between = ((each @ whole.T).round() for each in (x.float().sign(), whole[lo:hi]))
        between[torch.arange(hi - lo), torch.arange(lo, hi)] = -5
        for tile_bytes in (4 * 90**2, HUGE):
            for k in (1, 4, 130):
                for found, dense in (
                    (head.topk(x, k, tile_bytes=tile_bytes), cosines),
                    (head.nearest_classes(k), between),
                ):
                    order = dense.sort(dim=1, descending=True, stable=True)
                    assert torch.equal(found.ids, order.indices[:, :k]), (dtype, tile_bytes, k)
                    assert torch.equal(found.cosines, order.values[:, :k].to(dtype))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_of_equal_cosines_the_lower_id_is_first(ranks, world):
    ranks(world).run(_ties)


def test_of_equal_cosines_the_lower_id_is_first_without_a_group():
    _ties(0, 1)


# ---------------------------------------------------------------------------------------------------- replicas


def _replicas(rank: int, world: int) -> None:
    mesh = two_by_two()
    whole = rows_of(3, 21, D).float()
    head, lo, hi = filled(PartialFC(D, 21, NormFace(), group=mesh), whole)
    assert (lo, hi) == ((0, 11), (11, 21))[rank % 2]
    x = rows_of(rank, rank + 1, D).float()
    between = dense_cosines(whole[lo:hi], whole)
    between[torch.arange(hi - lo), torch.arange(lo, hi)] = -math.inf
    check(head.topk(x, 4, tile_bytes=300), dense_cosines(x, whole), 4, 1e-6)
    check(head.nearest_classes(4, tile_bytes=300), between, 4, 1e-6)


def test_every_replica_answers_its_own(ranks):
    ranks(4).run(_replicas)


# ---------------------------------------------------------------------------------------------------- what can be wrong


def _bad(rank: int, world: int, case: str) -> str:
    head, last = PartialFC(D, 9, NormFace()), rank == world - 1
    x = torch.randn(3, D)
    if case == "nan" and last:
        x[1, 2] = math.nan
    if case == "nan row":
        if last:
            local(head.weight.detach())[0, 0] = math.inf
        return any_message_of(lambda: head.nearest_classes(2))
    wrong = {
        "width": torch.randn(3, D + 1),
        "dtype": torch.ones(3, D, dtype=torch.int64),
        "dtype of one": x.double(),
        "dimensions": torch.randn(D),
        "no tensor": [1.0] * D,
    }
    if case in wrong and last:
        return any_message_of(lambda: head.topk(wrong[case], 2))
    k = {"k of one": 3, "k is no int": 2.5, "k is 0": 0}.get(case, 2) if last else 2
    if case == "k > C":
        return any_message_of(lambda: head.topk(x, 10))
    if case == "k > C - 1":
        return any_message_of(lambda: head.nearest_classes(9))
    if case == "tile":
        return any_message_of(lambda: head.nearest_classes(2, tile_bytes=0))
    if case == "tile of one":
        return any_message_of(lambda: head.nearest_classes(2, tile_bytes=1000 + last))
    return any_message_of(lambda: head.topk(x, k))


BAD = {
    "nan": "NonFiniteError: rank 2: the length of embeddings[1] is not finite",
    "nan row": "NonFiniteError: the length of the row of class 6 is not finite",
    "width": "ValueError: rank 2: embeddings have width 8, the head has embedding_size 7",
    "dtype": "ValueError: rank 2: embeddings must be float32, float64, bfloat16 or float16, not torch.int64",
    "dtype of one": "ValueError: ranks disagree: embedding dtype is torch.float32 on rank 0 and torch.float64 on rank 2",
    "dimensions": "ValueError: rank 2: embeddings must be [N, D], but have 1 dimensions",
    "no tensor": "ValueError: rank 2: embeddings must be a tensor [N, D], not list",
    "k of one": "ValueError: ranks disagree: k is 2 on rank 0 and 3 on rank 2",
    "k is no int": "ValueError: rank 2: k must be an int, not float",
    "k is 0": "ValueError: rank 2: k is 0; valid are 1 to 9",
    "k > C": "ValueError: rank 0: k is 10; valid are 1 to 9",
    "k > C - 1": "ValueError: rank 0: k is 9; valid are 1 to 8",
    "tile": "ValueError: rank 0: tile_bytes is 0; it must be at least 1",
    "tile of one": "ValueError: ranks disagree: tile_bytes is 1000 on rank 0 and 1001 on rank 2",
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_the_same_on_every_rank(ranks, case):
    told = ranks(3).run(_bad, case)
    assert len(set(told)) == 1
    assert told[0].startswith(BAD[case]), told[0]


def test_a_single_class_has_no_neighbour():
    with pytest.raises(ValueError, match="only one class"):
        PartialFC(D, 1).nearest_classes(1)


def test_a_head_that_diverged():
    head = PartialFC(D, 5)
    head.weight.data[3] = math.nan
    with pytest.raises(NonFiniteError, match="class 3"):
        head.topk(torch.ones(2, D), 1)


# ---------------------------------------------------------------------------------------------------- progress


@needs("tqdm")
def test_a_bar_is_drawn_to_its_end(capsys):
    head = PartialFC(D, 100)
    head.nearest_classes(3, tile_bytes=4 * 30 * 30, progress=True)
    assert "nearest classes: 100%" in capsys.readouterr().err
    head.topk(torch.ones(4, D), 3, tile_bytes=400, progress=True)
    assert "topk: 100%" in capsys.readouterr().err


def test_a_bar_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    head = PartialFC(D, 100)
    with pytest.raises(ModuleNotFoundError, match="pip install tqdm"):
        head.nearest_classes(3, progress=True)
    head.nearest_classes(3)


# ---------------------------------------------------------------------------------------------------- memory


def _largest(rank: int, world: int, K: int) -> tuple[int, int]:
    """C = 1,000: all cosines of a rank would be 4 MB / world."""
    C, tile_bytes = 1000, 40_000
    head = PartialFC(D, C, SubCenterArcFace(centers=K) if K > 1 else NormFace())
    x = torch.randn(300, D)
    found = []
    for ask in (lambda: head.topk(x, 3, tile_bytes=tile_bytes), lambda: head.nearest_classes(3, tile_bytes=tile_bytes)):
        with Allocations() as made:
            ask()
        found.append(made.bytes)
    rows = local(head.weight.detach())
    answers = max(len(rows) * 3 * 8, len(x) * 3 * 8, rows.nbytes, x.nbytes)
    assert answers < 2 * tile_bytes
    return max(found), max(tile_bytes, answers)


@pytest.mark.parametrize("K", [1, 2])
def test_no_tensor_is_larger_than_a_tile(ranks, K):
    for largest, allowed in ranks(2).run(_largest, K):
        assert 20_000 < largest <= allowed


@pytest.mark.parametrize("K", [1, 2])
def test_no_tensor_is_larger_than_a_tile_without_a_group(K):
    largest, allowed = _largest(0, 1, K)
    assert 20_000 < largest <= allowed
