"""Is a training loop set up correctly? Two training steps without a trace, and the checks that they allow.

    wiring       group, wrappers, devices, optimizers: seen from outside (wiring.py)
    agreement    the head's settings and seed and the backbone's parameters are the same on all ranks
    forward      embeddings [N_local, D] have the width and the device that the head expects; labels are in range
                 (trial.py)
    backward     gradients reach both; the backbone's equals that of one process with the global batch (gradients.py)
    steps        both change, all ranks keep the same backbone, found_inf is the same on all ranks (trial.py)
                 ── everything is restored (undo.py) ──

The gradient of one process is computed without the model's wrapper: every rank's batch goes through the bare backbone,
the gradient of the same global loss goes back through it, and the shares of all ranks are summed. The gradients of the
wrapped model must equal this sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partial_fc.diagnosis.checks import RESULTS, Check, agreed
from partial_fc.diagnosis.trial import DYNAMIC, Embed, Trial
from partial_fc.diagnosis.undo import Undo
from partial_fc.diagnosis.wiring import Wiring
from partial_fc.distributed.given import whole
from partial_fc.distributed.objects import gather_objects
from partial_fc.head import PartialFC
from partial_fc.kernels.choice import VARIABLE
from partial_fc.kernels.launch import failed as failed_kernels
from partial_fc.kernels.trial import tried_on

NEEDED = ("group", "wrapping", "device", "settings")  # if one of them fails, a step would hang or be meaningless


@dataclass(frozen=True)
class Report:
    """The result of `doctor`, the same on every rank. Print it, or use `ok` and `checks`."""

    checks: tuple[Check, ...]
    ranks: int = 1

    @property
    def ok(self) -> bool:
        """Whether no check failed; checks that could not be made are not counted."""
        return all(check.ok is not False for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """Return a check by its name."""
        return next(check for check in self.checks if check.name == name)

    def raise_if_wrong(self) -> None:
        """Raise RuntimeError if a check failed; the message says what is wrong and how to fix it."""
        wrong = [check for check in self.checks if check.ok is False]
        if wrong:
            raise RuntimeError("\n".join(f"{c.name}: {c.words}" + (f"; {c.mend}" if c.mend else "") for c in wrong))

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {"ok": self.ok, "ranks": self.ranks, "checks": [vars(check) for check in self.checks]}

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{ {True: '✓', False: '✗', None: '–'}[check.ok] } {check.name:{width}}  {check.words}")
            if check.ok is False and check.mend:
                lines.append(f"  {'':{width}}  fix: {check.mend}")
        failed = sum(check.ok is False for check in self.checks)
        verdict = f"{failed or 'no'} problem{'s' * (failed != 1)} found"
        return "\n".join([*lines, f"{len(self.checks)} checks on {self.ranks} rank{'s' * (self.ranks > 1)}: {verdict}"])


def doctor(
    model: nn.Module,
    head: nn.Module,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    *,
    batch: tuple[Any, Tensor] | None = None,
    input_shape: Sequence[int] | None = None,
    embed: Embed | None = None,
    scaler: Any = None,
    accelerator: Any = None,
) -> Report:
    """Run two steps of a training loop on every rank, restore everything, and report what is set up wrongly.

    Args:
        model: the backbone as the loop calls it: wrapped by DDP, FSDP2 or Accelerate, or bare. Or a model that contains
            the head and is called as `model(inputs, labels)`.
        head: the PartialFC.
        optimizers: all optimizers of the loop, including the `RowOptimizer`.
        batch: (inputs, labels `[N_local]`) of this rank, as in the loop.
        input_shape: shape of one sample, for random inputs if there is no batch. Without either, checks that need the
            backbone's forward are skipped.
        embed: `embed(model, inputs)` returns embeddings `[N_local, D]`, if `model(inputs)` does not.
        scaler: the GradScaler of the loop, to check that ranks agree on overflows; not needed for Accelerate's own.
        accelerator: the Accelerator, to check what was passed to its prepare().

    Every rank must call it. The steps compute a gradient of the whole backbone and head, also with update_in_backward,
    and need CPU memory of the size of weights, gradients and optimizer state to restore them. Under DeepSpeed the
    engine's steps are not run.

    Raises TypeError if the head is not a PartialFC, ValueError if its rows are in a storage. All other mistakes are in
    the report; `report.raise_if_wrong()` raises them.
    """
    given = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    for each in given:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f"optimizers must be torch optimizers, not {type(each).__name__}")
    if getattr(getattr(head, "class_rows", None), "store", None) is not None:
        raise ValueError(
            "doctor keeps a copy in memory of all that it restores: give it a small head without storage, which is "
            "wired as this one"
        )
    if input_shape is not None:
        input_shape = [whole("a size in input_shape", each, least=1) for each in input_shape]
    if batch is not None and not (isinstance(batch, Sequence) and len(batch) == 2):
        raise TypeError("batch must be a pair (inputs, labels)")
    wiring = Wiring.of(model, head, given, accelerator)
    checks = agreed([*wiring.checks(), _labels(wiring, batch)])
    checks.append(_settings(wiring))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    by_name = {check.name: check for check in checks}
    failed = [name for name in (*NEEDED, "labels") if by_name[name].ok is False]
    if by_name["head optimizer"].ok is False and wiring.refuses_to_step:
        failed.append("head optimizer")
    if failed:
        checks += [Check(name, None, f"not checked: fix {', '.join(failed)} first") for name in (*DYNAMIC, "kernels")]
        return Report(tuple(checks), ranks)
    scaler = scaler or getattr(accelerator, "scaler", None)
    wrappers = wiring.layers[:-1]
    if wiring.engine and len(wiring.layers) == 1:  # FSDP2 has no wrapper: it changes the class of the model
        wrappers = [wiring.bare]
    with Undo([model, head], given, wrappers) as undo:
        trial = Trial(wiring, undo, batch, input_shape, embed, scaler, checks)
        trial.run()
        of_kernels = agreed([_kernels(wiring.head)])  # of the trial's forwards
    return Report((*trial.checks, *of_kernels), ranks)


# ---------------------------------------------------------------------------------------------------- before the steps


def _labels(wiring: Wiring, batch: tuple[Any, Tensor] | None) -> Check:
    name = "labels"
    head = wiring.head
    if batch is None:
        return Check(name, None, "not checked: no batch was given")
    labels = batch[1]
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        return Check(name, False, f"labels are {what}, not int64 [N]", "pass one class id per sample: labels.long()")
    bad = labels[(labels != head.ignore_index) & ((labels < 0) | (labels >= head.num_classes))]
    if len(bad):
        too_large = int(bad[0]) >= head.num_classes
        mend = "count labels from 0; num_classes is the largest label of all data plus 1" if too_large else ""
        return Check(name, False, f"label {int(bad[0])} is out of range: valid are 0 to {head.num_classes - 1}", mend)
    return Check(name, True, f"all labels are in the range 0 to {head.num_classes - 1}")


def _kernels(head: PartialFC) -> Check:
    """Say which kernels served the forwards. One that failed is a failure, though its numbers are right."""
    name, found, said = "kernels", head.class_rows.kernels, head.kernels_in_use
    if failed_kernels:
        broken = "; ".join(f"{kernel} ({error})" for kernel, error in failed_kernels.items())
        mend = f'install another triton than this, or pass kernels="off" ({VARIABLE}=off)'
        return Check(name, False, f"plain PyTorch took the place of kernels that failed: {broken}", mend)
    if found is None:
        on_cpu = head.weight.device.type == "cpu"
        why = 'kernels="off"' if head.kernels == "off" else "the rows are on a CPU" if on_cpu else "no forward was run"
        return Check(name, True, said if said.startswith("none") else f"none ({why})")
    tried = f", tried beside plain PyTorch on {head.weight.device}" if tried_on(head.weight.device) else ""
    return Check(name, True, f"{found}{tried}{f' ({found.reason})' if found.reason else ''}")


def _settings(wiring: Wiring) -> Check:
    """Check that all ranks built the same head and backbone; by name, so that the message says what differs."""
    head = wiring.head
    mine: dict[str, object] = {k: str(v) for k, v in head.agreed_settings().items()}
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in wiring.backbone.items()]
    mine["the backbone's parameters"] = hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest()
    all_ranks = gather_objects(mine, RESULTS)
    for rank, other in enumerate(all_ranks):
        for key, value in all_ranks[0].items():
            if other[key] != value:
                words = f"ranks disagree: {key} is {value} on rank 0 and {other.get(key)} on rank {rank}"
                mend = "build the same head and backbone, with the same seed, on every rank"
                return Check("settings", False, words, mend)
    return Check("settings", True, f"all ranks built the same head, seed {head.seed}")
