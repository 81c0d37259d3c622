"""The error for NaN and infinities, and the package's logger."""

from __future__ import annotations

import logging

log = logging.getLogger("partial_fc")


class NonFiniteError(ValueError, RuntimeError):
    """A NaN or infinity in embeddings, losses or gradients. Raised on every rank alike."""
