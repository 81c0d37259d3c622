"""`NonFiniteError`, the package's logger, and the words for losses and optimizers that are wired wrongly."""

from __future__ import annotations

import logging

log = logging.getLogger("partial_fc")


class NonFiniteError(ValueError, RuntimeError):
    """A NaN or infinity in embeddings, losses or gradients. Raised on every rank alike."""


def built_before_group() -> RuntimeError:
    return RuntimeError(
        "this head was built before the process group: every rank would train a copy of its own. "
        "Build it after torch.distributed.init_process_group (or Accelerator(), deepspeed.init_distributed())"
    )


def rows_that_cannot_travel(owner: str, kinds: str) -> ValueError:
    return ValueError(
        f"rows of this {owner} are on the CPU, but its process group exchanges tensors of {kinds} alone: leave device= "
        "out or give it that of this rank, without storage=, or name a backend for the CPU as well, "
        'init_process_group("cpu:gloo,cuda:nccl")'
    )


def replaced_parameter(owner: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"another tensor was put in the place of this {owner}'s {name}, which its optimizer does not know: keep "
        "it out of "
        "fully_shard, and copy values into it (torch.no_grad(), or load_state_dict without assign=True). "
        "functional_call takes tensors (parameter.detach()), not parameters. A margin with parameters is of one head"
    )


def assigned_data(owner: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"a tensor was assigned to {name}.data of this {owner}, which has no effect on rows that are split over ranks: "
        f'in a new {owner} call load_state_dict({{"{name}": tensor}}, strict=False) on every rank, which takes all C '
        "rows, or import_weights(file, ...)"
    )


def untaken_gradients(owner: str) -> RuntimeError:
    return RuntimeError(
        f"no RowOptimizer takes the row gradients of this {owner}, so it would never train: "
        "build head_optimizer = RowOptimizer(torch.optim.SGD, head, lr=...) and keep it; an optimizer over "
        "head.parameters() does not work with sampling"
    )


def grad_of_rows(owner: str) -> RuntimeError:
    return RuntimeError(
        f"torch.autograd.grad cannot give the gradient by the rows of this {owner}: there is none of all rows, because "
        "they are sampled or move in backward. Call loss.backward(), or backward(inputs=[...]) with the weight among "
        "them, and look at head.row_grad"
    )


def changed_in_between(owner: str) -> RuntimeError:
    return RuntimeError(
        f"the classes of this {owner} were changed (expand, remap) between a forward and its backward: call backward() "
        "before the change, or the forward again after it"
    )


def second_optimizer() -> RuntimeError:
    return RuntimeError(
        "another RowOptimizer was built for this head after this one, and both would move its rows; "
        "keep one, and build it again only where nothing steps the old one"
    )


# ------------------------------------------------------------------------------------------------- tools for looking


def parametrized(name: str) -> str:
    return (
        f"{name} was taken apart by a parametrization or by pruning, so that nothing would train what stands for it: "
        "remove it (torch.nn.utils.parametrize.remove_parametrizations, prune.remove before the head is trained); "
        "margins normalise class rows themselves"
    )


def other_rows(owner: str, name: str, given: str, own: str) -> RuntimeError:
    return RuntimeError(
        f"functional_call gave this {owner} {given} for its {name}, which is {own}: in a group every rank gives a "
        "DTensor of its rows"
    )


def given_for_a_call(name: str) -> str:
    return (
        f"functional_call gave this head another {name} for a training step, whose row gradients would go to the "
        "head's own: build the head with sample_rate=1.0 and without update_in_backward, call eval(), or copy the "
        "values into the head"
    )


def hooked(name: str) -> str:
    return (
        f"{name} has hooks that would never be called, because there is no gradient of all of its rows: remove them, "
        "and look at head.row_grad after backward, or at the parameters in head_optimizer.param_groups[0]; hooks of "
        "the head and of its embeddings work"
    )


def exported() -> RuntimeError:
    return RuntimeError(
        "torch.export and torch.onnx.export cannot take in a head, which exchanges batches with other ranks: export "
        "the backbone, and the class weights by partial_fc.export_weights"
    )


def scripted() -> RuntimeError:
    return RuntimeError(
        "torch.jit (script, trace) cannot take in a head, which exchanges batches with other ranks: script the "
        "backbone, and write the class weights by partial_fc.export_weights"
    )


def clipped_in_backward() -> RuntimeError:
    return RuntimeError(
        "update_in_backward cannot be joined with clipping: rows moved before the norm was known; clip the backbone "
        "alone, or build the RowOptimizer without update_in_backward"
    )


def missing_labels(owner: str) -> TypeError:
    return TypeError(f"{owner}(embeddings, labels) needs labels; only a GlobalBatch brings its own")


def not_a_step(problem: str) -> RuntimeError:
    """Of a forward inside a checkpoint; problem: what `problem_of_forward` has found, "" where `gather` was inside."""
    return RuntimeError(
        problem
        or "this batch was gathered inside activation checkpointing (torch.utils.checkpoint with use_reentrant=True), "
        "which cuts it off from the backbone: checkpoint the backbone alone, and call gather on its output"
    )


def no_norm(norm_type: float, max_norm: float) -> ValueError:
    if not norm_type > 0:
        return ValueError(f"norm_type is the order of the norm, above 0 or infinity, not {norm_type}")
    return ValueError(f"max_norm is the largest norm, at least 0, not {max_norm}")
