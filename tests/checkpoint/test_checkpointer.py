"""Checkpointer: which checkpoints are kept, kills at any point, asynchronous saves, one writer per folder."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runner import forking
from shards import local
from torch import nn

import partial_fc.checkpoint.checkpointer
from partial_fc import (
    ArcFace,
    Checkpointer,
    CosFace,
    PartialFC,
    RandomState,
    RowOptimizer,
    load_checkpoint,
    save_checkpoint,
)

C, D = 23, 5


def head_of(value: float, classes: int = C) -> PartialFC:
    """A head all of whose weights are `value`."""
    head = PartialFC(D, classes, dtype=torch.float64)
    local(head.weight.detach()).fill_(value)
    return head


def values(head: PartialFC) -> set[float]:
    return set(local(head.weight.detach()).flatten().tolist())


# ---------------------------------------------------------------------------------------------------- which are kept


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_and_the_best_are_kept(tmp_path, asynchronous):
    checkpointer = Checkpointer(tmp_path / "run", keep_last=2, keep_best=1, asynchronous=asynchronous)
    head = head_of(0)
    assert checkpointer.latest() is None and checkpointer.steps() == []
    for step, metric in enumerate([0.1, 0.9, 0.3, None, float("nan"), 0.5]):
        local(head.weight.detach()).fill_(step)
        checkpointer.save(step, metric=metric, head=head)
    checkpointer.wait()
    assert checkpointer.steps() == [1, 4, 5]
    assert checkpointer.latest() == tmp_path / "run" / "step-000000005"
    other = head_of(-1)
    assert Checkpointer(tmp_path / "run").load(head=other) == 5 and values(other) == {5}
    assert checkpointer.load(step=1, head=other) == 1 and values(other) == {1}
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint of step 2 in .* \(steps there: 1, 4, 5\)"):
        checkpointer.load(step=2, head=other)


def test_the_best_may_be_the_smallest(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=1, keep_best=2, best="min")
    for step, metric in enumerate([3.0, 1.0, 2.0, 9.0]):
        checkpointer.save(step, metric=metric, head=head_of(step))
    assert checkpointer.steps() == [1, 2, 3]


def test_one_that_is_not_whole_is_passed_over(tmp_path, caplog):
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, head=head_of(step))
    shard = next((tmp_path / "step-000000002").glob("data-*/*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    head = head_of(0)
    assert Checkpointer(tmp_path).load(head=head) == 1 and values(head) == {1}
    assert f"{shard} has" in caplog.text and "skipped" in caplog.text


def test_one_that_is_not_whole_is_in_nobodys_way(tmp_path):
    """A run that goes on from an older one comes to the step again; the damaged one counts among neither the newest nor
    the best."""
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2, 4):
        checkpointer.save(step, metric=step, head=head_of(step))
    checkpointer.release()
    shutil.rmtree(next((tmp_path / "step-000000001").glob("data-*")))
    for step in (2, 4):
        shard = next((tmp_path / f"step-{step:09d}").glob("data-*/*.distcp"))
        if step == 4:
            shard.unlink()
    again = Checkpointer(tmp_path, keep_last=2, keep_best=1)
    assert again.load(head=head_of(0)) == 2
    again.save(3, metric=0, head=head_of(3))
    again.save(4, metric=0, head=head_of(40))
    head = head_of(0)
    assert Checkpointer(tmp_path).load(head=head) == 4 and values(head) == {40}
    assert set(again.steps()) >= {2, 3, 4} and again.best_so_far() == again.path(2)


@pytest.mark.parametrize("before", [False, True])
def test_a_checkpoint_is_kept_if_a_rank_is_lost_after_it_was_published(tmp_path, monkeypatch, before):
    """The save fails on the ranks that are left; what it has replaced is gone, so that it must not go, too."""
    if before:
        save_checkpoint(tmp_path / "one", head=head_of(1))
    agree = partial_fc.checkpoint.save_load.on_first_rank
    calls: list[Any] = []

    def lose_a_rank(action: Callable[[], Any], group: Any = None) -> Any:
        result = agree(action, group)
        calls.append(result)
        if result is None and (tmp_path / "one/manifest.json").exists() and len(calls) > 2:
            raise RuntimeError("a rank was lost")
        return result

    monkeypatch.setattr(partial_fc.checkpoint.save_load, "on_first_rank", lose_a_rank)
    with pytest.raises(RuntimeError, match="a rank was lost"):
        save_checkpoint(tmp_path / "one", head=head_of(2))
    monkeypatch.undo()
    head = head_of(0)
    load_checkpoint(tmp_path / "one", head=head)
    assert values(head) == {2}


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match='best must be "max" or "min"'):
        Checkpointer(tmp_path, best="most")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be at least 0"):
        Checkpointer(tmp_path).save(-1, head=head_of(0))
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .* \(steps there: none\)"):
        Checkpointer(tmp_path).load(head=head_of(0))


# ----------------------------------------------------------------------------------------------- while training goes on


def save_and_change(rank: int, world: int, folder: str) -> tuple[list[float], list[str]]:
    """Save asynchronously, change everything before the first byte is written, and load what was written."""
    module, go = partial_fc.checkpoint.checkpointer, threading.Event()
    written = module.write_checkpoint

    def later(*arguments: Any, **options: Any) -> None:
        assert go.wait(30)
        written(*arguments, **options)

    module.write_checkpoint = later
    try:
        checkpointer = Checkpointer(folder, asynchronous=True)
        head, plain = head_of(1.0), nn.Linear(2, 2)
        nn.init.constant_(plain.weight, 1.0)
        counter = {"steps": [1]}
        for step in (1, 2):  # the second copy goes into the memory of the first
            go.clear()
            checkpointer.save(step, head=head, plain=plain, counter=State(counter))
            assert checkpointer.latest() is None if step == 1 else checkpointer.latest().name.endswith("1")
            local(head.weight.detach()).fill_(step + 1)
            nn.init.constant_(plain.weight, step + 1)
            counter["steps"].append(step)
            go.set()
            checkpointer.wait()
        found = []
        for step in (1, 2):
            restored = State({})
            checkpointer.load(step=step, head=head, plain=plain, counter=restored)
            assert values(head) <= {step} and set(plain.weight.flatten().tolist()) == {step}
            found.append(len(restored.state["steps"]))
        return found, sorted(p.name for p in Path(folder).glob("step-*"))
    finally:
        module.write_checkpoint = written


class State:
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.parametrize("world", [0, 1, 3])
def test_an_asynchronous_save_does_not_see_what_comes_later(ranks, tmp_path, world):
    results = ranks(world).run(save_and_change, str(tmp_path)) if world else [save_and_change(0, 1, str(tmp_path))]
    assert all(result == ([1, 2], ["step-000000001", "step-000000002"]) for result in results)


def train_while_saving(rank: int, world: int, folder: str, asynchronous: bool) -> list[float]:
    """Steps with collectives of their own while the writer's are under way."""
    head = PartialFC(D, C, sample_rate=0.5, dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    checkpointer = Checkpointer(folder, asynchronous=asynchronous, keep_last=100)
    losses = []
    for step in range(12):
        generator = torch.Generator().manual_seed(step * world + rank)
        loss = head(
            torch.randn(4, D, generator=generator, dtype=torch.float64), torch.randint(0, C, (4,), generator=generator)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 2:
            checkpointer.save(step, head=head, optimizer=optimizer)
    checkpointer.wait()
    return losses


def test_saving_asynchronously_changes_nothing(ranks, tmp_path):
    there, here = (ranks(2).run(train_while_saving, str(tmp_path / str(a)), a) for a in (True, False))
    assert there == here
    for step in range(1, 12, 2):
        heads = [PartialFC(D, C, sample_rate=0.5, dtype=torch.float64) for _ in range(2)]
        for head, kind in zip(heads, ("True", "False"), strict=True):
            load_checkpoint(tmp_path / kind / f"step-{step:09d}", head=head)
        assert torch.equal(heads[0].weight, heads[1].weight)


# ----------------------------------------------------------------------------------------------- what cannot be written


def save_with_little_room(rank: int, world: int, folder: str, asynchronous: bool) -> list[str]:
    """Files may not grow beyond a limit on the last rank: what a full disk is to the one that meets it."""
    errors = []
    checkpointer = Checkpointer(folder, asynchronous=asynchronous)
    head = head_of(1.0, 4000)
    checkpointer.save(1, head=head)
    checkpointer.wait()
    local(head.weight.detach()).fill_(2.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        checkpointer.save(2, head=head)
        checkpointer.wait()
    except OSError as error:
        errors.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpointer.load(head=head) == 1 and values(head) <= {1.0}
    local(head.weight.detach()).fill_(3.0)
    checkpointer.save(3, head=head)
    checkpointer.wait()
    assert checkpointer.load(head=head) == 3 and values(head) <= {3.0}
    return errors


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_is_the_same_error_on_all_and_loses_nothing(ranks, tmp_path, world, asynchronous):
    errors = ranks(world).run(save_with_little_room, str(tmp_path), asynchronous)
    assert len(errors[0]) == 1 and all(each == errors[0] for each in errors)
    assert f"cannot be written: rank {world - 1}: " in errors[0][0] and "File too large" in errors[0][0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-000000001", "step-000000003"]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tmp_path):
    with mounted(tmp_path / "disk", "size=300k") as disk:
        save_checkpoint(disk / "here", head=head_of(1.0, 4000))  # 160 kB, and there is no room for twice as much
        with pytest.raises(OSError, match=r"checkpoint .* cannot be written: .*No space left on device"):
            save_checkpoint(disk / "here", head=head_of(2.0, 4000))
        head = head_of(0.0, 4000)
        load_checkpoint(disk / "here", head=head)
        assert values(head) == {1.0}


def save_read_only(rank: int, world: int, folder: str) -> list[str]:
    errors = []
    for save in (
        lambda: save_checkpoint(folder, head=head_of(1)),
        lambda: Checkpointer(folder).save(1, head=head_of(1)),
    ):
        try:
            save()
        except OSError as error:
            errors.append(str(error))
    return errors


def test_a_read_only_folder(ranks, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        errors = ranks(2).run(save_read_only, str(disk))
    assert errors[0] == errors[1] == [f"checkpoint {disk} cannot be written: Read-only file system"] * 2


def test_an_asynchronous_error_comes_with_the_next_call(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(1, head=head_of(1))
    checkpointer.wait()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk has gone")

    with monkeypatch.context() as patch:
        patch.setattr("partial_fc.checkpoint.save_load.write", fail)
        checkpointer.save(2, head=head_of(2))
        with pytest.raises(OSError, match="the disk has gone"):
            checkpointer.save(3, head=head_of(3))
    checkpointer.save(3, head=head_of(3))
    checkpointer.wait()
    assert checkpointer.steps() == [1, 3]


def test_the_thread_uses_the_gpu_of_its_rank(monkeypatch):
    taken: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: taken.append((threading.current_thread().name, index)))
    partial_fc.checkpoint.checkpointer._Writer(lambda: taken.append(("written", 0))).join()
    assert taken == [("checkpoint", 3), ("written", 0)]


# -------------------------------------------------------------------------------------------------- one writer a folder

HOLD = """
import sys, time, os, torch
from partial_fc import Checkpointer, PartialFC
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, head=PartialFC(5, 23))
if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(60)  # as a process that loads data, which outlives its parent
print("saved", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def another_run(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder), *arguments]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": root}
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "saved\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def refused(rank: int, world: int, folder: str) -> list[str]:
    errors = []
    for attempt in (Checkpointer(folder).claim, lambda: Checkpointer(folder).save(5, head=head_of(5))):
        try:
            attempt()
        except BlockingIOError as error:
            errors.append(str(error))
    return errors


def test_a_second_run_is_refused_while_the_first_lives(ranks, tmp_path):
    with another_run(tmp_path, "with a child") as first:
        errors = ranks(2).run(refused, str(tmp_path))
        assert errors[0] == errors[1] and len(set(errors[0])) == 1 and len(errors[0]) == 2
        assert f"{tmp_path} is being written by another run (process {first.pid} on " in errors[0][0]
        assert "wait for it to end, stop it, or choose another folder" in errors[0][0]
        assert Checkpointer(tmp_path).load(head=head_of(0)) == 1  # reading is allowed
        first.kill()
        first.wait()
        checkpointer = Checkpointer(tmp_path)  # the child still lives
        assert checkpointer.load(head=head_of(0)) == 1
        checkpointer.save(2, head=head_of(2))
        assert checkpointer.steps() == [1, 2]


def test_a_folder_of_another_run_is_refused_and_nothing_of_it_removed(tmp_path):
    first = Checkpointer(tmp_path)
    for step in (10, 20):
        first.save(step, head=head_of(step))
    first.release()
    second = Checkpointer(tmp_path, keep_last=1)
    for step in (5, 20):
        with pytest.raises(
            FileExistsError,
            match=f"cannot save step {step}: .* holds a checkpoint of step 20, which this run did not write",
        ):
            second.save(step, head=head_of(0))
    for step in (30, 40):
        second.save(step, head=head_of(step))
    assert second.steps() == [10, 20, 40]
    going_on = Checkpointer(tmp_path, keep_last=2)
    assert going_on.load(head=head_of(0)) == 40
    going_on.save(50, head=head_of(50))
    going_on.save(50, head=head_of(51))  # its own may be written again
    assert going_on.steps() == [40, 50]
    head = head_of(0)
    assert going_on.load(head=head) == 50 and values(head) == {51}


def save_other_things(rank: int, world: int, folder: str) -> str:
    try:
        Checkpointer(folder).save(rank, head=head_of(0))
    except ValueError as error:
        return str(error)
    return "saved"


def test_ranks_that_disagree_about_the_step(ranks, tmp_path):
    texts = ranks(2).run(save_other_things, str(tmp_path))
    assert (
        texts[0]
        == texts[1]
        == "ranks disagree: (step, names to save) is (0, ['head']) on rank 0 and (1, ['head']) on rank 1"
    )
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- killed at any point


def save_until(folder: str, kill_at: int, asynchronous: bool, report: Any) -> None:
    """Go on with a run and save step 2; SIGKILL at the kill_at-th function call of the save, if it comes to that."""
    torch.set_num_threads(1)
    head = head_of(0.0)
    checkpointer = Checkpointer(folder, keep_last=1, asynchronous=asynchronous)
    checkpointer.load(head=head)
    local(head.weight.detach()).fill_(2.0)
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(profile)
    sys.setprofile(profile)
    checkpointer.save(2, head=head)
    checkpointer.wait()
    sys.setprofile(None)
    threading.setprofile(None)
    report.put(count)


def kill_points(folder: Path, points: Callable[[int], list[int]], asynchronous: bool) -> tuple[int, dict[str, int]]:
    """(how many points there are, what was found after kills at some of them: name of the newest step -> how often)."""
    context = forking()
    template = folder / "template"
    Checkpointer(template).save(1, head=head_of(1.0))
    report = context.Queue()

    def run(kill_at: int) -> Path:
        there = folder / f"run-{kill_at}"
        shutil.copytree(template, there)
        process = context.Process(target=save_until, args=(str(there), kill_at, asynchronous, report))
        process.start()
        process.join(60)
        assert process.exitcode == (0 if kill_at == 0 else -signal.SIGKILL), (
            f"point {kill_at}: exit code {process.exitcode}"
        )
        return there

    run(0)
    total = report.get(timeout=10)
    found: dict[str, int] = {}
    for kill_at in points(total):
        there = run(kill_at)
        head = head_of(0.0)
        checkpointer = Checkpointer(there, keep_last=1)
        step = checkpointer.load(head=head)
        assert values(head) == {step}, f"point {kill_at}: step {step} holds {values(head)}"
        checkpointer.save(3, head=head_of(3.0))
        assert checkpointer.load(head=head) == 3 and values(head) == {3.0}
        assert sorted(p.name for p in there.iterdir()) == [".lock", "step-000000003"], "what was torn is cleared away"
        found[str(step)] = found.get(str(step), 0) + 1
        shutil.rmtree(there)
    return total, found


def test_killed_while_saving(tmp_path):
    total, found = kill_points(
        tmp_path, lambda total: [1 + i * (total - 1) // 19 for i in range(20)], asynchronous=False
    )
    assert total > 1000 and sum(found.values()) == 20
    assert found["1"] >= 10 and found["2"] >= 1, "some kills come before the new checkpoint is complete, some after"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_while_saving_at_many_points(tmp_path, asynchronous, capsys):
    # a thread's calls fall a little differently each time: its last points may not be reached
    last = 0.95 if asynchronous else 1.0
    total, found = kill_points(
        tmp_path, lambda total: [1 + int(i * (total * last - 1)) // 499 for i in range(500)], asynchronous
    )
    with capsys.disabled():
        print(
            f"\nkilled at {sum(found.values())} of {total} points of a save (asynchronous: {asynchronous}); newest after it: {found}"
        )
    assert sum(found.values()) == 500


def save_for_ever(rank: int, world: int, folder: str, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    head = head_of(0.0, 2000)
    checkpointer = Checkpointer(folder, keep_last=2, asynchronous=True)
    step = checkpointer.load(head=head) if checkpointer.latest() else 0
    while True:
        step += 1
        local(head.weight.detach()).fill_(step)
        checkpointer.save(step, head=head)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ranks_killed_at_random_moments(tmp_path, capsys):
    """Two ranks that save without pause; one of them is killed at a random moment, then the other; the newest is whole
    each time."""
    context = forking()
    folder, generator, steps = tmp_path / "run", random.Random(0), [0]
    for trial in range(60):
        store = str(tmp_path / f"store-{trial}")
        processes = [context.Process(target=save_for_ever, args=(rank, 2, str(folder), store)) for rank in range(2)]
        for process in processes:
            process.start()
        before = time.monotonic()
        while Checkpointer(folder).steps()[-1:] <= steps[-1:]:
            assert all(process.exitcode is None for process in processes) and time.monotonic() < before + 120, (
                "no step was saved"
            )
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        for process in processes if trial % 2 else processes[::-1]:
            process.kill()
            time.sleep(generator.uniform(0, 0.05))
        for process in processes:
            process.join()
        head = head_of(0.0, 2000)
        step = Checkpointer(folder).load(head=head)
        assert values(head) == {step} and step > steps[-1]
        steps.append(step)
    with capsys.disabled():
        print(f"\n60 kills of two ranks while saving; the newest complete steps were {steps[1]} to {steps[-1]}")


# ---------------------------------------------------------------------------------------------------- the rest of a run


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def save_random(rank: int, world: int, folder: str) -> list[float]:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    draw()
    save_checkpoint(folder, random=RandomState())
    return draw()


def load_random(rank: int, world: int, folder: str) -> list[float]:
    load_checkpoint(folder, random=RandomState())
    return draw()


def test_random_states_are_each_ranks_own(ranks, tmp_path):
    expected = ranks(2).run(save_random, str(tmp_path))
    assert ranks(2).run(load_random, str(tmp_path)) == expected
    more = ranks(4).run(load_random, str(tmp_path))
    assert more[:2] == expected
    assert len({number for each in more for number in each}) == 12, "every rank draws numbers of its own"
    assert ranks(4).run(load_random, str(tmp_path)) == more
    assert load_random(0, 1, str(tmp_path)) == expected[0]


def build(rank: int) -> dict[str, Any]:
    head = PartialFC(D, C, ArcFace(scale=16.0), 0.5, dtype=torch.float64)
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(3, D), nn.Dropout(0.2)).double()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.1)
    head_optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    torch.manual_seed(100 + rank)
    return {
        "head": head,
        "backbone": backbone,
        "optimizer": optimizer,
        "head_optimizer": head_optimizer,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
        "head_schedule": torch.optim.lr_scheduler.StepLR(head_optimizer, 2, 0.5),
        "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2),
        "random": RandomState(),
    }


def train(parts: dict[str, Any], steps: range, rank: int) -> list[Any]:
    """Everything that a run has a state of takes part: dropout, a scaler that meets an infinity, two schedules."""
    seen: list[Any] = []
    scaler = parts["scaler"]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, labels = (
            torch.randn(8, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, C, (8,), generator=generator),
        )
        loss = parts["head"](parts["backbone"](x), labels)
        scaler.scale(loss * (torch.inf if step == 1 else 1)).backward()
        for p in parts["backbone"].parameters():
            dist.all_reduce(p.grad)
        for name in ("optimizer", "head_optimizer"):
            scaler.step(parts[name])
        scaler.update()
        for name in ("schedule", "head_schedule"):
            parts[name].step()
        for name in ("optimizer", "head_optimizer"):
            parts[name].zero_grad()
        seen.append((loss.item(), scaler.get_scale(), parts["head_schedule"].get_last_lr()[0]))
    return seen


def run_whole(rank: int, world: int, folder: str) -> tuple[list[Any], list[float]]:
    parts = build(rank)
    train(parts, range(3), rank)
    Checkpointer(folder, asynchronous=True).save(3, **parts)
    rest = train(parts, range(3, 7), rank)
    return rest, local(parts["head"].weight.detach()).flatten().tolist()


def run_rest(rank: int, world: int, folder: str) -> tuple[list[Any], list[float]]:
    parts = build(rank)
    assert Checkpointer(folder).load(**parts) == 3
    return train(parts, range(3, 7), rank), local(parts["head"].weight.detach()).flatten().tolist()


@pytest.mark.filterwarnings("ignore:.*grad_scaler.*")
def test_a_run_goes_on_exactly(ranks, tmp_path):
    whole = ranks(2).run(run_whole, str(tmp_path))
    while not Checkpointer(tmp_path).steps():
        time.sleep(0.01)  # the threads that write have not been waited for
    assert ranks(2).run(run_rest, str(tmp_path)) == whole
    scales = [scale for _, scale, _ in whole[0][0]]
    assert len(set(scales)) > 1, "the scaler moves, so its state counts"


def load_another(rank: int, world: int, folder: str) -> list[str]:
    errors = []
    for head in (PartialFC(D, C, CosFace()), PartialFC(D + 1, C), PartialFC(D, C + 1)):
        before = local(head.weight.detach()).clone()
        try:
            Checkpointer(folder).load(head=head)
        except ValueError as error:
            errors.append(str(error))
        assert torch.equal(local(head.weight.detach()), before)
    return errors


def test_a_checkpoint_of_another_head(ranks, tmp_path):
    Checkpointer(tmp_path).save(1, head=PartialFC(D, C))
    errors = ranks(2).run(load_another, str(tmp_path))
    assert errors[0] == errors[1]
    margin, width, classes = errors[0]
    assert (
        "head: it is of a head with ArcFace(scale=64.0" in margin
        and "this one has CosFace(" in margin
        and "build the head" in margin
    )
    assert "head/weight has shape [23, 5], but the shape here is [23, 6]; the embedding size differs" in width
    assert (
        "head/weight has shape [23, 5], but the shape here is [24, 5]; the checkpoint has 23 classes: "
        "build the head for as many, load, then call expand()" in classes
    )
    with pytest.raises(ValueError, match="it is of a head with ArcFace"):
        PartialFC(D, C, CosFace()).load_state_dict(PartialFC(D, C).state_dict())


def test_the_state_of_another_optimizer(tmp_path):
    head = PartialFC(D, C)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    head(torch.randn(4, D), torch.arange(4)).backward()
    optimizer.step()
    optimizer.zero_grad()
    save_checkpoint(tmp_path, optimizer=optimizer)
    with pytest.raises(ValueError, match="optimizer: it is the state of another optimizer: of SGD, and AdamW is built"):
        load_checkpoint(tmp_path, optimizer=RowOptimizer(torch.optim.AdamW, PartialFC(D, C)))
    other = RowOptimizer(torch.optim.SGD, PartialFC(D, C), lr=0.5)  # the momentum comes with the state, as in torch
    load_checkpoint(tmp_path, optimizer=other)
    assert other.param_groups[0]["momentum"] == 0.9


def test_the_options_of_another_optimizer_before_its_first_step(tmp_path):
    """There is no state to tell it by; a state of 0.1.0, or of torch's own optimizer, does not name its class."""
    save_checkpoint(tmp_path, optimizer=RowOptimizer(torch.optim.AdamW, PartialFC(D, C)))
    other = RowOptimizer(torch.optim.SGD, PartialFC(D, C), lr=1.0)
    with pytest.raises(ValueError, match="it is the state of another optimizer: of AdamW, and SGD is built here"):
        load_checkpoint(tmp_path, optimizer=other)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (1.0, 0)
    theirs = RowOptimizer(torch.optim.AdamW, PartialFC(D, C))
    load_checkpoint(tmp_path, optimizer=theirs)
    head = PartialFC(D, C)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    head(torch.randn(4, D), torch.arange(4)).backward()
    optimizer.step()
    optimizer.zero_grad()
    old = {key: value for key, value in optimizer.state_dict().items() if key != "class"}
    other.load_state_dict(old)
    assert other.param_groups[0]["momentum"] == 0.9
    with pytest.raises(ValueError, match="it has momentum_buffer, which AdamW as built here has not"):
        theirs.load_state_dict(old)
