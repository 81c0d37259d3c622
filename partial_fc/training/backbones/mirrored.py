"""Embeddings of images by a backbone; with `flip` the sum of those of an image and of its mirror image.

The sum is usual for faces (Deng et al. 2019, evaluation of ArcFace): it does not depend on which side was photographed.
"""

from collections.abc import Callable

from torch import Tensor


def embeddings_of(backbone: Callable[[Tensor], Tensor], images: Tensor, flip: bool) -> Tensor:
    """Return float32 embeddings `[n, D]` of images `[n, C, H, W]`, not scaled to unit length."""
    embeddings = backbone(images).float()
    return embeddings + backbone(images.flip(3)).float() if flip else embeddings
