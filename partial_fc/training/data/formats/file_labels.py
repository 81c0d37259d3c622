"""Labels and names of identities as files have them, and the labels 0..C-1 made from them.

    7, 3, 7             integers, numbered in their order          -> 1, 0, 1
    "Bo", "Ada", "Bo"   strings, numbered in alphabetical order    -> 1, 0, 1

identities.json, a list of strings beside the data, gives names to identities that have only integers: the name of
label k is the k-th string. `partial-fc data convert` writes it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from partial_fc.training.errors import UserError

NAMES = "identities.json"


def number_labels(values: Sequence[str] | npt.NDArray[np.int64]) -> tuple[torch.Tensor, list[str]]:
    """Return (labels int64 [n] in 0..C-1, names [C]) for the labels of n samples as the files have them."""
    raw = np.asarray(values) if len(values) else np.empty(0, dtype=np.int64)
    found, labels = np.unique(raw, return_inverse=True)
    return torch.from_numpy(labels.reshape(-1).astype(np.int64)), [str(each) for each in found.tolist()]


def is_integer(text: str) -> bool:
    """Return whether `text` is an integer of at most 18 ASCII digits, with or without a sign (not 1_000, not ٣)."""
    digits = text[1:] if text[:1] in "+-" else text
    return digits.isascii() and digits.isdigit() and len(digits) <= 18


def read_names(path: Path, numbers: list[str]) -> list[str]:
    """Return the names of the integer labels `numbers` from the file `path`; `numbers` itself if there is no file."""
    if not path.is_file():
        return numbers
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        chosen = [names[int(number)] for number in numbers if int(number) >= 0]
    except (OSError, ValueError, IndexError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is not a list of the names of {len(numbers):,} identities ({error}); fix or remove it"
        ) from error
    if not isinstance(names, list) or len(chosen) != len(numbers) or not all(isinstance(name, str) for name in chosen):
        raise UserError(f"{path} is not a list of the names of {len(numbers):,} identities; fix or remove it")
    return chosen
