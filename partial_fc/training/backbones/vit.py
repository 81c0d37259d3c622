"""Vision transformers for faces: no class token, every patch's features count (arXiv:2010.11929; for faces, arXiv:2203.15565).

Data's story, for faces of 112 x 112 in colour, T = 12 x 12 patches of 9 x 9 pixels (what is left over at the edges is cut off):

    [n, 3, 112, 112] -> patch_embed  [n, T, E] -> + pos_embed
      in training: a tenth of each image's patches, drawn anew, is left out  [n, 0.9 T, E]
      -> blocks (attention, then an MLP, each added to its input) -> norm
      in training: mask_token in the place of those left out  [n, T, E]
      -> flatten [n, T E] -> dropout -> feature (linear, batch norm, linear, batch norm)  [n, D]

A patch is a twelfth of the shorter side, rounded, so that other sizes have about as many. In training a block is now and then
left out for an image (stochastic depth, arXiv:1603.09382), deeper blocks more often. The names of modules and parameters are
those of the field's checkpoints (vit_t, vit_s, vit_b, vit_l).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partial_fc.training.backbones import register
from partial_fc.training.backbones.precision import in_full_precision
from partial_fc.training.backbones.recompute import run_blocks

_MASKED = 0.1  # share of patches that a training step leaves out
_DROPPED = 0.1  # how often the last block is left out for an image
_HEADS = 8


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    """[n, T, E] to [n, T, E]: queries, keys and values by one product without bias, `_HEADS` heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, _HEADS, width // _HEADS).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, tokens, width))


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Block(nn.Module):
    """Attention and MLP; in training each is left out with probability `dropped` for an image, and counts more otherwise."""

    def __init__(self, width: int, dropped: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), _Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), _MLP(width)
        self.dropped = dropped

    def _sometimes(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.dropped
        return x * (kept / (1 - self.dropped)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._sometimes(self.attn(self.norm1(x)))
        return x + self._sometimes(self.mlp(self.norm2(x)))


class FaceTransformer(nn.Module):
    """`depth` blocks of `width` numbers a patch: images float [n, C, H, W] to embeddings [n, D]. A model serves one image size."""

    def __init__(self, width: int, depth: int, *, image_shape: tuple[int, int, int], embedding_size: int) -> None:
        super().__init__()
        channels, height, side = image_shape
        patch = max(1, round(min(height, side) / 12))
        tokens = (height // patch) * (side // patch)
        self.patch_embed = _PatchEmbed(channels, width, patch)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(_Block(width, _DROPPED * i / (depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(p=0.0)
        self.feature = nn.Sequential(
            nn.Linear(width * tokens, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )
        self.kept = max(1, int(tokens * (1 - _MASKED)))
        self._recompute = False
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward, or keep what is inside of it."""
        self._recompute = enable

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        n, tokens, width = x.shape
        order = None
        if self.training:
            order = torch.rand(n, tokens, device=x.device).argsort(1)
            x = x.gather(1, order[:, : self.kept, None].expand(-1, -1, width))
        x = self.norm(run_blocks(self.blocks, x, self._recompute, random=True))
        if order is not None:
            x = torch.cat((x, self.mask_token.to(x.dtype).expand(n, tokens - self.kept, width)), 1)
            x = x.gather(1, order.argsort(1)[:, :, None].expand(-1, -1, width))
        x = self.dropout(x.flatten(1))
        with in_full_precision(images.device):
            out: Tensor = self.feature(x.to(self.pos_embed.dtype))
        return out


def _register(name: str, width: int, depth: int) -> None:
    def build(*, image_shape: tuple[int, int, int], embedding_size: int) -> FaceTransformer:
        return FaceTransformer(width, depth, image_shape=image_shape, embedding_size=embedding_size)

    register(name)(build)


_register("vit_t", 256, 12)
_register("vit_s", 512, 12)
_register("vit_b", 512, 24)
_register("vit_l", 768, 24)
