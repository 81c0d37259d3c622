"""Every backbone computes its output stage in float32, even under autocast.

Half precision costs accuracy just before the embedding is normalised.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast; it does nothing on devices without autocast, such as meta (see counts.py)."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
