"""FSDP2: torchrun --standalone --nproc_per_node 2 examples/fsdp2.py FOLDER [EPOCHS [IDENTITIES]]"""

import gc
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_, load_checkpoint, save_checkpoint
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.data.loader import BatchLoader


def main(folder: str, epochs: int = 4, identities: int | None = None) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = GlyphIdentities("train", identities)
    loader = BatchLoader(data, batch_size=256, rank=rank, world=world, augment=AugmentConfig())

    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128)
    fully_shard(backbone)  # of a larger model shard the large parts first, each on its own
    head = PartialFC(128, data.num_identities, ArcFace(scale=32.0), sample_rate=0.5)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=5e-3)
    head_optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=5e-4)
    everything: dict[str, Any] = {
        "backbone": backbone,
        "optimizer": optimizer,
        "head": head,
        "head_optimizer": head_optimizer,
    }
    if os.path.isfile(f"{folder}/manifest.json"):
        load_checkpoint(folder, **everything)  # written by any number of ranks

    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = head(backbone(batch.images), batch.labels)
            loss.backward()
            clip_grad_norm_(backbone.parameters(), head, max_norm=5.0)
            for each in (optimizer, head_optimizer):
                each.step()
                each.zero_grad()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
        save_checkpoint(folder, **everything)


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
    gc.collect()  # frees the objects that use the process group
    dist.barrier()
    dist.destroy_process_group()
