"""The two training steps of `doctor`, and the checks that need them.

    forward      the bare model on this rank's inputs: embeddings [N_local, D]
    reference    gradients of the bare backbone, summed across ranks: those of one process with the global batch
    step 1, 2    through the wrapped model, with the loop's optimizers
    overflow     an infinity on one rank: does the GradScaler see it on all ranks?

Every check is made on all ranks, which agree on its result and then continue or stop together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partial_fc.diagnosis.checks import RESULTS, Check, agreed
from partial_fc.diagnosis.gradients import reach_checks, scale_check
from partial_fc.diagnosis.undo import Undo
from partial_fc.diagnosis.wiring import DEEPSPEED, FSDP2, Wiring, bare
from partial_fc.distributed.objects import gather_objects
from partial_fc.distributed.ranks import Ranks, naming_the_missing
from partial_fc.distributed.shards import local_part
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.optim.row_state import HALF
from partial_fc.optim.two_optimizers import MovedTwice
from partial_fc.sampling import mix

SAMPLES = 4  # per rank, if no batch is given
DYNAMIC = ("replicas", "forward", "head gradient", "backbone gradient", "gradient scale", "steps", "found_inf")

Embed = Callable[[nn.Module, Any], Tensor]


class Trial:
    """Two steps of the loop. `checks` holds the results, on which all ranks agree.

    It stops after a failure that would make the next part hang.

    A batch is the given one, or random inputs of `input_shape`, or None: then embeddings are random and the backbone
    does not run.
    """

    def __init__(
        self,
        wiring: Wiring,
        undo: Undo,
        batch: tuple[Any, Tensor] | None,
        input_shape: Sequence[int] | None,
        embed: Embed | None,
        scaler: Any,
        checks: list[Check],
    ) -> None:
        self.wiring = wiring
        self.undo = undo
        self.head = wiring.head
        self.backbone = wiring.backbone
        self.scaler: Any = copy.deepcopy(scaler) if scaler is not None and scaler.is_enabled() else None
        self.embed = embed or (lambda model, inputs: model(inputs))
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = local_part(self.head.weight).device
        self.batch = batch if batch is not None else self._random_batch(input_shape)
        self.embeddings: Tensor | None = None
        self.checks = list(checks)

    @property
    def backbone_runs(self) -> bool:
        return self.batch is not None

    def run(self) -> None:
        self.wiring.model.train()
        self.head.train()
        for each in self.wiring.optimizers:
            if isinstance(bare(each), RowOptimizer):
                bare(each).update_in_backward = False  # type: ignore[attr-defined]
        self._add(self._check_replicas("replicas", "at the start"))
        if self.wiring.engine == DEEPSPEED:
            self._skip("the doctor does not run the engine's steps", DYNAMIC[1:])
            return
        if not self._check_forward():
            self._skip("fix the forward first", DYNAMIC[2:])
            return
        reference = self._reference() if self.backbone_runs and self.wiring.engine != FSDP2 else None
        self._prepare()
        self._loss(self.wiring.model).backward()
        self._add(*reach_checks(self.head, self.backbone, self.backbone_runs))
        self._add(self._check_scale(reference))
        self._step_optimizers()
        self._prepare()
        self._loss(self.wiring.model).backward()
        self._step_optimizers()
        self._add(self._check_steps())
        self._add(self._check_found_inf())

    def _add(self, *mine: Check) -> None:
        self.checks += agreed(list(mine))

    def _skip(self, reason: str, names: Sequence[str]) -> None:
        self.checks += [Check(name, None, f"not checked: {reason}") for name in names]

    def _failed(self, *names: str) -> bool:
        """Return whether one of these checks has failed."""
        return any(check.ok is False for check in self.checks if check.name in names)

    # ------------------------------------------------------------------------------------------------ parts of a step

    def _prepare(self) -> None:
        """Before each forward: the same dropout, the same draws and no gradients."""
        self.undo.clear()
        self.undo.rewind()
        torch.manual_seed(mix(11, self.rank) % 2**62)

    def _generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(mix(7, self.rank) % 2**62)

    def _random_batch(self, input_shape: Sequence[int] | None) -> tuple[Any, Tensor] | None:
        if input_shape is None:
            return None
        generator = self._generator()
        inputs = torch.randn(SAMPLES, *input_shape, generator=generator, device="cpu", dtype=torch.float32)
        dtype = next((p.dtype for p in self.backbone.values() if p.dtype == torch.float64), torch.float32)
        labels = torch.randint(0, self.head.num_classes, (SAMPLES,), generator=generator, device="cpu")
        return inputs.to(self.device, dtype), labels.to(self.device)

    def _embed(self, model: nn.Module) -> Tensor:
        if self.batch is not None:
            return self.embed(model, self.batch[0])
        shape = (SAMPLES, self.head.embedding_size)
        x = torch.randn(shape, generator=self._generator(), device="cpu", dtype=torch.float32)
        dtype = self.head.weight.dtype if self.head.weight.dtype not in HALF else torch.float32
        return x.to(self.device, dtype).requires_grad_()

    def _loss(self, model: nn.Module) -> Tensor:
        """Return the loop's loss, and keep the embeddings. A head inside the model is called by the model."""
        if self.wiring.inside and self.batch is not None:
            hook = self.head.register_forward_pre_hook(self._keep_embeddings)
            try:
                return model(*self.batch).sum()
            finally:
                hook.remove()
        self.embeddings = self._embed(model)
        if self.batch is None:
            labels = torch.arange(SAMPLES, device=self.device) % self.head.num_classes
        else:
            labels = self.batch[1]
        return self.head(self.embeddings, labels).sum()

    def _keep_embeddings(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.embeddings = arguments[0]

    def _step_optimizers(self) -> None:
        for each in self.wiring.optimizers:
            with suppress(MovedTwice):  # the check of the wiring has named them
                bare(each).step()

    # ------------------------------------------------------------------------------------------------ forward

    def _check_forward(self) -> bool:
        """Add the check "forward" and return whether it passed.

        Runs the bare model first, because a rank that fails in the wrapped one would keep the others waiting.
        """
        problem = self._embeddings_problem()
        if self._add_forward(problem) and not self.wiring.inside:
            self.checks.pop()
            try:  # from here on errors are the same on all ranks
                self._loss(self.wiring.bare)
            except (ValueError, RuntimeError) as error:
                problem = (f"the head rejects the batch: {error}", "")
            self._add_forward(problem)
        return self.checks[-1].ok is True

    def _embeddings_problem(self) -> tuple[str, str] | None:
        """Run the bare model; return (what is wrong with its embeddings, how to fix it), None if nothing is."""
        self._prepare()
        try:
            if self.wiring.inside and self.batch is not None:
                self._loss(self.wiring.bare)
            else:
                self.embeddings = self._embed(self.wiring.bare)
        except Exception as error:
            return f"the forward raises {type(error).__name__}: {error}", "make one step of the loop run first"
        x: Any = self.embeddings
        width = self.head.embedding_size
        if not isinstance(x, Tensor):
            mend = "pass a function that returns them: doctor(..., embed=...)"
            return f"the model returns {type(x).__name__}, not a tensor of embeddings", mend
        if x.ndim != 2 or x.shape[1] != width:
            mend = "build PartialFC with the width of the backbone's output as embedding_size"
            return f"embeddings are {list(x.shape)}, the head expects [N, {width}]", mend
        if x.device != self.device:
            return f"embeddings are on {x.device}, the head on {self.device}", "head.to(device)"
        return None

    def _add_forward(self, problem: tuple[str, str] | None) -> bool:
        random = " (random ones, for the head alone)" if self.batch is None else ""
        passed = Check("forward", True, f"embeddings are [N, {self.head.embedding_size}] on {self.device}{random}")
        self._add(passed if problem is None else Check("forward", False, *problem))
        return self.checks[-1].ok is True

    # ------------------------------------------------------------------------------------------------ gradients

    def _reference(self) -> list[Tensor]:
        """Return the backbone's gradients (float64) of one process with the global batch: all ranks' shares, summed."""
        self._prepare()
        loss = self._loss(self.wiring.bare)
        parameters = list(self.backbone.values())
        grads: list[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad and parameters and self.embeddings is not None and self.embeddings.requires_grad:
            grads = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        elif loss.requires_grad:
            loss.backward()  # the other ranks are in its collectives
        ranks = self.head.class_rows.shards.ranks
        factor = ranks.total if self.head.scale_embedding_grad else 1
        local = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        return [_sum_over(ranks, g.double()) / factor for g in local]

    def _check_scale(self, reference: list[Tensor] | None) -> Check:
        if reference is None or not self.backbone:
            sharded = self.backbone_runs and self.backbone
            reason = "under FSDP2 gradients are sharded" if sharded else "the backbone was not run"
            return Check("gradient scale", None, f"not checked: {reason}")
        half_precision = (
            any(p.dtype in HALF for p in self.backbone.values())
            or self.embeddings is None
            or self.embeddings.dtype in HALF
        )
        return scale_check(self.backbone, reference, half_precision, self.head.class_rows.shards.ranks.total)

    # ------------------------------------------------------------------------------------------------ after the steps

    def _check_replicas(self, name: str, when: str) -> Check:
        """Check that all ranks hold the same backbone, bit for bit."""
        plain = {n: p for n, p in self.backbone.items() if not isinstance(p, DTensor)}
        if self.wiring.engine == DEEPSPEED or len(plain) < len(self.backbone):
            return Check(name, None, "not checked: the backbone is sharded")
        all_ranks = gather_objects([_digest(p) for p in plain.values()], RESULTS)
        for rank, digests in enumerate(all_ranks):
            for key, here, there in zip(plain, all_ranks[0], digests, strict=True):
                if here != there:
                    words = f"{when} the backbone's {key} differs between rank 0 and rank {rank}"
                    mend = "wrap it in DDP after loading it, and update it with averaged gradients only"
                    return Check(name, False, words, mend)
        one = "there is only one copy of the backbone"
        return Check(name, True, "all ranks hold the same backbone" if len(all_ranks) > 1 else one)

    def _check_steps(self) -> Check:
        name = "steps"
        rates = [g["lr"] for o in self.wiring.optimizers for g in o.param_groups if "lr" in g]
        head_parameters = [p for p in self.head.parameters() if p.requires_grad]
        head_changed = any(gather_objects(self.undo.changed(head_parameters), RESULTS))
        backbone_changed = any(gather_objects(self.undo.changed(self.backbone.values()), RESULTS))
        if rates and all(float(rate) == 0 for rate in rates):
            return Check(name, None, "not checked: all learning rates are 0")
        unchanged = []
        if head_parameters and not head_changed and not self._failed("head optimizer", "head gradient"):
            unchanged.append("the head")
        trains = self.backbone_runs and bool(self.backbone)
        if trains and not backbone_changed and not self._failed("backbone optimizer", "backbone gradient"):
            unchanged.append("the backbone")
        if unchanged:
            mend = "create optimizers after the model is moved, cast and wrapped, and check their learning rates"
            return Check(name, False, f"two steps did not change {' and '.join(unchanged)}", mend)
        after = self._check_replicas(name, "after two steps")
        if after.ok is False and not self._failed("replicas"):
            return after
        both = "head and backbone, identically on all ranks"
        return Check(name, True, f"two steps changed {both if self.backbone_runs else 'the head'}")

    # ------------------------------------------------------------------------------------------------ overflow

    def _check_found_inf(self) -> Check:
        """Check that all ranks detect an infinity on one rank, in the embeddings' gradient and in the row gradients."""
        name = "found_inf"
        if self.scaler is None:
            return Check(name, None, "not checked: no GradScaler was given")
        for where in ("backbone", "head") if self.backbone_runs and self.backbone else ("head",):
            self._backward_with_infinity(where)
            optimizers = [o for o in self.wiring.optimizers if self._holds(o, where)]
            detected: list[bool] = []
            refused = ""
            try:
                detected = [self._overflows(bare(o)) for o in optimizers]
            except RuntimeError as error:  # backbone and head in one optimizer: plain tensors and DTensors
                refused = str(error).splitlines()[0]
            all_ranks = gather_objects((detected, refused), RESULTS)
            texts = [text for _, text in all_ranks if text]
            if texts:
                mend = "put the head's parameters into an optimizer of their own, and unscale each optimizer"
                return Check(name, False, f"the scaler cannot unscale the {where}'s optimizer: {texts[0]}", mend)
            missed = [rank for rank, (found, _) in enumerate(all_ranks) if not all(found)]
            if missed:
                words = f"an infinity in the {where}'s gradient on one rank is not detected on rank {missed[0]}"
                mend = (
                    "unscale every optimizer by scaler.unscale_(optimizer); the head needs a RowOptimizer, "
                    "the backbone needs DDP"
                )
                return Check(name, False, words, mend)
        return Check(name, True, "an infinity on one rank is detected on all ranks")

    def _backward_with_infinity(self, where: str) -> None:
        """Run a backward with an infinity on one rank.

        It is in the embeddings' gradient (where="backbone") or in the row gradients (where="head").
        """
        last = (dist.get_world_size() if dist.is_initialized() else 1) - 1
        self._prepare()
        loss = self.scaler.scale(self._loss(self.wiring.model))
        x = self.embeddings
        if where == "backbone" and self.rank == last and x is not None and x.requires_grad:
            x.register_hook(lambda grad: grad * float("inf"))
        loss.backward()
        if where == "head":
            carriers = [c for c in self.head.class_rows.carriers if c.grad is not None and local_part(c.grad).numel()]
            owners = [rank for rank, has in enumerate(gather_objects(bool(carriers), RESULTS)) if has]
            if owners and self.rank == owners[-1]:
                local_part(carriers[0].grad).view(-1)[0] = float("inf")  # type: ignore[arg-type]

    def _holds(self, optimizer: torch.optim.Optimizer, where: str) -> bool:
        """Return whether an optimizer holds parameters of the "backbone" or of the "head"."""
        own = {id(p) for p in (self.backbone.values() if where == "backbone" else self.head.class_rows.trainable)}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _overflows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the scaler finds a non-finite gradient in the optimizer."""
        self.scaler.unscale_(optimizer)
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        self.scaler._per_optimizer_states.clear()
        return any(float(local_part(value)) > 0 for value in found)


def _digest(tensor: Tensor) -> int:
    """Return a checksum of a tensor's bits, computed on its device in blocks, so that no temporary has its size."""
    total = 0
    for block in local_part(tensor.detach()).contiguous().view(-1).view(torch.uint8).split(1 << 20):
        places = torch.arange(1, len(block) + 1, device=block.device) * 0x9E3779B1
        total = mix(total, int((places * (block.long() + 1)).sum()))
    return total


def _sum_over(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Sum a tensor in place over all ranks of a head, replicas included."""
    for group in (ranks.group, ranks.replica_group):
        if group is not None:
            with naming_the_missing("the doctor's sum of gradients", group):
                dist.all_reduce(tensor, group=group)
    return tensor
