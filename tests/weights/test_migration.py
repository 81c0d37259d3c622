"""Files of each rank that other trainers saved become one matrix, whatever their number, and what is wrong with them is
said in words."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from shards import local
from torch import Tensor

from partial_fc import ArcFace, PartialFC, RankFiles, RowOptimizer, Softmax, import_weights, load_checkpoint
from partial_fc.training.cli.main import main

C, D = 23, 6
LAYOUTS = ["checkpoint", "softmax_fc", "bare", "bare old"]


def matrix(seed: int) -> Tensor:
    return torch.randn(C, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(matrix: Tensor, world: int) -> list[Tensor]:
    """C // world rows a rank, one more on the first C % world, contiguous: 8, 8, 7."""
    counts = [len(matrix) // world + int(rank < len(matrix) % world) for rank in range(world)]
    return [rows.clone() for rows in matrix.split(counts)]


def optimizer_state(rows: Tensor, kind: str, lr: float = 0.05) -> dict[str, Any]:
    """As of an optimizer over a backbone [2, 3] and, last, the class weights of a rank."""
    if kind == "adamw":
        state: dict[str, Any] = {"step": torch.tensor(7.0), "exp_avg": rows, "exp_avg_sq": rows.square()}
        group: dict[str, Any] = {"lr": lr, "betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False}
    else:
        state, group = (
            {"momentum_buffer": rows},
            {"lr": lr, "momentum": 0.8, "weight_decay": 1e-3, "dampening": 0, "nesterov": False},
        )
    of_backbone = {key: torch.ones(2, 3) for key in state}
    return {"state": {0: of_backbone, 1: state}, "param_groups": [{**group, "params": [0]}, {**group, "params": [1]}]}


def write(folder: Path, layout: str, world: int = 3, kind: str = "sgd", momentum: bool = True) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for rank, (weight, state) in enumerate(zip(split(matrix(1), world), split(matrix(2), world), strict=True)):
        if layout == "checkpoint":
            path = folder / f"checkpoint_gpu_{rank}.pt"
            content = {
                "epoch": 3,
                "state_dict_backbone": {"w": torch.ones(2, 3)},
                "state_dict_softmax_fc": {"weight": weight},
            }
            torch.save({**content, **({"state_optimizer": optimizer_state(state, kind)} if momentum else {})}, path)
        elif layout == "softmax_fc":
            path = folder / f"softmax_fc_gpu_{rank}.pt"
            names = (
                {"weight_mom": state}
                if kind == "sgd"
                else {"weight_exp_avg": state, "weight_exp_avg_sq": state.square()}
            )
            some = {"weight_activated": weight[:2], "weight_activated_mom": state[:2], "weight_index": torch.arange(2)}
            torch.save({"weight": weight, **some, **(names if momentum else {})}, path)
        else:
            mark, old = (":", False) if layout == "bare old" else ("_", True)
            path = folder / f"rank{mark}{rank}_softmax_weight.pt"
            torch.save(weight, path, _use_new_zipfile_serialization=old)
            if momentum:
                torch.save(
                    state, folder / f"rank{mark}{rank}_softmax_weight_mom.pt", _use_new_zipfile_serialization=old
                )
        paths.append(path)
    return paths


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 3, 12])
def test_a_folder_is_one_matrix(tmp_path, layout, world):
    paths = write(tmp_path / "run", layout, world)  # of 12 files, that of rank 10 comes after that of rank 9
    for files in (RankFiles(tmp_path / "run"), RankFiles(paths), RankFiles([str(p) for p in paths])):
        assert files.shape == (C, D) and files.dtype == torch.float64 and len(files) == world
        assert torch.equal(files.rows(0, C), matrix(1))
        for a, b in ((0, 1), (7, 17), (22, 23), (5, 5)):
            assert torch.equal(files.rows(a, b), matrix(1)[a:b])
        assert list(files.state) == ["momentum_buffer"]
        assert torch.equal(files.state["momentum_buffer"].rows(3, 20), matrix(2)[3:20])


def test_only_one_file_is_held(tmp_path, monkeypatch):
    import gc
    import weakref

    from partial_fc.weights import rank_files

    held: list[Any] = []
    most = []
    real = rank_files.load_file

    def load(path: Path) -> Any:
        gc.collect()
        content = real(path)
        held.append(weakref.ref(content))
        most.append(sum(each() is not None for each in held))
        return content

    monkeypatch.setattr(rank_files, "load_file", load)
    files = RankFiles(write(tmp_path / "run", "bare", momentum=False))
    files.rows(0, C)
    files.rows(5, 20)
    assert len(most) > 6 and max(most) == 1


