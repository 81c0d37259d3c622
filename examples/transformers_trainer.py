"""transformers.Trainer: torchrun --nproc_per_node 2 examples/transformers_trainer.py FOLDER [EPOCHS [IDENTITIES]]"""

import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from partial_fc import ArcFace, PartialFC, RowOptimizer
from partial_fc.engines.transformers import HeadTrainer
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities


class Recogniser(nn.Module):
    def __init__(self, backbone: nn.Module, head: PartialFC) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(self.backbone(images), labels)}


def main(folder: str, epochs: int = 4, identities: int | None = None) -> None:
    args = TrainingArguments(  # creates the process group; build the head after it
        folder,
        use_cpu=True,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        max_grad_norm=5.0,
        save_strategy="epoch",
        ddp_find_unused_parameters=False,
        report_to=[],
    )
    data = GlyphIdentities("train", identities)
    samples = [{"images": data.load(i) / 255, "labels": label} for i, label in enumerate(data.labels)]
    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128)
    model = Recogniser(backbone, PartialFC(128, data.num_identities, ArcFace(scale=32.0), sample_rate=0.5))
    rows = RowOptimizer(torch.optim.SGD, model.head, lr=0.1, momentum=0.9, weight_decay=5e-4)
    trainer = HeadTrainer(model, args, head_optimizers=[rows], train_dataset=samples)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if os.path.isdir(folder) else None)
    print(f"loss {trainer.state.log_history[-1]['train_loss']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
    gc.collect()  # frees the objects that use the process group
    if dist.is_initialized():
        dist.destroy_process_group()
