"""What goes wrong in a step."""

from __future__ import annotations


class NonFiniteError(ValueError, RuntimeError):
    """A NaN or infinity in embeddings, losses or gradients: a bad value, met while running."""
