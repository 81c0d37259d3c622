"""Rows in host memory and in files: the same run, bit for bit, as with rows in torch's own memory."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import message_of
from shards import two_by_two, whole
from tier_runs import (
    ADAGRAD,
    ADAMW,
    ROW_WISE,
    SGD,
    C,
    D,
    N,
    assert_equal,
    batch,
    head_of,
    state_of,
    storage_of,
    train,
)
from torch import Tensor

from partial_fc import (
    CenterLoss,
    Checkpointer,
    FileRows,
    HostRows,
    RowOptimizer,
    Softmax,
    SubCenterArcFace,
    doctor,
    gather,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.distributed.ranks import Ranks
from partial_fc.distributed.shards import ClassShards
from partial_fc.optim.adam_moves import AdamMoves
from partial_fc.optim.moves import LinearMoves
from partial_fc.sampling import draw_window, window_size
from partial_fc.softmax.draws import Draws
from partial_fc.tiers import pages
from partial_fc.tiers import store as store_module
from partial_fc.tiers.initial import initial_rows
from partial_fc.tiers.store import scratch_like

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- the same run


@pytest.mark.parametrize("kind", ["host", "files"])
@pytest.mark.parametrize("skipped", ["still", "dense"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, ADAGRAD, ROW_WISE], ids=lambda each: each[0].__name__)
def test_a_run_is_that_of_a_head_in_memory(tmp_path, kind, skipped, optimizer):
    cls, options = optimizer
    block = 7 if skipped == "dense" else 1
    runs = []
    for storage in (None, storage_of(kind, str(tmp_path))):
        head = head_of(storage, sample_block=block)
        rows = RowOptimizer(cls, head, skipped_rows=skipped, **options)
        losses = train(head, rows, 14)
        runs.append((losses, state_of(rows)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=lambda each: each[0].__name__)
def test_steps_that_are_forgotten(tmp_path, monkeypatch, optimizer):
    """Rows that nobody has touched have missed the oldest steps, too."""
    for form in (LinearMoves, AdamMoves):
        monkeypatch.setattr(form, "MOST", 6)
    cls, options = optimizer
    runs = []
    for storage in (None, FileRows(tmp_path)):
        head = head_of(storage, sample_rate=0.01)
        rows = RowOptimizer(cls, head, **options)
        losses = train(head, rows, 5)
        assert storage is None or head.class_rows.store.untouched > 200
        runs.append((losses + train(head, rows, 10, first=5), state_of(rows)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize(
    "made",
    [
        {"margin": Softmax()},
        {"margin": SubCenterArcFace(scale=16.0, centers=3)},
        {"dtype": torch.bfloat16, "low_precision": "master"},
        {"dtype": torch.bfloat16, "low_precision": "stochastic"},
        {"sampling_correction": "importance", "sample_block": 5},
        {"hard_negatives": 3, "hard_negatives_every": 4},
    ],
    ids=str,
)
def test_other_heads_and_weights_in_half_precision(tmp_path, made):
    made = dict(made)
    low = made.pop("low_precision", None)
    runs = []
    for storage in (None, FileRows(tmp_path)):
        head = head_of(storage, **{k: copy.deepcopy(v) for k, v in made.items()})
        rows = RowOptimizer(SGD[0], head, low_precision=low, **SGD[1])
        losses = train(head, rows, 9)
        runs.append((losses, state_of(rows)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("update", ["paper", "gradient"])
def test_centers(tmp_path, update):
    runs = []
    for storage in (None, HostRows(), FileRows(tmp_path)):
        centers = CenterLoss(D, C, update=update, seed=2, storage=storage)
        mover: Any = centers if update == "paper" else RowOptimizer(SGD[0], centers, **SGD[1])
        losses = train(centers, mover, 9)
        if storage is not None:
            assert centers.class_rows.store is not None
            assert centers.class_rows.store.untouched > 200
        centers.class_rows.catch_up()
        runs.append((losses, centers.centers.detach().clone()))
    for losses, rows in runs[1:]:
        assert losses == runs[0][0]
        assert torch.equal(rows, runs[0][1])


def run_of_ranks(rank: int, world: int, kind: str, folder: str) -> tuple[list[float], dict[str, Any]]:
    head = head_of(storage_of(kind, folder), num_classes=101, sample_block=4)
    rows = RowOptimizer(SGD[0], head, **SGD[1])
    losses = []
    for step in range(7):
        x, y = batch(step, 101)
        loss = head(x[rank::world], y[rank::world])
        loss.backward()
        rows.step()
        rows.zero_grad()
        losses.append(float(loss.detach()))
    return losses, state_of(rows)


def run_of_replicas(rank: int, world: int, kind: str, folder: str) -> tuple[list[float], dict[str, Any], Tensor]:
    """Rows whose gradient comes from a batch of another replica are touched, too."""
    mesh, storage = two_by_two(), storage_of(kind, folder)
    head = head_of(storage, num_classes=101, group=mesh)
    rows = RowOptimizer(SGD[0], head, **SGD[1])
    centers = CenterLoss(D, 101, group=mesh, storage=storage)
    losses = []
    for step in range(5):
        x, y = batch(step, 101)
        gathered = gather(x[rank::world].requires_grad_(), y[rank::world], group=mesh)
        loss = head(gathered) + centers(gathered)
        loss.backward()
        rows.step()
        centers.step()
        rows.zero_grad()
        losses.append(float(loss.detach()))
    centers.class_rows.catch_up()
    return losses, state_of(rows), whole(centers.centers).clone()


@pytest.mark.slow
def test_on_replicas(ranks, tmp_path):
    in_memory = ranks(4).run(run_of_replicas, "memory", "", timeout=300)
    stored = ranks(4).run(run_of_replicas, "files", str(tmp_path), timeout=300)
    for (losses, state, centers), (expected, in_torch, of_torch) in zip(stored, in_memory, strict=True):
        assert losses == expected
        assert_equal(state, in_torch)
        assert torch.equal(centers, of_torch)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_on_several_ranks(ranks, tmp_path, world):
    for kind in ("host", "files"):
        in_memory = ranks(world).run(run_of_ranks, "memory", "", timeout=300)
        stored = ranks(world).run(run_of_ranks, kind, str(tmp_path), timeout=300)
        for (losses, state), (expected, in_torch) in zip(stored, in_memory, strict=True):
            assert losses == expected
            assert_equal(state, in_torch)


@pytest.mark.parametrize("larger", [False, True], ids=["in-the-cache", "larger-than-memory"])
def test_a_row_is_never_stale(tmp_path, monkeypatch, larger):
    """Windows overlap, the labels of a step are in the next window, and rows are read ahead and written behind."""
    if larger:
        monkeypatch.setattr(store_module, "_memory_for_files", lambda: 0)
        monkeypatch.setattr(store_module, "MOST_ASKED", 0)
    runs = []
    for storage in (None, FileRows(tmp_path)):
        head = head_of(storage, sample_rate=0.45, num_classes=60)
        rows = RowOptimizer(SGD[0], head, **SGD[1])

        def labels(step: int) -> Tensor:
            return draw_window(60, 0.45, seed=3, step=step + 1, device=CPU)[:N]

        runs.append((train(head, rows, 60, labels=labels), state_of(rows)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


# ------------------------------------------------------------------------------------------------- rows nobody touched


def test_rows_that_no_step_has_touched_are_not_stored(tmp_path):
    classes = 400_000  # 9.6 MB
    head = head_of(FileRows(tmp_path), num_classes=classes, sample_rate=1e-5)
    rows = RowOptimizer(SGD[0], head, skipped_rows="still", **SGD[1])
    store = head.class_rows.store
    assert store is not None
    train(head, rows, 2)
    assert 0 < classes - store.untouched < 30
    for each in store.tensors.values():
        assert each.file is not None
        assert os.fstat(each.file).st_blocks * 512 < classes * D * 4 // 2
    assert {*store.tensors} == {"weight", "weight/momentum_buffer"}
    assert os.listdir(tmp_path) == []  # without a name
    head.topk(torch.randn(1, D), 1)  # looks at all rows
    expected = initial_rows(0, classes, (D,), std=0.01, seed=3)
    same = (head.weight.detach() == expected).all(1)
    assert store.untouched == 0
    assert 0 < int((~same).sum()) < 30


def test_drawn_again_with_a_bias(tmp_path):
    head = head_of(FileRows(tmp_path), margin=Softmax())
    rows = RowOptimizer(SGD[0], head, **SGD[1])
    head.reset_parameters()
    assert head.class_rows.store is not None
    assert head.class_rows.store.untouched == C
    train(head, rows, 2)
    head.reset_parameters()
    rows.catch_up()
    assert torch.equal(head.weight, initial_rows(0, C, (D,), std=0.01, seed=3))
    assert head.bias is not None and not head.bias.any()


def test_a_killed_process_leaves_nothing(tmp_path):
    process = os.fork()
    if not process:
        head = head_of(FileRows(tmp_path))
        train(head, RowOptimizer(SGD[0], head, **SGD[1]), 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------- all rows


def test_checkpoints_load_with_and_without_a_storage(tmp_path):
    def pair(storage: Any) -> dict[str, Any]:
        head = head_of(storage)
        return {"head": head, "optimizer": RowOptimizer(ADAMW[0], head, **ADAMW[1])}

    memory, files = pair(None), pair(FileRows(tmp_path))
    for each in (memory, files):
        train(each["head"], each["optimizer"], 5)
    save_checkpoint(tmp_path / "saved", **files)
    memory["optimizer"].catch_up()  # as saving does
    for storage in (None, HostRows(), FileRows(tmp_path)):
        loaded = pair(storage)
        load_checkpoint(tmp_path / "saved", **loaded)
        store = loaded["head"].class_rows.store
        if store is not None:
            of_store = store.tensors["weight/exp_avg"].tensor.data_ptr()
            assert loaded["optimizer"].state[loaded["head"].weight]["exp_avg"].data_ptr() == of_store
        expected = copy.deepcopy((memory["head"], memory["optimizer"]))
        assert train(loaded["head"], loaded["optimizer"], 4, first=5) == train(*expected, 4, first=5)
        assert_equal(state_of(loaded["optimizer"]), state_of(expected[1]))
    plain = pair(FileRows(tmp_path))  # what came from elsewhere is copied to the files
    plain["head"].load_state_dict(memory["head"].state_dict())
    plain["optimizer"].load_state_dict(memory["optimizer"].state_dict())
    assert_equal(state_of(plain["optimizer"]), state_of(memory["optimizer"]))
    in_files = {rows.tensor.data_ptr() for rows in plain["head"].class_rows.store.tensors.values()}
    state = plain["optimizer"].state[plain["head"].weight]
    assert {state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr(), plain["head"].weight.data_ptr()} == in_files


def test_an_asynchronous_checkpoint_is_copied_to_another_file(tmp_path):
    head = head_of(FileRows(tmp_path))
    rows = RowOptimizer(SGD[0], head, **SGD[1])
    train(head, rows, 3)
    like = scratch_like(head.weight.detach())
    assert like is not None and like.shape == head.weight.shape
    assert scratch_like(torch.zeros(C, D)) is None
    checkpointer = Checkpointer(tmp_path / "saved", asynchronous=True)
    before = state_of(rows)
    checkpointer.save(3, head=head, optimizer=rows)
    train(head, rows, 4, first=3)  # while it is written
    checkpointer.wait()
    loaded = head_of(None)
    optimizer = RowOptimizer(SGD[0], loaded, **SGD[1])
    Checkpointer(tmp_path / "saved").load(head=loaded, optimizer=optimizer)
    assert_equal(state_of(optimizer), before)


def test_it_says_how_much_the_files_take(tmp_path, caplog, monkeypatch):
    with caplog.at_level("INFO", logger="partial_fc"):
        head_of(FileRows(tmp_path))
    assert f"{C * D * 4} bytes when all are used" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    head_of(FileRows(tmp_path))
    assert caplog.records[-1].levelname == "WARNING"


def test_queries_and_changes_of_classes(tmp_path):
    found = []
    for storage in (None, HostRows(), FileRows(tmp_path)):
        head = head_of(storage)
        rows = RowOptimizer(SGD[0], head, **SGD[1])
        train(head, rows, 3)
        results = [*head.topk(batch(9)[0], 4), *head.nearest_classes(2)]
        head.expand(20)
        head.remap([-1, *(i // 2 for i in range(C + 19))])
        train(head, rows, 3, first=3)
        head.init_from_embeddings([batch(step, head.num_classes) for step in range(3)])
        train(head, rows, 2, first=6)
        if storage is not None:
            kept = {each.tensor.data_ptr() for each in head.class_rows.store.tensors.values()}
            assert head.weight.data_ptr() in kept
            assert rows.state[head.weight]["momentum_buffer"].data_ptr() in kept
        found.append((results, state_of(rows)))
    for results, state in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0][0], strict=True))
        assert_equal(state, found[0][1])


def test_all_classes_in_every_step(tmp_path):
    runs = []
    for storage in (None, HostRows(), FileRows(tmp_path)):
        head = head_of(storage, sample_rate=1.0)
        rows = RowOptimizer(SGD[0], head, update_in_backward=True, **SGD[1])
        runs.append((train(head, rows, 4), state_of(rows)))
    for losses, state in runs[1:]:
        assert losses == runs[0][0]
        assert_equal(state, runs[0][1])
    head = head_of(HostRows(), sample_rate=1.0)
    assert "update_in_backward=True" in message_of(head, *batch(0))
    RowOptimizer(SGD[0], head, **SGD[1])
    assert "update_in_backward=True" in message_of(head, *batch(0))
    head.eval()(*batch(0))


# ------------------------------------------------------------------------------------------------- blocks of classes


@pytest.mark.parametrize(("classes", "rate", "block"), [(100, 0.2, 7), (64, 0.25, 16), (10, 0.3, 10), (1001, 0.01, 4)])
def test_windows_of_consecutive_classes(classes, rate, block):
    blocks = -(-classes // block)
    size = max(1, round(rate * blocks))
    assert window_size(classes, rate, block) == size * block
    steps = -(-blocks // size)
    drawn: list[int] = []
    for step in range(steps):
        ids = draw_window(classes, rate, seed=1, step=step, device=CPU, block=block).view(size, block)
        assert torch.equal(ids - ids[:, :1], torch.arange(block).expand(size, -1))
        assert (ids[:, 0] % block == 0).all()
        assert len(ids[:, 0].unique()) == size
        drawn += ids.flatten().tolist()
    assert {*range(classes)} <= {*drawn}


def test_at_once_selects_the_rows_of_blocks():
    shards = ClassShards.split(100, Ranks(rank=1, world=2), CPU)
    draws = Draws().fit(100, 0.2, 1, shards.lo, shards.hi, CPU, 7)
    for step in range(20):
        labels = torch.tensor([3, 55, 99, 60])
        rows, slots = draws.select(step, labels)
        rows = rows if slots is None else rows[slots.as_pads().real()].sort().values
        window = draw_window(100, 0.2, seed=1, step=step, device=CPU, block=7)
        ids = torch.cat((window, labels)).unique()
        assert torch.equal(rows, ids[(ids >= shards.lo) & (ids < shards.hi)] - shards.lo)


def test_a_block_is_checked():
    assert "sample_block must be" in message_of(head_of, None, sample_block=0)
    assert "at most 300" in message_of(head_of, None, sample_block=301)
    assert "nothing is drawn" in message_of(head_of, None, sample_block=2, sample_rate=1.0)


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_what_a_storage_cannot_be(tmp_path):
    with pytest.raises(TypeError, match="HostRows"):
        head_of("files")
    with pytest.raises(TypeError, match="path of a folder"):
        head_of(FileRows(3))  # type: ignore[arg-type]
    on_meta = head_of(HostRows(), device="meta")
    assert "keep their device and dtype" in message_of(on_meta.to_empty, device="cpu")
    with pytest.raises(ValueError, match="faiss"):
        head_of(HostRows(), hard_negatives=2, hard_negatives_search="faiss")
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot hold class rows" in message_of(head_of, FileRows(file))
    assert "cannot hold class rows" in message_of(head_of, FileRows(file / "below"))


def test_what_a_head_with_a_storage_cannot_do(tmp_path):
    head = head_of(FileRows(tmp_path))
    with pytest.raises(TypeError, match="save a checkpoint"):
        copy.deepcopy(head)
    for move in (head.double, head.bfloat16, lambda: head.to("meta")):
        assert "keep their device and dtype" in message_of(move)
    assert head.float() is head
    with pytest.raises(ValueError, match="without storage"):
        doctor(torch.nn.Linear(2, D), head, [], input_shape=[2])
    copied = copy.deepcopy(head_of(HostRows()))
    assert copied.class_rows.store is None
    assert copied.double().weight.dtype == torch.float64
    copied.float()
    assert torch.equal(copied.weight, initial_rows(0, C, (D,), std=0.01, seed=3))


@pytest.mark.parametrize("allowed", [True, False])
def test_pages_that_cannot_be_read_are_an_error_and_no_signal(tmp_path, monkeypatch, allowed):
    """allowed: the process may read its own memory by a system call; else single pages of the file are read."""
    if allowed and not pages.reads_itself():
        pytest.skip("it may not")
    monkeypatch.setattr(pages, "reads_itself", lambda: allowed)
    head = head_of(FileRows(tmp_path), num_classes=20_000, sample_rate=0.01)
    assert head.class_rows.store is not None
    rows = torch.tensor([3, 15_000])
    head.class_rows.store._read_in(rows)
    if allowed:
        os.ftruncate(head.class_rows.store.tensors["weight"].file, 0)
    else:
        monkeypatch.setattr(os, "pread", raising(errno.EIO, 0))
        monkeypatch.setattr(pages, "resident", lambda address, length: torch.zeros(length // pages.PAGE + 1) > 0)
    assert "cannot be read: Input/output error" in message_of(head.class_rows.store._read_in, rows)


def raising(number: int, after: int) -> Any:
    """A system call that fails when it has been called so often."""
    calls = [0]

    def call(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(number, os.strerror(number))

    return call


def failing_run(rank: int, world: int, folder: str, call: str, number: int) -> str:
    """The last rank's disk fails in the third step; what every rank says of it."""
    before = getattr(pages, call)
    head = head_of(FileRows(folder), num_classes=5_000_000, sample_rate=4e-7)
    rows = RowOptimizer(SGD[0], head, **SGD[1])
    y = torch.tensor([1, 4_000_000])  # no other rows are new in the third step than those that are drawn
    try:
        for step in range(6):
            if step == 2 and rank == world - 1:
                setattr(pages, call, raising(number, 0))
            head(batch(step, samples=2)[0], y).backward()
            rows.step()
            rows.zero_grad()
    except RuntimeError as error:
        return str(error)
    finally:
        setattr(pages, call, before)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("reserve", errno.ENOSPC, "has no room for class rows, or cannot be written: No space left on device"),
        ("read_in", errno.EIO, "cannot be read: Input/output error"),
        ("write_out", errno.EIO, "cannot be written: Input/output error"),
    ],
)
def test_a_disk_that_fails_in_a_step(tmp_path, call, number, words):
    text = failing_run(0, 1, str(tmp_path), call, number)
    assert words in text
    assert "newest checkpoint" in text


