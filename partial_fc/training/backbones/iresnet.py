"""The residual network of face recognition ("improved" ResNet; ArcFace, arXiv:1801.07698, section 3).

Shapes, for faces of 112 x 112 in colour:

    [n, 3, 112, 112] -> conv1, bn1, prelu (no stride)  [n, 64, 112, 112]
      -> layer1 [n, 64, 56, 56] -> layer2 [n, 128, 28, 28] -> layer3 [n, 256, 14, 14] -> layer4 [n, 512, 7, 7]
      -> bn2 -> flatten -> dropout -> fc -> features  [n, 512]

A block is bn1, conv1, bn2, prelu, conv2 (with the stride), bn3, added to its input; no activation follows the sum.
Modules and parameters are named as in InsightFace, so its checkpoints load unchanged. At image sizes other than 112,
the map before `fc` and the input of `fc` have other sizes.
"""

import torch
from torch import nn

from partial_fc.training.backbones import register
from partial_fc.training.backbones.precision import in_full_precision
from partial_fc.training.backbones.recompute import run_blocks

_EPS = 1e-5
_WIDTHS = (64, 128, 256, 512)


def _conv(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)


class IBasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: [n, inputs, H, W] -> [n, outputs, H / stride, W / stride], rounded up."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, eps=_EPS)
        self.conv1 = _conv(inputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs, eps=_EPS)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = _conv(outputs, outputs, 3, stride)
        self.bn3 = nn.BatchNorm2d(outputs, eps=_EPS)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs, eps=_EPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return torch.add(self.bn3(self.conv2(out)), shortcut)


class IResNet(nn.Module):
    """Four stages with `blocks` IBasicBlocks: images float [n, C, H, W] -> embeddings [n, D].

    Height and width are halved four times, rounded up. The input size of `fc` depends on them, so a model works for one
    image size.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], *, image_shape: tuple[int, int, int], embedding_size: int
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.conv1 = _conv(channels, _WIDTHS[0], 3)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0], eps=_EPS)
        self.prelu = nn.PReLU(_WIDTHS[0])
        inputs = (_WIDTHS[0], *_WIDTHS[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(IBasicBlock(i, o, 2), *(IBasicBlock(o, o, 1) for _ in range(count - 1)))
            for i, o, count in zip(inputs, _WIDTHS, blocks, strict=True)
        )
        self.bn2 = nn.BatchNorm2d(_WIDTHS[-1], eps=_EPS)
        self.dropout = nn.Dropout(p=0.0)
        self.fc = nn.Linear(_WIDTHS[-1] * -(-height // 16) * -(-width // 16), embedding_size)
        self.features = nn.BatchNorm1d(embedding_size, eps=_EPS)
        self._recompute = False
        # The head normalises embeddings or learns its own scale, so a second learned scale would only drift.
        nn.init.constant_(self.features.weight, 1.0)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, or store its intermediate results."""
        self._recompute = enable

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = run_blocks(layer, x, self._recompute)
        x = self.dropout(self.bn2(x).flatten(1))
        with in_full_precision(images.device):
            out: torch.Tensor = self.features(self.fc(x.to(self.fc.weight.dtype)))
        return out


def _register(name: str, blocks: tuple[int, int, int, int]) -> None:
    def build(*, image_shape: tuple[int, int, int], embedding_size: int) -> IResNet:
        return IResNet(blocks, image_shape=image_shape, embedding_size=embedding_size)

    register(name)(build)


_register("iresnet18", (2, 2, 2, 2))
_register("iresnet34", (3, 4, 6, 3))
_register("iresnet50", (3, 4, 14, 3))
_register("iresnet100", (3, 13, 30, 3))
_register("iresnet200", (6, 26, 60, 6))
