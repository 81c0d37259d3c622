"""Read class rows that are spread over the parts of a checkpoint (increments.py), a block at a time.

rows a to b of a tensor:   initial values  <  part-0000  <  part-0001  <  the checkpoint's own    (the newest wins)
"""

from __future__ import annotations

import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from partial_fc.checkpoint.increments import DONE, IDS, MISSED
from partial_fc.checkpoint.layout import block_rows, read, read_rows, rows_of_rank
from partial_fc.checkpoint.manifest import naming_the_checkpoint, part_name
from partial_fc.checkpoint.safe_reader import SafeReader
from partial_fc.distributed.shards import local_part
from partial_fc.tiers.store import Initial

MOST_INITIAL = 2.0**31  # which numbers of every kind can be
PLACEHOLDER = "__tensor__"  # {PLACEHOLDER: key} stands for a tensor in a skeleton (save_load.py)

# (missed steps, name of a parameter, its rows and their state, how many steps each has had) -> these rows and state as
# they would be now: one function, of optim/saved_steps.py
MADE_UP: list[Callable[[Mapping[str, Any], str, dict[str, Tensor], Tensor], dict[str, Tensor]]] = []


def link_parts(before: Path, parts: list[str], data: Path) -> None:
    """Give a new data folder what an earlier one and its parts have: by hard links, or copies where there are none."""
    with naming_the_checkpoint(data.parent):
        for i, part in enumerate(parts):
            target = data / part_name(i)
            target.mkdir()
            for file in sorted((before / part).iterdir()):
                if file.is_file():
                    _link(file, target / file.name)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
        with target.open("rb") as copy:
            os.fsync(copy.fileno())


