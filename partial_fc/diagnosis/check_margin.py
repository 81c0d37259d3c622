"""Check a margin of your own: a sharded head with it, in 1, 2 and 3 processes, against a dense float64 reference.

    from partial_fc import check_margin

    if __name__ == "__main__":  # because it starts processes
        check_margin(MyMargin())

The reference is written from the definition, with autograd through all of it. The check finds gradients that do not
match the formula (a target that mixes samples, a cosine changed in place, a detached part), state that differs between
ranks, and results that depend on the number of ranks.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from partial_fc.classes.head_arguments import check_head_arguments
from partial_fc.distributed.given import whole
from partial_fc.distributed.shards import local_part
from partial_fc.head import PartialFC
from partial_fc.margins.base import Margin, Positives
from partial_fc.sampling import mix

NUM_CLASSES, WIDTH, STEPS = 11, 6, 3
COUNTS = (4, 0, 5)  # samples per rank, combined if there are fewer ranks
IGNORED = -100


@dataclass
class _StepResult:
    """Loss of a step, gradients of embeddings `[N, D]` and class rows `[C, ...]`, and the margin's buffers after it."""

    loss: Tensor
    embeddings: Tensor
    weight: Tensor
    state: dict[str, Tensor]


def check_margin(
    margin: Margin,
    *,
    worlds: Sequence[int] = (1, 2, 3),
    tolerance: float = 1e-8,
    timeout: float = 120.0,
    inter_topk: int = 0,
    inter_topk_penalty: float = 0.06,
) -> None:
    """Compare `margin` in a sharded head with a dense reference, and print what was compared.

    Args:
        margin: the margin; it is sent to the processes by pickle.
        worlds: the world sizes to check.
        tolerance: the largest difference allowed in loss, gradients and buffers, all in float64.
        timeout: seconds to wait for a rank.
        inter_topk: of the head, as for `PartialFC`.
        inter_topk_penalty: of the head, likewise.

    Raises AssertionError that names the world size, the step and the differing value, or RuntimeError with the
    traceback of a rank that failed.
    """
    worlds = [whole("a world size in worlds", world, least=1) for world in worlds]
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be an instance of a Margin such as ArcFace(), not {margin!r}")
    x, labels, weight = _inputs(margin)
    penalty: dict[str, Any] = {"inter_topk": inter_topk, "inter_topk_penalty": inter_topk_penalty}
    check_head_arguments(margin, 1.0, 0.0, None, inter_topk, inter_topk_penalty, None)
    prepared = copy.deepcopy(margin).double()  # as a head prepares it
    prepared.prepare(NUM_CLASSES, NUM_CLASSES)
    prepared.reset()
    dense = _dense_steps(prepared, x, labels, weight, penalty)
    differences = []
    for world in worlds:
        sharded = _run(margin, world, timeout, penalty)
        for step, (mine, expected) in enumerate(zip(sharded, dense, strict=False)):
            differences += [f"{world} ranks, step {step}: {text}" for text in _differences(mine, expected, tolerance)]
    if differences:
        text = "\n  ".join(differences)
        raise AssertionError(f"{type(margin).__name__} does not match its formula:\n  {text}")
    ranks = ", ".join(str(world) for world in worlds)
    equal = f"loss, gradients and state equal the dense reference in {STEPS} steps on {ranks} ranks"
    print(f"{type(margin).__name__}: {equal}")


