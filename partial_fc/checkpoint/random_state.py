"""The states of a process's random number generators, as one thing that can be saved with everything else.

`state_dict` gathers those of all ranks, a few kilobytes each; `load_state_dict` gives every rank its own back. Heads need none of it (their
draws are keyed by seed and step); backbones with dropout, augmentation and data loaders do.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.missing import naming_the_missing
from partial_fc.sampling import mix


class RandomState:
    """Python's, NumPy's (if it is imported) and torch's generators of the CPU and of this rank's GPU, for `save_checkpoint(random=...)`.

    Loaded on as many ranks as saved, every rank goes on with its own numbers. On more ranks, those that had none are seeded from the first
    rank's state and their own number, so that no two draw alike. Every rank must call state_dict and load_state_dict.
    """

    def state_dict(self) -> dict[str, Any]:
        ranks: list[Any] = [_state()]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            with naming_the_missing("the exchange of random states"):
                dist.all_gather_object(ranks, _state())
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks, rank = state_dict["ranks"], dist.get_rank() if dist.is_initialized() else 0
        if rank < len(ranks):
            _restore(ranks[rank])
        else:
            _seed(mix(zlib.crc32(ranks[0]["torch"].encode()), rank) % 2**32)


def _state() -> dict[str, Any]:
    """Everything as text, which a checkpoint stores as one piece."""
    state: dict[str, Any] = {"python": json.dumps(random.getstate()), "torch": _to_text(torch.get_rng_state())}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = json.dumps([name, keys.tolist(), *rest])
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def _restore(state: dict[str, Any]) -> None:
    version, words, gauss = json.loads(state["python"])
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(_from_text(state["torch"]))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        name, keys, *rest = json.loads(state["numpy"])
        numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), *rest))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _to_text(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)