class _Part:
    """One data folder: the rows of losses that it has."""

    def __init__(self, folder: Path) -> None:
        self.reader = SafeReader(folder)
        self._bounds: dict[str, list[tuple[int, int, int, int]]] = {}
        self._chunks: dict[str, tuple[int, Tensor]] = {}  # the last one read, and its first row

    def size(self, key: str) -> int:
        stored = self._stored(key)
        return 0 if stored is None else next(iter(stored.size))

    def ids(self, loss: str, a: int, b: int) -> tuple[int, Tensor]:
        """Return which class ids from a to b it has, ascending `[n]`, and the place of the first among all it has."""
        found: list[Tensor] = []
        place = 0
        for start, end, first, last in self.bounds(loss):
            if last < a:
                place = end
            elif first < b:
                chunk = self.rows(f"{loss}{IDS}", start, end)
                i, j = torch.searchsorted(chunk, torch.tensor([a, b], device="cpu")).tolist()
                place = place if found else start + i
                found.append(chunk[i:j])
        return place, torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")

    def check_ids(self, loss: str, classes: int) -> None:
        """ValueError unless they are ascending numbers of classes."""
        ends = [(first, last) for _, _, first, last in self.bounds(loss)]
        ascending = all(a[1] < b[0] for a, b in pairwise(ends))
        if ends and not (ascending and ends[0][0] >= 0 and ends[-1][1] < classes):
            raise ValueError(f"{self.reader.path} is damaged: its class ids are not ascending numbers of classes")

    def ranges(self, loss: str, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Yield bounds of class ids from lo to hi, so that a chunk has those between two."""
        for _, _, first, last in self.bounds(loss):
            if last >= lo and first < hi:
                yield max(first, lo), min(last + 1, hi)

    def bounds(self, loss: str) -> list[tuple[int, int, int, int]]:
        """Return for each chunk of class ids where it begins and ends, and its first and last class id."""
        if loss not in self._bounds:
            self._bounds[loss] = list(self._read_bounds(f"{loss}{IDS}"))
        return self._bounds[loss]

    def _read_bounds(self, key: str) -> Iterator[tuple[int, int, int, int]]:
        starts = self._starts(key)
        for start, end in pairwise([*starts, self.size(key)]) if starts else ():
            ids = self.rows(key, start, end)
            if ids.dtype != torch.int64 or ids.ndim != 1 or not bool((ids[1:] > ids[:-1]).all()):
                raise ValueError(f"{self.reader.path} is damaged: its class ids are not ascending numbers of classes")
            yield start, end, int(ids[0]), int(ids[-1])

    def rows(self, key: str, i: int, j: int) -> Tensor:
        """Return the stored rows i to j of a tensor. Whoever asks for ascending rows reads each chunk once."""
        starts = self._starts(key)
        found: list[Tensor] = []
        while i < j:
            which = bisect_right(starts, i) - 1
            first, end = starts[which], [*starts, self.size(key)][which + 1]
            if self._chunks.get(key, (-1, None))[0] != first:
                self._chunks[key] = first, read_rows(self.reader, key, first, end)
            end = min(j, end)
            found.append(self._chunks[key][1][i - first : end - first])
            i = end
        return found[0] if len(found) == 1 else torch.cat(found)

    def _starts(self, key: str) -> list[int]:
        """Return the first row of each chunk of a tensor."""
        stored = self._stored(key)
        return [] if stored is None else sorted(next(iter(chunk.offsets)) for chunk in stored.chunks)

    def _stored(self, key: str) -> TensorStorageMetadata | None:
        found = self.reader.read_metadata().state_dict_metadata.get(key)
        return found if isinstance(found, TensorStorageMetadata) else None


class StoredRows:
    """The class rows of a checkpoint with parts. ValueError if its manifest is damaged."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        data = folder / manifest["data"]
        self.parts = [_Part(data / part) for part in (*manifest["parts"], "")]
        self.own = self.parts[-1].reader
        self.losses: dict[str, Any] = manifest["rows"]
        self.of: dict[str, str] = {}  # key -> loss
        self.initial: dict[str, Initial] = {}
        self.described: dict[str, TensorStorageMetadata] = {}  # key -> what it is as a whole
        self._missed: dict[str, Any] = {}
        try:
            for loss, entry in self.losses.items():
                self._describe(loss, entry, manifest["names"])
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"the manifest of checkpoint {folder} is damaged: {error}") from error

    def _describe(self, loss: str, entry: dict[str, Any], names: list[str]) -> None:
        """Note the tensors of a loss; AssertionError, or what comes of other kinds of values, if they cannot be."""
        optimizer, counts = entry["optimizer"], entry["counts"]
        assert loss in names and (optimizer is None or optimizer in names), f"{loss} or {optimizer} is not in it"
        assert optimizer is None or f"{optimizer}/{DONE}" in entry["tensors"], f"steps of {optimizer} are not in it"
        assert len(counts) == len(self.parts) and all(type(n) is int for n in counts), f"it counts {counts}"
        for key, tensor in entry["tensors"].items():
            size = torch.Size([entry["classes"], *tensor["row"]])
            assert min(size) >= 0 and key.split("/")[0] in names, f"{key} has the shape {list(size)}"
            self.described[key], self.of[key] = TensorStorageMetadata(_properties(tensor["dtype"]), size, []), loss
            self.initial[key] = _initial(**tensor["initial"])

    def check(self) -> None:
        """ValueError if a part is damaged. Reads no rows."""
        for i, part in enumerate(self.parts):
            part.reader.check()
            for loss, entry in self.losses.items():
                sizes = [part.size(key) for key in (f"{loss}{IDS}", *entry["tensors"])]
                if max(sizes) != entry["counts"][i]:
                    raise ValueError(f"{part.reader.path} is damaged: it has not {entry['counts'][i]} rows of {loss}")
            for key, whole in self.described.items():
                stored = part.reader.read_metadata().state_dict_metadata.get(key)
                if stored is None:
                    continue
                size: Any = getattr(stored, "size", ())
                dtype = getattr(getattr(stored, "properties", None), "dtype", None)
                if size[1:] != whole.size[1:] or dtype != whole.properties.dtype:
                    raise ValueError(f"{part.reader.path} is damaged: {key} is not what the manifest says")
                ids = part.size(f"{self.of[key]}{IDS}")
                if size[0] != ids and (ids or size[0] != whole.size[0]):
                    raise ValueError(f"{part.reader.path} is damaged: {key} has {size[0]} rows of {ids} classes")

    def metadata(self) -> dict[str, Any]:
        """Return what the checkpoint has by key, class rows as a whole."""
        found = dict(self.own.read_metadata().state_dict_metadata)
        return {key: value for key, value in found.items() if not key.endswith(IDS)} | self.described

    def rows(self, key: str, a: int, b: int) -> Tensor:
        """Return rows a to b of a tensor as they were saved."""
        loss, (whole, parts) = self.of[key], self._newest(key)
        out = torch.empty(0, device="cpu") if whole else self._initial(key, a, b)
        for part in parts:
            if not part.size(key):
                continue
            if self._has_all(part, key):
                out = part.rows(key, a, b).clone()
                continue
            i, ids = part.ids(loss, a, b)
            if len(ids):
                out.index_copy_(0, ids - a, part.rows(key, i, i + len(ids)))
        return out

    def made_up(self, key: str, a: int, b: int) -> Tensor:
        """Return rows a to b of a tensor after the steps that they have missed."""
        loss = self.of[key]
        optimizer = self.losses[loss]["optimizer"]
        if optimizer is None or key.endswith(DONE):
            return self.rows(key, a, b)
        if optimizer not in self._missed:
            self._missed[optimizer] = self._missed_steps(optimizer)
        missed = self._missed[optimizer]
        for name, each in missed["parameters"].items():
            state = f"{optimizer}/state/{each['place']}/"
            wanted = "" if key == f"{loss}/{name}" else key.removeprefix(state) if key.startswith(state) else None
            if wanted is None:
                continue
            values = {k.removeprefix(state): self.rows(k, a, b) for k in self.described if k.startswith(state)}
            values[""] = self.rows(f"{loss}/{name}", a, b)
            done = self.rows(f"{optimizer}/{DONE}", a, b)
            try:
                return MADE_UP[0](missed, name, values, done)[wanted]
            except (AttributeError, IndexError, KeyError, RuntimeError) as error:
                raise ValueError(f"checkpoint {self.folder}: {key} cannot make its missed steps: {error}") from error
        return self.rows(key, a, b)

    def source(self, key: str) -> StoredTensor:
        """Return a tensor as a `RowSource` (layout.py), after the steps that its rows have missed."""
        return StoredTensor(self, key)

    def is_plain(self, key: str, made_up: set[str]) -> bool:
        """Return whether all rows of a tensor are in the checkpoint's own part, as whoever loads them wants them.
        made_up: see `leave_out_missed`."""
        wanted = self.losses[self.of[key]]["optimizer"] not in made_up
        return len(self.parts) == 1 and wanted and self._has_all(self.parts[0], key)

    def leave_out_missed(self, skeletons: dict[str, Any]) -> set[str]:
        """Take the missed steps out of the states of optimizers that are loaded without the rows, or their loss alone
        is loaded: rows make them then. Return the names of these optimizers."""
        left = set()
        for loss, entry in self.losses.items():
            optimizer = entry["optimizer"]
            if optimizer is not None and not {loss, optimizer} <= skeletons.keys():
                left.add(optimizer)
                if isinstance(skeletons.get(optimizer), dict):
                    skeletons[optimizer].pop(MISSED, None)
        return left

    def untouched(self, named: Mapping[str, Any], made_up: set[str]) -> dict[str, Any]:
        """Return by name the `ClassRows` of losses in a storage that are loaded as they were saved, and of which nobody
        has touched a row: those that the checkpoint has not either may stay so. made_up: see `leave_out_missed`."""
        found = {loss: getattr(named.get(loss), "class_rows", None) for loss in self.losses}
        fresh = {
            loss: rows
            for loss, rows in found.items()
            if rows is not None and rows.store is not None and rows.store.untouched == rows.store.count
            if self.losses[loss]["optimizer"] not in made_up
        }
        whole = {self.of[key] for key in self.described if any(self._has_all(part, key) for part in self.parts)}
        return {loss: rows for loss, rows in fresh.items() if loss not in whole}

    def _touch(self, loss: str, store: Any, tensors: Mapping[str, Tensor]) -> bool:
        """Touch the rows of a storage that the checkpoint has; all, and return False, where others would have other
        values than they had in the run that saved it."""
        of_loss = [key for key in tensors if self.of[key] == loss and not key.endswith(DONE)]
        held = {key: store.rows_of(local_part(tensors[key].detach())) for key in of_loss}
        if any(held[key] is None or held[key].initial != self.initial[key] for key in of_loss):
            store.ready(None)
            return False
        for part in self.parts:
            for a, b in part.ranges(loss, store.lo, store.lo + store.count):
                store.ready(part.ids(loss, a, b)[1] - store.lo, ahead=False)
        return True

    def fill(
        self, tensors: Mapping[str, Tensor], made_up: set[str], untouched: Mapping[str, Any] | None = None
    ) -> None:
        """Read this rank's rows into its tensors. made_up: see `leave_out_missed`. untouched: as the method of this
        name returns it. ValueError, before anything has changed, if there is damage that can be seen without them."""
        for part in self.parts if tensors else ():
            for loss, entry in self.losses.items():
                part.check_ids(loss, entry["classes"])
        for optimizer in made_up:
            self._missed[optimizer] = self._missed_steps(optimizer)
        stay = {loss for loss, rows in (untouched or {}).items() if self._touch(loss, rows.store, tensors)}
        for key, tensor in tensors.items():
            if self.losses[self.of[key]]["optimizer"] not in made_up:
                in_store = self.of[key] in stay and not key.endswith(DONE)
                self._fill(key, tensor, initial=not in_store)
                continue
            (lo, hi), local = _own_rows(tensor), local_part(tensor.detach())
            for a, b in self.blocks(key, lo, hi):
                local[a - lo : b - lo].copy_(self.made_up(key, a, b))
        for rows in (untouched or {}).values():
            rows.store.wrote()

    def _fill(self, key: str, tensor: Tensor, initial: bool) -> None:
        """Read this rank's rows of a tensor as they were saved: part by part, each over those before. initial: rows
        that no part has get initial values."""
        loss, (lo, hi), local = self.of[key], _own_rows(tensor), local_part(tensor.detach())
        whole, parts = self._newest(key)
        if initial and not whole:
            for a, b in self.blocks(key, lo, hi):
                local[a - lo : b - lo].copy_(self._initial(key, a, b))
        for part in parts:
            if self._has_all(part, key):
                read({key: tensor}, part.reader, alone=True)
            elif part.size(key):
                for a, b in part.ranges(loss, lo, hi):
                    place, ids = part.ids(loss, a, b)
                    rows = part.rows(key, place, place + len(ids))
                    local.index_copy_(0, (ids - lo).to(local.device), rows.to(local.device, local.dtype))

    def blocks(self, key: str, a: int, b: int) -> list[tuple[int, int]]:
        """Return the bounds of blocks of rows a to b in which a tensor is read."""
        size = block_rows(self.described[key].size[1:], self.described[key].properties.dtype, max(b - a, 1))
        return [(start, min(start + size, b)) for start in range(a, b, size)]

    def _initial(self, key: str, a: int, b: int) -> Tensor:
        whole = self.described[key]
        out = torch.zeros(b - a, *whole.size[1:], dtype=whole.properties.dtype, device="cpu")
        if not self.initial[key].is_zero:
            self.initial[key].write(out, torch.arange(b - a, device="cpu"), a)
        return out

    def _has_all(self, part: _Part, key: str) -> bool:
        """Return whether a part has all rows of a tensor, so that nothing of what was there before is left."""
        return part.size(key) == self.described[key].size[0] and not part.size(f"{self.of[key]}{IDS}")

    def _newest(self, key: str) -> tuple[bool, list[_Part]]:
        """Return whether some part has all rows of a tensor, and the parts from the newest such on, or all."""
        whole = [i for i, part in enumerate(self.parts) if self._has_all(part, key)]
        return bool(whole), self.parts[whole[-1] if whole else 0 :]

    def _missed_steps(self, optimizer: str) -> dict[str, Any]:
        skeleton: dict[str, Any] = {optimizer: 0}
        read(skeleton, self.own, alone=True)
        try:
            missed: dict[str, Any] = skeleton[optimizer][MISSED]
            for each in missed["parameters"].values():
                key = each["table"][PLACEHOLDER]
                stored = self.own.read_metadata().state_dict_metadata[key]
                tables = {key: torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu")}  # type: ignore[union-attr]
                read(tables, self.own, alone=True)
                each["table"] = tables[key]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint {self.folder} is damaged: what its rows have missed is not there") from error
        return missed


def _own_rows(tensor: Tensor) -> tuple[int, int]:
    return rows_of_rank(tensor) if isinstance(tensor, DTensor) else (0, len(tensor))


def _properties(dtype: str) -> TensorProperties:
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype), f"{dtype!r} is no dtype"
    return TensorProperties(dtype=found)


def _initial(std: float, seed: int | None, fill: float, dtype: str) -> Initial:
    assert seed is None or type(seed) is int, f"{seed!r} is no seed"
    assert max(abs(std), abs(fill)) < MOST_INITIAL, f"initial values of {std!r} and {fill!r}"
    return Initial(std=float(std), seed=seed, dtype=_properties(dtype).dtype, fill=float(fill))


class StoredTensor:
    """A `RowSource` of one tensor of a checkpoint with parts."""

    def __init__(self, stored: StoredRows, key: str) -> None:
        self._stored, self._key = stored, key
        self.shape = stored.described[key].size
        self.dtype = stored.described[key].properties.dtype

    def rows(self, a: int, b: int) -> Tensor:
        return self._stored.made_up(self._key, a, b)
