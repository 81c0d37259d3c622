"""A digest that names the weights of a backbone: equal for a run's checkpoint and for its exported files."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def weights_digest(state: Mapping[str, Any]) -> str:
    """Return 32 hexadecimal digits for a state dict: of its names, shapes, dtypes and the bits of its tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor):
            digest.update(f"{name}\0{value!r}\0".encode())
            continue
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
