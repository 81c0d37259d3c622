"""Ray Train: python examples/ray_train.py FOLDER [EPOCHS [IDENTITIES [WORKERS]]], FOLDER shared by all nodes"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from torch.nn.parallel import DistributedDataParallel

from partial_fc import ArcFace, Checkpointer, PartialFC, Progress, RowOptimizer, clip_grad_norm_
from partial_fc.training.backbones import build_backbone
from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.loader import BatchLoader


def train(config: dict[str, Any]) -> None:
    """Each worker runs this, in a process group of Ray Train; after a failure, new workers run it again."""
    rank, world, device = dist.get_rank(), dist.get_world_size(), get_device()
    data = GlyphIdentities("train", config["identities"])
    loader = BatchLoader(data, batch_size=256, rank=rank, world=world)
    torch.manual_seed(0)
    backbone = build_backbone("small", image_shape=data.image_shape, embedding_size=128).to(device)
    model = DistributedDataParallel(backbone)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    head = PartialFC(128, data.num_identities, ArcFace(scale=32.0), sample_rate=0.5, device=device)
    head_optimizer = RowOptimizer(torch.optim.SGD, head, lr=0.1, momentum=0.9)
    run: dict[str, Any] = {"backbone": backbone, "optimizer": optimizer, "head": head, "head_optimizer": head_optimizer}
    progress = run["progress"] = Progress()
    checkpointer = Checkpointer(Path(config["folder"], "checkpoints"), keep_last=2)
    if checkpointer.latest():
        checkpointer.load(**run)  # written by any number of workers

    for epoch in range(progress.epoch, config["epochs"]):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = head(model(batch.images.to(device)), batch.labels.to(device))
            loss.backward()
            clip_grad_norm_(model.parameters(), head, max_norm=5.0)
            for each in (optimizer, head_optimizer):
                each.step()
                each.zero_grad()
        progress.epoch = epoch + 1
        for buffer in backbone.buffers():
            dist.broadcast(buffer, 0)  # a checkpoint holds one copy of them
        checkpointer.save(progress.epoch, **run)
        metrics = {"epoch": progress.epoch, "workers": world, "loss": loss.item()}
        with tempfile.TemporaryDirectory() as small:  # Ray keeps metrics beside a checkpoint alone: a file of rank 0
            if rank == 0:
                Path(small, "metrics.json").write_text(json.dumps(metrics))
                print(f"epoch {progress.epoch}: loss {loss.item():.6f} on {world} workers", flush=True)
            ray.train.report(metrics, Checkpoint.from_directory(small) if rank == 0 else None)


def main(folder: str, epochs: int = 4, identities: int = 1000, workers: int = 2) -> None:
    folder = str(Path(folder).resolve())  # Ray's workers run elsewhere
    config = {"folder": folder, "epochs": epochs, "identities": identities}
    again = RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=3))
    scaling = ScalingConfig(num_workers=workers)
    result = TorchTrainer(train, train_loop_config=config, scaling_config=scaling, run_config=again).fit()
    print(f"complete, Ray has {result.metrics}; the newest checkpoints are in {folder}/checkpoints")


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
