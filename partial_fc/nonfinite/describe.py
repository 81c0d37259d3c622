"""What is non-finite, in words that are the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from partial_fc.batch.status import as_matrix
from partial_fc.distributed.ranks import local_part
from partial_fc.distributed.texts import gather_texts
from partial_fc.rows import ClassRows

BLOCK_BYTES = 8 << 20
SEPARATOR = "\x1f"  # between the findings of one rank


def not_finite(tensor: Tensor) -> Tensor:
    """Return a 0-d bool: it holds a NaN or infinity, or its sum overflows. One pass without a temporary."""
    tensor = local_part(tensor.detach())
    # the sum of half precision in float32 would make a float32 copy on a CPU
    if tensor.dtype in (torch.float16, torch.bfloat16) and tensor.numel():
        return ~torch.stack(torch.aminmax(tensor)).isfinite().all()
    return ~tensor.sum().isfinite()


def describe(heads: Sequence[ClassRows], parameters: Sequence[Tensor]) -> str:
    """Return what is not finite: of each kind the first that any rank found. Two collectives a loss."""
    found: list[str] = []
    for i, rows in enumerate(heads):
        ranks = rows.shards.ranks
        mine = [_bad_weight(rows), _bad_loss(rows), _bad_row(rows), _bad_parameter(parameters) if i == 0 else ""]
        table = [text.split(SEPARATOR) for text in gather_texts(SEPARATOR.join(mine), ranks, rows.device)]
        for kind in range(len(mine)):
            flat = next((flat for flat, texts in enumerate(table) if texts[kind]), None)
            if flat is not None:
                found.append(f"{ranks.name(flat)}: {table[flat][kind]}")
    return "; ".join(found) or "the norm of the gradient overflows"


def _bad_weight(rows: ClassRows) -> str:
    named = ((name, local_part(p.detach())) for name, p in rows.parameters.items())
    return _first_row(named, rows.shards.lo, None, "{name} of class {row} holds a NaN or infinity")


def _bad_row(rows: ClassRows) -> str:
    pairs = zip(rows.parameters, rows.carriers, strict=False)
    named = [(name, local_part(carrier.grad)) for name, carrier in pairs if carrier.grad is not None]
    ids = rows.grad_rows if rows.sampled else None
    text = _first_row(named, rows.shards.lo, ids, "the gradient of {name} of class {row} is not finite")
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


def _bad_loss(rows: ClassRows) -> str:
    """Return what is wrong with the losses; the rank that has the sample reports it."""
    for backward in rows.record.backwards:
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
    if any(bool(not_finite(backward.grad)) for backward in rows.record.backwards):
        return "the factor of the loss is not finite"
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
