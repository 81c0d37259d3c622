"""Do all ranks come to the same operation?

Every operation of the package that is a collective begins with an all-gather of one size: `WIDTH` integers, of which
the first says which operation it is. The exchange of a batch brings its status that way, all others call `meet`. So
ranks that come to different operations (`if rank == 0: save_checkpoint(...)`) hear of it at once and alike, where
collectives of different sizes would hang, exchange nonsense or end the process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from partial_fc.distributed.inquiry import RankMissing, come_apart
from partial_fc.distributed.operation import current_operation
from partial_fc.distributed.ranks import Ranks, all_gather_mesh

WIDTH = 24  # integers; batch/status.py has a field for each
BATCH, GATHERED = "the exchange of a batch", "a forward with a gathered batch"
AGREEMENT = "an agreement of all ranks"
# The place of a name is its number in a meeting. Other names travel as an agreement.
OPERATIONS = (
    AGREEMENT, BATCH, GATHERED, "the building of a head", "load_state_dict",
    "save_checkpoint", "load_checkpoint", "Checkpointer.save", "Checkpointer.load", "Checkpointer.claim",
    "export_weights", "import_weights", "topk", "nearest_classes", "expand", "remap", "init_from_embeddings",
    "the check which ranks have a batch (JoinedBatches)", "the comparison of checksums", "check_same",
    "refresh_hard_negatives", "predict", "outliers",
)  # fmt: skip


def meet(what: str, ranks: Ranks, device: torch.device, values: Sequence[int] = ()) -> list[list[int]]:
    """Return the `values` of every rank of the mesh; a collective.

    what: the operation that begins, unless it is a part of one with a name (`operation`).

    Raises RankMissing on every rank if one of them has come to another operation.
    """
    what = current_operation(what)
    if ranks.group is None:
        return [list(values)]
    row = [operation_number(what), *values]
    where = ranks.place_of_counts(device)
    mine = torch.tensor(row + [0] * (WIDTH - len(row)), dtype=torch.int64, device=where)
    table = all_gather_mesh(mine, ranks, what).tolist()
    refuse_apart([others[0] for others in table], ranks)
    return [others[1 : 1 + len(values)] for others in table]


def operation_number(what: str) -> int:
    return OPERATIONS.index(what) if what in OPERATIONS else 0


def refuse_apart(numbers: Sequence[int], ranks: Ranks) -> None:
    """Raise RankMissing, the same on every rank, unless all ranks have come to the same operation."""
    if len(set(numbers)) > 1:
        names = [OPERATIONS[number] if number < len(OPERATIONS) else "another operation" for number in numbers]
        where = {ranks.global_rank(flat): name for flat, name in enumerate(names)}
        raise RankMissing(come_apart(where))
