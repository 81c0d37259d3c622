"""Class weights and centers to and from single files that other programs read, at any world size.

    export    shard [C_local, ...] of each rank ── row blocks ──> its place in one safetensors file [C, ...]
    import    safetensors file | checkpoint | files of each rank | RowSource ── row blocks ──> shard of each rank

The matrix `[C, ...]` is in no process: what a rank holds beside its shard is one block of rows. Everything that can be known beforehand
(the path, shapes, every file's header and length) is judged before a row is moved, and what one rank finds wrong is raised on all.
On a 2-D mesh the first replica writes, and each replica reads.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.centers import CenterLoss
from partial_fc.checkpoint.layout import RowSource, SafeReader, block_rows, read
from partial_fc.checkpoint.manifest import MANIFEST, read_manifest
from partial_fc.checkpoint.save_load import stored_tensors
from partial_fc.distributed.agreement import on_every_rank
from partial_fc.distributed.ranks import Ranks, all_gather_mesh
from partial_fc.errors import log
from partial_fc.head import PartialFC
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.optim.row_state import MASTER
from partial_fc.shards import local_part
from partial_fc.weights.rank_files import RankFiles, described
from partial_fc.weights.safetensors_file import (
    RowWriter,
    SafetensorsRows,
    check_free,
    create,
    publish,
    read_header,
    temporary_name,
)

SUFFIX = ".safetensors"

ClassRows = PartialFC | CenterLoss
Source = str | os.PathLike[str] | RowSource
Result = TypeVar("Result")


def export_weights(path: str | os.PathLike[str], rows_of: ClassRows, *, overwrite: bool = False) -> None:
    """Write class weights or centers as one safetensors file; every rank of the head must call it, and see the same folder.

    A head gives `weight [C, D]` (`[C, K, D]` with sub-centers) and, of `Softmax`, `bias [C]`; a `CenterLoss` gives `centers [C, D]`; as
    they are, in their dtype. The file's metadata says what they are of (`describe`). The file appears when it is complete.

    Raises, the same on every rank: FileExistsError if `path` is there and not to be overwritten, OSError if it cannot be written (folder
    missing or read-only, disk full, a rank that does not see it), ValueError if ranks name different files. Nothing is left then.
    """
    rows_of.class_rows.check_group()
    path, ranks = Path(path), rows_of.class_rows.shards.ranks
    token = _agree(path, overwrite, rows_of)
    temporary = temporary_name(path, token)
    parameters = rows_of.class_rows.parameters
    first = ranks.rank == ranks.replica == 0
    metadata = describe(
        "head" if isinstance(rows_of, PartialFC) else "center",
        rows_of.num_classes,
        rows_of.embedding_size,
        rows_of.margin.describe() if isinstance(rows_of, PartialFC) else None,
    )

    def prepare() -> None:
        if first:
            check_free(path, overwrite)
            create(temporary, {name: (p.shape, p.dtype) for name, p in parameters.items()}, metadata)

    def write() -> None:
        if ranks.replica:
            return
        if not temporary.exists():
            raise OSError(
                f"{temporary.parent} does not show what the first rank has made there; export to a folder that all ranks share"
            )
        with RowWriter(temporary) as writer:
            for name, parameter in parameters.items():
                local = local_part(parameter.detach())
                for a, b in blocks(local.shape, local.dtype):
                    writer.write_rows(name, rows_of.class_rows.shards.lo + a, local[a:b])

    try:
        _together(ranks, lambda: _saying(f"{path} cannot be written", prepare))
        _together(ranks, lambda: _saying(f"{path} cannot be written", write))
        _together(
            ranks,
            lambda: _saying(
                f"{path} cannot be written", lambda: publish(temporary, path, overwrite) if first else None
            ),
        )
    finally:
        if first:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def describe(kind: str, num_classes: int, embedding_size: int, margin: str | None) -> dict[str, str]:
    """The metadata of an exported file: format (for readers that look for it), kind, num_classes, embedding_size, margin of a head."""
    sizes = {"kind": kind, "num_classes": str(num_classes), "embedding_size": str(embedding_size)}
    return {"format": "pt", **sizes, **({} if margin is None else {"margin": margin})}


def import_weights(
    source: Source, rows_of: ClassRows, *, key: str | None = None, optimizer: RowOptimizer | None = None
) -> None:
    """Fill class weights or centers from a file or other source; every rank of the head must call it, and reads its own rows.

    source: a safetensors file; a checkpoint of this project; a folder of files of each rank (`RankFiles`), or one such file; or anything
        with `shape`, `dtype` and `rows(a, b)`. It must be of as many classes and as wide. Values are cast to the head's dtype.
    key: the tensor to take, by its name in the source; without it `weight` (and `bias`, where head and source have one) or `centers`.
        With it, and from a RowSource, a bias stays as it is.
    optimizer: the head's `RowOptimizer`, to be given the momentum that files of each rank hold, too; its options stay as they are.

    Raises, the same on every rank and before a row has changed: FileNotFoundError, or ValueError for a source that is damaged, has no such
    tensor or another shape; OSError for one that cannot be read. Rows that read as they should are not looked into: NaN is imported.
    """
    rows_of.class_rows.check_group()
    ranks, parameters = rows_of.class_rows.shards.ranks, rows_of.class_rows.parameters
    main = next(iter(parameters))
    if optimizer is not None and rows_of.class_rows.live_optimizer is not optimizer:
        raise ValueError("optimizer must be the RowOptimizer of this very head")
    found = _together(ranks, lambda: _open(source, rows_of, key))
    if optimizer is not None:
        _together(ranks, lambda: _check_state(found, optimizer))
    if isinstance(found, SafeReader):
        keys = _checkpoint_keys(found, rows_of, key)
        state = {stored: parameters[name].detach() for name, stored in keys.items()}
        _together(ranks, lambda: read(state, found, alone=True))
    else:
        _together(ranks, lambda: _fill(rows_of, {parameters[name]: rows for name, rows in found.items()}))
    if isinstance(rows_of, CenterLoss):
        rows_of._pending = None  # differences from other centers
    live = rows_of.class_rows.live_optimizer
    if live is not None:
        for parameter in parameters.values():
            if MASTER in live.state.get(parameter, {}):
                local_part(live.state[parameter][MASTER]).copy_(local_part(parameter.detach()))
    if optimizer is not None:
        files = found[main]  # type: ignore[index]
        _together(ranks, lambda: _fill_state(files, rows_of, optimizer))  # type: ignore[arg-type]
    log.info("%s of %d classes imported from %s", main, rows_of.num_classes, _named(source))


# ---------------------------------------------------------------------------------------------------- sources


def _open(source: Source, rows_of: ClassRows, key: str | None) -> dict[str, RowSource] | SafeReader:
    """name of a parameter -> where its rows are, or a checkpoint; all that can be judged now is."""
    parameters = rows_of.class_rows.parameters
    main, shape = next((name, p.shape) for name, p in parameters.items())
    if isinstance(source, RowSource):
        check_shape(source.shape, shape, f"{_named(source)}")
        return {main: source}
    path = Path(source)
    if path.is_dir() and (path / MANIFEST).exists():
        stored = stored_tensors(path)  # all files are whole
        reader = SafeReader(path / read_manifest(path)["data"])
        for name, stored_key in _checkpoint_keys(reader, rows_of, key).items():
            check_shape(stored[stored_key][0], parameters[name].shape, f"{path}: {stored_key}")
        return reader
    if path.is_dir() or path.suffix in (".pt", ".pth", ".bin"):
        files = RankFiles(path if path.is_dir() else [path], key=key)
        check_shape(files.shape, shape, str(path))
        return {main: files}
    tensors = read_header(path).tensors
    wanted = {main: main} if key is None else {main: key}
    if key is None and "bias" in parameters:
        if "bias" not in tensors:
            raise ValueError(
                f"{path} has no bias, and the head has one: build it with Softmax(bias=False), or leave it as it is: key={main!r}"
            )
        wanted["bias"] = "bias"
    elif key is None and isinstance(rows_of, PartialFC) and "bias" in tensors:
        raise ValueError(
            f"{path} has a bias, and the head has none: build it with Softmax(), or leave the bias out: key={main!r}"
        )
    sources: dict[str, RowSource] = {}
    for name, stored_key in wanted.items():
        if stored_key not in tensors:
            names = ", ".join(sorted(tensors)) or "none"
            raise ValueError(f"{path} has no tensor {stored_key}; it has {names}: name the one to take with key=")
        sources[name] = SafetensorsRows(path, stored_key)
        check_shape(sources[name].shape, parameters[name].shape, f"{path}: {stored_key}")
    return sources


def _checkpoint_keys(reader: SafeReader, rows_of: ClassRows, key: str | None) -> dict[str, str]:
    """name of a parameter -> key in a checkpoint."""
    stored = reader.read_metadata().state_dict_metadata
    prefix = "head" if isinstance(rows_of, PartialFC) else "center"
    main, *others = rows_of.class_rows.parameters
    keys = {main: key} if key is not None else {name: f"{prefix}/{name}" for name in (main, *others)}
    for each in keys.values():
        if each not in stored:
            candidates = [name for name in sorted(stored) if name.endswith(("/weight", "/centers", "/bias"))]
            raise ValueError(
                f"checkpoint {Path(reader.path).parent} has no tensor {each}; it has {', '.join(candidates)}: name one with key="
            )
    return keys


def check_shape(found: torch.Size | tuple[int, ...], wanted: torch.Size | tuple[int, ...], what: str) -> None:
    """ValueError unless both are the same: what each is, and what to do."""
    found, wanted = tuple(found), tuple(wanted)
    if found == wanted:
        return
    problem = f"{what} has {described(found)}, here it is {described(wanted)}"
    if found[1:] == wanted[1:] and found:
        problem += f"; build for {found[0]:,} classes, import, then expand() or remap() to what is wanted"
    elif len(found) == len(wanted):
        problem += "; embeddings of another width do not fit these rows: build with that embedding_size"
    raise ValueError(problem)


def _named(source: Source) -> str:
    return str(source) if isinstance(source, str | os.PathLike | RankFiles) else f"the given {type(source).__name__}"


# ---------------------------------------------------------------------------------------------------- rows


def blocks(shape: torch.Size, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Bounds of the row blocks of a matrix of this shape."""
    size = block_rows(shape[1:], dtype, shape[0])
    for a in range(0, shape[0], size):
        yield a, min(a + size, shape[0])


