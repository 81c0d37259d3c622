"""`ShardedLoss`: the part of a training step that `PartialFC` and `CenterLoss` share.

a batch   gathered from all ranks, checked alike on every rank
wiring    errors for a loss that is built or trained wrongly
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from partial_fc import errors
from partial_fc.batch.exchange import GlobalBatch, exchange, require_grad_like_others
from partial_fc.batch.facts import Agreed
from partial_fc.batch.later import look_now
from partial_fc.batch.misuse import check_use
from partial_fc.batch.refusals import check_gathered, tell_others
from partial_fc.batch.status import LabelSet
from partial_fc.batch.targets import check_batch
from partial_fc.distributed.forwards import USUAL, surroundings
from partial_fc.distributed.shards import ClassShards
from partial_fc.nonfinite.bad_step import count_skip
from partial_fc.nonfinite.wiring import follow_in_eval
from partial_fc.nonfinite.zero_loss import cleared_in_place
from partial_fc.sharded_module import ShardedModule


class ShardedLoss(ShardedModule):
    """Base of `ChangeableLoss`, and so of `PartialFC` and `CenterLoss`."""

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
            loss.register_hook(record.hook(losses, batch, self.ignore_index))
        return loss

    def _checked_batch(self, embeddings: Tensor | GlobalBatch, labels: Tensor | None) -> tuple[GlobalBatch, Tensor]:
        """Return the global batch, checked, and what autograd follows: this rank's embeddings, or the gathered ones."""
        ranks, gathered = self.shards.ranks, isinstance(embeddings, GlobalBatch)
        own = [(self._parameters.get(key), p) for key, p in self.class_rows.parameters.items()]
        own += [(attrgetter(key)(self), p) for key, p in self.class_rows.shared.items()]
        try:
            # parameters replaced or hooked, or a mode of torch that no step runs in: check_use says what it is
            changed = any(now is not p or p._backward_hooks or p._post_accumulate_grad_hooks for now, p in own)
            if changed or [look() for look in surroundings()] != USUAL:
                check_use(self)
            self._check_wiring()
        except RuntimeError as error:
            tell_others(error, gathered, ranks, self.class_rows.device)
            raise
        agreed = None if ranks.group is None else Agreed.of(self)
        batch = embeddings if isinstance(embeddings, GlobalBatch) else self._gather(embeddings, labels, agreed)
        if gathered:
            check_gathered(batch, ranks, agreed, self.class_rows.device)
            batch = look_now(batch) if batch.later and not self._looks_later else batch
        if self.training:
            self._begin_forward()
        record, valid = self.class_rows.record, range(self.num_classes)
        reason = check_batch(batch, self.embedding_size, valid, self.ignore_index, record.on_nonfinite)
        if reason and self.training:
            record.bad_forward = True
            count_skip(record, reason)
        if isinstance(embeddings, GlobalBatch):
            return batch, batch.embeddings
        return batch, require_grad_like_others(embeddings, batch.status)

    @property
    def _looks_later(self) -> bool:
        """Whether the check of the step finds what is bad, so that forward need not wait for a device."""
        step = self.training and torch.is_grad_enabled() and self.class_rows.record.on_nonfinite != "log"
        return step and self.class_rows.home.type != "cpu"  # rows on the host need to know the labels anyway

    def _begin_forward(self) -> None:
        rows = self.class_rows
        trained = any(p.requires_grad for p in rows.everything)
        none = rows.grad_rows is None and all(p.grad is None for p in rows.everything)
        none = none or (rows.record.bad_step and cleared_in_place(rows))
        # without a RowOptimizer nothing reports that gradients were cleared
        if rows.record.begin_forward(no_gradients=trained and none and rows.live_optimizer is None):
            self.forget_notes()

    def _gather(self, embeddings: Tensor, labels: Tensor | None, agreed: Agreed | None) -> GlobalBatch:
        if labels is None and self.shards.ranks.group is None:  # else the other ranks must hear of it
            raise errors.missing_labels(self.class_rows.owner)
        rows, sets, validate = self.class_rows, [LabelSet(None, labels)], self.class_rows.record.validate
        look = (validate == "always" or (validate == "first" and not self._seen_batch)) and not self._looks_later
        (batch,) = exchange(embeddings, sets, rows.shards.ranks, look=look, device=rows.device, agreed=agreed)
        self._seen_batch = True
        return batch

    def _anchor(self) -> Tensor | None:
        """Return the parameter that autograd asks for the gradient of detached rows; None if none is trained."""
        return next((p for p in self.class_rows.parameters.values() if p.requires_grad), None)

    def _check_wiring(self) -> None:
        """Raise if it was built before its group, or no optimizer takes row gradients."""
        rows = self.class_rows
        rows.check_group()
        if rows.store is not None:
            rows.store.check(rows, trains=self.training and torch.is_grad_enabled())
        trains_alone = self.training and torch.is_grad_enabled() and rows.sampled and rows.live_optimizer is None
        if trains_alone and (rows.grad_rows is not None or rows.lost > 1):
            raise errors.untaken_gradients(rows.owner)
