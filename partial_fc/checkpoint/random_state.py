"""The state of a process's random number generators, as one object that can be saved in a checkpoint.

`state_dict` gathers the states of all ranks, a few kilobytes each. `load_state_dict` restores each rank's own state.
Heads do not need it (their draws are keyed by seed and forward count); dropout, augmentation and data loaders do.
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

from partial_fc.distributed.objects import gather_objects
from partial_fc.sampling import mix


class RandomState:
    """Generators of Python, NumPy (if imported), torch on CPU and on this rank's GPU: `save_checkpoint(random=...)`.

    At the same world size, every rank continues its own sequence. At a larger one, the additional ranks are seeded from
    the first rank's state and their rank, so that all sequences differ. Every rank must call state_dict and
    load_state_dict.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": gather_objects(take_random_state(), "the gather of random states")}

    def check_state(self, state: Any) -> None:
        """Raise ValueError unless the generators of every rank can take their state."""
        try:
            for each in state["ranks"]:
                _set(each, random.Random(), torch.Generator())
            if not state["ranks"]:
                raise ValueError("it is of no rank")
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"it is no state of random generators: {error}") from error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks = state_dict["ranks"]
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank < len(ranks):
            restore_random_state(ranks[rank])
        else:
            _seed(mix(zlib.crc32(ranks[0]["torch"].encode()), rank) % 2**32)


def take_random_state() -> dict[str, Any]:
    """Return all states as text, which a checkpoint stores as one value."""
    state: dict[str, Any] = {"python": json.dumps(random.getstate()), "torch": _to_text(torch.get_rng_state())}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = json.dumps([name, keys.tolist(), *rest])
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    numpy = sys.modules.get("numpy")
    _set(state, random, torch.default_generator, None if numpy is None else numpy.random)
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _set(state: dict[str, Any], python: Any, of_torch: torch.Generator, of_numpy: Any = None) -> None:
    """Set generators on the CPU. of_numpy: None to leave NumPy's out, or `numpy.random`."""
    version, words, gauss = json.loads(state["python"])
    python.setstate((version, tuple(words), gauss))
    of_torch.set_state(_from_text(state["torch"]))
    if of_numpy is not None and "numpy" in state:
        name, keys, *rest = json.loads(state["numpy"])
        of_numpy.set_state((name, sys.modules["numpy"].array(keys, dtype="uint32"), *rest))


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