def _inputs(margin: Margin) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings `[STEPS, N, D]`, labels `[STEPS, N]` and class rows `[C, D]` or `[C, K, D]`."""
    generator = torch.Generator().manual_seed(0)
    count = sum(COUNTS)
    x = torch.randn(STEPS, count, WIDTH, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, NUM_CLASSES, (STEPS, count), generator=generator)
    labels[:, 3] = IGNORED
    shape = (NUM_CLASSES, WIDTH) if margin.centers == 1 else (NUM_CLASSES, margin.centers, WIDTH)
    return x, labels, torch.randn(shape, generator=generator, dtype=torch.float64)


def _dense_steps(
    margin: Margin, all_x: Tensor, all_labels: Tensor, weight: Tensor, penalty: dict[str, Any]
) -> list[_StepResult]:
    found = []
    for step, (x, labels) in enumerate(zip(all_x, all_labels, strict=True)):
        x, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = _dense_loss(margin, x, labels, w, step, **penalty)
        on_x, on_w = torch.autograd.grad(loss, (x, w))
        found.append(_StepResult(loss.detach(), on_x, on_w, _state(margin)))
    return found


def _dense_loss(
    margin: Margin, x: Tensor, labels: Tensor, w: Tensor, step: int, inter_topk: int, inter_topk_penalty: float
) -> Tensor:
    """Return the mean loss by its definition, with autograd through all of it."""
    exists = labels != IGNORED
    norm = x.norm(dim=1)
    if margin.normalize:
        directions = torch.nn.functional.normalize(w, dim=-1).view(NUM_CLASSES, -1, WIDTH)
        embeddings = torch.nn.functional.normalize(x, dim=1) if margin.normalize_embeddings else x
        cosines = torch.einsum("nd,ckd->nck", embeddings, directions).amax(2)
    else:
        cosines = x @ w.T
    column = labels.clamp(min=0)[:, None]
    cosine = cosines.gather(1, column)[:, 0]
    positives = Positives(torch.where(exists, labels, -1), torch.arange(len(x)), norm, exists, mix(0, step))
    target = margin.target(cosine, positives)
    if inter_topk:
        near = cosines.detach().scatter(1, column, -torch.inf).topk(min(inter_topk, NUM_CLASSES - 1), dim=1).indices
        angles = torch.acos(cosines.gather(1, near)) - inter_topk_penalty
        cosines = cosines.scatter(1, near, torch.where(angles < 0, 2 - angles.cos(), angles.cos()))
    others = margin.negative(cosines, target.detach()[:, None])
    logits = others.scatter(1, column, target[:, None]) * margin.scale
    if margin.binary:
        target_weight, other_weight = margin.binary
        is_target = torch.nn.functional.one_hot(column[:, 0], NUM_CLASSES).bool()
        losses = torch.where(is_target, target_weight * softplus(-logits), other_weight * softplus(logits)).sum(1)
    else:
        losses = torch.nn.functional.cross_entropy(logits, column[:, 0], reduction="none")
    penalty = margin.penalty(norm)
    return (losses if penalty is None else losses + penalty)[exists].mean()


def _state(margin: Margin) -> dict[str, Tensor]:
    return {name: buffer.double().clone() for name, buffer in margin.named_buffers()}


# ---------------------------------------------------------------------------------------------------- ranks


def _run(margin: Margin, world: int, timeout: float, penalty: dict[str, Any]) -> list[_StepResult]:
    """Run the steps on `world` ranks, each in its own process, and return the combined results."""
    context = multiprocessing.get_context("spawn")
    pickled = pickle.dumps(margin)  # bytes, because tensors would be sent as memory that all ranks share
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            arguments = (pickled, rank, world, os.path.join(folder, "store"), there, timeout, penalty)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            parts = _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [_combined(list(steps)) for steps in zip(*parts, strict=True)]


def _combined(steps: list[_StepResult]) -> _StepResult:
    """Combine one step of all ranks. The state is the first rank's, or that of the last rank that differs from it."""
    state = steps[0].state
    for each in steps[1:]:
        state = {k: v if float((v - steps[0].state[k]).abs().max()) > 0 else state[k] for k, v in each.state.items()}
    return _StepResult(
        steps[0].loss, torch.cat([s.embeddings for s in steps]), torch.cat([s.weight for s in steps]), state
    )


def _collect(pipes: list[Connection], timeout: float) -> list[list[_StepResult]]:
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        ready = wait([p for rank, p in enumerate(pipes) if rank not in answers], timeout)
        if not ready:
            silent = sorted(set(range(len(pipes))) - set(answers))
            raise RuntimeError(f"ranks {silent} did not respond within {timeout:g} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                succeeded, answer = pipes[rank].recv()
            except (EOFError, ConnectionResetError):
                raise RuntimeError(
                    f"rank {rank} did not start; call check_margin under `if __name__ == '__main__':`, "
                    "with a margin whose class can be imported"
                ) from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {len(pipes)}:\n{answer}")
            answers[rank] = [_StepResult(**step) for step in torch.load(io.BytesIO(answer))]
    return [answers[rank] for rank in range(len(pipes))]


def _serve(
    pickled: bytes, rank: int, world: int, store: str, pipe: Connection, timeout: float, penalty: dict[str, Any]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
        # bytes here as well, because handles of shared memory would end with this process
        buffer = io.BytesIO()
        torch.save([vars(step) for step in _sharded_steps(pickle.loads(pickled), rank, world, penalty)], buffer)
        pipe.send((True, buffer.getvalue()))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _sharded_steps(margin: Margin, rank: int, world: int, penalty: dict[str, Any]) -> list[_StepResult]:
    """Run the steps on this rank and return its part of them."""
    all_x, all_labels, weight = _inputs(margin)
    counts = [sum(COUNTS[i] for i in range(len(COUNTS)) if i * world // len(COUNTS) == r) for r in range(world)]
    here = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    budget = 0 if rank % 2 else None
    head = PartialFC(WIDTH, NUM_CLASSES, margin, dtype=torch.float64, logits_budget=budget, **penalty)
    with torch.no_grad():
        local_part(head.weight).copy_(weight[head.selected])
    found: list[_StepResult] = []
    for x, labels in zip(all_x[:, here], all_labels[:, here], strict=True):
        x = x.clone().requires_grad_()
        try:
            loss = head(x, labels)
        except ValueError as error:
            if not (found and "running statistics" in str(error)):
                raise
            break  # a buffer that differs between ranks, which the comparison with the formula shows
        loss.backward()
        assert x.grad is not None and head.weight.grad is not None
        found.append(
            _StepResult(loss.detach(), x.grad / world, local_part(head.weight.grad).clone(), _state(head.margin))
        )
        head.zero_grad()
    return found


def _differences(mine: _StepResult, expected: _StepResult, tolerance: float) -> list[str]:
    texts = []
    if not abs(float(mine.loss - expected.loss)) <= tolerance:
        texts.append(f"the loss is {float(mine.loss):.10g}, dense {float(expected.loss):.10g}")
    named = [
        ("the gradient of embeddings", mine.embeddings, expected.embeddings),
        ("the gradient of class", mine.weight, expected.weight),
    ]
    named += [(f"buffer {name}", value, expected.state[name]) for name, value in mine.state.items()]
    for what, a, b in named:
        off = (a - b).abs().nan_to_num(nan=float("inf"))
        if off.numel() and not float(off.max()) <= tolerance:
            at = f"[{int(off.flatten(1).amax(1).argmax())}]" if off.ndim > 1 else ""
            texts.append(f"{what}{at} is off by {float(off.max()):.3g}")
    return texts
