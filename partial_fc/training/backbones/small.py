"""A small convolutional network for small images, such as the glyphs; it trains in a minute on a CPU.

Shapes, for the 32 x 32 grey glyphs:

    [n, 1, 32, 32] -> [n, 32, 16, 16] -> [n, 64, 8, 8] -> [n, 128, 4, 4] -> [n, 256, 2, 2] -> flat [n, 1024] -> [n, D]

Each of the first four arrows is a strided convolution, batch normalisation and PReLU. The map is flattened, not
averaged, because characters differ in the position of strokes. For larger images the map is pooled to 2 x 2, so that
the linear layer has the same size.
"""

import torch
from torch import nn

from partial_fc.training.backbones import register

_WIDTHS = (32, 64, 128, 256)
_MAP = 2


@register("small")
class SmallBackbone(nn.Module):
    """Four strided convolutions and a linear layer: images float [n, C, H, W] -> embeddings [n, D]."""

    def __init__(self, *, image_shape: tuple[int, int, int], embedding_size: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, *_WIDTHS[:-1]), _WIDTHS, strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.PReLU(outputs),
            ]
            height, width = (height + 1) // 2, (width + 1) // 2
        self.blocks = nn.Sequential(*layers)
        cells = (min(height, _MAP), min(width, _MAP))
        self.pool = nn.Identity() if cells == (height, width) else nn.AdaptiveAvgPool2d(cells)
        # no bias: the normalisation that follows subtracts the mean
        self.fc = nn.Linear(_WIDTHS[-1] * cells[0] * cells[1], embedding_size, bias=False)
        self.features = nn.BatchNorm1d(embedding_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.features(self.fc(self.pool(self.blocks(images)).flatten(1)))
        return out