@torch.no_grad()
def _fill(rows_of: ClassRows, sources: dict[Tensor, RowSource]) -> None:
    """Copy this rank's rows of each source into the tensor."""
    for tensor, source in sources.items():
        local = local_part(tensor.detach())
        for a, b in blocks(local.shape, source.dtype):
            local[a:b].copy_(source.rows(rows_of.class_rows.shards.lo + a, rows_of.class_rows.shards.lo + b))


def _check_state(found: dict[str, RowSource] | SafeReader, optimizer: RowOptimizer) -> None:
    """ValueError unless the source holds what the optimizer keeps of each row."""
    source = next(iter(found.values())) if isinstance(found, dict) else found
    if not isinstance(source, RankFiles):
        raise ValueError(
            "optimizer= is for files of each rank, which may hold momentum; of other sources only class weights are taken"
        )
    if not source.state:
        raise ValueError(
            f"{source} hold no state of an optimizer for all rows; leave optimizer= out, and it starts anew"
        )
    wanted = set(optimizer.initial_state)
    if wanted != set(source.state):
        mine = ", ".join(sorted(wanted)) or "nothing"
        raise ValueError(
            f"{source} hold {', '.join(source.state)} of each row, the optimizer as built here keeps {mine}"
        )


def _fill_state(source: RankFiles, rows_of: ClassRows, optimizer: RowOptimizer) -> None:
    state = optimizer.state_template()
    of_weight = state["state"][0]
    _fill(rows_of, {of_weight[name]: rows for name, rows in source.state.items()})
    if "step" in of_weight and source.step is not None:
        of_weight["step"] = torch.full_like(torch.as_tensor(of_weight["step"]), source.step)
    optimizer.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------- agreement over a mesh


