"""Vision transformers for faces, without a class token (arXiv:2010.11929; for faces, arXiv:2203.15565).

Shapes, for faces of 112 x 112 in colour, T = 12 x 12 patches of 9 x 9 pixels (the remaining pixels at the edges are
dropped):

    [n, 3, 112, 112] -> patch_embed  [n, T, E] -> + pos_embed
      in training: a random tenth of each image's patches is dropped  [n, 0.9 T, E]
      -> blocks (attention, then an MLP, each added to its input) -> norm
      in training: mask_token in place of the dropped patches  [n, T, E]
      -> flatten [n, T E] -> dropout -> feature (linear, batch norm, linear, batch norm)  [n, D]

The side of a patch is a twelfth of the shorter side of the image, rounded, so the number of patches is similar at all
sizes. In training, blocks are skipped at random for some images (stochastic depth, arXiv:1603.09382), deeper blocks
more often. Modules and parameters are named as in InsightFace (vit_t, vit_s, vit_b, vit_l), so its checkpoints load
unchanged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partial_fc.training.backbones import register
from partial_fc.training.backbones.precision import in_full_precision
from partial_fc.training.backbones.recompute import run_blocks

_MASKED = 0.1  # share of patches that are dropped in training
_DROPPED = 0.1  # probability that the last block is skipped for an image
_HEADS = 8


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    """[n, T, E] -> [n, T, E]: queries, keys and values from one linear layer without bias, `_HEADS` heads."""

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
    """Attention and MLP, each added to its input; in training, each is skipped with probability `dropped` per image."""

    def __init__(self, width: int, dropped: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _MLP(width)
        self.dropped = dropped

    def _drop_path(self, x: Tensor) -> Tensor:
        """Set `x` `[n, T, E]` to 0 for random images and scale it for the others, so that its mean stays the same."""
        if not self.training or not self.dropped:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.dropped
        return x * (kept / (1 - self.dropped)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop_path(self.attn(self.norm1(x)))
        return x + self._drop_path(self.mlp(self.norm2(x)))


class FaceTransformer(nn.Module):
    """`depth` blocks: images float [n, C, H, W] -> embeddings [n, D]. A model works for one image size."""

    def __init__(self, width: int, depth: int, *, image_shape: tuple[int, int, int], embedding_size: int) -> None:
        super().__init__()
        channels, height, image_width = image_shape
        patch = max(1, round(min(height, image_width) / 12))
        tokens = (height // patch) * (image_width // patch)
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
        """Recompute each block in the backward pass, or store its intermediate results."""
        self._recompute = enable

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        n, tokens, width = x.shape
        order = None
        if self.training:
            order = torch.rand(n, tokens, device=x.device).argsort(1)  # a random permutation per image
            x = x.gather(1, order[:, : self.kept, None].expand(-1, -1, width))
        x = self.norm(run_blocks(self.blocks, x, self._recompute, random=True))
        if order is not None:
            x = torch.cat((x, self.mask_token.to(x.dtype).expand(n, tokens - self.kept, width)), 1)
            x = x.gather(1, order.argsort(1)[:, :, None].expand(-1, -1, width))  # back to the original order
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
