"""`gather`: the global batch once for several losses, each with labels of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from partial_fc.batch.exchange import GlobalBatch, exchange, require_grad_like_others
from partial_fc.batch.status import LabelSet
from partial_fc.distributed.derivatives import first_derivative
from partial_fc.distributed.forwards import WIRING, in_checkpoint, problem_of_forward
from partial_fc.distributed.groups import ranks_of
from partial_fc.distributed.ranks import Group, start_reduce_scatter

GatherValidate = Literal["always", "never"]


@overload
def gather(
    embeddings: Tensor,
    labels: Tensor,
    *,
    label_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    group: Group = None,
    validate: GatherValidate = "always",
) -> GlobalBatch: ...


@overload
def gather(
    embeddings: Tensor,
    labels: Mapping[str, Tensor],
    *,
    label_weights: Mapping[str, Tensor] | None = None,
    sample_weights: Tensor | Mapping[str, Tensor] | None = None,
    group: Group = None,
    validate: GatherValidate = "always",
) -> dict[str, GlobalBatch]: ...


def gather(
    embeddings: Tensor,
    labels: Tensor | Mapping[str, Tensor],
    *,
    label_weights: Tensor | Mapping[str, Tensor] | None = None,
    sample_weights: Tensor | Mapping[str, Tensor] | None = None,
    group: Group = None,
    validate: GatherValidate = "always",
) -> GlobalBatch | dict[str, GlobalBatch]:
    """Gather embeddings `[N_local, D]` and labels `[N_local]` from all ranks, once for any number of losses.

    Every rank of the group must call it; N_local may differ between ranks and be 0. In backward the gradients of all
    losses are summed and reduce-scattered once.

    Several losses with labels of their own: pass a dict. The result is a dict of batches that share the embeddings:

        batch = gather(x, {"faces": a, "plates": b})
        loss = faces(batch["faces"]) + plates(batch["plates"])

    A sample that does not belong to a loss has that loss's ignore_index as its label.

    Args:
        labels: int64 `[N_local]`, or `[N_local, L]` for soft or several labels a sample; or a dict of such tensors. All
            ranks must bring the same names, in any order.
        label_weights: `[N_local, L]`, each at least 0 and together 1 in a sample that has a label of at least 0. For a
            dict of labels: a dict with the names that have some.
        sample_weights: `[N_local]`, each at least 0: the weight of each sample in a mean. For a dict of labels: one
            tensor for all names, or a dict.
        group: as of the losses.
        validate: "always" looks for labels out of range, NaN, infinities and invalid weights, "never" does not. Each
            loss checks the findings by its own number of classes and `on_nonfinite`; its own `validate` is about
            batches that it gathers itself. There is no "first", because nothing is remembered between two calls.

    Raises ValueError, the same on every rank, if names, shapes, dtypes, widths, devices or weights are wrong on any
    rank; elsewhere than on a CPU, where the host would wait for the weights, the check of the step does that for them.
    """
    if validate not in ("always", "never"):
        raise ValueError(
            f'validate of gather must be "always" or "never", not {validate!r}; for the first batch alone say it there'
        )
    ranks = ranks_of(group)
    sets, problem = _label_sets(labels, label_weights, sample_weights)
    refused = problem_of_forward("batch", training=False)
    problem = f"{WIRING}: {refused}" if refused else problem
    # elsewhere than on a CPU a look waits for the device: there the check of the step finds what is bad
    look = validate == "always" and isinstance(embeddings, Tensor) and embeddings.device.type == "cpu"
    batches = exchange(embeddings, sets, ranks, look=look, problem=problem)
    first = batches[0]
    everyone = _Gathered.apply(
        require_grad_like_others(embeddings, first.status), first.embeddings, ranks, first.counts
    )
    for batch in batches:
        batch.embeddings = everyone
    cut_off = embeddings.requires_grad and not torch.is_grad_enabled() and in_checkpoint()
    for batch in batches:
        batch.cut_off, batch.later = cut_off, validate == "always" and not look
    if not isinstance(labels, Mapping):
        return first
    by_name = {batch.name: batch for batch in batches}
    return {name: by_name[name] for name in labels}


class _Gathered(torch.autograd.Function):
    """Connects the gathered embeddings to this rank's.

    forward:   [N_local, D] -> [N, D]   (gathered already)
    backward:  ∂L/∂x_local = (Σ over ranks of ∂L/∂x)[local rows], a reduce-scatter

    Half precision becomes float32 on arrival, so that gradients of several losses and ranks are summed in float32.
    """

    @staticmethod
    def forward(ctx, local, everyone, ranks, counts):  # type: ignore[no-untyped-def]
        ctx.ranks, ctx.counts, ctx.embeddings = ranks, counts, local
        return everyone.view_as(everyone) if everyone.dtype == torch.float64 else everyone.float()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True
            return first_derivative("gather", _Gathered.backward, ctx, grad, ctx.embeddings)
        return start_reduce_scatter(grad, ctx.ranks, ctx.counts)().to(ctx.embeddings.dtype), None, None, None


def _label_sets(labels: Any, label_weights: Any, sample_weights: Any) -> tuple[list[LabelSet], str]:
    """Return (label sets sorted by name, what is wrong with the names or "")."""
    weights = {"label_weights": label_weights, "sample_weights": sample_weights}
    named = {what: given for what, given in weights.items() if isinstance(given, Mapping)}
    if not isinstance(labels, Mapping):
        problem = f": {next(iter(named))} are a dict, but labels are not" if named else ""
        return [LabelSet(None, labels, label_weights, sample_weights)], problem
    if not labels:
        return [], ": labels are an empty dict; it needs a name and labels for each head"
    for name in labels:
        if not isinstance(name, str):
            return [], f": the names of labels must be strings, not {name!r}"
    if label_weights is not None and "label_weights" not in named:
        return [], ": labels are a dict, so label_weights must be one too, with the names that have weights"
    for what, given in named.items():
        for name in given:
            if name not in labels:
                return [], f": {what} are given for {name!r}, labels for {_listed(labels)} only"
    of_labels = label_weights or {}
    of_samples = named.get("sample_weights", dict.fromkeys(labels, sample_weights))
    return [LabelSet(name, labels[name], of_labels.get(name), of_samples.get(name)) for name in sorted(labels)], ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
