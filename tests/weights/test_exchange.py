"""Class weights and centers as single files: bit for bit at every world size, in bounded memory, refused in words where
they do not fit."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from shards import local, part_of, two_by_two
from torch import Tensor
from watching import Allocations

from partial_fc import (
    CenterLoss,
    CosFace,
    CurricularFace,
    PartialFC,
    RowOptimizer,
    Softmax,
    SphereFace2,
    SubCenterArcFace,
    export_weights,
    import_weights,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.training.cli.main import main
from partial_fc.weights.safetensors_file import RowWriter, SafetensorsRows, create, publish, read_header, temporary_name

D = 6
KINDS = ("arc", "softmax", "subcenter", "center", "half")


def build(kind: str, classes: int, seed: int = 0, group: Any = None) -> PartialFC | CenterLoss:
    if kind == "center":
        return CenterLoss(D, classes, seed=seed, init_std=1.0, group=group, dtype=torch.float64)
    margin = {"softmax": Softmax(), "subcenter": SubCenterArcFace(centers=2)}.get(kind)
    head = PartialFC(
        D, classes, margin, seed=seed, init_std=1.0, group=group, dtype=torch.bfloat16 if kind == "half" else None
    )
    if head.bias is not None:  # drawn by class id, as the weights are
        start = head.shards.lo
        local(head.bias.detach()).copy_(torch.arange(start, start + head.shards.local) + 10.0 * seed)
    return head


def parts(rows_of: PartialFC | CenterLoss) -> dict[str, Tensor]:
    return {name: local(p.detach()).clone() for name, p in rows_of.named_parameters()}


def export(rank: int, world: int, path: str, kind: str, classes: int, seed: int) -> dict[str, Tensor]:
    rows_of = build(kind, classes, seed)
    export_weights(path, rows_of)
    return parts(rows_of)


def take(rank: int, world: int, path: str, kind: str, classes: int) -> dict[str, Tensor]:
    rows_of = build(kind, classes, seed=99)
    import_weights(path, rows_of)
    return parts(rows_of)


def whole(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "written_by"), [(23, 2), (3, 4), (23, 1)])
def test_any_world_size_reads_what_any_other_wrote(ranks, tmp_path, kind, classes, written_by):
    path = str(tmp_path / "w.safetensors")
    expected = whole(ranks(written_by).run(export, path, kind, classes, 3))
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == expected.keys()
    for world in (1, 2, 3, 4):
        found = whole(ranks(world).run(take, path, kind, classes))
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) and torch.equal(theirs[name], tensor)
    assert os.listdir(tmp_path) == ["w.safetensors"]
    assert not stat.S_IMODE(os.stat(path).st_mode) & 0o111


def test_without_a_group_and_in_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("partial_fc.checkpoint.layout.ROW_BLOCK_BYTES", 2 * D * 4)
    before, after = build("arc", 23, 1), build("arc", 23, 2)
    export_weights(tmp_path / "a.safetensors", before)
    import_weights(tmp_path / "a.safetensors", after)
    assert torch.equal(before.weight, after.weight)
    assert read_header(tmp_path / "a.safetensors").metadata == {
        "format": "pt",
        "kind": "head",
        "num_classes": "23",
        "embedding_size": "6",
        "margin": before.margin.describe(),
    }


def on_a_mesh(rank: int, world: int, path: str) -> tuple[Tensor, Tensor]:
    mesh = two_by_two()
    rows_of = build("arc", 5, seed=3, group=mesh)
    export_weights(path, rows_of)
    other = build("arc", 5, seed=4, group=mesh)
    import_weights(path, other)
    return local(rows_of.weight.detach()).clone(), local(other.weight.detach()).clone()


def test_a_mesh_of_replicas_writes_once_and_reads_everywhere(ranks, tmp_path):
    results = ranks(4).run(on_a_mesh, str(tmp_path / "w.safetensors"))
    for before, after in results:
        assert torch.equal(before, after)
    written = safetensors.torch.load_file(tmp_path / "w.safetensors")["weight"]
    assert torch.equal(written, torch.cat([results[0][0], results[1][0]]))


def in_a_part_of_the_world(rank: int, world: int, path: str) -> bool:
    group = torch.distributed.new_group([1, 2])
    if rank == 0:
        return True
    rows_of, other = build("arc", 5, 1, group), build("arc", 5, 2, group)
    export_weights(path, rows_of)
    import_weights(path, other)
    return torch.equal(local(rows_of.weight), local(other.weight))


def test_a_head_on_some_of_the_ranks(ranks, tmp_path):
    assert ranks(3).run(in_a_part_of_the_world, str(tmp_path / "w.safetensors")) == [True] * 3


# ---------------------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 3), (0, 3)])
def test_the_library_reads_what_is_written_here_and_the_other_way_round(tmp_path, dtype, shape):
    tensors = {
        "a": torch.randn(shape).to(dtype),
        "odd": torch.arange(3, dtype=torch.int8),
        "wide": torch.randn(5).double(),
    }
    theirs, mine = tmp_path / "theirs.safetensors", tmp_path / "mine.safetensors"
    safetensors.torch.save_file(tensors, theirs, metadata={"format": "pt"})
    rows = SafetensorsRows(theirs, "a")
    assert rows.shape == shape and rows.dtype == dtype
    assert torch.equal(rows.rows(0, shape[0]), tensors["a"])
    if shape[0]:
        assert torch.equal(rows.rows(2, 5), tensors["a"][2:5])
    temporary = temporary_name(mine)
    create(temporary, {name: (t.shape, t.dtype) for name, t in tensors.items()}, {"format": "pt"})
    for name, tensor in tensors.items():
        for first in range(len(tensor)):  # a writer of its own for each row, as of many processes
            with RowWriter(temporary) as writer:
                writer.write_rows(name, first, tensor[first : first + 1])
    publish(temporary, mine, overwrite=False)
    found = safetensors.torch.load_file(mine)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(mine, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"weight": {"dtype": "F32", "shape": [2, D], "data_offsets": [0, 48], **changes}}


BAD = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x01\x02", "not a safetensors file"),
    "header beyond the file": (struct.pack("<Q", 500) + b"{}", "is truncated or not a safetensors file"),
    "header too long": (struct.pack("<Q", 2**60) + b"{}", "is truncated or not a safetensors file"),
    "no JSON": (b"not json", "header is not JSON"),
    "not UTF-8": (b"\xff\xfe\xff", "header is not JSON"),
    "deep": (b"[" * 100_000, "header is not JSON"),
    "a list": ([1, 2], "not a table of tensors"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "not a table of tensors"),
    "twice": (b'{"weight": {}, "weight": {}}', "has a name twice"),
    "no offsets": ({"weight": {"dtype": "F32", "shape": [2, D]}}, "the entry of weight in its header is incomplete"),
    "entry of text": ({"weight": "here"}, "the entry of weight in its header is incomplete"),
    "shape of text": (entry(shape="ab"), "gives weight the shape"),
    "negative": (entry(shape=[-2, D]), "gives weight the shape"),
    "fraction": (entry(shape=[2.0, D]), "gives weight the shape"),
    "backwards": (entry(data_offsets=[48, 0]), "gives weight the shape"),
    "other size": (entry(shape=[3, D]), "has shape \\[3, 6\\] of F32, but 48 bytes"),
    "truncated": (entry(shape=[4, D], data_offsets=[0, 96]), "is truncated: weight ends at byte"),
    "unknown dtype": (entry(dtype="F4"), "has an unknown dtype"),
    "a number": ({"weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, "single number"),
    "other name": ({"fc": entry()["weight"]}, "has no tensor weight; it has fc"),
    "other classes": (
        entry(shape=[1, D], data_offsets=[0, 24]),
        "has 1 classes of width 6, but 2 classes of width 6 are expected; build for 1",
    ),
    "other width": (
        entry(shape=[6, 2]),
        "has 6 classes of width 2, but 2 classes of width 6 are expected; the embedding size differs",
    ),
    "sub-centers": (entry(shape=[2, 2, 3]), "has 2 classes of 2 rows of width 3, but 2 classes of width 6 are"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_nothing_changes(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes) and name in ("empty", "short", "header beyond the file", "header too long"):
        path.write_bytes(content)
    else:
        raw(path, content, b"\0" * 48)
    head = build("arc", 2)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match=message) as raised:
        import_weights(path, head)
    assert str(path) in str(raised.value)
    assert torch.equal(head.weight, before)


def test_tensors_that_are_not_asked_for_may_be_of_other_dtypes(tmp_path):
    weight = torch.randn(2, D)
    table = {**entry(data_offsets=[8, 56]), "scales": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}
    path = raw(tmp_path / "a.safetensors", table, b"\0" * 8 + weight.numpy().tobytes())
    head = build("arc", 2)
    import_weights(path, head)
    assert torch.equal(head.weight, weight)


# ---------------------------------------------------------------------------------------------------- what is refused


def test_files_stay_and_folders_must_be_there(tmp_path):
    head, other = build("arc", 5, 1), build("arc", 5, 2)
    path = tmp_path / "w.safetensors"
    export_weights(path, head)
    first = path.read_bytes()
    with pytest.raises(FileExistsError, match="already exists"):
        export_weights(path, other)
    assert path.read_bytes() == first
    export_weights(path, other, overwrite=True)
    assert path.read_bytes() != first
    with pytest.raises(ValueError, match=r"name of a torch.save file.* name it .*weights.safetensors"):
        export_weights(tmp_path / "weights.pt", head)
    assert not (tmp_path / "weights.pt").exists()
    with pytest.raises(FileExistsError, match="is a folder"):
        export_weights(tmp_path, other, overwrite=True)
    with pytest.raises(FileNotFoundError, match="cannot be written"):
        export_weights(tmp_path / "none" / "w.safetensors", head)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        import_weights(tmp_path / "none.safetensors", head)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def fail_to_write(rank: int, world: int, path: str, how: str) -> tuple[str, str]:
    import partial_fc.weights.safetensors_file as module

    head = build("arc", 23)
    real = module.RowWriter.write_rows, os.posix_fallocate

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if how == "full at rank 1" and rank == 1:
        module.RowWriter.write_rows = full  # type: ignore[method-assign, assignment]
    if how == "full at the start":
        os.posix_fallocate = full
    if how == "elsewhere" and rank == 1:
        os.chdir(Path(path).parent)
    try:
        export_weights("w.safetensors" if how == "elsewhere" else path, head)
    except (OSError, ValueError) as error:
        return type(error).__name__, str(error)
    finally:
        module.RowWriter.write_rows, os.posix_fallocate = real  # type: ignore[method-assign]
    return "", "written"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("full at rank 1", "rank 1: .*No space left"),
        ("full at the start", "No space left"),
        ("elsewhere", "a folder that all ranks share"),
    ],
)
def test_what_one_rank_cannot_write_is_said_by_all_and_nothing_is_left(ranks, tmp_path, how, words):
    monkey = os.getcwd()
    (tmp_path / "inner").mkdir()
    path = str(tmp_path / "inner" / "w.safetensors")
    results = ranks(2).run(fail_to_write, path, how)
    if how == "elsewhere":
        ranks(2).run(back, monkey)
    assert results[0] == results[1]
    assert results[0][0] == "OSError"
    assert re.search(words, results[0][1])
    assert not list((tmp_path / "inner").iterdir())
    assert not list(Path(monkey).glob(".w.safetensors*"))


def back(rank: int, world: int, folder: str) -> None:
    os.chdir(folder)


def name_another_file(rank: int, world: int, path: str) -> str:
    try:
        export_weights(f"{path}{rank}.safetensors", build("arc", 5))
    except ValueError as error:
        return str(error)
    return "written"


def see_another_file(rank: int, world: int, path: str) -> tuple[str, bool]:
    head = build("arc", 5)
    before = local(head.weight.detach()).clone()
    try:
        import_weights(path if rank == 0 else path + "-elsewhere", head)
    except FileNotFoundError as error:
        return str(error), torch.equal(before, local(head.weight))
    return "read", False


def test_ranks_agree_on_errors(ranks, tmp_path):
    texts = ranks(2).run(name_another_file, str(tmp_path / "w"))
    assert len(set(texts)) == 1
    assert "ranks disagree: path or overwrite differs between rank 0 and rank 1" in texts[0]
    export_weights(tmp_path / "a", build("arc", 5))
    results = ranks(2).run(see_another_file, str(tmp_path / "a"))
    assert results[0] == results[1]
    assert results[0][0].startswith("rank 1: there is no file") and results[0][1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be written"):
            export_weights(tmp_path / "w.safetensors", build("arc", 5))
    finally:
        tmp_path.chmod(0o700)


def test_biases_are_not_lost_in_silence(tmp_path):
    export_weights(tmp_path / "bias", build("softmax", 5, 3))
    export_weights(tmp_path / "none", build("arc", 5, 4))
    plain, linear = build("arc", 5), build("softmax", 5)
    with pytest.raises(ValueError, match="has a bias, but the head has none"):
        import_weights(tmp_path / "bias", plain)
    import_weights(tmp_path / "bias", plain, key="weight")
    with pytest.raises(ValueError, match="has no bias, but the head has one"):
        import_weights(tmp_path / "none", linear)
    bias = linear.bias.detach().clone()
    import_weights(tmp_path / "none", linear, key="weight")
    assert torch.equal(linear.bias, bias) and torch.equal(plain.weight, build("softmax", 5, 3).weight)


def test_rows_may_be_cast_and_centers_take_weights(tmp_path):
    head, center = build("half", 5, 3), build("center", 5, 4)
    export_weights(tmp_path / "w", head)
    center(torch.randn(2, D, dtype=torch.float64), torch.tensor([1, 2]))
    import_weights(tmp_path / "w", center, key="weight")
    assert torch.equal(center.centers, head.weight.double())
    before = center.centers.clone()
    center.step()  # what was noted was about other centers
    assert torch.equal(center.centers, before)


def test_float32_masters_follow(tmp_path):
    head = build("half", 5, 3)
    optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, low_precision="master")
    head(torch.randn(4, D), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    optimizer.zero_grad()
    export_weights(tmp_path / "w", build("half", 5, 7))
    import_weights(tmp_path / "w", head)
    assert torch.equal(head.weight, build("half", 5, 7).weight)
    assert torch.equal(optimizer.state[head.weight]["master_weight"], head.weight.float())


class Columns:
    """A matrix from anywhere: its rows are counted on demand."""

    shape, dtype = torch.Size([23, D]), torch.float32

    def rows(self, a: int, b: int) -> Tensor:
        return torch.arange(a, b)[:, None] + torch.arange(D) / 10


def take_source(rank: int, world: int) -> Tensor:
    head = build("arc", 23)
    import_weights(Columns(), head)
    return local(head.weight.detach()).clone()


def test_anything_with_rows_is_a_source(ranks):
    assert torch.equal(torch.cat(ranks(3).run(take_source)), Columns().rows(0, 23))
    with pytest.raises(
        ValueError, match=r"the given Columns has 23 classes of width 6, but 5 classes of width 6 are expected"
    ):
        import_weights(Columns(), build("arc", 5))


# ---------------------------------------------------------------------------------------------------- memory


def test_nothing_is_as_large_as_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("partial_fc.checkpoint.layout.ROW_BLOCK_BYTES", 4096)
    head, other = build("arc", 20_000, 1), build("arc", 20_000, 2)
    with Allocations():  # what is imported and compiled once
        export_weights(tmp_path / "first", small := build("arc", 5))
        import_weights(tmp_path / "first", small)
    tracemalloc.start()
    try:
        with Allocations() as seen:
            export_weights(tmp_path / "w", head)
            import_weights(tmp_path / "w", other)
        assert tracemalloc.get_traced_memory()[1] < head.weight.nbytes / 4  # buffers of files are Python's memory
    finally:
        tracemalloc.stop()
    assert seen.bytes <= 4096 and 2048 < seen.copied <= 4096
    assert torch.equal(head.weight, other.weight)


RESIDENT = """
import resource, sys, torch
from partial_fc.training.cli.main import main
from partial_fc.weights.single_file import import_weights
main(["import", sys.argv[1], "--output", sys.argv[1] + "-small-checkpoint"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["import", sys.argv[2], "--output", sys.argv[2] + "-checkpoint"]) == 0
assert main(["export", sys.argv[2] + "-checkpoint", sys.argv[2] + "-again.safetensors"]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_commands_hold_a_block_of_a_matrix_of_200_megabytes(tmp_path):
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    create(small, {"weight": ((100, 512), torch.float32)}, {})
    create(large, {"weight": ((100_000, 512), torch.float32)}, {})
    answer = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(small), str(large)], capture_output=True, text=True, check=True
    )
    assert int(answer.stdout.splitlines()[-1]) < 100_000 * 512 * 4 / 2
    assert Path(f"{large}-again.safetensors").stat().st_size > 100_000 * 512 * 4


