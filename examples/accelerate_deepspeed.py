"""DeepSpeed through Accelerate: torchrun --nproc_per_node 2 examples/accelerate_deepspeed.py [STAGE] [EPOCHS]

With `accelerate launch --config_file ...` omit the plugin: Accelerate creates it from its configuration file.
"""

import sys
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

from partial_fc import ArcFace, PartialFC, RowOptimizer
from partial_fc.engines.deepspeed import DeepSpeedHead, import_deepspeed
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.augment import AugmentConfig
from partial_fc.training.data.loader import BatchLoader

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def main(stage: int = 2, epochs: int = 2, identities: int = 1000, micro_batches: int = 2) -> None:
    import_deepspeed()
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=micro_batches, gradient_clipping=5.0)
    backend = InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
    accelerator = Accelerator(
        gradient_accumulation_steps=micro_batches, deepspeed_plugin=plugin, kwargs_handlers=[backend]
    )
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    data = GlyphIdentities("train", identities)
    loader = BatchLoader(data, batch_size=256 // micro_batches, rank=rank, world=world, augment=AugmentConfig())
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 256 // micro_batches // world

    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128)
    model, _ = accelerator.prepare(backbone, torch.optim.SGD(backbone.parameters(), **SGD))
    head = PartialFC(128, data.num_identities, ArcFace(scale=32.0), sample_rate=0.5, device=device)
    beside = DeepSpeedHead(model, RowOptimizer(torch.optim.SGD, head, **SGD), joint_clipping=True)

    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = head(model(batch.images.to(device)), batch.labels.to(device))
                accelerator.backward(loss)  # after the last micro-batch this also steps backbone and head
        accelerator.print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, gradient norm {beside.norm:.2f}, angle {head.target_angle:.2f}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
