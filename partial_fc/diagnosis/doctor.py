"""Is it wired right? Two training steps that leave nothing behind, and what they show, check by check.

    wiring       group, wrappers, devices, optimizers: looked at from outside (wiring.py)
    agreement    the head's settings and seed, the backbone's parameters: the same on all ranks
    forward      embeddings [N_local, D] of the width and on the device of the head; labels in range
    backward     gradients reach both; the backbone's equals that of one process with the global batch
    steps        both move, the replicas stay equal, found_inf is the same on all ranks (trial.py)
                 ── all is put back (undo.py) ──

The one process: every rank's embeddings go through the bare backbone, the gradient of the same global loss goes back through it, and the
ranks' shares are summed. What DDP, or whatever is there, made of the gradients must be that sum; a factor or a difference has a name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partial_fc.diagnosis.trial import DYNAMIC, Embed, Trial, agreed, gather_objects
from partial_fc.diagnosis.undo import Undo
from partial_fc.diagnosis.wiring import Check, Wiring

NEEDED = ("group", "wrapping", "device", "settings")  # without them a step would hang, or mean nothing


@dataclass(frozen=True)
class Report:
    """What `doctor` found, the same on every rank. Print it, or look at `ok` and `checks`."""

    checks: tuple[Check, ...]
    ranks: int = 1

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; what could not be checked is not counted."""
        return all(check.ok is not False for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """A check by its name."""
        return next(check for check in self.checks if check.name == name)

    def raise_if_wrong(self) -> None:
        """RuntimeError that says what is wrong and how to mend it, if anything is."""
        wrong = [check for check in self.checks if check.ok is False]
        if wrong:
            raise RuntimeError("\n".join(f"{c.name}: {c.words}" + (f"; {c.mend}" if c.mend else "") for c in wrong))

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"ok": self.ok, "ranks": self.ranks, "checks": [vars(check) for check in self.checks]}

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{ {True: '✓', False: '✗', None: '–'}[check.ok] } {check.name:{width}}  {check.words}")
            if check.ok is False and check.mend:
                lines.append(f"  {'':{width}}  to mend: {check.mend}")
        wrong = sum(check.ok is False for check in self.checks)
        verdict = "all is right" if not wrong else f"{wrong} {'is' if wrong == 1 else 'are'} wrong"
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
    """Run two steps of a training loop on every rank, put everything back, and say what is right and what is wrong.

    Args:
        model: the backbone as the loop calls it: wrapped by DDP, FSDP2 or Accelerate, or bare; or a model that has the head inside and is
            called as `model(inputs, labels)`.
        head: the PartialFC.
        optimizers: all that the loop steps, the `RowOptimizer` among them.
        batch: this rank's (inputs, labels `[N_local]`), as of the loop.
        input_shape: of one sample, for random inputs, where no batch is given. With neither, what needs the backbone's forward is not
            checked.
        embed: `embed(model, inputs)` gives embeddings `[N_local, D]`, where that is not `model(inputs)`.
        scaler: the GradScaler of the loop, to see that ranks agree on overflows; Accelerate's own is found.
        accelerator: the Accelerator, to see what it was given to prepare.

    Every rank must call it. The steps take a gradient of the whole backbone and head, also with update_in_backward, and CPU memory of the
    size of weights, gradients and optimizer state for what is put back. Under DeepSpeed the engine's steps are not run.

    Raises TypeError for a head that is no PartialFC; else wrong wiring is in the report. `report.raise_if_wrong()` raises.
    """
    given = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    for each in given:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f"optimizers must be torch optimizers, not {type(each).__name__}")
    if batch is not None and not (isinstance(batch, Sequence) and len(batch) == 2):
        raise TypeError("batch must be a pair (inputs, labels)")
    wiring = Wiring.of(model, head, given, accelerator)
    checks = agreed([*wiring.checks(), _labels(wiring, batch)])
    checks.append(_settings(wiring))
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    found = {check.name: check for check in checks}
    wrong = [name for name in (*NEEDED, "labels") if found[name].ok is False]
    if found["head optimizer"].ok is False and wiring.refuses_to_step:
        wrong.append("head optimizer")
    if wrong:
        checks += [Check(name, None, f"not checked: {', '.join(wrong)} must be right first") for name in DYNAMIC]
        return Report(tuple(checks), ranks)
    scaler = scaler or getattr(accelerator, "scaler", None)
    layers = [*wiring.layers[:-1], *([wiring.bare] if wiring.engine and len(wiring.layers) == 1 else [])]
    with Undo([model, head], given, layers) as undo:
        trial = Trial(wiring, undo, batch, input_shape, embed, scaler, checks)
        trial.run()
    return Report(tuple(trial.checks), ranks)


# ---------------------------------------------------------------------------------------------------- before anything runs


def _labels(wiring: Wiring, batch: tuple[Any, Tensor] | None) -> Check:
    head, name = wiring.head, "labels"
    if batch is None:
        return Check(name, None, "not checked: no batch was given")
    labels = batch[1]
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        return Check(name, False, f"labels are {what}, not int64 [N]", "one class id a sample: labels.long()")
    bad = labels[(labels != head.ignore_index) & ((labels < 0) | (labels >= head.num_classes))]
    if len(bad):
        mend = (
            "labels count from 0; num_classes is the largest label of all data and one"
            if int(bad[0]) >= head.num_classes
            else ""
        )
        return Check(name, False, f"label {int(bad[0])} is not among 0 to {head.num_classes - 1}", mend)
    return Check(name, True, f"all are among 0 to {head.num_classes - 1}")


def _settings(wiring: Wiring) -> Check:
    """Whether all ranks built the same head and backbone: by name, so that it is known what differs."""
    head = wiring.head
    mine: dict[str, object] = {k: str(v) for k, v in head._settings().items()}
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in wiring.backbone.items()]
    mine["the backbone's parameters"] = hashlib.blake2b(repr(shapes).encode(), digest_size=8).hexdigest()
    everyone = gather_objects(mine)
    for rank, other in enumerate(everyone):
        for key, value in everyone[0].items():
            if other[key] != value:
                words = f"ranks disagree: {key} is {value} on rank 0 and {other[key]} on rank {rank}"
                return Check(
                    "settings", False, words, "build the same head and backbone, with the same seed, on every rank"
                )
    return Check("settings", True, f"all ranks built the same head, seed {head.seed}")