# ---------------------------------------------------------------------------------------------------- commands


def train(head: PartialFC, optimizer: RowOptimizer, steps: int, rank: int = 0, world: int = 1) -> list[float]:
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, head.num_classes, (12,), generator=generator)
        mine = part_of(12, rank, world)
        loss = head(x[mine], labels[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def margin_of(name: str) -> Any:
    margins = (CosFace(scale=32.0), CurricularFace(), SphereFace2(), Softmax())
    return next(margin for margin in margins if type(margin).__name__ == name)


def train_from(rank: int, world: int, path: str, margin: str) -> list[float]:
    head = PartialFC(D, 23, margin_of(margin), seed=5, dtype=torch.float64)
    load_checkpoint(path, head=head)
    return train(head, RowOptimizer(torch.optim.SGD, head, lr=0.1), 4, rank, world)


@pytest.mark.parametrize("margin", ["CosFace", "CurricularFace", "SphereFace2", "Softmax"])
def test_an_imported_checkpoint_trains_as_the_head_it_came_from(ranks, tmp_path, capsys, margin):
    head = PartialFC(D, 23, margin_of(margin), seed=3, init_std=1.0, dtype=torch.float64)
    file, checkpoint = str(tmp_path / "w.safetensors"), str(tmp_path / "checkpoint")
    save_checkpoint(tmp_path / "first", head=head)
    assert main(["export", str(tmp_path / "first"), file]) == 0
    given = ["--margin", margin, *(["--margin.scale", "32"] if margin == "CosFace" else [])]
    assert main(["import", file, "--output", checkpoint, *given]) == 0
    assert "head, 23 classes of width 6" in capsys.readouterr().out
    expected = train(head, RowOptimizer(torch.optim.SGD, head, lr=0.1), 4)
    for world in (1, 2, 3):
        for losses in ranks(world).run(train_from, checkpoint, margin):
            assert losses == pytest.approx(expected, rel=1e-9)


def test_exported_bytes_are_those_of_the_checkpoint(tmp_path):
    head, center = build("subcenter", 23, 3), build("center", 23, 4)
    save_checkpoint(tmp_path / "c", head=head, middle=center)
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "w.safetensors")]) == 0
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "m.safetensors"), "--name", "middle"]) == 0
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w.safetensors")["weight"], head.weight)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "m.safetensors")["centers"], center.centers)
    export_weights(tmp_path / "same.safetensors", head)
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()
    assert main(["import", str(tmp_path / "m.safetensors"), "--output", str(tmp_path / "back")]) == 0
    other = build("center", 23, 5)
    load_checkpoint(tmp_path / "back", center=other)
    assert torch.equal(other.centers, center.centers)
    import_weights(tmp_path / "back", other := build("center", 23, 6))
    assert torch.equal(other.centers, center.centers)


