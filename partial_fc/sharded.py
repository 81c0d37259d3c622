"""`ShardedLoss`: the part of a training step that `PartialFC` and `CenterLoss` share.

a batch   gathered from all ranks, checked alike on every rank
wiring    errors for a loss that is built or trained wrongly
"""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc import errors
from partial_fc.batch.exchange import GlobalBatch, exchange, require_grad_like_others
from partial_fc.batch.status import LabelSet
from partial_fc.distributed.forwards import USUAL, problem_of_forward, surroundings
from partial_fc.nonfinite.bad_step import count_skip
from partial_fc.nonfinite.wiring import check_replacement, follow_in_eval
from partial_fc.nonfinite.zero_loss import zero_loss
from partial_fc.sharded_module import ShardedModule
from partial_fc.shards import ClassShards
from partial_fc.targets import check_batch


class ShardedLoss(ShardedModule):
    """Base of `PartialFC` and `CenterLoss`."""

    @property
    def shards(self) -> ClassShards:
        """The split of the classes over ranks."""
        return self.class_rows.shards

    def _follow(self, loss: Tensor, losses: Tensor, batch: GlobalBatch) -> Tensor:
        """Return the loss, with a hook that makes the forward part of the step. losses: what it is the sum of."""
        record = self.class_rows.record
        if not self.training:
            return follow_in_eval(loss, self.class_rows)
        if loss.requires_grad and record.watches:
            loss.register_hook(record.hook(losses, batch))
        return loss

    def _zero_loss(self, x: Tensor, batch: GlobalBatch, gradient_of_all_rows: bool) -> Tensor:
        """Return the loss of a skipped step. gradient_of_all_rows: give zeros to the parameters; else no rows."""
        samples = batch.counts[batch.ranks.rank] if self.reduction == "none" else None
        return zero_loss(x, samples, self.class_rows, gradient_of_all_rows)

    def forget_notes(self) -> None:
        """Drop what the forwards of a skipped step have noted."""

    # ------------------------------------------------------------------------------------------------ a batch

    def _take(self, embeddings: Tensor | GlobalBatch, labels: Tensor | None) -> tuple[GlobalBatch, Tensor]:
        """Return the global batch, checked, and what autograd follows: this rank's embeddings, or the gathered ones."""
        usual = [look() for look in surroundings()] == USUAL
        problem = "" if usual else problem_of_forward(self.class_rows.owner, self.training)
        batch = embeddings if isinstance(embeddings, GlobalBatch) else self._gather(embeddings, labels, problem)
        if problem or (batch.cut_off and torch.is_grad_enabled()):
            raise errors.not_a_step(problem)
        if not batch.ranks.same_as(self.shards.ranks):
            raise RuntimeError("the batch was gathered over another group than the head's")
        if self.training:
            self._begin_forward()
        record = self.class_rows.record
        valid = range(self.num_classes)
        reason = check_batch(batch, self.embedding_size, valid, self.ignore_index, record.on_nonfinite)
        if reason and self.training:
            record.bad_forward = True
            count_skip(record, reason)
        if isinstance(embeddings, GlobalBatch):
            return batch, batch.embeddings
        return batch, require_grad_like_others(embeddings, batch.status)

    def _begin_forward(self) -> None:
        rows = self.class_rows
        trained = any(p.requires_grad for p in rows.everything)
        # without a RowOptimizer nothing reports that gradients were cleared
        no_gradients = rows.grad_rows is None and all(p.grad is None for p in rows.everything)
        if rows.record.begin_forward(no_gradients=trained and no_gradients and rows.live_optimizer is None):
            self.forget_notes()

    def _gather(self, embeddings: Tensor, labels: Tensor | None, problem: str) -> GlobalBatch:
        if labels is None and self.shards.ranks.group is None:  # else the other ranks must hear of it
            raise errors.missing_labels(self.class_rows.owner)
        validate = self.class_rows.record.validate
        look = validate == "always" or (validate == "first" and not self._seen_batch)
        sets, device = [LabelSet(None, labels)], self.class_rows.device
        (batch,) = exchange(embeddings, sets, self.shards.ranks, look=look, device=device, problem=problem)
        self._seen_batch = True
        return batch

    def _anchor(self) -> Tensor:
        """Return a scalar that requires grad, so that autograd calls the backward although the weights are detached."""
        requires_grad = any(p.requires_grad for p in self.class_rows.parameters.values())
        return torch.zeros((), device=self.class_rows.device, requires_grad=requires_grad)

    # ------------------------------------------------------------------------------------------------ what can be wrong

    def _check_wiring(self) -> None:
        """Raise if it was built before its group, parameters were replaced, or no optimizer takes row gradients."""
        rows = self.class_rows
        rows.check_group()
        for key, parameter in rows.parameters.items():
            now = self._parameters.get(key)  # torch.func.functional_call puts plain tensors there, for one call
            if now is not parameter:
                check_replacement(rows, key, now, self.training)
        if not (self.training and torch.is_grad_enabled() and rows.sampled) or rows.live_optimizer is not None:
            return
        if rows.grad_rows is not None or rows.lost > 1:
            raise errors.untaken_gradients(rows.owner)
