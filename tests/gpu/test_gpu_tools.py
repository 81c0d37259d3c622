"""What surrounds a step, on the pretend GPU as on CPUs: queries, changes of classes, files, the loop, evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_gpu import ALONE, ALONE_ON_HOST, CLASSES, RANKS, RANKS_ON_HOST, SLOW_ON_REPLICAS, WIDTH, Place, Pools, on_both
from torch import nn

from partial_fc import (
    Checkpointer,
    DivergenceWatch,
    JoinedBatches,
    PartialFC,
    PreemptionGuard,
    Progress,
    RandomState,
    RowOptimizer,
    class_mapping,
    clip_grad_norm_,
    export_weights,
    import_weights,
    load_checkpoint,
    save_checkpoint,
)
from partial_fc.training.evaluation import evaluate_embeddings

Made = tuple[PartialFC, RowOptimizer]


def trained(place: Place, rate: float = 0.5, steps: int = 1, **options: Any) -> Made:
    """A head and its optimizer after some steps."""
    options = {"device": place.device, "group": place.group, "storage": place.storage, "init_std": 1.0, **options}
    head = PartialFC(WIDTH, CLASSES, sample_rate=rate, **options)
    optimizer = RowOptimizer(torch.optim.AdamW, head, lr=0.1)
    for step in range(steps):
        step_of(place, head, optimizer, step)
    return head, optimizer


def step_of(place: Place, head: PartialFC, optimizer: RowOptimizer, step: int, classes: int = CLASSES) -> Any:
    x, y = place.batch(step, classes)
    loss = head(x, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def queries(place: Place) -> list[Any]:
    head, _ = trained(place)
    x, _ = place.batch(9)
    return [*head.topk(x.detach(), 3), *head.topk(x.detach(), 5, tile_bytes=1 << 12), *head.nearest_classes(3)]


def changes(place: Place) -> list[Any]:
    """Classes that come and go; training goes on."""
    head, optimizer = trained(place, class_weights=torch.ones(CLASSES))
    found: list[Any] = []
    head.expand(20, class_weights=torch.ones(20))
    found.append(step_of(place, head, optimizer, 1, CLASSES + 20))
    head.expand(2, place.filled(2, WIDTH), class_weights=torch.ones(2))
    x, _ = place.batch(2)
    new = torch.full((len(x),), CLASSES + 22, device=place.device)
    head.expand(1, [(x.detach(), new)], class_weights=torch.ones(1))
    mapping = class_mapping(CLASSES + 23, merge=[(5, 9)], drop=[0])
    head.remap(mapping)
    found.append(step_of(place, head, optimizer, 3, CLASSES + 21))
    return [*found, head.weight, head.num_classes]


def means(place: Place) -> list[Any]:
    """Another number of batches on each rank."""
    head, _ = trained(place)
    head.init_from_embeddings([(x.detach(), y) for x, y in map(place.batch, range(1 + place.rank))])
    return [head.weight]


def checkpoints(place: Place, folder: str) -> list[Any]:
    """Saved, trained on, loaded into another head: both train on alike."""
    head, optimizer = trained(place)
    path = f"{folder}/{place.device.type}"
    save_checkpoint(path, head=head, head_optimizer=optimizer, progress=Progress())
    other, its_optimizer = trained(place, steps=0)
    load_checkpoint(path, head=other, head_optimizer=its_optimizer, progress=Progress())
    return [step_of(place, *pair, 1) for pair in ((head, optimizer), (other, its_optimizer))] + [
        head.weight,
        other.weight,
    ]


def checkpointers(place: Place, folder: str) -> list[Any]:
    """A save in the background, of random numbers too."""
    head, optimizer = trained(place)
    checkpointer = Checkpointer(f"{folder}/{place.device.type}", asynchronous=True)
    named = {"head": head, "head_optimizer": optimizer, "random": RandomState()}
    checkpointer.save(1, **named)
    step_of(place, head, optimizer, 1)
    checkpointer.wait()
    checkpointer.load(**named)
    return [step_of(place, head, optimizer, 1), head.weight]


def state_dicts(place: Place) -> list[Any]:
    head, optimizer = trained(place)
    other, its_optimizer = trained(place, steps=0)
    other.load_state_dict(head.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's would have one memory for both
    return [step_of(place, *pair, 1) for pair in ((head, optimizer), (other, its_optimizer))] + [
        head.weight,
        other.weight,
    ]


def weight_files(place: Place, folder: str) -> list[Any]:
    head, _ = trained(place)
    path = f"{folder}/{place.device.type}.safetensors"
    export_weights(path, head)
    other, _ = trained(place, steps=0)
    import_weights(path, other)
    return [head.weight, other.weight]


def joined(place: Place) -> list[Any]:
    """The second rank has more batches; in the second pass, the first one has none."""
    found: list[Any] = []
    for counts in ((1, 3), (0, 2)):
        head, optimizer = trained(place, steps=0)
        loader = JoinedBatches([place.batch(step) for step in range(counts[place.rank])], group=place.group)
        for x, y in loader:
            loss = head(x.detach().requires_grad_(), y)
            loss.backward()
            clip_grad_norm_([], head, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        found.append(head.weight)
    return found


def watched(place: Place, of_backbone: bool) -> list[Any]:
    """Ranks that stay equal; then one that does not."""
    head, optimizer = trained(place)
    things: list[Any] = [head]
    if of_backbone:
        backbone = nn.Linear(WIDTH, WIDTH, device=place.device)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.copy_(place.filled(*parameter.shape))
        plain = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
        things = [backbone, head, plain]
    watch = DivergenceWatch(*things, every=2, on_divergence="log")
    for step in range(4):
        step_of(place, head, optimizer, step)
        if of_backbone and step == 3 and place.rank == 1:
            with torch.no_grad():
                backbone.weight[0, 0] += 1
        watch.step()
    assert set(watch.found) == ({"weight"} if of_backbone and place.world > 1 else set())
    return [len(watch.found)]


def watched_optimizers(place: Place, alone: bool) -> list[Any]:
    """Adam, whose state begins with a count on the CPU, and a backbone with running statistics."""
    backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.ones_like(parameter))
    backbone.to(place.device)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=0.1)
    watch = DivergenceWatch(*([optimizer] if alone else [backbone, optimizer]), every=2, buffers=True)
    for step in range(4):
        backbone(place.filled(4, WIDTH, key=step)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step()
    return [len(watch.found)]


def preempted(place: Place) -> list[Any]:
    return [PreemptionGuard().requested()]


def evaluated(place: Place) -> list[Any]:
    def add(tensor: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    labels = torch.arange(64, device=place.device) % 16
    found = evaluate_embeddings(
        place.filled(64, WIDTH), labels, name="x", tile=20, rank=place.rank, world=place.world, reduce=add
    )
    assert found.eer is not None
    return [
        [tar for tar in found.tar.values() if tar is not None],
        found.eer,
        found.rank1,
        found.genuine_pairs,
        found.impostor_pairs,
    ]


SCENARIOS: dict[str, tuple[Callable[..., list[Any]], tuple[Any, ...]]] = {
    "queries": (queries, ()),
    "changes of classes": (changes, ()),
    "class means": (means, ()),
    "state dicts": (state_dicts, ()),
    "a watch of a head": (watched, (False,)),
    "a watch of a backbone": (watched, (True,)),
    "a watch of an optimizer": (watched_optimizers, (True,)),
    "a watch of statistics": (watched_optimizers, (False,)),
    "a request to stop": (preempted, ()),
}
WITH_FILES = {"checkpoints": checkpoints, "a checkpointer": checkpointers, "weight files": weight_files}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_tools(gpu_ranks: Pools, ranks: Pools, layout: str, name: str):
    scenario, arguments = SCENARIOS[name]
    on_both(gpu_ranks, ranks, layout, scenario, *arguments)


@pytest.mark.parametrize("name", WITH_FILES)
@pytest.mark.parametrize("layout", SLOW_ON_REPLICAS)
def test_files(gpu_ranks: Pools, ranks: Pools, layout: str, name: str, tmp_path: Path):
    on_both(gpu_ranks, ranks, layout, WITH_FILES[name], str(tmp_path))


OF_ROWS = ("queries", "changes of classes", "class means", "state dicts", "a watch of a head")


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize("layout", [ALONE_ON_HOST, pytest.param(RANKS_ON_HOST, marks=pytest.mark.slow)])
def test_tools_for_rows_on_the_host(gpu_ranks: Pools, ranks: Pools, layout: str, name: str):
    scenario, arguments = SCENARIOS[name]
    on_both(gpu_ranks, ranks, layout, scenario, *arguments)


@pytest.mark.parametrize("name", WITH_FILES)
@pytest.mark.parametrize("layout", [ALONE_ON_HOST, pytest.param(RANKS_ON_HOST, marks=pytest.mark.slow)])
def test_files_of_rows_on_the_host(gpu_ranks: Pools, ranks: Pools, layout: str, name: str, tmp_path: Path):
    on_both(gpu_ranks, ranks, layout, WITH_FILES[name], str(tmp_path))


@pytest.mark.parametrize("layout", [*SLOW_ON_REPLICAS[1:], RANKS_ON_HOST])
def test_joined_batches(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, joined)


@pytest.mark.parametrize("layout", [ALONE, RANKS])
def test_evaluation(gpu_ranks: Pools, ranks: Pools, layout: str):
    on_both(gpu_ranks, ranks, layout, evaluated)