def _together(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """`on_every_rank` over all ranks of a head: its group, and on a 2-D mesh the replicas, too."""
    if ranks.group is None:
        return action()
    if ranks.total == dist.get_world_size():
        return on_every_rank(action)
    if ranks.replica_group is None:
        return on_every_rank(action, ranks.group)
    return on_every_rank(lambda: on_every_rank(action, ranks.group), ranks.replica_group)


def _agree(path: Path, overwrite: bool, rows_of: ClassRows) -> int:
    """A number that all ranks share and no other call; ValueError on every rank if they name different files."""
    ranks, device = rows_of.class_rows.shards.ranks, rows_of.class_rows.device
    mine = torch.tensor(
        [secrets.randbits(48), zlib.crc32(os.fsencode(path)), overwrite], dtype=torch.int64, device=device
    )
    table = all_gather_mesh(mine, ranks).tolist()
    for flat, (_, *asked) in enumerate(table):
        if asked != table[0][1:]:
            raise ValueError(
                f"ranks disagree: {ranks.name(0)} and {ranks.name(flat)} were given another path, or overwrite, to export to"
            )
    return int(table[0][0])


def _saying(what: str, action: Callable[[], Result]) -> Result:
    """An OSError of the system says what could not be done."""
    try:
        return action()
    except OSError as error:
        if error.errno is None:  # words of this module
            raise
        raise type(error)(f"{what}: {error.strerror}") from error
