"""MobileFaceNet, a small network for faces on phones (arXiv:1804.07573), and InsightFace's wider variants of it.

Shapes, for faces of 112 x 112 in colour, at scale 1 (`mobilefacenet`; `mbf` has scale 2, `mbf_large` 4 and more
blocks):

    [n, 3, 112, 112] -> convolution with stride 2, depthwise convolution  [n, 64, 56, 56]
      -> bottlenecks [n, 64, 28, 28] -> [n, 128, 14, 14] -> [n, 128, 7, 7]
      -> conv_sep, 1 x 1  [n, 512, 7, 7] -> depthwise convolution, 7 x 7  [n, 512, 1, 1] -> linear -> [n, D]

A bottleneck is a 1 x 1 convolution (wider), a depthwise 3 x 3, and a 1 x 1 without activation, added to the input if
the shape is the same. The last depthwise convolution has a weight for each position of the map; an average over the
map would lose the positions, which matter in a face. Modules and parameters are named as in InsightFace's `mbf`, and
bottlenecks have its widths, so its checkpoints load unchanged.
"""

from collections.abc import Sequence

import torch
from torch import nn

from partial_fc.training.backbones import register
from partial_fc.training.backbones.precision import in_full_precision
from partial_fc.training.backbones.recompute import run_blocks

_LAST = 512  # channels of the last map


class _Layers(nn.Module):
    """A sequence of layers, whose parameters are named `layers.0...` as in InsightFace."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def _convolution(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 1,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    active: bool = True,
) -> _Layers:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return _Layers(convolution, nn.BatchNorm2d(outputs), *([nn.PReLU(outputs)] if active else []))


class Bottleneck(_Layers):
    """[n, inputs, H, W] -> [n, outputs, H / stride, W / stride], rounded up; `between` channels inside."""

    def __init__(self, inputs: int, outputs: int, between: int, stride: int, residual: bool) -> None:
        super().__init__(
            _convolution(inputs, between),
            _convolution(between, between, 3, stride, 1, groups=between),
            _convolution(between, outputs, active=False),
        )
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return x + out if self.residual else out


def _stage(width: int, blocks: int, between: int) -> _Layers:
    return _Layers(*(Bottleneck(width, width, between, 1, True) for _ in range(blocks)))


class MobileFaceNet(nn.Module):
    """Images float [n, C, H, W] -> embeddings [n, D]: four stages with `blocks` blocks, widths multiplied by `scale`.

    Height and width are halved four times, rounded up. The last depthwise convolution has the size of the resulting
    map, so a model works for one image size.
    """

    def __init__(
        self, blocks: Sequence[int], scale: int, *, image_shape: tuple[int, int, int], embedding_size: int
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        narrow, wide = 64 * scale, 128 * scale
        first = _convolution(narrow, narrow, 3, 1, 1, groups=64) if blocks[0] == 1 else _stage(narrow, blocks[0], 128)
        self.layers = nn.ModuleList(
            [
                _convolution(channels, narrow, 3, 2, 1),
                first,
                Bottleneck(narrow, narrow, 128, 2, False),
                _stage(narrow, blocks[1], 128),
                Bottleneck(narrow, wide, 256, 2, False),
                _stage(wide, blocks[2], 256),
                Bottleneck(wide, wide, 512, 2, False),
                _stage(wide, blocks[3], 256),
            ]
        )
        self.conv_sep = _convolution(wide, _LAST)
        sides = (-(-height // 16), -(-width // 16))
        self.dropout = nn.Dropout(p=0.0)
        self.features = _Layers(
            _convolution(_LAST, _LAST, sides, groups=_LAST, active=False),
            nn.Flatten(),
            nn.Linear(_LAST, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        self._recompute = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each bottleneck in the backward pass, or store its intermediate results."""
        self._recompute = enable

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for layer in self.layers:
            assert isinstance(layer, _Layers)
            x = run_blocks(layer.layers if isinstance(layer.layers[0], Bottleneck) else [layer], x, self._recompute)
        x = self.conv_sep(x)
        whole, flatten, linear, norm = self.features.layers
        x = self.dropout(flatten(whole(x)))
        with in_full_precision(images.device):
            out: torch.Tensor = norm(linear(x.to(linear.weight.dtype)))
        return out


def _register(name: str, blocks: Sequence[int], scale: int) -> None:
    def build(*, image_shape: tuple[int, int, int], embedding_size: int) -> MobileFaceNet:
        return MobileFaceNet(blocks, scale, image_shape=image_shape, embedding_size=embedding_size)

    register(name)(build)


_register("mobilefacenet", (1, 4, 6, 2), 1)
_register("mbf", (1, 4, 6, 2), 2)
_register("mbf_large", (2, 8, 12, 4), 4)
