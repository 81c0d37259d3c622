"""Class weights that other trainers saved in a file a rank, as one matrix.

    file of rank 0   weight [C_0, D]   ─┐
    file of rank 1   weight [C_1, D]   ─┼─>  RankFiles: shape [C_0 + C_1 + ..., D], rows(a, b)
    ...                                ─┘    state: momentum of the same rows, where all files hold it

Ranks own contiguous ranges of classes in the order of their numbers, of any sizes; the common split is C // world rows and one more on
the first C % world ranks. Layouts that are understood (those of InsightFace's arcface_torch and what was made of it):

    checkpoint_gpu_{rank}.pt       "state_dict_softmax_fc": {"weight"}, "state_optimizer": a torch optimizer's state dict
    softmax_fc_gpu_{rank}.pt       {"weight"}, with the module's own "weight_mom", or "weight_exp_avg" and "weight_exp_avg_sq"
    rank_{rank}_softmax_weight.pt  a tensor, with rank_{rank}_softmax_weight_mom.pt beside it; also as rank:{rank}_...

In `state_optimizer` the class weights are the last parameter. Where the trainer sampled, that may be the rows of the last step only
("weight_activated"), whose momentum is that of some rows: it is taken only in the shape of the weight.

Files are loaded with `weights_only`, so that nothing in them can run, and mapped, so that only what is read is in memory; one at a time.
(Files in torch's format of before 1.6 cannot be mapped and are loaded whole, still one at a time.)
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("partial_fc")

LAYOUTS = (r"checkpoint_gpu_(\d+)\.pt", r"softmax_fc_gpu_(\d+)\.pt", r"rank[:_](\d+)_softmax_weight\.pt")
RANK = re.compile(r"(?:rank|gpu)[:_-]?(\d+)")
MODULE, OPTIMIZER = "state_dict_softmax_fc", "state_optimizer"
# state of rows, as torch's optimizers name it -> as the module itself names it
STATE = {"momentum_buffer": "weight_mom", "exp_avg": "weight_exp_avg", "exp_avg_sq": "weight_exp_avg_sq"}

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class RankFiles:
    """The class weights of a folder, or of a list in order of the ranks, of files that each hold one rank's rows: a `RowSource`.

    key: name of the weight in each file, for other layouts than those above; "a/b" for one within another table.

    shape `[C, D]`, dtype. state: momentum and the like of the same rows, by the name of torch's optimizers; empty unless all files hold
    it for all their rows. step: how often that optimizer had stepped, if the files say so. options: of that optimizer, if they are told.

    Raises FileNotFoundError, or ValueError naming the file and what to do: a rank's file that is missing, out of order or there twice,
    another width or dtype, no such key, a truncated file, no file of torch, or one that asks for code to be run.
    """

    def __init__(self, paths: Paths, *, key: str | None = None) -> None:
        self._key = key
        self._where = str(paths) if isinstance(paths, str | os.PathLike) else f"{len(paths)} files"
        self._paths = (
            _in_folder(Path(paths)) if isinstance(paths, str | os.PathLike) else _in_order([Path(p) for p in paths])
        )
        self._open: tuple[Path, Any] | None = None  # the file that was read last
        found = [self._look(path) for path in self._paths]
        first = found[0]
        for path, part in zip(self._paths, found, strict=True):
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise ValueError(
                    f"{path} holds {described(part.shape)} in {_short(part.dtype)}, {self._paths[0]} {described(first.shape)} in "
                    f"{_short(first.dtype)}; they are not of one matrix: give the files of one run"
                )
        counts = [part.shape[0] for part in found]
        self._starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.shape = torch.Size((self._starts[-1], *first.shape[1:]))
        self.dtype: torch.dtype = first.dtype
        self.step, self.options = first.step, first.options
        self.state: dict[str, _State] = {name: _State(self, name) for name in self._state_of_all(found)}
        self._open = None
        _look_at_split(self._where, counts)

    def __str__(self) -> str:
        return f"{self._where} ({len(self._paths)} ranks)" if len(self._paths) > 1 else str(self._paths[0])

    def __len__(self) -> int:
        """How many files, and so ranks, there are."""
        return len(self._paths)

    def rows(self, a: int, b: int) -> Tensor:
        """Rows a to b, `[b - a, D]`, on the CPU."""
        return self._rows(a, b, self._weight)

    def _rows(self, a: int, b: int, take: Callable[[Path], Tensor]) -> Tensor:
        if not 0 <= a <= b <= self.shape[0]:
            raise IndexError(f"rows {a}..{b} of {self.shape[0]}")
        out = torch.empty(b - a, *self.shape[1:], dtype=self.dtype, device="cpu")
        for path, start, stop in zip(self._paths, self._starts, self._starts[1:], strict=False):
            lo, hi = max(a, start), min(b, stop)
            if lo < hi:
                out[lo - a : hi - a] = take(path)[lo - start : hi - start]
        return out

    # ------------------------------------------------------------------------------------------------ one file

    def _content(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None  # before the next is opened
            self._open = path, _load(path)
        return self._open[1]

    def _weight(self, path: Path) -> Tensor:
        content = self._content(path)
        weight = content if isinstance(content, Tensor) and self._key is None else _find(path, content, self._key)
        if not weight.is_floating_point() or weight.ndim < 2 or weight.layout != torch.strided:
            raise ValueError(
                f"{path}: the weight is {list(weight.shape)} of {_short(weight.dtype)}, no matrix of floating-point rows"
            )
        return weight.detach()

    def _look(self, path: Path) -> _Found:
        weight = self._weight(path)
        shapes = {name: state for name in STATE if (state := self._state(path, name)) is not None}
        whole = {name for name, state in shapes.items() if state.shape == weight.shape}
        optimizer = _optimizer_state(self._content(path))
        step = optimizer[0].get("step")
        step = (
            float(step) if isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1) else None
        )
        return _Found(weight.shape, weight.dtype, whole, set(shapes) - whole, step, optimizer[1])

    def _state(self, path: Path, name: str) -> Tensor | None:
        """A piece of the optimizer's state for the rows of a file, of whatever shape, if there is any."""
        content = self._content(path)
        if isinstance(content, Tensor):
            beside = path.with_name(f"{path.stem}_mom{path.suffix}")
            if name != "momentum_buffer" or not beside.is_file():
                return None
            content = self._content(beside)
            if not isinstance(content, Tensor):
                raise ValueError(f"{beside} is no tensor; take it away to import the weights without momentum")
            return content
        in_module = _module(content).get(STATE[name])
        state = in_module if isinstance(in_module, Tensor) else _optimizer_state(content)[0].get(name)
        return state.detach() if isinstance(state, Tensor) else None

    def _state_of_all(self, found: list[_Found]) -> list[str]:
        """What all files hold for all rows; words about what is left out."""
        names = []
        for name in STATE:
            whole = [path.name for path, part in zip(self._paths, found, strict=True) if name in part.whole]
            partial = [path.name for path, part in zip(self._paths, found, strict=True) if name in part.partial]
            if len(whole) == len(found) and len({part.step for part in found}) == 1:
                names.append(name)
            elif partial:
                log.warning("%s is left out: %s has it only for the rows of the last step", name, partial[0])
            elif len(whole) == len(found):
                log.warning("%s is left out: the files are of different steps of the optimizer", name)
            elif whole:
                log.warning("%s is left out: %d of %d files have it (%s, ...)", name, len(whole), len(found), whole[0])
        if ("exp_avg" in names) != ("exp_avg_sq" in names):
            names = [name for name in names if not name.startswith("exp_avg")]
        return names


