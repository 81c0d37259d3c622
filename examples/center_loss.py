"""Center loss on the features of your own classifier: torchrun --nproc_per_node 2 examples/center_loss.py [EPOCHS]"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc import CenterLoss
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.data.loader import BatchLoader


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.backbone(images)
        return embeddings, self.linear(embeddings)


def main(epochs: int = 4) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = GlyphIdentities("train")
    loader = BatchLoader(data, batch_size=256, rank=rank, world=world, augment=AugmentConfig())

    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128)
    model = DistributedDataParallel(Classifier(backbone, 128, data.num_identities))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    cross_entropy = nn.CrossEntropyLoss()
    center = CenterLoss(128, data.num_identities)  # outside the model, because its rows are sharded across ranks

    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            embeddings, logits = model(batch.images)
            ce = cross_entropy(logits, batch.labels)
            distance = center(embeddings, batch.labels)
            optimizer.zero_grad()
            (ce + 0.1 * distance).backward()
            optimizer.step()
            center.step()
        if rank == 0:
            losses = f"cross-entropy {ce.item():.3f}, ½ distance² to centers {distance.item():.3f}"
            print(f"epoch {epoch + 1}: {losses}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
