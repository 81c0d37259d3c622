"""Plain DistributedDataParallel, as in your own loop: torchrun --nproc_per_node 2 examples/ddp.py [EPOCHS] [BACKEND]"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_, gather
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.data.loader import BatchLoader
from partial_fc.training.evaluation import evaluate_embeddings


def main(epochs: int = 4, backend: str = "gloo") -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before anything is on a GPU
    dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    data = GlyphIdentities("train")
    loader = BatchLoader(data, batch_size=256, rank=rank, world=world, augment=AugmentConfig())
    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128).to(device)
    model = DistributedDataParallel(backbone)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    head = PartialFC(128, data.num_identities, ArcFace(scale=32.0), sample_rate=0.5, device=device)
    head_optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, epochs * len(loader)) for o in (optimizer, head_optimizer)]

    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = head(model(batch.images.to(device)), batch.labels.to(device))
            loss.backward()
            clip_grad_norm_(model.parameters(), head, max_norm=5.0)
            optimizer.step()
            head_optimizer.step()
            optimizer.zero_grad()
            head_optimizer.zero_grad()
            for schedule in schedules:
                schedule.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss:.3f}, target angle {head.target_angle:.2f} rad", flush=True)
    backbone.eval()
    seen = BatchLoader(GlyphIdentities("seen"), batch_size=500, rank=rank, world=world, shuffle=False, drop_last=False)
    with torch.no_grad():
        parts = [(backbone(batch.images.to(device)), batch.labels.to(device)) for batch in seen]
    everyone = gather(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    if rank == 0:
        print(evaluate_embeddings(everyone.embeddings.cpu(), everyone.labels.cpu(), name="seen").summary())
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))  # type: ignore[arg-type]
