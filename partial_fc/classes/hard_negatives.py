"""Hard negatives: the K nearest classes of each class of a batch join the sample of every training forward at r < 1.

    table [C, K]      ids of the nearest classes of each class, the same on every rank; −1: not known yet
    every E forwards  class rows ── nearest_classes (queries.py) ──> lists [C_local, K] of this rank's classes
                                 ── all-gather, a piece of classes at a time ──> table
                      (or nearly so, by an index: approximate.py)
    every forward     class ids of the batch [P] ── rows of the table ──> ids [P·(1 + K)], drawn as labels are

Training forward t searches where t > 0 and E divides t, from the rows as they are then, and draws by what it found: so
the forward count alone decides, and a run is the same at every world size and after every resumption. (Ties within the
rounding of a cosine may be broken otherwise, and an index depends on the shards.) Between two searches a forward looks
K ids up for each label: no collective, nothing for which the host waits.

Hard classes by the nearest rows: Suh et al., Stochastic Class-Based Hard Example Mining for Deep Metric Learning, 2019.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.classes.approximate import approximate_classes, faiss_module
from partial_fc.classes.change import check_reachable
from partial_fc.classes.changeable import ChangeableLoss
from partial_fc.classes.interface import Change
from partial_fc.classes.queries import nearest_classes
from partial_fc.distributed.given import whole
from partial_fc.distributed.operation import operation
from partial_fc.distributed.ranks import all_gather, naming_the_missing
from partial_fc.distributed.shards import ClassShards, shard_bounds
from partial_fc.errors import NonFiniteError, log
from partial_fc.sharded_module import check_choice
from partial_fc.tiers.store import RowStore

SEARCH = "the search for hard negatives"
PIECE_BYTES = 16 << 20  # of ids that all ranks together send at a time
BLOCK = 1 << 16  # classes whose lists are renumbered at a time
TABLE = "neighbours"
UNKNOWN = -1

Search = Literal["exact", "faiss"]


class HardNegatives(ChangeableLoss):
    """Base of `HeadState`. neighbours: the table `[C, K]` int32, a buffer that is saved; None where K is 0."""

    neighbours: Tensor | None
    forward_count: int
    _hard_negatives: int = 0
    _hard_negatives_every: int = 1000
    _hard_negatives_search: Search = "exact"

    # tensors of the state that load in any shape: a table of more or fewer neighbours, also where there is none here
    any_shape = frozenset({TABLE})

    def _make_table(self, hard_negatives: int, every: int, search: Search, centers: int) -> None:
        """Register the table, of which nothing is known yet. ValueError where there are not so many other classes."""
        check_neighbours(hard_negatives, self.num_classes)
        self._hard_negatives, self._hard_negatives_every = hard_negatives, every
        self._hard_negatives_search = checked_search(search, hard_negatives, centers, self.class_rows.store)
        shape = self.num_classes, hard_negatives
        table = torch.full(shape, UNKNOWN, dtype=torch.int32, device=self._device) if hard_negatives else None
        self.register_buffer(TABLE, table)

    @property
    def hard_negatives(self) -> int:
        """K: how many nearest classes of each class of the batch take part in a training forward."""
        return self._hard_negatives

    @hard_negatives.setter
    def hard_negatives(self, value: int) -> None:
        raise ValueError(
            f"hard_negatives of a head that is built stays {self._hard_negatives}: build another head with "
            f"hard_negatives={value} and load the state of this one into it (save_checkpoint, load_checkpoint)"
        )

    @property
    def hard_negatives_every(self) -> int:
        """How many training forwards lie between two searches; may be set, on every rank alike."""
        return self._hard_negatives_every

    @hard_negatives_every.setter
    def hard_negatives_every(self, value: int) -> None:
        self._hard_negatives_every = whole("hard_negatives_every", value, least=1)

    @property
    def hard_negatives_search(self) -> Search:
        """How neighbours are searched; may be set, on every rank alike."""
        return self._hard_negatives_search

    @hard_negatives_search.setter
    def hard_negatives_search(self, value: Search) -> None:
        centers = self.class_rows.main.shape[1] if self.class_rows.main.ndim == 3 else 1
        self._hard_negatives_search = checked_search(value, self._hard_negatives, centers, self.class_rows.store)

    # ------------------------------------------------------------------------------------------------ a forward

    def with_hard_negatives(self, positives: Tensor) -> Tensor:
        """Return the class ids of a batch `[P]`, in any shape, and behind them their hard negatives: `[P·(1 + K)]`.

        −1, and what is no class, has none. A collective where it is time for a search.
        """
        assert self.neighbours is not None
        if self.forward_count and self.forward_count % self._hard_negatives_every == 0:
            self._search_in_forward()
        ids = positives.reshape(-1)
        classes = ids.clamp(0, self.num_classes - 1)  # on accelerators a wrong label is found by the step's check
        found = torch.where((classes == ids)[:, None], self.neighbours.index_select(0, classes), UNKNOWN)
        return torch.cat((ids, found.to(ids.dtype).flatten()))

    def _search_in_forward(self) -> None:
        """Search; with on_nonfinite="log" rows that are not finite leave the table as it is."""
        try:
            with operation(SEARCH):
                self._search()
        except NonFiniteError as error:
            if self.class_rows.record.on_nonfinite != "log":
                raise
            log.warning("hard negatives stay those of the last search: %s", error)

    @operation("refresh_hard_negatives")
    @torch._disable_dynamo
    def refresh_hard_negatives(self) -> None:
        """Search the K nearest classes of all classes now, as a training forward does every `hard_negatives_every`.

        For rows that did not come from training: after `init_from_embeddings` or `import_weights`. Every rank must call
        it. The work is that of `nearest_classes(K)`, or of an index, then C · K ids to every rank. Raises RuntimeError
        for a head without hard negatives, NonFiniteError if a row is not finite; the same on every rank, with nothing
        changed.
        """
        if self.neighbours is None:
            raise RuntimeError("this head has no hard negatives: build it with hard_negatives=K and a sample_rate < 1")
        check_reachable(self)
        self._search()

    @torch.no_grad()
    def _search(self) -> None:
        table, k, shards = self.neighbours, self._hard_negatives, self.class_rows.shards
        assert table is not None
        started = time.perf_counter()
        self.class_rows.catch_up()
        recall = ""
        if self._hard_negatives_search == "faiss":
            found, share = approximate_classes(self.class_rows, k)
            recall = f", recall {share:.3f}"
        else:
            found = nearest_classes(self.class_rows, k)
        gather_lists(found.ids, shards, table)
        total = all_gather(found.cosines.sum(dtype=torch.float64), shards.ranks.group, SEARCH).sum()
        mean = float(total) / table.numel()
        message = "hard negatives: the %d nearest of %d classes in %.3g s, mean cosine %.4f%s, %d bytes on every rank"
        log.info(message, k, self.num_classes, time.perf_counter() - started, mean, recall, table.nbytes)

    # ------------------------------------------------------------------------------------------------ state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of any module; ids stay whole numbers where all is cast (`type`)."""
        table = self.neighbours
        super()._apply(fn, recurse)
        if table is not None and self.neighbours is not None and self.neighbours.dtype != table.dtype:
            self.neighbours = table.to(self.neighbours.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the table with the rest: of other K the nearest, filled up with −1. A whole state without one has −1
        alone; one that is not needed is left out."""
        key, table = prefix + TABLE, self.neighbours
        given = {name: value for name, value in state_dict.items() if name != key}
        if table is not None and key in state_dict:
            given[key] = fitted(state_dict[key], self.num_classes, self._hard_negatives)
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # in a group a key that any rank lacks is now one that all lack
        if table is not None and key in missing_keys:
            missing_keys.remove(key)
            if f"{prefix}_extra_state" not in missing_keys:
                table.fill_(UNKNOWN)

    def changed_table(self, change: Change) -> Callable[[], None]:
        """Check K for the classes after a change; call the result to renumber the table."""
        check_neighbours(self._hard_negatives, change.num_classes)

        def take() -> None:
            if self.neighbours is not None:
                self.neighbours = renumbered(self.neighbours, change)

        return take


def check_hard_negatives(hard_negatives: int, every: int, sample_rate: float) -> tuple[int, int]:
    """Return both as ints. ValueError for what no head can have."""
    hard_negatives = whole("hard_negatives", hard_negatives, least=0)
    every = whole("hard_negatives_every", every, least=1)
    if hard_negatives and sample_rate == 1:
        raise ValueError(
            f"hard_negatives is {hard_negatives}, but with sample_rate=1.0 all classes take part in every forward: "
            "leave it at 0, or give a sample_rate below 1"
        )
    return hard_negatives, every


def checked_search(search: Search, hard_negatives: int, centers: int, store: RowStore | None) -> Search:
    """Return how to search. ValueError for what cannot be, ModuleNotFoundError without faiss where it is needed."""
    check_choice("hard_negatives_search", search, ("exact", "faiss"))
    if search == "faiss" and hard_negatives:
        if centers > 1:
            raise ValueError(f'hard_negatives_search="faiss" takes one row a class, not {centers} centers: use "exact"')
        if store is not None:
            kind = type(store.storage).__name__
            raise ValueError(f'hard_negatives_search="faiss" holds all rows in an index, beside {kind}: use "exact"')
        faiss_module()
    return search


def check_neighbours(hard_negatives: int, num_classes: int) -> None:
    """ValueError unless a class has so many others."""
    if hard_negatives and hard_negatives >= num_classes:
        raise ValueError(
            f"hard_negatives is {hard_negatives}, the number of nearest other classes of a class; with {num_classes} "
            f"classes it can be at most {num_classes - 1}"
        )


def fitted(stored: Any, num_classes: int, k: int) -> Any:
    """Return a stored table `[C, K']` as `[C, k]`: its nearest, filled up with −1. Of other classes as it is, which
    torch refuses."""
    if not isinstance(stored, Tensor) or stored.ndim != 2 or len(stored) != num_classes:
        return stored
    return torch.nn.functional.pad(stored[:, :k], (0, max(0, k - stored.shape[1])), value=UNKNOWN)


def gather_lists(lists: Tensor, shards: ClassShards, table: Tensor) -> None:
    """Write the lists `[C_local, K]` of all ranks to `table [C, K]`; a collective."""
    ranks, k = shards.ranks, table.shape[1]
    if ranks.group is None:
        table.copy_(lists)
        return
    bounds = [shard_bounds(shards.num_classes, owner, ranks.world) for owner in range(ranks.world)]
    longest, step = bounds[0][1], max(1, PIECE_BYTES // (table.itemsize * k * ranks.world))
    for a in range(0, longest, step):
        own = lists[a : a + step]
        piece = table.new_full((min(step, longest - a), k), UNKNOWN)
        piece[: len(own)] = own
        for (lo, hi), rows in zip(bounds, all_gather(piece, ranks.group, SEARCH), strict=True):
            first, last = lo + a, min(lo + a + len(rows), hi)
            if first < last:
                table[first:last] = rows[: last - first]
    if ranks.replica_group is not None:
        # replicas sum the gradients of the rows that they select, which a tie broken otherwise would mix up
        with naming_the_missing(SEARCH, ranks.replica_group):
            dist.broadcast(table, dist.get_global_rank(ranks.replica_group, 0), group=ranks.replica_group)


def renumbered(table: Tensor, change: Change) -> Tensor:
    """Return the table `[C', K]` after a change of classes.

    A class keeps its list, a merged one that of its lowest old id; ids are renumbered. −1 for classes that are gone,
    for the class itself (merged with its neighbour), and for new classes, until the next search.
    """
    out = table.new_full((change.num_classes, table.shape[1]), UNKNOWN)
    first = change.moves.first
    new_ids = torch.arange(len(table), device="cpu") if change.mapping is None else change.mapping
    new_ids = new_ids.to(table.device, table.dtype)
    old, new = change.moves.old[first].to(table.device), change.moves.new[first].to(table.device)
    for of_block, to in zip(old.split(BLOCK), new.split(BLOCK), strict=True):
        lists = table.index_select(0, of_block)
        ids = torch.where(lists < 0, UNKNOWN, new_ids[lists.clamp(min=0).long()])
        out[to] = torch.where(ids == to[:, None], UNKNOWN, ids)
    return out