class _State:
    """Rows of one piece of the optimizer's state: a `RowSource`."""

    def __init__(self, files: RankFiles, name: str) -> None:
        self.shape, self.dtype, self._files, self._name = files.shape, files.dtype, files, name

    def rows(self, a: int, b: int) -> Tensor:
        return self._files._rows(a, b, self._take)

    def _take(self, path: Path) -> Tensor:
        state = self._files._state(path, self._name)
        assert state is not None
        return state


class _Found:
    """What one file holds; nothing of it is kept open."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        whole: set[str],
        partial: set[str],
        step: float | None,
        options: dict[str, Any],
    ) -> None:
        self.shape, self.dtype, self.whole, self.partial, self.step, self.options = (
            shape,
            dtype,
            whole,
            partial,
            step,
            options,
        )


def described(shape: Sequence[int]) -> str:
    """[1000, 512] -> "1,000 classes of width 512"."""
    if len(shape) == 3:
        return f"{shape[0]:,} classes of {shape[1]} rows of width {shape[2]}"
    return f"{shape[0]:,} classes" + (f" of width {shape[1]}" if len(shape) > 1 else "") if shape else "a single number"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------- which files


def _in_folder(folder: Path) -> list[Path]:
    """The files of one layout in a folder, by the number of the rank."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of files of each rank")
    found = {layout: [p for p in folder.iterdir() if re.fullmatch(layout, p.name)] for layout in LAYOUTS}
    found = {layout: paths for layout, paths in found.items() if paths}
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no files of each rank: none is named checkpoint_gpu_0.pt, softmax_fc_gpu_0.pt or rank_0_softmax_weight.pt; "
            "list files of other names in order of the ranks"
        )
    if len(found) > 1:
        names = " and ".join(sorted(paths[0].name for paths in found.values()))
        raise ValueError(f"{folder} holds files of several kinds ({names}); list those to take, in order of the ranks")
    return _in_order(sorted(next(iter(found.values())), key=lambda path: _rank(path) or 0))


