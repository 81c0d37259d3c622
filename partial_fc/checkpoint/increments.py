"""Class rows in checkpoints: as they are, with the steps that they have missed, so that saving changes nothing; and of
rows in a storage (tiers/) those alone that changed since the checkpoint before, with links to it.

    step-000002000/
      manifest.json       "parts", and under "rows" what a loss has: its tensors, and how many rows each part has of it
      data-0001/          the state of this step, but of class rows those alone that may have changed since step 1000,
                          as they are, with the steps that they have missed (optim/saved_steps.py)
        part-0000/        hard links to what earlier checkpoints wrote: rows that changed up to them
        part-0001/

So each checkpoint is complete by itself, whatever becomes of the others. A row is that of the newest part that has it;
a row that no part has was never touched and has its initial values (tiers/initial.py). All rows that were ever touched
are written anew when half of them have changed, or when parts are many or have twice as many rows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from partial_fc.checkpoint.layout import RowBlocks, block_rows
from partial_fc.checkpoint.manifest import WITH_PARTS, find_damage, part_name, read_manifest
from partial_fc.checkpoint.named import unwrapped
from partial_fc.distributed.groups import device_of, ranks_of
from partial_fc.distributed.shards import local_part
from partial_fc.distributed.texts import gather_texts

log = logging.getLogger("partial_fc")

MISSED = "missed_steps"  # of the state of an optimizer
DONE = f"{MISSED}/done"  # how many of them each row has had
IDS = "#rows"  # behind the name of a loss: which class ids a part has
MOST_PARTS = 16
FLAGS = 1 << 16  # that are looked at together

Copy = Callable[[str, Tensor], Tensor]  # (name, tensor) -> the tensor to write instead


@dataclass(frozen=True)
class SavedIn:
    """Where all rows of a store were saved, or loaded from. versions: of its parameters then."""

    checkpoint: Path
    token: str
    versions: tuple[int, ...]


@contextlib.contextmanager
def rows_as_they_are(of_losses: Iterable[Any]) -> Iterator[None]:
    """Within it, state dicts of these `ClassRows` have rows that have missed steps, and touch none."""
    losses = [*of_losses]
    for rows in losses:
        rows.as_they_are = True
    try:
        yield
    finally:
        for rows in losses:
            rows.as_they_are = False


class _Loss:
    """The rows of one loss that a checkpoint is to have."""

    def __init__(self, name: str, rows: Any, optimizer: str | None, missing: bool) -> None:
        self.name = name
        self.rows = rows
        self.optimizer = optimizer  # its name, if it is saved too
        self.missing = missing  # rows may have missed steps
        self.names = [name] if optimizer is None else [name, optimizer]  # whose states have its rows
        self.tensors: dict[str, dict[str, Any]] = {}  # by key, as the manifest describes them
        self.row_bytes = 0  # of all of them
        self.chosen: _Chosen | None = None  # local rows to write; None for all of them
        self.offset = self.total = 0  # of n among those of all ranks

    def describe(self, key: str, tensor: Any) -> None:
        """Note a tensor of the state, if it has class rows of this loss."""
        store = self.rows.store
        names = {f"{self.name}/{name}" for name in self.rows.parameters} | {f"{self.optimizer}/{DONE}"}
        states = tuple(f"{self.optimizer}/state/{place}/" for place in range(len(self.rows.parameters)))
        if not isinstance(tensor, Tensor) or not tensor.ndim or not (key in names or key.startswith(states)):
            return
        local = local_part(tensor.detach())
        held = None if store is None else store.rows_of(local)
        if store is not None and held is None and key != f"{self.optimizer}/{DONE}":
            return
        initial = None if held is None else held.initial
        self.row_bytes += tensor.shape[1:].numel() * tensor.itemsize
        self.tensors[key] = {
            "row": list(tensor.shape[1:]),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "initial": {
                "std": getattr(initial, "std", 0.0),
                "seed": getattr(initial, "seed", None),
                "fill": getattr(initial, "fill", 0.0),
                "dtype": str(getattr(initial, "dtype", torch.float32)).removeprefix("torch."),
            },
        }

    def choose(self, only_changed: bool, untouched: bool) -> None:
        """Decide which rows are written. untouched: some rank has rows that nobody has touched."""
        store = self.rows.store
        if store is None:
            return
        if only_changed:
            self.chosen = _Chosen(store.changed)
        elif untouched:
            self.chosen = _Chosen(store.touched.clone())

    def blocks(self, key: str, tensor: Tensor, copy: Copy | None) -> RowBlocks:
        """Return the chosen rows of a tensor for writing. copy: returns a copy of a whole tensor, where rows are to be
        written as they are now, whatever becomes of them."""
        local, chosen, store = local_part(tensor.detach()), self.chosen, self.rows.store
        if store is None:
            whole = local if copy is None else copy(key, local)
            return RowBlocks(tensor.shape, tensor.dtype, self.rows.shards.lo, len(whole), lambda a, b: whole[a:b])

        def take(a: int, b: int) -> Tensor:
            index = torch.arange(a, b, device="cpu") if chosen is None else chosen.rows(a, b)
            store.readable(index)
            return local[a:b] if chosen is None else local.index_select(0, index)

        row, first = tensor.shape[1:], self.rows.shards.lo if chosen is None else self.offset
        shape, count = torch.Size([self.total, *row]), len(local) if chosen is None else len(chosen)
        if copy is None:
            return RowBlocks(shape, tensor.dtype, first, count, take)
        kept, size = store.scratch(count, tuple(row), tensor.dtype), block_rows(row, tensor.dtype, count)
        for a in range(0, count, size):
            b = min(a + size, count)
            kept[a:b] = take(a, b)
        return RowBlocks(shape, tensor.dtype, first, count, lambda a, b: kept[a:b])

    def ids(self) -> RowBlocks | None:
        """Return the class ids of the chosen rows for writing; None if they are all."""
        chosen, lo = self.chosen, self.rows.shards.lo
        if chosen is None:
            return None
        take: Callable[[int, int], Tensor] = lambda a, b: chosen.rows(a, b) + lo  # noqa: E731
        return RowBlocks(torch.Size([self.total]), torch.int64, self.offset, len(chosen), take)

    def versions(self) -> tuple[int, ...]:
        """Return what changes if somebody writes to parameters as a whole; steps write to their local part."""
        return tuple(p._version for p in self.rows.parameters.values() if isinstance(p, DTensor))  # noqa: SLF001

    def counts(self, since: bool) -> dict[str, int]:
        """Return how many rows this rank would write. since: there is a checkpoint that has all but those that
        changed."""
        lo, store = self.rows.shards.lo, self.rows.store
        if store is None:
            return {"lo": lo, "changed": 0, "touched": self.rows.shards.local, "untouched": 0}
        changed = int(store.changed.sum()) if since else 0
        return {"lo": lo, "changed": changed, "touched": store.count - store.untouched, "untouched": store.untouched}


class Increments:
    """What one checkpoint writes of the class rows of the losses in `named`."""

    def __init__(self, named: Mapping[str, Any], checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.losses = list(_losses(named))
        self.parts: list[str] = []  # data folders that are linked to, relative to that of the checkpoint before
        self.before: Path | None = None  # its folder
        self.note: dict[str, Any] = {}

    def decide(self, tensors: Mapping[str, Any]) -> None:
        """Decide what is written, the same on every rank; a collective. From here on changes count for the next one."""
        if not self.losses:
            return
        for loss in self.losses:
            for key, tensor in tensors.items():
                loss.describe(key, tensor)
        everyone = [json.loads(text) for text in self._gather(json.dumps(self._facts()))]
        first = everyone[0]
        counts = {loss.name: self._count(loss, everyone) for loss in self.losses}
        linked = first["before"] and all(each["token"] == first["token"] for each in everyone)
        before = first["rows"] if linked else {}
        in_stores = [loss.name for loss in self.losses if loss.rows.store is not None]  # others are always whole
        for name in in_stores:
            touched, changed, _ = counts[name]
            kept = before.get(name, {"counts": []})["counts"]
            linked = linked and len(kept) < MOST_PARTS and 2 * changed <= touched >= (sum(kept) + changed) / 2
        rows = {}
        for loss in self.losses:
            touched, changed, untouched = counts[loss.name]
            loss.choose(only_changed=linked, untouched=untouched > 0)
            whole = loss.chosen is None
            loss.total = loss.rows.shards.num_classes if whole else changed if linked else touched
            if not whole:
                shards = [each["counts"][loss.name] for each in everyone]
                of_shards = {each["lo"]: each["changed" if linked else "touched"] for each in shards}  # replicas once
                loss.offset = sum(n for lo, n in of_shards.items() if lo < loss.rows.shards.lo)
            described: dict[str, Any] = before[loss.name] if linked else {"counts": [], "tensors": loss.tensors}
            missed = loss.optimizer is not None and f"{loss.optimizer}/{DONE}" in loss.tensors
            rows[loss.name] = {
                "classes": loss.rows.shards.num_classes,
                "optimizer": loss.optimizer if missed else None,
                "tensors": described["tensors"] | {k: v for k, v in loss.tensors.items() if k.endswith(DONE)},
                "counts": [*described["counts"], loss.total],
            }
            size = loss.total * loss.row_bytes
            log.info("checkpoint %s: %d rows of %s, %d bytes", self.checkpoint, loss.total, loss.name, size)
        if linked:
            self.before, self.parts = Path(first["before"]), first["parts"]
        parts = [part_name(i) for i in range(len(self.parts))]
        self.note = {"format": WITH_PARTS, "parts": parts, "rows": rows, "token": first["new"]}
        for loss in self.losses:
            if loss.rows.store is not None:
                loss.rows.store.begin_changes(SavedIn(self.checkpoint, first["new"], loss.versions()))

    def blocks(self, key: str, tensor: Any, copy: Copy | None) -> RowBlocks | None:
        """Return what is written of a tensor of class rows; None for any other. copy: see `collect`."""
        its = next((loss for loss in self.losses if key in loss.tensors), None)
        return None if its is None else its.blocks(key, tensor, copy)

    def ids(self) -> dict[str, RowBlocks]:
        """Return by key which class ids are written."""
        found = {f"{loss.name}{IDS}": loss.ids() for loss in self.losses}
        return {key: ids for key, ids in found.items() if ids is not None}

    def abandon(self) -> None:
        """The checkpoint was not written: the next one has all rows."""
        for loss in self.losses:
            if loss.rows.store is not None:
                loss.rows.store.note(None)

    def _facts(self) -> dict[str, Any]:
        """Return what this rank knows of the checkpoint before, and how many of its rows changed."""
        facts: dict[str, Any] = {"new": secrets.token_hex(8), "token": None, "before": None}
        stores = [loss.rows.store for loss in self.losses]
        for store in stores:
            if store is not None:
                store.note(torch.empty(0, dtype=torch.int64, device="cpu"))  # has somebody else written rows?
        in_stores = [loss for loss in self.losses if loss.rows.store is not None]
        saved: list[SavedIn] = [loss.rows.store.saved for loss in in_stores if loss.rows.store.saved is not None]
        same = len(saved) == len(in_stores) and len({(s.checkpoint, s.token) for s in saved}) == 1
        if same and all(loss.versions() == s.versions for s, loss in zip(saved, in_stores, strict=True)):
            facts["token"] = saved[0].token
            if ranks_of(None).rank == 0:
                facts |= self._checkpoint_before(saved[0])
        counts = {loss.name: loss.counts(since=facts["token"] is not None) for loss in self.losses}
        return {**facts, "counts": counts}

    def _checkpoint_before(self, saved: SavedIn) -> dict[str, Any]:
        """Return what its manifest says, if it is whole and has these tensors."""
        try:
            manifest = read_manifest(saved.checkpoint)
            fine = manifest.get("token") == saved.token and find_damage(saved.checkpoint, manifest) is None
        except (OSError, ValueError):
            fine = False
        if not fine:
            return {}
        for loss in self.losses:
            before = manifest["rows"].get(loss.name, {"tensors": {}})["tensors"]
            if _but_done(before) != _but_done(loss.tensors):
                return {}
        before = saved.checkpoint / manifest["data"]
        return {"before": str(before), "parts": [*manifest["parts"], ""], "rows": manifest["rows"]}

    def _gather(self, text: str) -> list[str]:
        ranks = ranks_of(None)
        return [text] if ranks.group is None else gather_texts(text, ranks, device_of(ranks))

    def _count(self, loss: _Loss, everyone: list[dict[str, Any]]) -> tuple[int, int, int]:
        """Return how many rows were touched, have changed, and were not touched, on all ranks; those of replicas
        once."""
        shards = {each["counts"][loss.name]["lo"]: each["counts"][loss.name] for each in everyone}
        found = [sum(each[kind] for each in shards.values()) for kind in ("touched", "changed", "untouched")]
        return found[0], found[1], found[2]


class _Chosen:
    """The rows for which a flag `[C_local]` is set, in order, without a list of them all."""

    def __init__(self, flags: Tensor) -> None:
        self.flags = flags
        counts = [int(part.sum()) for part in flags.split(FLAGS)]
        self.before = torch.tensor([0, *counts], device="cpu").cumsum(0)  # how many stand before each part

    def __len__(self) -> int:
        return int(self.before[-1])

    def rows(self, a: int, b: int) -> Tensor:
        """Return the a-th to b-th of them, int64 `[b - a]`."""
        first, last = torch.searchsorted(self.before, torch.tensor([a, b - 1], device="cpu"), right=True).tolist()
        found = self.flags[(first - 1) * FLAGS : last * FLAGS].nonzero()[:, 0] + (first - 1) * FLAGS
        start = a - int(self.before[first - 1])
        return found[start : start + b - a]


def loaded_from(named: Mapping[str, Any], checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Call it when `named` was loaded: a checkpoint that comes needs no rows that have not changed since."""
    begun = []
    for loss in _losses(named):
        entry = manifest.get("rows", {}).get(loss.name)
        whole = entry is not None and all(key.split("/")[0] in named for key in entry["tensors"])
        # else rows were loaded alone, or have made the steps that they had missed
        if whole and loss.rows.store is not None and (entry["optimizer"] is None or loss.missing):
            saved = SavedIn(checkpoint, manifest["token"], loss.versions())
            loss.rows.store.begin_changes(saved)
            begun.append(loss.rows.store)
    for thing in named.values():
        store = getattr(getattr(thing, "class_rows", None), "store", None)
        if store is not None and store not in begun:
            store.note(None)
            store.wrote()


def _losses(named: Mapping[str, Any]) -> Iterator[_Loss]:
    """Yield the losses that have rows in a storage, or that have missed steps, and can be saved as they are."""
    optimizers = {name: unwrapped(thing) for name, thing in named.items()}
    optimizers = {name: thing for name, thing in optimizers.items() if isinstance(thing, torch.optim.Optimizer)}
    for name, thing in named.items():
        # its own: what torch.compile wraps has it too, but other names in its state
        rows = None if name in optimizers else getattr(thing, "__dict__", {}).get("class_rows")
        missing = rows is not None and rows.behind is not None and rows.behind.some_are_behind()
        if rows is None or (rows.store is None and not missing):
            continue
        its = next((n for n, each in optimizers.items() if getattr(each, "class_rows", None) is rows), None)
        if its is not None or rows.behind is None:
            yield _Loss(name, rows, its, missing)


def _but_done(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return descriptions of tensors, without those that come and go."""
    return {key: (value["row"], value["dtype"]) for key, value in tensors.items() if not key.endswith(DONE)}
