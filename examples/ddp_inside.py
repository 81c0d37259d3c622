"""A head inside the module that DDP wraps: torchrun --nproc_per_node 2 examples/ddp_inside.py [EPOCHS [IDENTITIES]]"""

import gc
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_
from partial_fc.engines.ddp import ignore_heads
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.data.loader import BatchLoader


class Recogniser(nn.Module):
    def __init__(self, backbone: nn.Module, head: PartialFC) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(images), labels)


def main(epochs: int = 4, identities: int | None = None) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = GlyphIdentities("train", identities)
    loader = BatchLoader(data, batch_size=256, rank=rank, world=world, augment=AugmentConfig())

    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128)
    recogniser = Recogniser(backbone, PartialFC(128, data.num_identities, ArcFace(scale=32.0), sample_rate=0.5))
    ignore_heads(recogniser)  # before wrapping, and on the module that is wrapped
    model = DistributedDataParallel(recogniser)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    head_optimizer = RowOptimizer(torch.optim.SGD, recogniser.head, lr=0.1, momentum=0.9, weight_decay=5e-4)

    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = model(batch.images, batch.labels)
            loss.backward()
            clip_grad_norm_(backbone.parameters(), recogniser.head, max_norm=5.0)
            for each in (optimizer, head_optimizer):
                each.step()
                each.zero_grad()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
    gc.collect()  # frees the objects that use the process group
    dist.barrier()
    dist.destroy_process_group()