def _in_order(paths: list[Path]) -> list[Path]:
    """The paths, if they are those of ranks 0, 1, 2, ... as far as their names tell."""
    if not paths:
        raise ValueError("an empty list of files; list one of each rank, in order")
    for i, path in enumerate(paths):
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}, which is to hold the rows of rank {i}")
        if any(path.samefile(other) for other in paths[:i]):
            raise ValueError(f"{path} is listed twice; list each rank's file once")
    ranks = [_rank(path) for path in paths]
    if None in ranks:
        return paths
    for i, (path, rank) in enumerate(zip(paths, ranks, strict=True)):
        if rank == i:
            continue
        if rank in ranks[:i]:
            raise ValueError(f"{path} is a second file of rank {rank}; list each rank's file once")
        if i not in ranks:
            raise FileNotFoundError(
                f"the file of rank {i} is missing: {path} is of rank {rank}; every rank from 0 on must have one"
            )
        raise ValueError(
            f"the files are out of order: {path} is of rank {rank} and stands where rank {i} belongs; list them by rank"
        )
    return paths


def _rank(path: Path) -> int | None:
    found = RANK.findall(path.name)
    return int(found[-1]) if found else None


def _look_at_split(where: str, counts: list[int]) -> None:
    """A word if sizes are of no usual split, as when a file of another run lies among them."""
    total, world = sum(counts), len(counts)
    even = [total // world + (rank < total % world) for rank in range(world)]
    chunk = -(-total // world)
    chunks = [max(0, min(chunk, total - rank * chunk)) for rank in range(world)]
    if counts not in (even, chunks):
        log.warning(
            "the files in %s hold %s rows, which is no usual split of %d classes; are they of one run?",
            where,
            counts,
            total,
        )


# ---------------------------------------------------------------------------------------------------- what is in a file


def _load(path: Path) -> Any:
    """What torch.load makes of a file, mapped if it can be; it can run nothing."""
    try:
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)|global[^\n]*?`?([\w]+\.[\w.]+)`?", str(error))
        if asked is not None:
            raise ValueError(
                f"{path} asks for {asked[1] or asked[2]} to be run, which tensors and plain values do not need: it is not to be trusted. "
                "If it is your own, load it in the program that wrote it and save the weight tensor alone"
            ) from error
        raise ValueError(f"{path} is no file of torch.save, or damaged") from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        UnicodeDecodeError,
    ) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is truncated, or no file of torch.save ({first_line}); copy it again") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}") from error


def _module(content: Any) -> dict[str, Any]:
    """The state dict of the class weights' module."""
    if not isinstance(content, dict):
        return {}
    module = content.get(MODULE, content)
    return module if isinstance(module, dict) else {}


def _find(path: Path, content: Any, key: str | None) -> Tensor:
    place = _module(content) if key is None else content
    for part in (key or "weight").split("/"):
        if not isinstance(place, dict) or part not in place:
            keys = ", ".join(list(map(str, place))[:12]) if isinstance(place, dict) else f"a {type(place).__name__}"
            raise ValueError(
                f"{path} has no {key or 'weight'}; it holds {keys or 'nothing'}: name the tensor of class weights with key="
            )
        place = place[part]
    if not isinstance(place, Tensor):
        raise ValueError(
            f"{path}: {key or 'weight'} is a {type(place).__name__}, no tensor; name that of the class weights with key="
        )
    return place


def _optimizer_state(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state of the last parameter, its group's options) of a torch optimizer's state dict, empty where there is none."""
    try:
        group = content[OPTIMIZER]["param_groups"][-1]
        state = content[OPTIMIZER]["state"].get(group["params"][-1], {})
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}, {}
    return (state if isinstance(state, dict) else {}), {k: v for k, v in group.items() if k != "params"}
