"""What is bad in a batch that nobody looked at before it was computed: found when the loss turns out not to be finite.

Elsewhere than on a CPU a look at labels and weights would make the host wait for the device in every forward. So a bad
one makes the loss infinite or NaN instead (`targets.py`), the check of the step finds that where it waits anyway, and
every rank then looks at labels and weights, which all of them hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from partial_fc.batch.backward_pass import BackwardPass
from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.refusals import TOLERANCE, bad_label_in, bad_weight_in, refuse_statistics
from partial_fc.batch.status import LabelSet, Status, inspect
from partial_fc.batch.weights import as_given
from partial_fc.distributed.meeting import meet
from partial_fc.distributed.ranks import Ranks, all_gather_mesh


def bad_value_found_later(backwards: Iterable[BackwardPass], classes: int) -> str:
    """Return which label of the step's batches is no class, or which weight is invalid; "" if none is, or they were
    looked at before."""
    for backward in backwards:
        if not backward.batch.looked:
            batch = looked_at(backward.batch)
            text = bad_weight_in(batch.status, batch.ranks, batch.name)
            text = text or bad_label_in(batch, range(classes), backward.ignore_index)
            if text:
                return text
    return ""


def shares_if_alike(loss_shares: Tensor, places: Sequence[tuple[dict[str, Any], str]], ranks: Ranks) -> Tensor:
    """Return the loss shares `[N]`; infinite or NaN if the running statistics of the ranks differ. One small
    collective where there are statistics, and no wait. places: as `statistics_of` returns them."""
    if not places or ranks.group is None:
        return loss_shares
    everyone = all_gather_mesh(
        _sum_of([held[name] for held, name in places]), ranks, "the comparison of running statistics"
    )
    return loss_shares / (everyone.amax() - everyone.amin() <= TOLERANCE * everyone.abs().amax())


def compare_statistics(statistics: Sequence[Tensor], ranks: Ranks, device: torch.device) -> None:
    """Raise ValueError on every rank if running statistics of the ranks differ. A collective where there are some."""
    if statistics and ranks.group is not None:
        bits = int(_sum_of(statistics).view(torch.int64))
        refuse_statistics([each for (each,) in meet("check_same", ranks, device, (bits,))], ranks)


def _sum_of(statistics: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.double().sum() for each in statistics]).sum()


def look_now(batch: GlobalBatch) -> GlobalBatch:
    """Return the batch as `looked_at`; raise ValueError for an invalid weight, as `gather` does on a CPU."""
    batch = looked_at(batch)
    text = bad_weight_in(batch.status, batch.ranks, batch.name)
    if text:
        raise ValueError(text)
    return batch


def looked_at(batch: GlobalBatch) -> GlobalBatch:
    """Return the batch with what its labels and weights hold in its statuses, as if it had been looked at; embeddings
    are not."""
    status: list[Status] = []
    start = 0
    for row in batch.status:
        part = slice(start, start + row.samples)
        start += row.samples
        labels = batch.mesh_labels[part].cpu()
        of_labels, of_samples = (
            None if each is None else each[part].cpu() for each in (batch.mesh_label_weights, batch.mesh_sample_weights)
        )
        given = LabelSet(None, labels, None if of_labels is None else as_given(of_labels, row.weights), of_samples)
        found: Any = Status(*inspect(_nothing(labels), [given], "", False, True)[0].tolist())
        of_values = [name for name in Status._fields if name.startswith(("small", "larg", "second", "bad"))]
        status.append(row._replace(**{name: getattr(found, name) for name in of_values}))
    return replace(batch, status=tuple(status), looked=True)


def _nothing(labels: Tensor) -> Tensor:
    return labels.new_zeros(len(labels), 1).float()
