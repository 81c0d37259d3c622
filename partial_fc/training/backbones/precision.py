"""The output stage of every backbone is computed in float32, also under autocast: half precision costs accuracy just before the
embedding is normalised.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast within; on devices that have none (meta, where operations are counted) nothing."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
