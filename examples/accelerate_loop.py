"""accelerate launch --config_file configs/accelerate/cpu2.yaml examples/accelerate_loop.py FOLDER [EPOCHS [CLASSES]]"""

import os
import shutil
import sys

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

from partial_fc import ArcFace, PartialFC, RowOptimizer
from partial_fc.engines.accelerate import clip_grad_norm_, prepare_heads, save_heads_with
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities


def main(folder: str, epochs: int = 4, identities: int | None = None) -> None:
    split = DataLoaderConfiguration(split_batches=True)
    options = {"mixed_precision": "bf16", "log_with": "tensorboard", "project_dir": folder}
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=split, **options)
    accelerator.init_trackers("logs")
    data = GlyphIdentities("train", identities)
    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    samples = [(data.load(i) / 255, label) for i, label in enumerate(data.labels)]
    loader = DataLoader(samples, batch_size=128, shuffle=True, drop_last=True)  # type: ignore[arg-type,var-annotated]
    model, optimizer, schedule, loader = accelerator.prepare(backbone, optimizer, schedule, loader)  # not the head
    head = PartialFC(128, data.num_identities, ArcFace(scale=32.0), sample_rate=0.5, device=accelerator.device)
    rows = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9, weight_decay=5e-4)
    rows_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(rows, 1000)
    head_optimizer, head_schedule = prepare_heads(accelerator, rows, rows_schedule)
    save_heads_with(accelerator, head=head, head_optimizer=head_optimizer, head_schedule=head_schedule)
    if os.path.isdir(f"{folder}/state"):
        accelerator.load_state(f"{folder}/state")

    for epoch in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = head(model(images), labels)
                accelerator.backward(loss)
                clip_grad_norm_(accelerator, model.parameters(), head, max_norm=5.0)
                for each in (head_optimizer, optimizer, head_schedule, schedule):  # with fp16 the head's comes first
                    each.step()
                head_optimizer.zero_grad()
                optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=epoch)
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
        accelerator.save_state(f"{folder}/new")  # a kill while it is written leaves the last one as it was
        if accelerator.is_main_process:
            shutil.rmtree(f"{folder}/state", ignore_errors=True)
            os.rename(f"{folder}/new", f"{folder}/state")
        accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
