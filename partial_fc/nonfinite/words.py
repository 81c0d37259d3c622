"""What is not finite, in words that are the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from partial_fc.batch_status import as_matrix
from partial_fc.distributed.ranks import tell
from partial_fc.nonfinite.step_record import Watched
from partial_fc.shards import local_part

BLOCK_BYTES = 8 << 20


SEPARATOR = "\x1f"  # between the findings of one rank


def rows_device(head: Watched) -> torch.device:
    return local_part(next(iter(head._rows.parameters.values()))).device


def not_finite(tensor: Tensor) -> Tensor:
    """0-d bool: whether anything in it is a NaN or infinity, or its sum overflows. One pass without a temporary."""
    tensor = local_part(tensor.detach())
    if (
        tensor.dtype in (torch.float16, torch.bfloat16) and tensor.numel()
    ):  # a sum in float32 would make a float32 copy on a CPU
        return ~torch.stack(torch.aminmax(tensor)).isfinite().all()
    return ~tensor.sum().isfinite()


def explain(heads: Sequence[Watched], parameters: Sequence[Tensor]) -> str:
    """What is not finite, the same text on every rank: of each kind the first that a rank found. Two collectives a head."""
    said: list[str] = []
    for i, head in enumerate(heads):
        ranks = head._rows.shards.ranks
        mine = [_bad_weight(head), _bad_loss(head), _bad_row(head), _bad_parameter(parameters) if i == 0 else ""]
        table = [text.split(SEPARATOR) for text in tell(SEPARATOR.join(mine), ranks, rows_device(head))]
        for kind in range(len(mine)):
            flat = next((flat for flat, texts in enumerate(table) if texts[kind]), None)
            if flat is not None:
                said.append(f"{ranks.name(flat)}: {table[flat][kind]}")
    return "; ".join(said) or "the norm of the gradient overflows"


def _bad_weight(head: Watched) -> str:
    named = ((name, local_part(p.detach())) for name, p in head._rows.parameters.items())
    return _first_row(named, head._rows.shards.lo, None, "{name} of class {row} holds a NaN or infinity")


def _bad_row(head: Watched) -> str:
    rows = head._rows
    named = [
        (n, local_part(c.grad)) for n, c in zip(rows.parameters, rows.carriers, strict=False) if c.grad is not None
    ]
    text = _first_row(
        named,
        rows.shards.lo,
        rows.rows if rows.sampled else None,
        "the gradient of {name} of class {row} is not finite",
    )
    shared = [name for name, p in rows.shared.items() if p.grad is not None and bool(not_finite(p.grad))]
    return text or (f"the gradient of {shared[0]} is not finite" if shared else "")


def _first_row(named: Iterable[tuple[str, Tensor]], lo: int, ids: Tensor | None, text: str) -> str:
    for name, tensor in named:
        for start, block in _blocks(tensor):
            bad = (~block.reshape(len(block), -1).isfinite().all(1)).nonzero()
            if len(bad):
                row = start + int(bad[0])
                return text.format(name=name, row=lo + (row if ids is None else int(ids[row])))
    return ""


def _bad_loss(head: Watched) -> str:
    """Said by the rank whose sample it is."""
    for backward in head._record.backwards:
        losses, batch = backward.losses.detach(), backward.batch
        if losses.ndim and len(losses) == len(batch.labels):
            losses = losses[batch.local]
            bad = (~losses.isfinite()).nonzero()
            if len(bad):
                at = int(bad[0])
                labels = as_matrix(batch.labels)[batch.local][at].tolist()
                return f"the loss of embeddings[{at}] (label {', '.join(map(str, labels))}) is {losses[at].item()}"
        elif not bool(losses.isfinite().all()):
            return "the loss is not finite"
    if any(bool(not_finite(backward.grad)) for backward in head._record.backwards):
        return "what the loss is multiplied with is not finite"
    return ""


def _bad_parameter(parameters: Sequence[Tensor]) -> str:
    for i, parameter in enumerate(parameters):
        if parameter.grad is not None and bool(not_finite(parameter.grad)):
            return f"the gradient of parameter {i} {list(parameter.shape)} of those given is not finite"
    return ""


def _blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    size = max(1, BLOCK_BYTES // max(1, tensor[:1].nbytes)) if len(tensor) else 1
    for start in range(0, len(tensor), size):
        yield start, tensor[start : start + size]
