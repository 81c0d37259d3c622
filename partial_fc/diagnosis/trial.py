"""The two steps of `doctor`: forward, backward, gradients against one process, what moved, what a scaler hears.

    forward      the bare model on this rank's inputs: embeddings [N_local, D]
    reference    gradients of the bare backbone, summed over the ranks: what one process with the global batch would have
    step 1, 2    through the wrapped model, by the loop's optimizers
    overflow     an infinity on one rank, and who notices it

Every check is made on all ranks and agreed on, and all ranks go on or stop together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from partial_fc.diagnosis.undo import Undo
from partial_fc.diagnosis.wiring import DEEPSPEED, Check, Wiring, bare
from partial_fc.distributed.missing import naming_the_missing
from partial_fc.distributed.ranks import Ranks
from partial_fc.optim.row_optimizer import RowOptimizer
from partial_fc.optim.row_state import HALF
from partial_fc.sampling import mix
from partial_fc.shards import local_part

SAMPLES = 4  # a rank, where no batch is given
TOLERANCE, HALF_TOLERANCE = 1e-2, 1e-1  # of gradients, relative: what is wrong is wrong by a factor
DYNAMIC = ("replicas", "forward", "head gradient", "backbone gradient", "gradient scale", "steps", "found_inf")

Embed = Callable[[nn.Module, Any], Tensor]


class Trial:
    """Two steps of the loop; `checks` holds what they showed, agreed on by all ranks. Nothing goes on after a failure that would hang."""

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
        self.wiring, self.undo, self.head = wiring, undo, wiring.head
        self.scaler: Any = copy.deepcopy(scaler) if scaler is not None and scaler.is_enabled() else None
        self.embed = embed or (lambda model, inputs: model(inputs))
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.backbone = wiring.backbone
        self.device = local_part(self.head.weight).device
        self.batch = batch if batch is not None else self._make(input_shape)
        self.embeddings: Tensor | None = None
        self.checks = list(checks)

    def _wrong(self, *names: str) -> bool:
        """Whether one of these checks has found the reason already."""
        return any(check.ok is False for check in self.checks if check.name in names)

    def _make(self, input_shape: Sequence[int] | None) -> tuple[Any, Tensor] | None:
        if input_shape is None:
            return None
        generator = torch.Generator("cpu").manual_seed(mix(7, self.rank) % 2**62)
        inputs = torch.randn(SAMPLES, *input_shape, generator=generator, device="cpu", dtype=torch.float32)
        dtype = next((p.dtype for p in self.backbone.values() if p.dtype == torch.float64), torch.float32)
        labels = torch.randint(0, self.head.num_classes, (SAMPLES,), generator=generator, device="cpu")
        return inputs.to(self.device, dtype), labels.to(self.device)

    def run(self) -> None:
        self.wiring.model.train()
        self.head.train()
        for each in self.wiring.optimizers:
            if isinstance(bare(each), RowOptimizer):
                bare(each).update_in_backward = False  # type: ignore[attr-defined]
        self._say(self._replicas("replicas", "at the start"))
        if self.wiring.engine == DEEPSPEED:
            self._leave_out("the engine's steps are not run", DYNAMIC[1:])
            return
        runs = self.batch is not None
        if not self._forward():
            self._leave_out("the forward must be right first", DYNAMIC[2:])
            return
        reference = self._reference() if runs and self.wiring.engine != "FSDPModule" else None
        self._start()
        self._loss(self.wiring.model).backward()
        self._say(*self._gradients(runs))
        self._say(self._scale(reference, runs))
        self._step()
        self._start()
        self._loss(self.wiring.model).backward()
        self._step()
        self._say(self._steps(runs))
        self._say(self._found_inf(runs))

    def _say(self, *mine: Check) -> None:
        self.checks += agreed(list(mine))

    def _leave_out(self, reason: str, names: Sequence[str]) -> None:
        self.checks += [Check(name, None, f"not checked: {reason}") for name in names]

    # ------------------------------------------------------------------------------------------------ pieces of a step

    def _start(self) -> None:
        """The same dropout, the same draws and no gradients."""
        self.undo.clear()
        self.undo.rewind()
        torch.manual_seed(mix(11, self.rank) % 2**62)

    def _embed(self, model: nn.Module) -> Tensor:
        if self.batch is None:
            generator = torch.Generator("cpu").manual_seed(mix(7, self.rank) % 2**62)
            x = torch.randn(SAMPLES, self.head.embedding_size, generator=generator, device="cpu", dtype=torch.float32)
            return x.to(
                self.device, self.head.weight.dtype if self.head.weight.dtype not in HALF else torch.float32
            ).requires_grad_()
        return self.embed(model, self.batch[0])

    def _loss(self, model: nn.Module) -> Tensor:
        """The loop's loss; a head inside the model is called by it."""
        if self.wiring.inside and self.batch is not None:
            hook = self.head.register_forward_pre_hook(self._note)
            try:
                return model(*self.batch).sum()
            finally:
                hook.remove()
        self.embeddings = self._embed(model)
        labels = (
            torch.arange(SAMPLES, device=self.device) % self.head.num_classes if self.batch is None else self.batch[1]
        )
        return self.head(self.embeddings, labels).sum()

    def _note(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.embeddings = arguments[0]

    def _forward(self) -> bool:
        """Whether embeddings are what the head takes, and it takes them. The bare model, so that a rank that fails keeps nobody waiting."""
        self._start()
        width, problem = self.head.embedding_size, None
        try:
            if self.wiring.inside and self.batch is not None:
                self._loss(self.wiring.bare)
            else:
                self.embeddings = self._embed(self.wiring.bare)
        except Exception as error:
            problem = f"the forward raises {type(error).__name__}: {error}", "see that one step of the loop runs"
        x: Any = self.embeddings
        if problem is None and not isinstance(x, Tensor):
            problem = (
                f"the model gives {type(x).__name__}, not a tensor of embeddings",
                "say how to get them: doctor(..., embed=...)",
            )
        if problem is None and (x.ndim != 2 or x.shape[1] != width):
            mend = "give PartialFC the width of the backbone's output as embedding_size"
            problem = f"embeddings are {list(x.shape)}, the head takes [N, {width}]", mend
        if problem is None and x.device != self.device:
            problem = f"embeddings are on {x.device}, the head on {self.device}", "head.to(device)"
        if self._say_forward(problem) and not self.wiring.inside:
            self.checks.pop()
            try:  # from here on errors are the same on all ranks
                self._loss(self.wiring.bare)
            except (ValueError, RuntimeError) as error:
                problem = f"the head refuses the batch: {error}", ""
            self._say_forward(problem)
        return self.checks[-1].ok is True

    def _say_forward(self, problem: tuple[str, str] | None) -> bool:
        made_up = ", made up for the head alone" if self.batch is None else ""
        right = Check("forward", True, f"embeddings are [N, {self.head.embedding_size}] on {self.device}{made_up}")
        self._say(right if problem is None else Check("forward", False, *problem))
        return self.checks[-1].ok is True

    def _step(self) -> None:
        for each in self.wiring.optimizers:
            bare(each).step()

    # ------------------------------------------------------------------------------------------------ gradients

    def _reference(self) -> list[Tensor]:
        """The backbone's gradient of the global batch, as one process would have it: summed shares of all ranks, float64."""
        self._start()
        loss = self._loss(self.wiring.bare)
        parameters = list(self.backbone.values())
        grads: list[Tensor | None] = [None] * len(parameters)
        if loss.requires_grad and parameters and self.embeddings is not None and self.embeddings.requires_grad:
            grads = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        elif loss.requires_grad:
            loss.backward()  # the others are in its collectives
        ranks = self.head.class_rows.shards.ranks
        factor = ranks.total if self.head.scale_embedding_grad else 1
        local = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        return [_sum_over(ranks, g.double()) / factor for g in local]

    def _gradients(self, runs: bool) -> list[Check]:
        head, checks = self.head, []
        row_grad = head.row_grad
        grads = (
            [row_grad[1]]
            if row_grad is not None
            else [local_part(p.grad) for p in head.parameters() if p.grad is not None]
        )
        some = any(gather_objects(any(bool(g.any()) for g in grads)))
        frozen = not any(p.requires_grad for p in head.parameters())
        if some or frozen:
            checks.append(
                Check("head gradient", True, "the head is frozen" if frozen else "the loss reaches the head's rows")
            )
        else:
            mend = "head(embeddings, labels) must be part of the loss that backward begins at"
            checks.append(Check("head gradient", False, "the loss reaches no row of the head", mend))
        name = "backbone gradient"
        without = [n for n, p in self.backbone.items() if p.grad is None or not bool(local_part(p.grad).any())]
        if not runs or not self.backbone:
            words = (
                "the backbone has nothing to train"
                if not self.backbone
                else "not checked: give batch=(inputs, labels) or input_shape="
            )
            checks.append(Check(name, None if self.backbone else True, words))
        elif len(without) == len(self.backbone):
            mend = "embeddings must come out of the model with their graph: no detach(), no_grad() or eval-only path"
            checks.append(Check(name, False, "the loss reaches no parameter of the backbone", mend))
        else:
            left = f", but {len(without)} of {len(self.backbone)}: {', '.join(without[:3])}" if without else ""
            checks.append(Check(name, True, f"the loss reaches the backbone's parameters{left}"))
        return checks

    def _scale(self, reference: list[Tensor] | None, runs: bool) -> Check:
        name = "gradient scale"
        if reference is None or not self.backbone:
            reason = "under FSDP2 gradients are in shards" if runs and self.backbone else "the backbone was not run"
            return Check(name, None, f"not checked: {reason}")
        mine = [
            torch.zeros_like(r) if p.grad is None else p.grad.double()
            for p, r in zip(self.backbone.values(), reference, strict=True)
        ]
        size = sum(float(r.square().sum()) for r in reference)
        if not size:
            return Check(name, None, "not checked: the gradient is zero")
        ratio = sum(float((g * r).sum()) for g, r in zip(mine, reference, strict=True)) / size
        off = sum(float((g - r).square().sum()) for g, r in zip(mine, reference, strict=True)) ** 0.5 / size**0.5
        scaled = (
            sum(float((g - ratio * r).square().sum()) for g, r in zip(mine, reference, strict=True)) ** 0.5 / size**0.5
        )
        everyone = gather_objects((ratio, off, scaled))
        low = (
            any(p.dtype in HALF for p in self.backbone.values())
            or self.embeddings is None
            or self.embeddings.dtype in HALF
        )
        tolerance = HALF_TOLERANCE if low else TOLERANCE
        world = self.head.class_rows.shards.ranks.total
        if all(each[1] <= tolerance for each in everyone):
            off = max(each[1] for each in everyone)
            return Check(
                name,
                True,
                f"the backbone's gradient is that of one process with the global batch, to {max(off, 1e-16):.0e}",
            )
        if any(each[2] > tolerance * max(1.0, abs(each[0])) for each in everyone):
            words = (
                "the backbone's gradients differ between ranks: nothing averages them"
                if world > 1
                else f"off by {off:.2g}, relative"
            )
            return Check(name, False, words, "wrap the backbone in DistributedDataParallel (or accelerator.prepare it)")
        words = f"the backbone's gradient is {ratio:.4g} times that of one process with the global batch"
        mend = f"gradients are averaged over ranks, so the head must scale them by {world}: build it with scale_embedding_grad=True"
        if ratio > 1:
            mend = "gradients are summed over ranks, not averaged: build the head with scale_embedding_grad=False"
        return Check(name, False, words, mend)

    # ------------------------------------------------------------------------------------------------ after the steps

    def _replicas(self, name: str, when: str) -> Check:
        """Whether all ranks hold the same backbone, bit for bit."""
        plain = {n: p for n, p in self.backbone.items() if not isinstance(p, DTensor)}
        if self.wiring.engine == DEEPSPEED or len(plain) < len(self.backbone):
            return Check(name, None, "not checked: the backbone is in shards")
        everyone = gather_objects([_digest(p) for p in plain.values()])
        for rank, digests in enumerate(everyone):
            for key, here, there in zip(plain, everyone[0], digests, strict=True):
                if here != there:
                    words = f"{when} the backbone's {key} is not the same on rank 0 and rank {rank}"
                    return Check(
                        name,
                        False,
                        words,
                        "let DDP wrap it after it is loaded, and change it by averaged gradients alone",
                    )
        return Check(name, True, "all ranks hold the same backbone" if len(everyone) > 1 else "there is one backbone")

    def _steps(self, runs: bool) -> Check:
        name = "steps"
        rates = [g["lr"] for o in self.wiring.optimizers for g in o.param_groups if "lr" in g]
        head = any(gather_objects(self.undo.moved(p for p in self.head.parameters() if p.requires_grad)))
        backbone = any(gather_objects(self.undo.moved(self.backbone.values())))
        if rates and all(float(rate) == 0 for rate in rates):
            return Check(name, None, "not checked: all learning rates are 0")
        still = [
            what
            for what, moves, trains in (
                (
                    "the head",
                    head or self._wrong("head optimizer", "head gradient"),
                    any(p.requires_grad for p in self.head.parameters()),
                ),
                (
                    "the backbone",
                    backbone or self._wrong("backbone optimizer", "backbone gradient"),
                    runs and bool(self.backbone),
                ),
            )
            if trains and not moves
        ]
        if still:
            mend = "build optimizers after the last move, cast or wrap, and see their learning rates"
            return Check(name, False, f"two steps did not move {' and '.join(still)}", mend)
        after = self._replicas(name, "after two steps")
        if after.ok is False and not self._wrong("replicas"):
            return after
        return Check(
            name, True, "two steps moved " + ("head and backbone, the same way on all ranks" if runs else "the head")
        )

    def _found_inf(self, runs: bool) -> Check:
        """An infinity on the last rank alone, once in its embeddings' gradient and once in its rows': all ranks must hear of it."""
        name = "found_inf"
        if self.scaler is None:
            return Check(name, None, "not checked: no GradScaler was given")
        last = (dist.get_world_size() if dist.is_initialized() else 1) - 1
        mend = "every optimizer must be unscaled by scaler.unscale_(optimizer), the head's by the RowOptimizer, the backbone's under DDP"
        for where in ("backbone", "head") if runs and self.backbone else ("head",):
            self._start()
            loss = self.scaler.scale(self._loss(self.wiring.model))
            if (
                where == "backbone"
                and self.rank == last
                and self.embeddings is not None
                and self.embeddings.requires_grad
            ):
                self.embeddings.register_hook(lambda grad: grad * float("inf"))
            loss.backward()
            if where == "head":
                carriers = [
                    c for c in self.head.class_rows.carriers if c.grad is not None and local_part(c.grad).numel()
                ]
                owners = [rank for rank, has in enumerate(gather_objects(bool(carriers))) if has]
                if owners and self.rank == owners[-1]:
                    local_part(carriers[0].grad).view(-1)[0] = float("inf")  # type: ignore[arg-type]
            wanted = [o for o in self.wiring.optimizers if self._holds(o, where)]
            mine, refused = [], ""
            try:
                mine = [self._overflows(bare(o)) for o in wanted]
            except RuntimeError as error:  # backbone and head in one optimizer: plain tensors and DTensors
                refused = str(error).splitlines()[0]
            everyone = gather_objects((mine, refused))
            texts = [text for _, text in everyone if text]
            if texts:
                alone = "keep the head's parameters in an optimizer of their own, and unscale each"
                return Check(name, False, f"the scaler cannot unscale the {where}'s optimizer: {texts[0]}", alone)
            missed = [rank for rank, (found, _) in enumerate(everyone) if not all(found)]
            if missed:
                return Check(
                    name,
                    False,
                    f"an infinity in the {where}'s gradient on one rank is not noticed on rank {missed[0]}",
                    mend,
                )
        return Check(name, True, "an infinity on one rank is noticed on all")

    def _holds(self, optimizer: torch.optim.Optimizer, where: str) -> bool:
        own = {id(p) for p in (self.backbone.values() if where == "backbone" else self.head.class_rows.trainable)}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _overflows(self, optimizer: torch.optim.Optimizer) -> bool:
        self.scaler.unscale_(optimizer)
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        self.scaler._per_optimizer_states.clear()
        return any(float(local_part(value)) > 0 for value in found)


def _digest(tensor: Tensor) -> int:
    """A number of the bits of a tensor, on its device; block by block, so that nothing of its size is made."""
    total = 0
    for block in local_part(tensor.detach()).contiguous().view(-1).view(torch.uint8).split(1 << 20):
        places = torch.arange(1, len(block) + 1, device=block.device) * 0x9E3779B1
        total = mix(total, int((places * (block.long() + 1)).sum()))
    return total


def _sum_over(ranks: Ranks, tensor: Tensor) -> Tensor:
    for group in (ranks.group, ranks.replica_group):
        if group is not None:
            with naming_the_missing("a sum of the doctor", group):
                dist.all_reduce(tensor, group=group)
    return tensor


def gather_objects(mine: Any) -> list[Any]:
    """What every rank of the default group brings; small things of plain types."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    with naming_the_missing("an exchange of objects"):
        dist.all_gather_object(everyone, mine)
    return everyone


def agreed(mine: list[Check]) -> list[Check]:
    """Of each check the first that is wrong on any rank, with the rank's name where it is not so on all."""
    everyone = gather_objects([tuple(vars(check).values()) for check in mine])
    found = []
    for of_check in zip(*everyone, strict=True):
        checks = [Check(*values) for values in of_check]
        wrong = [rank for rank, check in enumerate(checks) if check.ok is False]
        if not wrong:
            found.append(next((c for c in checks if c.ok is None), checks[0]))
            continue
        first = checks[wrong[0]]
        where = f"rank {wrong[0]}: " if len(wrong) < len(checks) else ""
        found.append(Check(first.name, False, where + first.words, first.mend))
    return found
