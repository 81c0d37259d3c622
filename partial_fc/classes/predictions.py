"""`HeadPredictions`: the classes of the largest logits, as a classifier answers with them.

    embeddings [N_local, D]  ── topk (queries.py) ──>  ids, cosines [N_local, k]  ── margin.inference, scale ──>  logits
    nothing normalised                            ──>  ids, s · x·w + b [N_local, k]

An inference logit has no margin, and a margin's rule for other classes does not apply to it: no class is the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.classes.hard_negatives import HardNegatives
from partial_fc.classes.queries import DEFAULT_TILE_BYTES, topk
from partial_fc.distributed.operation import operation
from partial_fc.margins.base import Margin


class Predictions(NamedTuple):
    """The classes of the largest logits: class ids int64 `[n, k]` and logits `[n, k]`, descending."""

    ids: Tensor
    logits: Tensor


class HeadPredictions(HardNegatives):
    """Base of `HeadState`."""

    margin: Margin

    @operation("predict")
    @torch._disable_dynamo
    @torch.no_grad()
    def predict(
        self, embeddings: Tensor, k: int, *, tile_bytes: int = DEFAULT_TILE_BYTES, progress: bool = False
    ) -> Predictions:
        """Return the k classes of the largest logits of this rank's embeddings: ids and logits `[N_local, k]`.

        The logit of a class is what the margin makes of it at inference, where no class is the target: scale times
        cosine, `x·w + b` of a `Softmax`, `r·g(cos θ) + b` of a `SphereFace2`, scale times ‖x‖ cos θ where embeddings
        are not normalised. It has no margin. Softmax (or the sigmoid, if every class is a binary decision) of all C of
        them makes probabilities. In every mode, of all classes of all ranks; else as `topk`, which has the arguments,
        the ties and the errors, and answers with cosines.
        """
        margin = self.margin
        as_they_are = None if margin.normalize else margin.scale
        found = topk(self.class_rows, embeddings, k, tile_bytes=tile_bytes, progress=progress, scale=as_they_are)
        if as_they_are is not None:
            return Predictions(found.ids, found.cosines)
        logits = margin.inference(found.cosines) * margin.scale
        if not margin.normalize_embeddings:
            logits = logits * torch.linalg.vector_norm(embeddings, dim=1, keepdim=True, dtype=logits.dtype)
        return Predictions(found.ids, logits)
