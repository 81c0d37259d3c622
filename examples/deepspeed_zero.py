"""A head beside a DeepSpeed engine: torchrun --nproc_per_node 2 examples/deepspeed_zero.py [ZERO_STAGE] [EPOCHS]"""

import gc
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from partial_fc import ArcFace, PartialFC, RowOptimizer
from partial_fc.engines.deepspeed import DeepSpeedHead, import_deepspeed, save_with_engine
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.data.loader import BatchLoader

deepspeed = import_deepspeed()
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def main(stage: int = 2, epochs: int = 2, identities: int = 1000, micro_batches: int = 2) -> None:
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    rank, world, device = dist.get_rank(), dist.get_world_size(), deepspeed.get_accelerator().current_device_name()
    data = GlyphIdentities("train", identities)
    loader = BatchLoader(data, batch_size=256 // micro_batches, rank=rank, world=world, augment=AugmentConfig())
    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128)
    config = {
        "train_micro_batch_size_per_gpu": 256 // micro_batches // world,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 5.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # torch's own optimizers count as untested
    }
    optimizer = torch.optim.SGD(backbone.parameters(), **SGD)
    engine, *_ = deepspeed.initialize(model=backbone, optimizer=optimizer, config=config)
    head = PartialFC(128, data.num_identities, ArcFace(scale=32.0), sample_rate=0.5, device=device)
    head_optimizer = RowOptimizer(torch.optim.SGD, head, **SGD)
    beside = DeepSpeedHead(engine, head_optimizer, joint_clipping=True)  # engine.step() also steps the head

    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = head(engine(batch.images.to(device)), batch.labels.to(device))
            engine.backward(loss)
            engine.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, gradient norm {beside.norm:.2f}", flush=True)

    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    save_with_engine(engine, folder[0], head=head, head_optimizer=head_optimizer)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
    gc.collect()  # frees the engine, which uses the process group
    dist.barrier()
    dist.destroy_process_group()
