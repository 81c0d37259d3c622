"""NaN and infinities: who looks for them, how ranks agree, what is skipped.

    forward    embeddings: the status of the batch reports them to every host before anything is computed from them
    backward   the losses [N] of its forwards are kept, and checked with the step
    check      once a step, before an optimizer moves: losses, gradients of class rows, gradients of the backbone. Two
               flags a rank travel with the norm's collective (clip_grad_norm_) or alone (check_gradients,
               RowOptimizer.step, center.step). Then the host reads them, once
    decision   "raise": NonFiniteError, before anything has moved
               "skip": gradients are forgotten, so that optimizers that step nevertheless do nothing; counted; limited
               a GradScaler's overflow: the forward was finite, the scaled gradient was not: the scaler skips, not
               counted

What is wrong (rank, sample, label, class row) is described by collectives that only a bad step takes part in.
"""

from partial_fc.errors import NonFiniteError
from partial_fc.nonfinite.check_gradients import check_gradients
from partial_fc.step_record import DEFAULT_MAX_SKIPS, StepRecord

__all__ = ["DEFAULT_MAX_SKIPS", "NonFiniteError", "StepRecord", "check_gradients"]
