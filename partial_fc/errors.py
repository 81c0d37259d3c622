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
