"""The sampling of classes: windows of a keyed permutation that looks random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_counts import tensors_in
from torch.utils._python_dispatch import TorchDispatchMode

from partial_fc import PartialFC, cycle_table
from partial_fc.distributed.shards import shard_bounds
from partial_fc.sampling import Windows, draw_window, mix, permutation_of, select_rows, window_size

CPU = torch.device("cpu")


class Operators(TorchDispatchMode):
    """Counts operators that make tensors, and the numbers in these."""

    count = numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count += 1
        self.numbers += sum(each.numel() for each in tensors_in(made))
        return made


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 99, 1000, 65_537])
@pytest.mark.parametrize("key", [0, 12345])
def test_permutations_hold_every_id_once(size, key):
    permutation = permutation_of(size, key, 7)
    ids = permutation.at(torch.arange(size))
    assert torch.equal(ids.sort().values, torch.arange(size))
    assert torch.equal(permutation.positions_of(ids), torch.arange(size))


def test_the_draw_never_changes():
    """A seed means the same draw in every version, on every machine: resumed runs depend on it."""
    assert draw_window(1000, 0.01, seed=3, step=0, device=CPU).tolist() == [
        435,
        160,
        305,
        978,
        684,
        468,
        472,
        3,
        993,
        930,
    ]
    assert mix(1, 2, 3) == 2623250113353451629


@pytest.mark.parametrize(("classes", "rate"), [(100, 0.1), (101, 0.1), (997, 0.3), (10, 0.01), (7, 0.9)])
def test_windows_are_distinct_and_visit_every_class_within_a_cycle(classes, rate):
    size = window_size(classes, rate)
    assert size == max(1, round(classes * rate))
    steps = -(-classes // size)
    for cycle in range(3):
        windows = [draw_window(classes, rate, seed=1, step=cycle * steps + i, device=CPU) for i in range(steps)]
        assert all(len(w) == len(w.unique()) == size for w in windows)
        assert len(torch.cat(windows).unique()) == classes


def test_draws_differ_between_steps_cycles_and_seeds():
    draws = [draw_window(1000, 0.5, seed=s, step=t, device=CPU) for s in (0, 1) for t in range(4)]
    assert len({tuple(sorted(d.tolist())) for d in draws}) == len(draws)


def test_draws_look_random():
    """Over many keys: every class is drawn about equally often, and neighbouring ids are drawn together no more than
    others."""
    classes, draws = 200, 4000
    counts, together = torch.zeros(classes), 0
    for seed in range(draws):
        drawn = torch.zeros(classes)
        drawn[draw_window(classes, 0.1, seed=seed, step=seed % 10, device=CPU)] = 1
        counts += drawn
        together += int((drawn[1:] * drawn[:-1]).sum())
    chi_square = float(((counts - draws * 0.1) ** 2 / (draws * 0.1 * 0.9)).sum())
    assert 120 < chi_square < 290  # 199 degrees of freedom: mean 199, deviation 20
    expected = draws * 199 * (20 / 200) * (19 / 199)
    assert abs(together - expected) < 5 * expected**0.5


def test_rows_are_positives_and_window_within_the_shard():
    rows = select_rows(torch.tensor([9, 2]), torch.tensor([[12, 10], [-1, 25]]), lo=10, hi=20)
    assert rows.tolist() == [0, 2, 9]
    assert select_rows(torch.tensor([], dtype=torch.int64), torch.tensor([3]), lo=10, hi=10).tolist() == []


@pytest.mark.parametrize("block", [1, 7])
@pytest.mark.parametrize(("classes", "rate"), [(101, 0.1), (997, 0.3), (60, 0.5), (10, 0.01), (7, 0.9), (1000, 0.999)])
def test_ranks_find_their_part_of_the_window_that_all_would_draw(classes, rate, block, monkeypatch):
    """By a table of the steps of their own classes, in pieces, or from the window itself; of two cycles and a half."""
    monkeypatch.setattr(cycle_table, "PIECE", 37)
    for world in (1, 2, 3, 8):
        parts = [
            Windows().fit(classes, rate, 5, *shard_bounds(classes, rank, world), CPU, block) for rank in range(world)
        ]
        assert not (world == 1 and parts[0].tabled)
        for step in range(min(5 * parts[0].steps // 2 + 1, 40)):
            window = draw_window(classes, rate, seed=5, step=step, device=CPU, block=block)
            found = [part.rows(step) + part.key[3] for part in parts]
            assert torch.equal(torch.cat(found).sort().values, window[window < classes].sort().values)
            for part, ids in zip(parts, found, strict=True):
                assert not part.tabled or torch.equal(ids, ids.sort().values)
                assert len(part.tables) <= part.tabled


def test_what_a_rank_does_for_a_window_shrinks_with_the_ranks():
    """Counted over a cycle: numbers that operators make, and operators, which are those of one piece a rank."""
    made, operators = [], []
    permutation_of(1 << 20, 0, 0).positions_of(torch.arange(1))  # what lies outside, √C numbers, is known from here on
    for world in (8, 64, 512):
        windows = Windows().fit(1 << 20, 0.1, 0, *shard_bounds(1 << 20, 3, world), CPU, 1)
        with Operators() as found:
            for step in range(windows.steps):
                windows.rows(step)
        made.append(found.numbers)
        operators.append(found.count)
    assert operators[0] == operators[1] == operators[2]
    assert made[0] > 7 * made[1] > 40 * made[2]


def test_small_windows_of_large_shards_are_drawn_as_they_are():
    windows = Windows().fit(10**9, 1e-6, 0, 0, 5 * 10**8, CPU, 1)
    assert not windows.tabled and len(windows.rows(3)) < 1000 and not windows.tables
    assert Windows().fit(10**9, 0.1, 0, 0, 5 * 10**8, CPU, 1).tabled


def _labels(rank: int, step: int) -> list[int]:
    return [*((11 * step + 3 * i + rank) % 100 for i in range(5)), 7]


def _counts(rank: int, world: int) -> list[tuple[list[int], dict[str, int]]]:
    """The classes of each step here and their counts; after the last, those with two classes more."""
    head = PartialFC(4, 100, sample_rate=0.1, ignore_index=7)
    found = []
    for step in range(5):
        if step < 4:
            embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            head(embeddings, torch.tensor(_labels(rank, step)))
        else:
            new = [i for i in range(head.shards.lo, head.shards.hi) if i not in head.selected][:2]
            head.selected_rows = torch.tensor([i - head.shards.lo for i in (*new, *head.selected.tolist())])
        found.append((head.selected.tolist(), {name: int(value) for name, value in head.selected_counts.items()}))
    head.eval()(embeddings, torch.tensor(_labels(rank, 0)))
    found.append((head.selected.tolist(), {name: int(value) for name, value in head.selected_counts.items()}))
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_the_rows_of_a_step_are_counted_by_what_put_them_there(ranks: Any, world):
    for found in ranks(world).run(_counts):
        for step, (ids, counts) in enumerate(found[:5]):
            window = {*draw_window(100, 0.1, seed=0, step=min(step, 3), device=CPU).tolist()} & {*ids}
            batch = {label for rank in range(world) for label in _labels(rank, min(step, 3))} & {*ids}
            batch -= {7, *window}
            assert counts["rows"] == len(ids) == counts["window"] + counts["batch"] + counts["hard"]
            assert (counts["window"], counts["batch"]) == (len(window), len(batch))
            assert counts["hard"] == (2 if step == 4 else 0)
        ids, counts = found[5]
        assert counts == {"rows": len(ids), "window": len(ids), "batch": 0, "hard": 0}
        assert ids == list(range(ids[0], ids[-1] + 1)), "all rows of the shard"
