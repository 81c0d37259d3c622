"""Lightning: torchrun --standalone --nproc_per_node 2 examples/lightning_module.py FOLDER [EPOCHS [IDENTITIES]]"""

import os
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_
from partial_fc.engines.joint import JointOptimizer
from partial_fc.engines.lightning import HeadStrategy
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities


class Recogniser(pl.LightningModule):
    def __init__(self, data: GlyphIdentities) -> None:
        super().__init__()
        self.data = data

    def configure_model(self) -> None:  # called after the process group is created
        torch.manual_seed(0)
        self.backbone = build_backbone("small", image_shape=self.data.image_shape, embedding_size=128)
        self.head = PartialFC(128, self.data.num_identities, ArcFace(scale=32.0), sample_rate=0.5)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(self.backbone(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        rows = RowOptimizer(torch.optim.SGD, self.head, lr=0.1, momentum=0.9, weight_decay=5e-4)
        return JointOptimizer(torch.optim.AdamW(self.backbone.parameters(), lr=5e-3), rows)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, *_: Any, **__: Any) -> None:
        clip_grad_norm_(self.backbone.parameters(), self.head, max_norm=gradient_clip_val)


def main(folder: str, epochs: int = 4, identities: int | None = None) -> None:
    data = GlyphIdentities("train", identities)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=HeadStrategy(process_group_backend="gloo"),
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=5.0,
        default_root_dir=folder,
        logger=False,
    )
    samples = [(data.load(i) / 255, label) for i, label in enumerate(data.labels)]
    loader = DataLoader(samples, batch_size=64, shuffle=True, drop_last=True)  # type: ignore[arg-type,var-annotated]
    last = f"{folder}/last.ckpt"
    trainer.fit(Recogniser(data), loader, ckpt_path=last if os.path.isfile(last) else None)
    trainer.save_checkpoint(last)


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
