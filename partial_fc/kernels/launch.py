"""Calling a kernel: where it cannot be compiled or launched, plain PyTorch takes its place from there on.

A kernel is compiled before it is launched, and an error of either comes before it has written anything. So the caller
that is told False has its tensors as they were.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from partial_fc.errors import log
from partial_fc.kernels.choice import VARIABLE, KernelsMode, triton_problem

INTERPRET = "TRITON_INTERPRET"  # Triton reads it when it is imported, which torch may do at any time
if os.environ.get(VARIABLE) == "interpret":
    os.environ.setdefault(INTERPRET, "1")

failed: dict[str, str] = {}  # kernels of this process that are not called any more, and their errors

NO_INTERPRETER = 'kernels="interpret" runs kernels in Triton\'s interpreter, '


def ran(name: str, launch: Callable[[], Any], like: Tensor) -> bool:
    """Return whether a kernel was launched. launch: makes the call. like: a tensor that it works on.

    Its first failure is a warning that names it; it is not called again in this process.
    """
    if name in failed:
        return False
    try:
        if like.device.type == "cpu":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of NumPy, by which the interpreter computes with infinities
                launch()
        else:
            with torch.cuda.device_of(like):
                launch()
    except Exception as error:  # whatever the compiler, the driver or the import of triton raises
        give_up(name, f"{type(error).__name__}: {error}")
        return False
    return True


def give_up(name: str, why: str) -> None:
    """Do not call a kernel any more in this process; one warning says why."""
    if name not in failed:
        failed[name] = why
        log.warning("the kernel %s failed, plain PyTorch takes its place from here on: %s", name, why)


def device_code(name: str) -> ModuleType:
    """Return the module of `partial_fc.kernels.device`, which imports triton."""
    return import_module(f"partial_fc.kernels.device.{name}")


def prepare(mode: KernelsMode) -> None:
    """Make this process ready for "interpret"; nothing is to be done for the other modes.

    Triton decides when it is imported whether its functions are interpreted, so a process does the one or the other.
    Raises ImportError or RuntimeError, which say what to do, where the interpreter cannot run.
    """
    if mode != "interpret":
        return
    problem = triton_problem()
    if problem:
        raise ImportError(f"{NO_INTERPRETER}but {problem}")
    if "triton" not in sys.modules:
        os.environ[INTERPRET] = "1"
    common = device_code("common")
    if not common.INTERPRETED.value:
        raise RuntimeError(
            f"{NO_INTERPRETER}but triton was imported before without it, maybe by torch: start the process with "
            f"{VARIABLE}=interpret"
        )
    try:
        total = torch.zeros(1, device="cpu")
        common.counted[(1,)](total, 3)
    except Exception as error:
        raise RuntimeError(
            f"{NO_INTERPRETER}which fails with this NumPy ({type(error).__name__}: {error}): install numpy<2.4, or a "
            "newer triton"
        ) from error
    if total.item() != 3:
        raise RuntimeError(f"{NO_INTERPRETER}which gave {total.item()} for a sum that is 3: install another triton")