# ---------------------------------------------------------------------------------------------- into a head that trains


def dense_steps(weight: Tensor, state: dict[str, Tensor], kind: str, steps: int) -> Tensor:
    """The class weights after some steps of an optimizer that goes on from `state`; the gradient is that of ½ ‖W −
    target‖²."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD([parameter], lr=0.05, momentum=0.8)
        if kind == "sgd"
        else torch.optim.AdamW([parameter], lr=0.05, betas=(0.8, 0.99), weight_decay=0.1)
    )
    optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
    for step in range(steps):
        parameter.grad = parameter.detach() - matrix(10 + step)
        optimizer.step()
    return parameter.detach()


def row_optimizer(head: PartialFC, kind: str) -> RowOptimizer:
    if kind == "sgd":
        return RowOptimizer(torch.optim.SGD, head, lr=0.05, momentum=0.8)
    return RowOptimizer(torch.optim.AdamW, head, lr=0.05, betas=(0.8, 0.99), weight_decay=0.1)


def go_on(rank: int, world: int, path: str, kind: str, imported: bool) -> tuple[Tensor, Tensor]:
    head = PartialFC(D, C, ArcFace(), dtype=torch.float64)
    optimizer = row_optimizer(head, kind)
    if imported:
        import_weights(path, head, optimizer=optimizer)
    else:
        load_checkpoint(path, head=head, head_optimizer=optimizer)
        if kind == "sgd":
            assert optimizer.param_groups[0]["momentum"] == 0.8 and optimizer.param_groups[0]["lr"] == 0.05
            optimizer.param_groups[0]["weight_decay"] = 0.0
    start = local(head.weight.detach()).clone()
    shards = head.shards
    for step in range(3):
        head.weight.grad = shards.wrap(local(head.weight.detach()) - matrix(10 + step)[shards.lo : shards.hi])
        optimizer.step()
        optimizer.zero_grad()
    return start, local(head.weight.detach()).clone()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("how", ["live", "command"])
def test_training_goes_on_where_the_other_trainer_stopped(ranks, tmp_path, kind, how):
    write(tmp_path / "run", "checkpoint", kind=kind)
    path = tmp_path / "run"
    if how == "command":
        path = tmp_path / "checkpoint"
        assert main(["import", str(tmp_path / "run"), "--output", str(path)]) == 0
    state = optimizer_state(matrix(2), kind)["state"][1]
    expected = dense_steps(matrix(1), state, kind, 3)
    assert not torch.allclose(expected, dense_steps(matrix(1), {}, kind, 3), atol=1e-3)  # the state counts
    for world in (1, 2, 3, 4):
        results = ranks(world).run(go_on, str(path), kind, how == "live")
        assert torch.equal(torch.cat([start for start, _ in results]), matrix(1))
        torch.testing.assert_close(torch.cat([end for _, end in results]), expected, rtol=1e-12, atol=1e-12)


def test_state_must_be_that_of_the_optimizer(tmp_path):
    write(tmp_path / "sgd", "softmax_fc")
    write(tmp_path / "none", "softmax_fc", momentum=False)
    head = PartialFC(D, C)
    before = head.weight.detach().clone()
    with pytest.raises(
        ValueError, match="has the row state momentum_buffer, but this optimizer needs exp_avg, exp_avg_sq"
    ):
        import_weights(tmp_path / "sgd", head, optimizer=RowOptimizer(torch.optim.AdamW, head))
    with pytest.raises(ValueError, match="omit optimizer="):
        import_weights(tmp_path / "none", head, optimizer=RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="of this head"):
        import_weights(
            tmp_path / "sgd", head, optimizer=RowOptimizer(torch.optim.SGD, PartialFC(D, C), lr=0.1, momentum=0.9)
        )
    assert torch.equal(head.weight, before)
    import_weights(tmp_path / "none", head)
    assert torch.equal(head.weight, matrix(1).float())


def test_options_of_the_files_are_told_of(tmp_path, caplog):
    """import_weights leaves options alone and says so; the checkpoint of the command brings them."""
    write(tmp_path / "run", "checkpoint")
    head = PartialFC(D, C, dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.3, momentum=0.8)
    with caplog.at_level(logging.WARNING, "partial_fc"):
        import_weights(tmp_path / "run", head, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert "the optimizer keeps {'lr': 0.3" in caplog.text and "has {'lr': 0.05" in caplog.text
    assert "set them in optimizer.param_groups[0]" in caplog.text
    assert main(["import", str(tmp_path / "run"), "--output", str(tmp_path / "start")]) == 0
    load_checkpoint(tmp_path / "start", head=head, head_optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.05
    caplog.clear()
    import_weights(tmp_path / "run", head, optimizer=optimizer)
    assert "keeps" not in caplog.text


@pytest.mark.parametrize("layout", ["softmax_fc", "bare", "bare old"])
def test_options_that_no_file_has_are_left_alone(tmp_path, layout, capsys):
    write(tmp_path / "run", layout)
    assert main(["import", str(tmp_path / "run"), "--output", str(tmp_path / "start")]) == 0
    out = capsys.readouterr().out
    assert "head_optimizer with momentum_buffer; its options stay as they are: the files have none" in out
    head = PartialFC(D, C, dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.3, momentum=0.7, weight_decay=0.01)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    load_checkpoint(tmp_path / "start", head=head, head_optimizer=optimizer)
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == before
    assert torch.equal(optimizer.state[head.weight]["momentum_buffer"], matrix(2))


def test_momentum_of_a_head_with_a_bias_is_imported(tmp_path):
    write(tmp_path / "run", "checkpoint")
    assert main(["import", str(tmp_path / "run"), "--output", str(tmp_path / "start"), "--margin", "Softmax"]) == 0
    head = PartialFC(D, C, Softmax(), dtype=torch.float64)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.3, momentum=0.8)
    load_checkpoint(tmp_path / "start", head=head, head_optimizer=optimizer)
    assert optimizer.state[head.weight]["momentum_buffer"].shape == (C, D)
    assert optimizer.param_groups[0]["lr"] == 0.05


# -------------------------------------------------------------------------------------------- momentum that is left out


def resave(path: Path, change: Any) -> None:
    content = torch.load(path, weights_only=True)
    torch.save(change(content), path)


def drop(key: str) -> Any:
    return lambda content: {k: v for k, v in content.items() if k != key}


def of_some_rows(content: dict[str, Any]) -> dict[str, Any]:
    content["state_optimizer"]["state"][1]["momentum_buffer"] = torch.zeros(2, D)
    return content


def of_another_step(content: dict[str, Any]) -> dict[str, Any]:
    content["state_optimizer"]["state"][1]["step"] = torch.tensor(8.0)
    return content


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (drop("state_optimizer"), "sgd", "2 of 3 files have it"),
        (of_some_rows, "sgd", "only for the rows of the last step"),
        (of_another_step, "adamw", "from different optimizer steps"),
    ],
)
def test_momentum_of_some_is_left_out_with_a_word(tmp_path, caplog, change, kind, words):
    paths = write(tmp_path / "run", "checkpoint", kind=kind)
    resave(paths[1], change)
    with caplog.at_level(logging.WARNING, "partial_fc"):
        files = RankFiles(tmp_path / "run")
    assert not files.state and words in caplog.text
    assert torch.equal(files.rows(0, C), matrix(1))


# ---------------------------------------------------------------------------------------------------- what is refused


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_files_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = write(tmp_path / "run", "softmax_fc")
    torch.save({"weight": torch.zeros(8, D), "more": Malicious()}, paths[1])
    with pytest.raises(ValueError, match=r"softmax_fc_gpu_1.pt refers to .*system, .*do not trust this file"):
        RankFiles(tmp_path / "run")
    torch.save({"weight": torch.zeros(8, D), "more": Malicious()}, paths[1], _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="do not trust this file"):
        RankFiles(tmp_path / "run")
    assert not Path("ran").exists()


def test_lists_and_folders_that_are_not_one_of_each_rank(tmp_path):
    paths = write(tmp_path / "run", "softmax_fc")
    with pytest.raises(ValueError, match=r"out of order: .*gpu_1.pt is of rank 1, but is listed for rank 0"):
        RankFiles([paths[1], paths[0], paths[2]])
    with pytest.raises(FileNotFoundError, match=r"the file of rank 1 is missing: .*gpu_2.pt"):
        RankFiles([paths[0], paths[2]])
    with pytest.raises(ValueError, match=r"gpu_1.pt is listed twice"):
        RankFiles([paths[0], paths[1], paths[1]])
    (tmp_path / "other").mkdir()
    torch.save({"weight": torch.zeros(7, D)}, tmp_path / "other" / "softmax_fc_gpu_1.pt")
    with pytest.raises(ValueError, match="is a second file of rank 1"):
        RankFiles([*paths[:2], tmp_path / "other" / "softmax_fc_gpu_1.pt"])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*no.pt, listed for rank 1"):
        RankFiles([paths[0], tmp_path / "no.pt"])
    with pytest.raises(ValueError, match="list of files is empty"):
        RankFiles([])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        RankFiles(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no per-rank files"):
        RankFiles(tmp_path)
    write(tmp_path / "run", "checkpoint")
    with pytest.raises(ValueError, match=r"several layouts \(checkpoint_gpu_\d.pt and softmax_fc_gpu_\d.pt\)"):
        RankFiles(tmp_path / "run")
    paths[1].unlink()
    for path in (tmp_path / "run").glob("checkpoint*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="the file of rank 1 is missing"):
        RankFiles(tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"weight": torch.zeros(8, D + 1, dtype=torch.float64)},
            "8 classes of width 7 in float64, .*8 classes of width 6 in float64",
        ),
        ({"weight": torch.zeros(8, D)}, "in float32, .* in float64; they are not parts of one matrix"),
        ({"fc.weight": torch.zeros(8, D), "epoch": 1}, "has no weight; it has fc.weight, epoch: give the name"),
        ({"weight": 3}, "weight is a int, not a tensor"),
        ({"weight": torch.zeros(8, D, dtype=torch.int64)}, "must be a floating-point matrix, but is int64"),
        ({"weight": torch.zeros(8)}, "must be a floating-point matrix, but is float32"),
        ([1, 2], "has no weight; it has nothing|has no weight; it has a list"),
        (b"plain text, no file of torch", "not a torch.save file"),
        (b"", "not a torch.save file"),
        ("truncated", "truncated or not a torch.save file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, words):
    paths = write(tmp_path / "run", "softmax_fc", momentum=False)
    if isinstance(content, bytes):
        paths[1].write_bytes(content)
    elif content == "truncated":
        paths[1].write_bytes(paths[1].read_bytes()[:-500])
    else:
        torch.save(content, paths[1])
    with pytest.raises(ValueError, match=words) as raised:
        RankFiles(tmp_path / "run")
    assert str(paths[1]) in str(raised.value)


def test_other_layouts_by_key_and_odd_sizes_with_a_word(tmp_path, caplog):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    for path, rows in ((first, matrix(1)[:3]), (second, matrix(1)[3:])):
        torch.save({"model": {"fc.weight": torch.nn.Parameter(rows.clone())}}, path)
    with caplog.at_level(logging.WARNING, "partial_fc"):
        files = RankFiles([first, second], key="model/fc.weight")
    assert torch.equal(files.rows(0, C), matrix(1))
    assert "[3, 20] rows, which is not a usual split of 23 classes" in caplog.text
    with pytest.raises(ValueError, match=r"has no model/weight; it has fc.weight"):
        RankFiles([first, second], key="model/weight")
    head = PartialFC(D, 24)
    with pytest.raises(
        ValueError, match=r"23 classes of width 6, but 24 classes of width 6 are expected; build for 23 classes"
    ):
        import_weights(files, head)


def see_other_files(rank: int, world: int, path: str) -> str:
    head = PartialFC(D, C)
    try:
        import_weights(path if rank == 0 else path + "-elsewhere", head)
    except FileNotFoundError as error:
        return str(error)
    return "read"


def test_ranks_agree_on_errors(ranks, tmp_path):
    write(tmp_path / "run", "bare")
    texts = ranks(2).run(see_other_files, str(tmp_path / "run"))
    assert len(set(texts)) == 1 and texts[0].startswith("rank 1: there is no file")


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    paths = write(tmp_path / "run", "softmax_fc")
    arguments = ["import", *map(str, reversed(paths)), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "out of order" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["import", *map(str, paths), "--output", str(tmp_path / "out")]) == 0
    assert "head, 23 classes of width 6 from 3 files" in capsys.readouterr().out