def test_every_rank_hears_of_a_disk_that_fails(ranks, tmp_path):
    texts = ranks(2).run(failing_run, str(tmp_path), "write_out", errno.EIO, timeout=300)
    assert all("cannot be written: Input/output error" in text for text in texts)
    assert texts[0].startswith("rank 1")


def built_where_one_rank_cannot(rank: int, world: int, folder: str) -> str:
    path = Path(folder) / f"of-rank-{rank}"
    if rank == 1:
        path.write_text("")
    return message_of(head_of, FileRows(path))


def test_every_rank_hears_of_a_folder_that_cannot_be_written(ranks, tmp_path):
    texts = ranks(2).run(built_where_one_rank_cannot, str(tmp_path), timeout=300)
    assert all("cannot hold class rows" in text for text in texts)
    assert "rank 1" in texts[0]


@pytest.mark.parametrize("how", ["init", "copy_", "apply"])
@pytest.mark.parametrize("steps", [0, 2])
def test_rows_that_are_written_before_they_have_their_initial_values(how, steps):
    """They would lose what was written when a step first uses them: refused, with the way."""
    head = head_of(HostRows())
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.0)
    train(head, optimizer, steps)

    def write() -> None:
        with torch.no_grad():
            if how == "copy_":
                head.weight.copy_(torch.ones(C, D))
            elif how == "apply":
                head.apply(lambda module: torch.nn.init.ones_(module.weight) if hasattr(module, "weight") else None)
            else:
                torch.nn.init.ones_(head.weight)

    write()
    with pytest.raises(RuntimeError, match=r"call catch_up\(\) of the RowOptimizer before"):
        train(head, optimizer, 1)
    head = head_of(HostRows())
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.0)
    train(head, optimizer, steps)
    optimizer.catch_up()
    write()
    train(head, optimizer, 2)
    assert torch.equal(head.weight, torch.ones(C, D))
