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


def replaced_parameter(owner: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"another tensor was put in the place of this {owner}'s {name}, which its optimizer does not know: keep "
        "it out of "
        "fully_shard, and copy values into it (torch.no_grad(), or load_state_dict without assign=True)"
    )


def assigned_data(owner: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"a tensor was assigned to {name}.data of this {owner}, which has no effect on rows that are split over ranks: "
        f'load_state_dict({{"{name}": tensor}}, strict=False) on every rank takes all C rows, and import_weights those '
        "of a file"
    )


def untaken_gradients(owner: str) -> RuntimeError:
    return RuntimeError(
        f"no RowOptimizer takes the row gradients of this {owner}, so it would never train: "
        "build RowOptimizer(torch.optim.SGD, it, ...) instead of passing its parameters() to an optimizer"
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


def transformed() -> RuntimeError:
    return RuntimeError(
        "torch.func (grad, vmap, jvp) cannot go through a head, which exchanges batches with other ranks: use "
        "backward() or torch.autograd.grad, and transforms for the backbone; functional_call alone works"
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


def second_order() -> RuntimeError:
    return RuntimeError(
        "create_graph=True asks for second derivatives, which a head does not have: its gradients would be taken for "
        "constants; call backward without it, and penalise gradients of a small dense head instead"
    )
