"""Backbones by name: images float [n, C, H, W] in [-1, 1] become embeddings float [n, D].

Every module of this package is imported with it, and registers its backbones as it is imported. To add one, add one
file here:

    @register("mine")
    def mine(*, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module: ...

`image_shape` is (C, H, W); the module's last layer gives `embedding_size` numbers an image. A module that can do more
says so by what it has: `dropout`, an nn.Dropout before its last layer; `set_grad_checkpointing(enable)`, after which
it computes its blocks again in the backward (timm's models have the same method). Names that begin with `timm:` and
`hf:` are models of those packages (outside.py); weights.py reads files of weights, counts.py counts.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from partial_fc.training.backbones.recompute import keep_statistics
from partial_fc.training.errors import UserError


class Builder(Protocol):
    """What is registered: a function or class that makes a backbone."""

    def __call__(self, *, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module: ...


BuilderT = TypeVar("BuilderT", bound=Builder)
Prefixed = Callable[[str, tuple[int, int, int], int], nn.Module]

BACKBONES: dict[str, Builder] = {}
PREFIXES: dict[str, Prefixed] = {}
"""Prefix of a name, such as "timm:" -> what builds from (the rest of the name, image_shape, embedding_size)."""


def register(name: str) -> Callable[[BuilderT], BuilderT]:
    """Decorator: make a builder known as `name`. A name taken twice raises ValueError."""

    def add(builder: BuilderT) -> BuilderT:
        if name in BACKBONES:
            raise ValueError(f"the backbone name {name!r} is registered already, by {BACKBONES[name]!r}")
        BACKBONES[name] = builder
        return builder

    return add


def build_backbone(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    embedding_size: int,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
) -> nn.Module:
    """Build the backbone `name` for images of `image_shape` (C, H, W), with `embedding_size` outputs an image.

    dropout: probability before the last layer. gradient_checkpointing: keep the inputs of blocks alone and compute the
    blocks again in the backward: the same gradients from less memory; batch statistics count a batch once.
    channels_last: convolutions get their images as [n, H, W, C] in memory, which is faster on GPUs; weights stay as
    they are, so that every engine and checkpoint takes them.

    Raises UserError for an unknown name, for sizes that are not positive, and for what the backbone cannot do.
    """
    if embedding_size < 1:
        raise UserError(f"the embedding size is {embedding_size}; give at least 1")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UserError(f"the image shape is {tuple(image_shape)}; give (channels, height, width), each at least 1")
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is not None:
        backbone = PREFIXES[prefix](name.removeprefix(prefix), image_shape, embedding_size)
    elif name in BACKBONES:
        backbone = BACKBONES[name](image_shape=image_shape, embedding_size=embedding_size)
    else:
        others = "".join(f", {prefix}NAME" for prefix in sorted(PREFIXES))
        raise UserError(f"unknown backbone {name!r}; choose one of: {', '.join(sorted(BACKBONES))}{others}")
    _set(backbone, name, dropout, gradient_checkpointing, channels_last)
    return backbone


def _set(backbone: nn.Module, name: str, dropout: float, gradient_checkpointing: bool, channels_last: bool) -> None:
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}; give a probability from 0, and below 1")
    if dropout:
        layer = getattr(backbone, "dropout", None)
        if not isinstance(layer, nn.Dropout):
            raise UserError(f"the backbone {name!r} has no dropout; leave --backbone.dropout out")
        layer.p = dropout
    if gradient_checkpointing:
        enable = getattr(backbone, "set_grad_checkpointing", None)
        if enable is None:
            raise UserError(
                f"the backbone {name!r} has no gradient checkpointing; leave --backbone.gradient_checkpointing out"
            )
        enable(True)
        keep_statistics(backbone)
    if channels_last:
        backbone.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