@pytest.mark.parametrize("kind", ["arc", "softmax"])
def test_a_checkpoint_is_a_source_too(ranks, tmp_path, kind):
    head = build(kind, 23, 3)
    save_checkpoint(tmp_path / "c", head=head, optimizer=RowOptimizer(torch.optim.SGD, head, lr=0.1))
    for world in (1, 3):
        found = whole(ranks(world).run(take, str(tmp_path / "c"), kind, 23))
        assert all(torch.equal(found[name], tensor) for name, tensor in parts(head).items())
    with pytest.raises(ValueError, match="has no tensor center/centers; it has head/"):
        import_weights(tmp_path / "c", build("center", 23))
    with pytest.raises(
        ValueError, match="head/weight has 23 classes of width 6, but 24 classes of width 6 are expected"
    ):
        import_weights(tmp_path / "c", build(kind, 24))


def test_commands_say_what_is_wrong(tmp_path, mistake):
    save_checkpoint(tmp_path / "c", head=build("softmax", 5, 3), a=build("center", 5), b=build("center", 5))
    file, output = tmp_path / "w.safetensors", tmp_path / "out"
    assert "there is no folder" in mistake("export", tmp_path / "none", file)
    assert "neither a checkpoint" in mistake("export", tmp_path, file)
    assert "name that ends in .safetensors" in mistake("export", tmp_path / "c", tmp_path / "w.bin")
    assert "no class weights or centers named x; it has a, b, head" in mistake(
        "export", tmp_path / "c", file, "--name", "x"
    )
    assert main(["export", str(tmp_path / "c"), str(file)]) == 0
    assert "already exists; choose another name" in mistake("export", tmp_path / "c", file)
    assert main(["export", str(tmp_path / "c"), str(file), "--overwrite"]) == 0
    assert "give the margin of the checkpoint" in mistake("import", file, "--output", output)
    assert "has a bias" in mistake("import", file, "--output", output, "--margin", "CosFace")
    assert "--margin.scale: Softmax has no argument scale; it takes bias" in mistake(
        "import", file, "--output", output, "--margin", "Softmax", "--margin.scale", "3"
    )
    assert "write --margin AdaFace --margin.h 0.5 --margin.margin 0.3" in mistake(
        "import", file, "--output", output, "--margin", "adaface", "--h", "0.5", "--m", "0.3"
    )
    assert "a safetensors file holds all rows" in mistake("import", file, file, "--output", output)
    assert "there is no file" in mistake("import", tmp_path / "no.safetensors", "--output", output)
    assert "--margin SubCenterArcFace --margin.centers K" in mistake(
        "import", file, "--output", output, "--margin", "SubCenterArcFace", "--key", "weight"
    )
    assert not output.exists()
    assert main(["import", str(file), "--output", str(output), "--margin", "Softmax"]) == 0
    assert "already holds a checkpoint" in mistake("import", file, "--output", output, "--margin", "Softmax")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "out", "w.safetensors"]


