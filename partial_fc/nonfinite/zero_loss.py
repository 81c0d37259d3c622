"""The loss of a forward that is skipped: zero, with zero gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.distributed.derivatives import first_derivative
from partial_fc.distributed.ranks import local_part
from partial_fc.rows import ClassRows
from partial_fc.step_record import StepRecord


def zero_loss(x: Tensor, samples: int | None, rows: ClassRows, gradient_of_all_rows: bool) -> Tensor:
    """Return a loss of zero whose backward runs on every rank as that of the real loss would have.

    samples: how many losses, `[samples]`; None for a scalar. gradient_of_all_rows: zeros for the parameters themselves;
    else, under sampling, gradients of no rows.
    """
    parameters = [local_part(p) for p in rows.parameters.values()]
    sink = None
    if not gradient_of_all_rows:
        parameters = [p.detach() for p in parameters]
        sink = rows.accumulate if rows.sampled else None
        if not x.requires_grad:
            x = x.detach().requires_grad_(any(p.requires_grad for p in rows.parameters.values()))
    loss: Tensor = _ZeroLoss.apply(x, samples, sink, *parameters)
    if loss.requires_grad:
        loss.register_hook(lambda grad: _mark(rows.record))
    return loss


def _mark(record: StepRecord) -> None:
    record.join_step()
    record.bad_step = True


class _ZeroLoss(torch.autograd.Function):
    """A NaN in the backbone's activations still makes its gradients NaN."""

    @staticmethod
    def forward(ctx, embeddings, samples, sink, *parameters):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(embeddings, *parameters)
        ctx.sink = sink
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        return embeddings.new_zeros(() if samples is None else (samples,), dtype=dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True
            return first_derivative("the loss of a skipped step", _ZeroLoss.backward, ctx, grad, *ctx.saved_tensors)
        embeddings, *parameters = ctx.saved_tensors
        nothing = torch.zeros_like(embeddings)
        if ctx.sink is None:
            wanted = zip(parameters, ctx.needs_input_grad[3:], strict=True)
            return nothing, None, None, *(torch.zeros_like(p) if needed else None for p, needed in wanted)
        no_rows = torch.empty(0, dtype=torch.int64, device=embeddings.device)
        ctx.sink(no_rows, [torch.empty_like(p[:0]) for p in parameters])
        return nothing, None, None, *[None] * len(parameters)
