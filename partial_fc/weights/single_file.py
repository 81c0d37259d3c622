"""Export class weights and centers to a single file and import them, at any world size.

    export    shard [C_local, ...] of each rank ── row blocks ──> its place in one safetensors file [C, ...]
    import    safetensors file | checkpoint | per-rank files | RowSource ── row blocks ──> shard of each rank

No process holds the matrix `[C, ...]`: beside its shard, a rank holds one block of rows. Paths, shapes, and the header
and length of every file are checked before any row is written, and an error of one rank is raised on every rank. On a
2-D mesh the first replica writes, and each replica reads.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.centers import CenterLoss
from partial_fc.checkpoint.layout import RowSource, block_rows, read
from partial_fc.checkpoint.manifest import MANIFEST, read_manifest
from partial_fc.checkpoint.safe_reader import SafeReader
from partial_fc.checkpoint.save_load import stored_rows, stored_tensors
from partial_fc.classes.interface import check_loss
from partial_fc.distributed.agreement import on_every_rank
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.operation import operation
from partial_fc.distributed.ranks import Ranks
from partial_fc.distributed.shards import local_part
from partial_fc.errors import log
from partial_fc.head import PartialFC
from partial_fc.margins.state import describe_as_built
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.optim.row_state import MASTER
from partial_fc.weights.rank_files import RankFiles, described
from partial_fc.weights.safetensors_file import (
    RowWriter,
    SafetensorsRows,
    check_free,
    create,
    delete_left,
    hold,
    publish,
    read_header,
    temporary_name,
)

SUFFIX = ".safetensors"
OF_TORCH = (".pt", ".pth", ".bin")  # names of torch.save files
OPTIONS = ("lr", "momentum", "betas", "weight_decay")  # of an optimizer in the files of another trainer

HeadOrCenters = PartialFC | CenterLoss
Source = str | os.PathLike[str] | RowSource
Result = TypeVar("Result")


@operation("export_weights")
def export_weights(path: str | os.PathLike[str], rows_of: HeadOrCenters, *, overwrite: bool = False) -> None:
    """Write class weights or centers to one safetensors file. Every rank must call it and see the same folder.

    A head exports `weight [C, D]` (`[C, K, D]` with sub-centers) and, with `Softmax`, `bias [C]`; a `CenterLoss`
    exports `centers [C, D]`; all in their own dtype. The metadata describes them (`describe`). The file appears under
    its name when it is complete.

    Raises, the same on every rank and without leaving a file: FileExistsError if `path` exists and `overwrite` is
    False; OSError if it cannot be written (folder missing or read-only, disk full, a rank that does not see the
    folder); ValueError if ranks pass different paths, or a name that torch.save files have.
    """
    check_loss(rows_of, "export_weights(path, head)")
    rows_of.class_rows.check_group()
    rows_of.class_rows.catch_up()
    path, ranks = Path(path), rows_of.class_rows.shards.ranks
    token = _agree_on_path(path, overwrite, rows_of)
    if path.suffix in OF_TORCH:
        raise ValueError(
            f"{path} is the name of a torch.save file, and what is written is a safetensors file: name it "
            f"{path.with_suffix(SUFFIX)}"
        )
    temporary = temporary_name(path, token)
    parameters = rows_of.class_rows.parameters
    first = ranks.rank == ranks.replica == 0
    held = contextlib.ExitStack()
    metadata = describe(
        "head" if isinstance(rows_of, PartialFC) else "center",
        rows_of.num_classes,
        rows_of.embedding_size,
        describe_as_built(rows_of.margin) if isinstance(rows_of, PartialFC) else None,
    )

    def prepare() -> None:
        if first:
            check_free(path, overwrite)
            delete_left(path)
            create(temporary, {name: (p.shape, p.dtype) for name, p in parameters.items()}, metadata)
            held.enter_context(hold(temporary))

    def write() -> None:
        if ranks.replica:
            return
        if not temporary.exists():
            raise OSError(
                f"{temporary.parent} does not have the file that the first rank created; "
                "export to a folder that all ranks share"
            )
        with RowWriter(temporary) as writer:
            for name, parameter in parameters.items():
                local = local_part(parameter.detach())
                for a, b in blocks(local.shape, local.dtype):
                    writer.write_rows(name, rows_of.class_rows.shards.lo + a, local[a:b])

    def finish() -> None:
        if first:
            publish(temporary, path, overwrite)

    try:
        for action in (prepare, write, finish):
            _on_every_rank(ranks, functools.partial(_naming, path, action))
    finally:
        held.close()
        if first:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def describe(kind: str, num_classes: int, embedding_size: int, margin: str | None) -> dict[str, str]:
    """Return the metadata of an exported file: format (some readers need it), kind, sizes, and the margin of a head."""
    sizes = {"kind": kind, "num_classes": str(num_classes), "embedding_size": str(embedding_size)}
    return {"format": "pt", **sizes, **({} if margin is None else {"margin": margin})}


@operation("import_weights")
def import_weights(
    source: Source, rows_of: HeadOrCenters, *, key: str | None = None, optimizer: RowOptimizer | None = None
) -> None:
    """Fill class weights or centers from a file or another source. Every rank must call it; each reads its own rows.

    Args:
        source: a safetensors file, a checkpoint of this project, a folder of per-rank files (`RankFiles`) or one such
            file, or an object with `shape`, `dtype` and `rows(a, b)`. Number of classes and embedding size must match.
            Values are cast to the head's dtype.
        key: name of the tensor in the source. Default: `weight` (and `bias`, if head and source have one) or `centers`.
            With a key, or from a RowSource, a bias is not imported.
        optimizer: the head's `RowOptimizer`, to import the momentum in per-rank files, too. Its options, such as
            the learning rate, stay as they are; a warning names those that differ in the files.

    Raises, the same on every rank and before any row has changed: FileNotFoundError; ValueError for a source that is
    damaged, lacks the tensor or has another shape; OSError for one that cannot be read. Values are not checked: a NaN
    is imported.
    """
    check_loss(rows_of, "import_weights(source, head)")
    rows_of.class_rows.check_group()
    rows_of.class_rows.catch_up()
    ranks, parameters = rows_of.class_rows.shards.ranks, rows_of.class_rows.parameters
    main = next(iter(parameters))
    if optimizer is not None and rows_of.class_rows.live_optimizer is not optimizer:
        raise ValueError("optimizer must be the RowOptimizer of this head")
    found = _on_every_rank(ranks, lambda: open_weights(source, rows_of, key))
    if optimizer is not None:
        _on_every_rank(ranks, lambda: _check_state(found, optimizer))
    if isinstance(found, SafeReader):
        keys = _checkpoint_keys(found.read_metadata().state_dict_metadata, Path(found.path).parent, rows_of, key)
        state = {stored: parameters[name].detach() for name, stored in keys.items()}
        _on_every_rank(ranks, lambda: read(state, found, alone=True))
    else:
        _on_every_rank(ranks, lambda: _fill(rows_of, {parameters[name]: rows for name, rows in found.items()}))
    if isinstance(rows_of, CenterLoss):
        rows_of.forget_notes()  # pending updates of centers were computed for the old ones
    live = rows_of.class_rows.live_optimizer
    if live is not None:
        for parameter in parameters.values():
            if MASTER in live.state.get(parameter, {}):
                local_part(live.state[parameter][MASTER]).copy_(local_part(parameter.detach()))
    if optimizer is not None:
        files = found[main]  # type: ignore[index]
        _on_every_rank(ranks, lambda: _fill_state(files, rows_of, optimizer))  # type: ignore[arg-type]
        _tell_of_options(files, optimizer)  # type: ignore[arg-type]
    log.info("imported %s of %d classes from %s", main, rows_of.num_classes, _named(source))


# ---------------------------------------------------------------------------------------------------- sources


def open_weights(source: Source, rows_of: HeadOrCenters, key: str | None) -> dict[str, RowSource] | SafeReader:
    """Return parameter name -> RowSource, or the reader of a checkpoint. Make all checks that read no rows."""
    parameters = rows_of.class_rows.parameters
    main, shape = next((name, p.shape) for name, p in parameters.items())
    if isinstance(source, RowSource):
        check_shape(source.shape, shape, _named(source))
        return {main: source}
    path = Path(source)
    if path.is_dir() and (path / MANIFEST).exists():
        stored = stored_tensors(path)  # also checks that all files are complete
        reader = SafeReader(path / read_manifest(path)["data"])
        keys = _checkpoint_keys(stored, path, rows_of, key)
        for name, stored_key in keys.items():
            check_shape(stored[stored_key][0], parameters[name].shape, f"{path}: {stored_key}")
        in_parts = stored_rows(path)
        if in_parts is None:
            return reader
        return {name: in_parts.source(stored_key) for name, stored_key in keys.items()}
    if path.is_dir() or path.suffix in OF_TORCH:
        files = RankFiles(path if path.is_dir() else [path], key=key)
        check_shape(files.shape, shape, str(path))
        return {main: files}
    tensors = read_header(path).tensors
    wanted = {main: main} if key is None else {main: key}
    if key is None and "bias" in parameters:
        if "bias" not in tensors:
            raise ValueError(
                f"{path} has no bias, but the head has one: build it with Softmax(bias=False), or keep the head's bias "
                f"with key={main!r}"
            )
        wanted["bias"] = "bias"
    elif key is None and isinstance(rows_of, PartialFC) and "bias" in tensors:
        raise ValueError(
            f"{path} has a bias, but the head has none: build it with Softmax(), or ignore the bias with key={main!r}"
        )
    sources: dict[str, RowSource] = {}
    for name, stored_key in wanted.items():
        if stored_key not in tensors:
            names = ", ".join(sorted(tensors)) or "none"
            raise ValueError(f"{path} has no tensor {stored_key}; it has {names}: choose one with key=")
        sources[name] = SafetensorsRows(path, stored_key)
        check_shape(sources[name].shape, parameters[name].shape, f"{path}: {stored_key}")
    return sources


def _checkpoint_keys(stored: Collection[str], path: Path, rows_of: HeadOrCenters, key: str | None) -> dict[str, str]:
    """Return parameter name -> key in a checkpoint, of those that it has."""
    prefix = "head" if isinstance(rows_of, PartialFC) else "center"
    main, *others = rows_of.class_rows.parameters
    keys = {main: key} if key is not None else {name: f"{prefix}/{name}" for name in (main, *others)}
    for each in keys.values():
        if each not in stored:
            candidates = [name for name in sorted(stored) if name.endswith(("/weight", "/centers", "/bias"))]
            raise ValueError(
                f"checkpoint {path} has no tensor {each}; it has {', '.join(candidates)}: choose one with key="
            )
    return keys


class OtherShape(ValueError):
    """A source has another shape than what it is for. The message says what to do in one's own loop."""

    def __init__(self, what: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        self.problem = f"{what} has {described(found)}, but {described(wanted)} are expected"
        self.other_classes = bool(found) and found[1:] == wanted[1:]
        advice = ""
        if self.other_classes:
            advice = f"; build for {found[0]:,} classes, import, then call expand() or remap()"
        elif len(found) == len(wanted):
            advice = f"; the embedding size differs: build with embedding_size {found[-1]}"
        super().__init__(self.problem + advice)


def check_shape(found: torch.Size | tuple[int, ...], wanted: torch.Size | tuple[int, ...], what: str) -> None:
    """OtherShape, with both shapes and what to do, unless they are equal."""
    if tuple(found) != tuple(wanted):
        raise OtherShape(what, tuple(found), tuple(wanted))


def _named(source: Source) -> str:
    return str(source) if isinstance(source, str | os.PathLike | RankFiles) else f"the given {type(source).__name__}"


# ---------------------------------------------------------------------------------------------------- rows


def blocks(shape: torch.Size, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the row blocks of a matrix of this shape."""
    size = block_rows(shape[1:], dtype, shape[0])
    for a in range(0, shape[0], size):
        yield a, min(a + size, shape[0])


@torch.no_grad()
def _fill(rows_of: HeadOrCenters, sources: dict[Tensor, RowSource]) -> None:
    """Copy this rank's rows of each source into its tensor."""
    for tensor, source in sources.items():
        local = local_part(tensor.detach())
        for a, b in blocks(local.shape, source.dtype):
            local[a:b].copy_(source.rows(rows_of.class_rows.shards.lo + a, rows_of.class_rows.shards.lo + b))


def _check_state(found: dict[str, RowSource] | SafeReader, optimizer: RowOptimizer) -> None:
    """ValueError unless the source has exactly the row state of the optimizer."""
    source = next(iter(found.values())) if isinstance(found, dict) else found
    if not isinstance(source, RankFiles):
        raise ValueError(
            "optimizer= is only for per-rank files, which may hold momentum; from other sources only class weights are "
            "imported"
        )
    if not source.state:
        raise ValueError(f"{source} has no optimizer state for all rows; omit optimizer= to start with new state")
    wanted = set(optimizer.initial_state)
    if wanted != set(source.state):
        mine = ", ".join(sorted(wanted)) or "nothing"
        raise ValueError(f"{source} has the row state {', '.join(source.state)}, but this optimizer needs {mine}")


def _fill_state(source: RankFiles, rows_of: HeadOrCenters, optimizer: RowOptimizer) -> None:
    state = optimizer.state_template()
    of_weight = state["state"][0]
    _fill(rows_of, {of_weight[name]: rows for name, rows in source.state.items()})
    if "step" in of_weight and source.step is not None:
        of_weight["step"] = torch.full_like(torch.as_tensor(of_weight["step"]), source.step)
    optimizer.load_state_dict(state)


def _tell_of_options(source: RankFiles, optimizer: RowOptimizer) -> None:
    """Log a warning that names the options that differ between the files and the optimizer, which keeps its own."""
    group = optimizer.param_groups[0]
    theirs = {k: v for k, v in source.options.items() if k in OPTIONS and k in group and _plain(v) != _plain(group[k])}
    if theirs:
        log.warning(
            "the optimizer keeps %s, where %s has %s; set them in optimizer.param_groups[0] to go on with those",
            {k: group[k] for k in theirs},
            source,
            theirs,
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------- agreement


def _on_every_rank(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Call `on_every_rank` over all ranks of a head: its group and, on a 2-D mesh, the replicas."""
    if ranks.group is None:
        return action()
    if ranks.total == dist.get_world_size():
        return on_every_rank(action)
    if ranks.replica_group is None:
        return on_every_rank(action, ranks.group)
    return on_every_rank(lambda: on_every_rank(action, ranks.group), ranks.replica_group)


def _agree_on_path(path: Path, overwrite: bool, rows_of: HeadOrCenters) -> int:
    """Return a random number, the same on every rank. ValueError on every rank if their arguments differ."""
    ranks, device = rows_of.class_rows.shards.ranks, rows_of.class_rows.device
    mine = (secrets.randbits(48), zlib.crc32(os.fsencode(path)), overwrite)
    table = meet("export_weights", ranks, device, mine)
    for flat, (_, *arguments) in enumerate(table):
        if arguments != table[0][1:]:
            raise ValueError(
                f"ranks disagree: path or overwrite differs between {ranks.name(0)} and {ranks.name(flat)}; "
                "pass the same on every rank"
            )
    return int(table[0][0])


def _naming(path: Path, action: Callable[[], Result]) -> Result:
    """Call `action`. Add to an OSError of the system which file cannot be written."""
    try:
        return action()
    except OSError as error:
        if error.errno is None:  # an error of this module: its message is complete
            raise
        raise type(error)(f"{path} cannot be written: {error.strerror}") from error