# ---------------------------------------------------------------------------------------------------- the application

RUN = ["--config", "configs/quickstart.yaml", "--data.identities", "60", "--train.batch_size", "64"]


def test_a_run_starts_from_given_weights_and_is_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    from partial_fc.training.cli.main import train_parser
    from partial_fc.training.config import to_config
    from partial_fc.training.trainer import Trainer

    given = PartialFC(128, 60, seed=77)
    export_weights(tmp_path / "w.safetensors", given)
    folder = tmp_path / "run"
    start = ["--output.folder", str(folder), "--head.weights", str(tmp_path / "w.safetensors")]
    config = to_config(train_parser(), [*RUN, *start])
    config.train.epochs = 1
    trainer = Trainer(config)
    assert torch.equal(trainer.head.weight, given.weight)
    trainer.train()
    trained = trainer.head.weight.detach().clone()
    trainer.close()
    assert not torch.equal(trained, given.weight)
    assert main(["export", str(folder), str(tmp_path / "trained.safetensors")]) == 0
    assert torch.equal(safetensors.torch.load_file(tmp_path / "trained.safetensors")["weight"], trained)
    (tmp_path / "w.safetensors").unlink()  # a run that is resumed needs it no more
    resumed = Trainer(config, resume=True)
    assert torch.equal(resumed.head.weight, trained)
    resumed.close()


def test_weights_that_do_not_fit_are_refused_before_training(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(Path(__file__).parents[2])
    export_weights(tmp_path / "w.safetensors", PartialFC(128, 61))
    start = ["train", *RUN, "--output.folder", str(tmp_path / "run"), "--head.weights"]
    assert "--head.weights: there is no" in mistake(*start, tmp_path / "none", "--check")
    text = mistake(*start, tmp_path / "w.safetensors")
    assert (
        "--head.weights: " in text and "has 61 classes of width 128, but 60 classes of width 128 are expected" in text
    )
    assert not (tmp_path / "run").exists()


def test_arguments_in_another_order_are_told(tmp_path):
    head = PartialFC(4, 6)
    for call, words in (
        (lambda: export_weights(head, tmp_path / "w"), r"export_weights\(path, head\) takes a PartialFC or CenterLoss"),  # type: ignore[arg-type]
        (lambda: export_weights(tmp_path / "w", head.weight), "not Parameter"),  # type: ignore[arg-type]
        (lambda: import_weights(head, tmp_path / "w"), r"import_weights\(source, head\) takes"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=words):
            call()
    assert not [*tmp_path.iterdir()]
