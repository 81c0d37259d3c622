"""Class weights that another trainer saved in one file per rank, as one matrix.

    file of rank 0   weight [C_0, D]   ─┐
    file of rank 1   weight [C_1, D]   ─┼─>  RankFiles: shape [C_0 + C_1 + ..., D], rows(a, b)
    ...                                ─┘    state: momentum of the same rows, if all files have it

Ranks own contiguous ranges of classes in the order of ranks. The ranges may have any size; the common split is
C // world rows, and one more on the first C % world ranks. These layouts are known (those of InsightFace's
arcface_torch and its descendants); their file names are in rank_paths.py, their keys in torch_file.py:

    checkpoint_gpu_{rank}.pt       "state_dict_softmax_fc": {"weight"}, "state_optimizer": state dict of the optimizer
    softmax_fc_gpu_{rank}.pt       {"weight"}, with "weight_mom", or "weight_exp_avg" and "weight_exp_avg_sq"
    rank_{rank}_softmax_weight.pt  a tensor; momentum in rank_{rank}_softmax_weight_mom.pt; also rank:{rank}_...

In `state_optimizer` the class weights are the last parameter. If the trainer sampled, that may be only the rows of the
last step ("weight_activated"), and momentum only that of some rows. It is imported only if it has the shape of the
weight.

Files are loaded with `weights_only`, so no code in them can run, and memory-mapped, so only what is read is in memory,
one file at a time. (Files in torch's format before version 1.6 cannot be mapped and are loaded whole, one at a time.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partial_fc.tiers import pages
from partial_fc.weights.rank_paths import in_folder, in_order, warn_of_unusual_split
from partial_fc.weights.torch_file import find_weight, load_file, module_state, optimizer_state

log = logging.getLogger("partial_fc")

# row state: name in torch's optimizers -> name in the module
STATE = {"momentum_buffer": "weight_mom", "exp_avg": "weight_exp_avg", "exp_avg_sq": "weight_exp_avg_sq"}

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class RankFiles:
    """Class weights in one file per rank, from a folder or a list of paths in the order of ranks: a `RowSource`.

    Args:
        paths: the folder or the list.
        key: name of the weight in each file, for layouts other than those above; "a/b" for nested dicts.

    Attributes:
        shape: of the whole matrix, `[C, D]`.
        dtype: of its numbers.
        state: momentum and similar state of the same rows, by their names in torch's optimizers; only state that all
            files have for all their rows.
        step: the number of steps of that optimizer, if the files have it.
        options: the options of that optimizer, if the files have them.

    Raises FileNotFoundError, or ValueError naming the file and the way out: a file that is missing, out of order or
    repeated; another width or dtype; no such key; a truncated file, not a torch file, or one that would run code.
    """

    def __init__(self, paths: Paths, *, key: str | None = None) -> None:
        self._key = key
        self._where = str(paths) if isinstance(paths, str | os.PathLike) else f"{len(paths)} files"
        self._paths = (
            in_folder(Path(paths)) if isinstance(paths, str | os.PathLike) else in_order([Path(p) for p in paths])
        )
        self._open: tuple[Path, Any] | None = None  # the file that was read last
        found = [self._inspect(path) for path in self._paths]
        first = found[0]
        for path, part in zip(self._paths, found, strict=True):
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise ValueError(
                    f"{path} has {described(part.shape)} in {_short(part.dtype)}, {self._paths[0]} has "
                    f"{described(first.shape)} in {_short(first.dtype)}; they are not parts of one matrix: "
                    "use the files of one run"
                )
        counts = [part.shape[0] for part in found]
        self._starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.shape = torch.Size((self._starts[-1], *first.shape[1:]))
        self.dtype: torch.dtype = first.dtype
        self.step = first.step
        self.options = first.options
        self.state: dict[str, _State] = {name: _State(self, name) for name in self._complete_state(found)}
        self._open = None
        warn_of_unusual_split(self._where, counts)

    def __str__(self) -> str:
        return f"{self._where} ({len(self._paths)} ranks)" if len(self._paths) > 1 else str(self._paths[0])

    def __len__(self) -> int:
        """Return the number of files, which is the number of ranks."""
        return len(self._paths)

    def rows(self, a: int, b: int) -> Tensor:
        """Return rows a to b, `[b - a, D]`, on the CPU."""
        return self.read_rows(a, b, self._weight)

    def read_rows(self, a: int, b: int, take: Callable[[Path], Tensor]) -> Tensor:
        if not 0 <= a <= b <= self.shape[0]:
            raise IndexError(f"rows {a} to {b} are out of range; there are {self.shape[0]}")
        out = torch.empty(b - a, *self.shape[1:], dtype=self.dtype, device="cpu")
        for path, start, stop in zip(self._paths, self._starts, self._starts[1:], strict=False):
            lo, hi = max(a, start), min(b, stop)
            if lo < hi:
                part = take(path)[lo - start : hi - start]
                _check_pages(path, part)
                out[lo - a : hi - a] = part
        return out

    # ------------------------------------------------------------------------------------------------ one file

    def _content(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = None  # free it before the next one is loaded
            self._open = path, load_file(path)
        return self._open[1]

    def _weight(self, path: Path) -> Tensor:
        content = self._content(path)
        weight = content if isinstance(content, Tensor) and self._key is None else find_weight(path, content, self._key)
        if not weight.is_floating_point() or weight.ndim < 2 or weight.layout != torch.strided:
            raise ValueError(
                f"{path}: the weight must be a floating-point matrix, but is {_short(weight.dtype)} "
                f"{list(weight.shape)}"
            )
        return weight.detach()

    def _inspect(self, path: Path) -> _Found:
        weight = self._weight(path)
        states = {name: state for name in STATE if (state := self.read_state(path, name)) is not None}
        complete = {name for name, state in states.items() if state.shape == weight.shape}
        last_state, options = optimizer_state(self._content(path))
        step = last_state.get("step")
        if not isinstance(step, int | float) and not (isinstance(step, Tensor) and step.numel() == 1):
            step = None
        partial = set(states) - complete
        return _Found(weight.shape, weight.dtype, complete, partial, None if step is None else float(step), options)

    def read_state(self, path: Path, name: str) -> Tensor | None:
        """Return one optimizer state of the rows of a file, of any shape; None if there is none."""
        content = self._content(path)
        if isinstance(content, Tensor):
            beside = path.with_name(f"{path.stem}_mom{path.suffix}")
            if name != "momentum_buffer" or not beside.is_file():
                return None
            content = self._content(beside)
            if not isinstance(content, Tensor):
                raise ValueError(f"{beside} is not a tensor; move it away to import the weights without momentum")
            return content
        in_module = module_state(content).get(STATE[name])
        state = in_module if isinstance(in_module, Tensor) else optimizer_state(content)[0].get(name)
        return state.detach() if isinstance(state, Tensor) else None

    def _complete_state(self, found: list[_Found]) -> list[str]:
        """Return the names of the state that all files have for all rows. Log a warning for other state."""
        names = []
        for name in STATE:
            complete = [path.name for path, part in zip(self._paths, found, strict=True) if name in part.complete]
            partial = [path.name for path, part in zip(self._paths, found, strict=True) if name in part.partial]
            if len(complete) == len(found) and len({part.step for part in found}) == 1:
                names.append(name)
            elif partial:
                log.warning("%s is not imported: %s has it only for the rows of the last step", name, partial[0])
            elif len(complete) == len(found):
                log.warning("%s is not imported: the files are from different optimizer steps", name)
            elif complete:
                log.warning(
                    "%s is not imported: only %d of %d files have it (%s, ...)",
                    name,
                    len(complete),
                    len(found),
                    complete[0],
                )
        if ("exp_avg" in names) != ("exp_avg_sq" in names):
            names = [name for name in names if not name.startswith("exp_avg")]
        return names


def _check_pages(path: Path, part: Tensor) -> None:
    """OSError if the disk cannot read a part of a mapped file; copying it would end the process."""
    places = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    try:
        pages.check(part.data_ptr(), places * part.itemsize)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error


class _State:
    """The rows of one optimizer state: a `RowSource`."""

    def __init__(self, files: RankFiles, name: str) -> None:
        self.shape = files.shape
        self.dtype = files.dtype
        self._files = files
        self._name = name

    def rows(self, a: int, b: int) -> Tensor:
        return self._files.read_rows(a, b, self._take)

    def _take(self, path: Path) -> Tensor:
        state = self._files.read_state(path, self._name)
        assert state is not None
        return state


@dataclass
class _Found:
    """What one file holds, without its tensors."""

    shape: torch.Size
    dtype: torch.dtype
    complete: set[str]  # state in the shape of the weight
    partial: set[str]  # state in another shape
    step: float | None
    options: dict[str, Any]


def described(shape: Sequence[int]) -> str:
    """Return a shape in words: [1000, 512] -> "1,000 classes of width 512"."""
    if not shape:
        return "a single number"
    if len(shape) == 3:
        return f"{shape[0]:,} classes of {shape[1]} rows of width {shape[2]}"
    return f"{shape[0]:,} classes" + (f" of width {shape[1]}" if len(shape) > 1 else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
