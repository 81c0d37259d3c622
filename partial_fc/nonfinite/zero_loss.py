"""The loss of a forward that is skipped: zero, with zero gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.distributed.derivatives import first_derivative
from partial_fc.distributed.ranks import local_part
from partial_fc.rows import ClassRows


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
        loss.register_hook(lambda grad: _mark(rows))
    return loss


def _mark(rows: ClassRows) -> None:
    rows.record.join_step()
    rows.record.bad_step = True
    _note_gradients(rows)


def cleared_in_place(rows: ClassRows) -> bool:
    """Return whether gradients were written to, besides by the backward of a skipped forward.

    `zero_grad(set_to_none=False)` of an optimizer of torch does that, and tells nobody.
    """
    noted = rows.record.gradients
    _note_gradients(rows)
    now = rows.record.gradients
    return bool(now) and all(there in noted and version > noted[there] + 1 for there, version in now.items())


def _note_gradients(rows: ClassRows) -> None:
    grads = [p.grad for p in rows.everything if p.grad is not None]
    rows.record.gradients = {local_part(grad).data_ptr(): grad._version for grad in grads}  # noqa: SLF001


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
