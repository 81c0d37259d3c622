"""Which kernels serve a forward.

    mode          "off": none. "auto": those that the rule allows, on a card. "interpret": the same in Triton's
                  interpreter, for rows on a CPU
    the rule      rows_problem, tiles_problem, stream_problem: the first thing against it, in words, or ""

What is chosen is tried before it is used (trial.py). A rank chooses for its own card. That is no matter to the others:
what ranks exchange has the same form either way.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, cast

import torch

KernelsMode = Literal["auto", "off", "interpret"]
MODES = ("auto", "off", "interpret")
VARIABLE = "PARTIAL_FC_KERNELS"
OLDEST_TRITON = (3, 6)
OLDEST_CARD = (8, 0)  # of the row kernels, which need nothing but bandwidth
WIDEST = 16384  # a program holds whole rows
LOGITS_CARD = (9, 0)  # of the kernels of logits: TMA and wgmma, for which their blocks are made
STREAM_WIDEST = 256  # D; at 512 blocks compile, but are so small that shared memory bounds them
STREAM_INSTEAD = 128  # D up to which a product more costs less than to write and read exponentials
HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """What the rule looks at. The dtypes are those of class rows, statistics and matrix products; width is D."""

    device: torch.device
    rows: torch.dtype
    stats: torch.dtype
    product: torch.dtype
    width: int
    centers: int
    normalize: bool
    bounded: bool  # exponentials are of the logits themselves, no maximum subtracted
    ruled: bool  # logits of other classes are more than scaled cosines
    binary: bool  # every class is a decision of its own
    bias: bool
    smoothing: bool
    metrics: bool
    correction: bool  # of a sampled forward
    sampled: bool = False  # some rows may take no part


@dataclass(frozen=True)
class Kernels:
    """What serves a forward. reason: why not everything does, in words; "" if it does. directions: the dtype in which
    the products take the directions of rows; None where rows enter them as they are. instead: logits are streamed even
    if they might be kept."""

    rows: bool
    tiles: bool
    stream: bool
    reason: str = ""
    directions: torch.dtype | None = None
    instead: bool = False

    @property
    def of_logits(self) -> bool:
        return self.tiles or self.stream

    def __str__(self) -> str:
        served = [name for name in ("rows", "tiles", "stream") if getattr(self, name)]
        named = " and ".join([", ".join(served[:-1]), served[-1]] if len(served) > 1 else served)
        return named or f"none ({self.reason})"


def mode_of(given: str) -> KernelsMode:
    """Return the mode of a head that was given this one: the environment's where it was given "auto". ValueError for a
    mode that does not exist."""
    if given not in MODES:
        raise ValueError(f"kernels must be one of {', '.join(MODES)}, not {given!r}")
    variable = os.environ.get(VARIABLE, "")
    if variable and variable not in MODES:
        raise ValueError(f"the environment variable {VARIABLE} must be one of {', '.join(MODES)}, not {variable!r}")
    return cast(KernelsMode, variable if variable and given == "auto" else given)


@lru_cache
def choose(mode: KernelsMode, case: Case) -> Kernels:
    """Return the kernels that serve a case: none, with a reason, if anything is against them."""
    problem = "kernels are off" if mode == "off" else machine_problem(mode, case.device) or rows_problem(case)
    if problem:
        return Kernels(False, False, False, problem)
    capability = (9, 0) if mode == "interpret" else torch.cuda.get_device_capability(case.device)
    of_tiles, of_stream = tiles_problem(case, capability), stream_problem(case, capability)
    why = [f"no {name}: {text}" for name, text in (("tiles", of_tiles), ("stream", of_stream)) if text]
    directions = case.product if case.normalize else None
    instead = not of_stream and case.width <= STREAM_INSTEAD
    return Kernels(True, not of_tiles, not of_stream, "; ".join(why), directions, instead)


def machine_problem(mode: KernelsMode, device: torch.device) -> str:
    """Return why no kernel runs for tensors of a device, "" if some do."""
    if mode == "interpret":
        return "" if device.type == "cpu" else f"the interpreter is for rows on a CPU, and these are on {device}"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"they are for NVIDIA cards, and the rows are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CARD:
        return f"they are for cards of capability {_dotted(OLDEST_CARD)} on, and this one has {_dotted(capability)}"
    return triton_problem()


@lru_cache
def triton_problem() -> str:
    """Return why the installed triton, which is not imported for it, does not serve; "" if it does."""
    found = None
    for name in ("triton", "pytorch-triton"):  # the second comes with nightly builds of torch
        with suppress(PackageNotFoundError):
            found = found or version(name)
    if found is None:
        return "triton is not installed: pip install 'partial_fc[kernels]'"
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    return "" if numbers >= OLDEST_TRITON else f"they need triton {_dotted(OLDEST_TRITON)}, and {found} is installed"


def rows_problem(case: Case) -> str:
    """Return why the row kernels do not serve a case: directions, gradients through them, updates."""
    if case.stats != torch.float32 or case.rows not in HALF_OR_SINGLE or case.product not in HALF_OR_SINGLE:
        return f"statistics are float32, and here they are {str(case.stats)[6:]}"
    return "" if case.width <= WIDEST else f"a program holds whole rows of at most {WIDEST} numbers, not {case.width}"


def tiles_problem(case: Case, capability: tuple[int, int]) -> str:
    """Return why the tile kernel does not serve a case that row kernels serve."""
    if capability != LOGITS_CARD:
        return f"they are for cards of capability {_dotted(LOGITS_CARD)}, and this one has {_dotted(capability)}"
    if case.product == torch.float16:
        return "exponentials may leave the range of float16"
    if case.product != torch.bfloat16 and case.device.type == "cuda":
        return f"products are {str(case.product)[6:]}, and a card has matrix units for bfloat16"
    if case.ruled or case.binary or case.centers > 1:
        return "a rule, a filter, sub-centers or decisions look at each logit"
    if case.metrics and case.correction:
        return "metrics look at logits before they are corrected for the sampling"
    return ""


def stream_problem(case: Case, capability: tuple[int, int]) -> str:
    """Return why the stream kernels do not serve a case that row kernels serve."""
    problem = tiles_problem(case, capability)
    if not problem and case.width > STREAM_WIDEST:
        return f"two blocks as wide as D = {case.width} leave no room; they are for D up to {STREAM_WIDEST}"
    return problem


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
