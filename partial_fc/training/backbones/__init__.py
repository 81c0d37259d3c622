"""Backbones by name: images float [n, C, H, W] in [-1, 1] become embeddings float [n, D].

Every module of this package is imported with it, and registers its backbone as it is imported. To add one, add one
file here:

    @register("mine")
    def mine(*, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module: ...

`image_shape` is (C, H, W); the module's last layer gives `embedding_size` numbers an image.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import nn

from partial_fc.training.errors import UserError


class Builder(Protocol):
    """What is registered: a function or class that makes a backbone."""

    def __call__(self, *, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module: ...


BuilderT = TypeVar("BuilderT", bound=Builder)

BACKBONES: dict[str, Builder] = {}


def register(name: str) -> Callable[[BuilderT], BuilderT]:
    """Decorator: make a builder known as `name`. A name taken twice raises ValueError."""

    def add(builder: BuilderT) -> BuilderT:
        if name in BACKBONES:
            raise ValueError(f"the backbone name {name!r} is registered already, by {BACKBONES[name]!r}")
        BACKBONES[name] = builder
        return builder

    return add


def build_backbone(name: str, *, image_shape: tuple[int, int, int], embedding_size: int) -> nn.Module:
    """Build the backbone `name` for images of `image_shape` (C, H, W), with `embedding_size` outputs an image.

    Raises UserError for an unknown name, and for sizes that are not positive.
    """
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}; choose one of: {', '.join(sorted(BACKBONES))}")
    if embedding_size < 1:
        raise UserError(f"the embedding size is {embedding_size}; give at least 1")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UserError(f"the image shape is {tuple(image_shape)}; give (channels, height, width), each at least 1")
    return BACKBONES[name](image_shape=image_shape, embedding_size=embedding_size)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
