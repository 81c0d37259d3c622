"""A loop like train_v2.py of insightface: torchrun --nproc_per_node 2 examples/from_insightface.py OUTPUT [FILES] [N]

FILES: a folder with its checkpoint_gpu_{rank}.pt, of any number of ranks, to go on from; "" for none. N: epochs.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_fc import CombinedMargin, PartialFC, RowOptimizer, export_weights, import_weights
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.loader import BatchLoader

LR, MARGINS, BATCH, GRADIENT_ACC, WARMUP, FP16 = 0.02, (1.0, 0.5, 0.0), 128, 1, 20, False


def main(output: str, files: str = "", epochs: int = 4) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = GlyphIdentities("train")
    loader = BatchLoader(data, batch_size=BATCH * world, rank=rank, world=world)
    torch.manual_seed(2048)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128)
    model = DistributedDataParallel(backbone)
    # the gradient and the far side of π as in its losses.py
    margin = CombinedMargin(64.0, *MARGINS, gradient="straight_through", past_pi="plain")
    head = PartialFC(128, data.num_identities, margin, sample_rate=0.5)
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    head_opt = RowOptimizer(torch.optim.SGD, head, lr=LR, momentum=0.9, weight_decay=5e-4)
    total, first = epochs * len(loader), 0
    if files:
        theirs = torch.load(Path(files) / "checkpoint_gpu_0.pt", weights_only=True)
        backbone.load_state_dict(theirs["state_dict_backbone"])
        state, group = theirs["state_optimizer"]["state"], theirs["state_optimizer"]["param_groups"][0]
        opt.load_state_dict({"state": {i: state[i] for i in group["params"] if i in state}, "param_groups": [group]})
        import_weights(files, head, optimizer=head_opt)  # rows and momentum of all ranks' files
        first = theirs["epoch"]

    def poly(step: int) -> float:
        return step / WARMUP if step < WARMUP else (1 - (step - WARMUP) / (total - WARMUP)) ** 2

    for each in (o for optimizer in (opt, head_opt) for o in optimizer.param_groups):
        each["initial_lr"] = LR
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, poly, first * len(loader) - 1) for o in (opt, head_opt)]
    amp = torch.amp.GradScaler("cuda", growth_interval=100, enabled=FP16)
    for epoch in range(first, epochs):
        loader.set_epoch(epoch)
        for step, batch in enumerate(loader, 1):
            loss = head(model(batch.images), batch.labels)
            amp.scale(loss / GRADIENT_ACC).backward()
            if step % GRADIENT_ACC == 0:
                amp.unscale_(opt)
                amp.unscale_(head_opt)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5)  # or partial_fc's, of backbone and head
                for optimizer in (opt, head_opt):
                    amp.step(optimizer)
                    optimizer.zero_grad()
                amp.update()
            for schedule in schedules:
                schedule.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss:.3f}", flush=True)
    export_weights(f"{output}/fc.safetensors", head, overwrite=True)
    if rank == 0:
        torch.save(backbone.state_dict(), f"{output}/model.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(int(a) if a.isdigit() else a for a in sys.argv[1:]))  # type: ignore[arg-type]
