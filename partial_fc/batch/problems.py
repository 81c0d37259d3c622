"""What is wrong with the types and shapes of a batch, in words. A usual batch does not come here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partial_fc.batch.refusals import describe_no_tensor, of_set
from partial_fc.batch.status import DTYPES, LabelSet, is_usual
from partial_fc.batch.weights import weights_problem


def examine(embeddings: Any, sets: list[LabelSet], device: torch.device | None, problem: str) -> tuple[Tensor, str]:
    """Return (embeddings, or some to send a status with, because the other ranks are waiting for it; what is wrong).

    problem: what is wrong already, or "".
    """
    if not isinstance(embeddings, Tensor):
        problem = problem or describe_no_tensor(embeddings)
        somewhere = next((s.labels.device for s in sets if isinstance(s.labels, Tensor)), None)
        embeddings = torch.empty(0, 0, device=device or somewhere)
    unusual = [each for each in sets if not is_usual(embeddings, each, device)]
    problem = problem or next(filter(None, (problem_of(embeddings, each, device) for each in unusual)), "")
    return embeddings, problem


def problem_of(embeddings: Tensor, given: LabelSet, device: torch.device | None) -> str:
    """Return what is wrong with types and shapes, as it follows the rank's name in an error; "" if nothing is."""
    problem = embeddings_problem(embeddings)
    if problem:
        return f": {problem}"
    problem = _labels_problem(embeddings, given.labels)
    if not problem and (given.labels.ndim == 2 or given.weighted):
        problem = weights_problem(embeddings, given.labels, given.label_weights, given.sample_weights)
    if problem:
        return f"{of_set(given.name)}: {problem}"
    if device is not None and embeddings.device != device:
        return f": the head is on {device}, embeddings on {embeddings.device}"
    return ""


def embeddings_problem(embeddings: Tensor) -> str:
    if embeddings.ndim != 2:
        return f"embeddings must be [N, D], but have {embeddings.ndim} dimensions"
    if embeddings.dtype not in DTYPES:
        return f"embeddings must be float32, float64, bfloat16 or float16, not {embeddings.dtype}"
    return ""


def _labels_problem(embeddings: Tensor, labels: Any) -> str:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        soft = isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim == 2
        hint = ": for soft labels give gather class ids [N, L] and label_weights [N, L]" if soft else ""
        return f"labels must be an int64 tensor, not {found}{hint}"
    if labels.ndim not in (1, 2) or (labels.ndim == 2 and not labels.shape[1]):
        return f"labels must be [N] or [N, L] with L at least 1, but are {list(labels.shape)}"
    if len(labels) != len(embeddings):
        return f"labels are for {len(labels)} samples, embeddings for {len(embeddings)}"
    return (
        ""
        if labels.device == embeddings.device
        else f"labels are on {labels.device}, embeddings on {embeddings.device}"
    )
