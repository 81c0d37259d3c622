"""The commands `partial-fc export` and `partial-fc import`: class weights to and from files, without a process group.

    export   newest checkpoint of a run ── stored blocks, one at a time ──> FILE.safetensors
    import   FILE.safetensors, or one file per rank ── blocks of rows ──> a checkpoint that any number of ranks can load

Only one block is in memory at a time. The imported checkpoint holds more than the matrix (the margin's state, the
forward count): these values are those of a newly built head.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from torch import Tensor
from tqdm import tqdm

from partial_fc.centers import CenterLoss
from partial_fc.checkpoint.layout import RowSource
from partial_fc.checkpoint.manifest import MANIFEST
from partial_fc.checkpoint.save_load import save_checkpoint, stored_tensors, stored_values, stream_tensor
from partial_fc.head import PartialFC
from partial_fc.margins.description import same_margin
from partial_fc.margins.variants import NormFace
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.training.cli.parser import add_traceback
from partial_fc.training.errors import UserError
from partial_fc.training.heads import MarginSettings
from partial_fc.training.saved import CONFIG, checkpoint_in
from partial_fc.training.settings_parser import SettingsParser
from partial_fc.weights.rank_files import RankFiles
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
from partial_fc.weights.single_file import OPTIONS, SUFFIX, describe

DEFAULT_MARGIN = MarginSettings("ArcFace")
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum_buffer": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "exp_avg": (torch.optim.AdamW, {"lr": 1e-3}),
}


def export_weights_command(arguments: list[str]) -> None:
    """`partial-fc export`: write class weights or centers of a checkpoint as one safetensors file."""
    parser = jsonargparse.ArgumentParser(
        prog="partial-fc export",
        description="Write class weights or centers of a checkpoint as one safetensors file.",
        exit_on_error=False,
    )
    parser.add_argument(
        "source", metavar="CHECKPOINT_OR_RUN", help="a checkpoint, or the folder of a run, for its newest checkpoint"
    )
    parser.add_argument("file", metavar="FILE.safetensors", help="file to write")
    parser.add_argument(
        "--name",
        default=None,
        help="name of the head or center loss in the checkpoint (default: head, if there is one)",
    )
    parser.add_argument("--overwrite", action="store_true", help="overwrite an existing file")
    add_traceback(parser)
    options = parser.parse_args(arguments)
    path = Path(options.file)
    if path.suffix != SUFFIX:
        raise UserError(f"{path} is not the name of a safetensors file; give a name that ends in {SUFFIX}")
    try:
        check_free(path, options.overwrite)
        checkpoint = _find_checkpoint(Path(options.source))
        stored = stored_tensors(checkpoint)
        name = _find_name(checkpoint, stored, options.name)
        keys = {kind: f"{name}/{kind}" for kind in ("weight", "centers", "bias") if f"{name}/{kind}" in stored}
        tensors = {tensor: (key, *stored[key]) for tensor, key in keys.items()}
        _export(checkpoint, path, options.overwrite, name, tensors)
    except ValueError as error:
        raise UserError(str(error)) from error
    except FileExistsError as error:
        raise UserError(f"{error}: --overwrite") from error
    print(f"{path}: {', '.join(f'{tensor} {list(stored[key][0])}' for tensor, key in keys.items())} of {checkpoint}")


def _find_checkpoint(source: Path) -> Path:
    """Return `source` if it is a checkpoint, or the newest checkpoint of the run folder `source`."""
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; give a checkpoint or the folder of a run")
    found = checkpoint_in(source)
    if found is None:
        raise UserError(f"{source} is neither a checkpoint (it has no {MANIFEST}) nor the folder of a run")
    return found


def _find_name(checkpoint: Path, stored: dict[str, Any], wanted: str | None) -> str:
    """Return the name of the head or center loss to export: `wanted`, or "head", or the only one in the checkpoint."""
    names = sorted(
        {key.split("/")[0] for key in stored if key.count("/") == 1 and key.endswith(("/weight", "/centers"))}
    )
    if wanted is None and "head" in names:
        return "head"
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        existing = ", ".join(names) or "none"
        missing = "no head" if wanted is None else f"no class weights or centers named {wanted}"
        raise UserError(f"{checkpoint} has {missing}; it has {existing}: choose with --name")
    return str(wanted)


def _export(
    checkpoint: Path, path: Path, overwrite: bool, name: str, tensors: dict[str, tuple[str, torch.Size, torch.dtype]]
) -> None:
    kind = "center" if "centers" in tensors else "head"
    extra = stored_values(checkpoint, name).get("_extra_state")
    margin = extra.get("margin") if isinstance(extra, dict) else None
    _, shape, _ = next(iter(tensors.values()))
    metadata = describe(kind, shape[0], shape[-1], margin)
    temporary = temporary_name(path)
    try:
        delete_left(path)
        create(temporary, {tensor: (shape, dtype) for tensor, (_, shape, dtype) in tensors.items()}, metadata)
        with (
            hold(temporary),
            RowWriter(temporary) as writer,
            _progress_bar("exporting", sum(shape[0] for _, shape, _ in tensors.values())) as bar,
        ):
            for tensor, (key, _, _) in tensors.items():
                stream_tensor(checkpoint, key, _BlockWriter(writer, tensor, bar))
        publish(temporary, path, overwrite)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class _BlockWriter:
    """Writes the blocks of one tensor as they are read."""

    def __init__(self, writer: RowWriter, tensor: str, bar: Any) -> None:
        self._writer = writer
        self._tensor = tensor
        self._bar = bar

    def __call__(self, first: int, rows: Tensor) -> None:
        self._writer.write_rows(self._tensor, first, rows)
        self._bar.update(len(rows))


def _progress_bar(what: str, rows: int) -> Any:
    return tqdm(total=rows, unit="row", unit_scale=True, desc=what, mininterval=0.5)


# ------------------------------------------------------------------------------------------------------------ import


def import_weights_command(arguments: list[str]) -> None:
    """`partial-fc import`: make a checkpoint of class weights that come from other files."""
    parser = SettingsParser(
        prog="partial-fc import",
        description="Make a checkpoint, for any number of ranks, of class weights in a safetensors file or in one "
        "file per rank.",
        exit_on_error=False,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="FILE.safetensors, or a folder with one file per rank, or these files in the order of the ranks",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="CHECKPOINT",
        help="folder for the checkpoint; it must not hold one already",
    )
    parser.add_argument(
        "--key", default=None, help="name of the tensor in the file or files, if it is not the usual one"
    )
    parser.add_argument(
        "--name", default=None, help="name of the weights in the checkpoint (default: head, or center for centers)"
    )
    add_traceback(parser)
    words = "The margin of the head, with its arguments after it: --margin CosFace --margin.margin 0.35."
    parser.add_class_option("margin", MarginSettings, DEFAULT_MARGIN, words)
    asked = parser.parse_args(arguments)
    given = parser.parse_args(arguments, defaults=False).get("margin")
    margin = DEFAULT_MARGIN if given is None else MarginSettings.read(given, "margin", DEFAULT_MARGIN)
    try:
        margin.build_margin(torch.ones(2), "margin")
        output = Path(asked.output)
        if (output / MANIFEST).exists():
            raise UserError(f"{output} already holds a checkpoint; choose another --output")
        for source in map(Path, asked.sources):
            if (source / CONFIG).is_file():
                raise UserError(
                    f"{source} is a run, which needs no import: give it to --head.weights, or one of its checkpoints "
                    "to load_checkpoint"
                )
        sources, kind, described = _open_sources([Path(p) for p in asked.sources], asked.key)
        if kind == "head" and described is not None and given is None:
            built = margin.build_margin(torch.ones(sources["weight"].shape[0]), "margin").describe()
            if not same_margin(described, built):
                raise UserError(
                    f"{asked.sources[0]} comes from a head with {described}; give the margin of the checkpoint: "
                    "--margin, --margin.scale, ..."
                )
        name = asked.name or kind
        if not name.isidentifier():
            raise UserError(
                f"--name {name} is not a valid name; use letters, digits and _, because the checkpoint is loaded with "
                f"load_checkpoint(path, {name}=...)"
            )
        _import(output, name, sources, kind, margin)
    except ValueError as error:
        raise UserError(str(error)) from error


def _open_sources(paths: list[Path], key: str | None) -> tuple[dict[str, RowSource], str, str | None]:
    """Return (name of a tensor -> its rows, "head" or "center", the margin that the file names or None)."""
    if paths[0].suffix != SUFFIX:
        return (
            {"weight": RankFiles(paths[0] if len(paths) == 1 and paths[0].is_dir() else paths, key=key)},
            "head",
            None,
        )
    if len(paths) > 1:
        raise UserError(
            f"got {len(paths)} files, starting with {paths[0]}; a safetensors file holds all rows, so give a single one"
        )
    header = read_header(paths[0])
    kind = "center" if key is None and "centers" in header.tensors and "weight" not in header.tensors else "head"
    main = "centers" if kind == "center" else "weight"
    sources: dict[str, RowSource] = {main: SafetensorsRows(paths[0], key or main)}
    if kind == "head" and key is None and "bias" in header.tensors:
        sources["bias"] = SafetensorsRows(paths[0], "bias")
    return sources, kind, header.metadata.get("margin")


def _import(output: Path, name: str, sources: dict[str, RowSource], kind: str, margin: MarginSettings) -> None:
    main = next(iter(sources.values()))
    state = _center_state(main) if kind == "center" else _head_state(sources, margin)
    parameters = sum(key in ("weight", "bias", "margin.offset") for key in state)
    optimizer = _optimizer_state(main, parameters) if isinstance(main, RankFiles) and main.state else None
    values = [*state.values(), *(optimizer["state"][0].values() if optimizer else ())]
    streamed = [value for value in values if isinstance(value, _ObservedRows)]
    with _progress_bar("importing", sum(source.shape[0] for source in streamed)) as bar:
        for source in streamed:
            source.bar = bar
        parts = {name: _State(state)}
        if optimizer:
            parts[f"{name}_optimizer"] = _State(optimizer)
        save_checkpoint(output, **parts)
    files = f" from {len(main)} files" if isinstance(main, RankFiles) else ""
    print(f"{output}: {name}, {main.shape[0]:,} classes of width {main.shape[-1]}{files}")
    if optimizer:
        options = {k: v for k, v in optimizer["param_groups"][0].items() if k in OPTIONS}
        more = f"loading it also sets {options}" if options else "its options stay as they are: the files have none"
        print(f"and {name}_optimizer with {', '.join(optimizer['state'][0])}; {more}")


def _head_state(sources: dict[str, RowSource], settings: MarginSettings) -> dict[str, Any]:
    """Return the state dict of a newly built head, with the rows of `sources`."""
    weight = sources["weight"]
    classes, width = weight.shape[0], weight.shape[-1]
    margin, of_head = (settings.build_margin(torch.ones(classes), "margin") for _ in range(2))
    head = PartialFC(width, classes, of_head, device="meta", dtype=weight.dtype)
    state = dict(head.state_dict())
    margin.prepare(classes, classes)
    for key, parameter in margin.named_parameters():
        parameter.data = parameter.data.to(state[f"margin.{key}"].dtype)
    margin.reset()
    start = {f"margin.{key}": value for key, value in margin.state_dict().items()}
    if state["weight"].shape != weight.shape:
        raise UserError(
            f"the weight has the shape {list(weight.shape)}, but a head with --margin {settings.name} has "
            f"{list(state['weight'].shape)}; --margin SubCenterArcFace --margin.centers K has K rows per class, every "
            "other margin of the package one"
        )
    if "bias" in sources and "bias" not in state:
        raise UserError(
            f"the file has a bias, but a head with --margin {settings.name} has none; give --margin Softmax, or "
            "--key weight"
        )
    for key, value in state.items():
        if key in sources:
            state[key] = _ObservedRows(sources[key])
        elif key == "bias":
            state[key] = torch.zeros(value.shape, dtype=value.dtype)
        elif key in start:
            state[key] = start[key].detach()
    return state


def _center_state(centers: RowSource) -> dict[str, Any]:
    loss = CenterLoss(centers.shape[-1], centers.shape[0], device="meta", dtype=centers.dtype)
    return {key: _ObservedRows(centers) if key == "centers" else value for key, value in loss.state_dict().items()}


def _optimizer_state(files: RankFiles, parameters: int) -> dict[str, Any]:
    """Return the state dict of a `RowOptimizer` with the per-row state in the files, and the options that they have.

    parameters: how many the head has. The files have state of its weight.
    """
    cls, options = next(OPTIMIZERS[key] for key in files.state)
    accepted = inspect.signature(cls).parameters
    known = {
        k: v for k, v in files.options.items() if k in accepted and isinstance(v, bool | int | float | tuple | list)
    }
    optimizer = RowOptimizer(cls, PartialFC(1, 1, NormFace()), **{**options, **known})
    state = optimizer.state_dict()
    # only what the files say: loading sets these options, and leaves others as they are
    state["param_groups"] = [{**known, "params": list(range(parameters))}]
    state["state"] = {0: {key: _ObservedRows(rows) for key, rows in files.state.items()}}
    if "exp_avg" in files.state:
        if files.step is None:
            raise ValueError(
                f"{files} hold exp_avg, but not the number of optimizer steps; remove state_optimizer to import only "
                "the weights"
            )
        state["state"][0]["step"] = torch.tensor(files.step)
    return state


class _ObservedRows:
    """A `RowSource` that updates a progress bar."""

    def __init__(self, source: RowSource) -> None:
        self.shape = torch.Size(source.shape)
        self.dtype = source.dtype
        self._source = source
        self.bar: Any = None

    def rows(self, a: int, b: int) -> Tensor:
        rows = self._source.rows(a, b)
        if self.bar is not None:
            self.bar.update(b - a)
        return rows


class _State:
    """A state dict in the form that save_checkpoint takes."""

    def __init__(self, state: dict[str, Any] | None) -> None:
        self._state = state or {}

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError("this object is only saved")
