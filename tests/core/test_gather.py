"""One gather for several heads with their own labels: the same numbers, the fewest collectives, the same errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import any_message_of as message_of
from dense_losses import Loss, share_of
from near import near
from shards import local, positions, samples_of, selected_by_all, two_by_two, whole
from torch import Tensor
from watching import collectives

from partial_fc import ArcFace, CenterLoss, GlobalBatch, NonFiniteError, NormFace, PartialFC, Softmax, gather
from partial_fc.batch.status import LabelSet, Status, inspect

D = 6
IGNORED = {"plates": 255, "faces": -100, "glyphs": -1}
CLASSES = {"plates": 5, "faces": 9, "glyphs": 40}
FACTORS = {"plates": 0.5, "faces": 1.0, "glyphs": 2.0}
REFERENCES = {
    "plates": Loss("Softmax"),
    "faces": Loss("ArcFace", {"scale": 8.0}),
    "glyphs": Loss("NormFace", {"scale": 20.0}),
}


def build(name: str, group: Any = None) -> PartialFC:
    margin, rate = {
        "plates": (Softmax(), 1.0),
        "faces": (ArcFace(scale=8.0), 1.0),
        "glyphs": (NormFace(scale=20.0), 0.3),
    }[name]
    options: Any = {"ignore_index": IGNORED[name], "dtype": torch.float64, "init_std": 1.0, "group": group}
    return PartialFC(D, CLASSES[name], margin, rate, **options)


def everyones(counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings of all ranks, and their labels by name: a sample may be of one, of several or of no head."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(counts)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    labels = {}
    for name, classes in CLASSES.items():
        drawn = torch.randint(0, classes, (n,), generator=generator)
        labels[name] = torch.where(torch.rand(n, generator=generator) < 0.6, drawn, IGNORED[name])
    return x, labels


def gradient(head: PartialFC) -> Tensor:
    """`[C_local, D]`, whether of all rows or of some."""
    out = torch.zeros_like(local(head.weight.detach()))
    if head.row_grad is None:
        return local(head.weight.grad).clone() if head.weight.grad is not None else out
    ids, values = head.row_grad
    out[ids - head.shards.lo] = local(values)
    return out


# ---------------------------------------------------------------------------------------------------- the same numbers


def joint(rank: int, world: int, names: list[str], counts: tuple[int, ...]) -> None:
    counts = counts[:world]
    x_all, labels_all = everyones(counts)
    here = samples_of(counts, rank)
    labels = {name: labels_all[name][here] for name in names}
    heads = {name: build(name) for name in names}

    expected = torch.zeros((), dtype=torch.float64)
    leaf, grads = x_all[here].clone().requires_grad_(), {}
    for name, head in heads.items():
        loss = FACTORS[name] * head(gather(leaf, labels[name]))
        loss.backward()
        expected += loss.detach()
        grads[name] = gradient(head)
        head.zero_grad()
        head.forward_count = 0  # draws the same negatives again

    x = x_all[here].clone().requires_grad_()
    mine = labels if rank % 2 else dict(reversed(labels.items()))  # each rank's own order of names
    batch = gather(x, mine)
    assert list(batch) == list(mine)
    assert len({id(each.embeddings) for each in batch.values()}) == 1
    for name, each in batch.items():
        assert isinstance(each, GlobalBatch) and each.name == name
        assert torch.equal(each.labels, labels_all[name]) and torch.equal(each.mesh_labels, labels_all[name])
        assert each.counts == counts and each.label_weights is None and each.mesh_label_weights is None
    loss = sum((FACTORS[name] * heads[name](batch[name]) for name in names), torch.zeros((), dtype=torch.float64))
    loss.backward()
    near(loss.detach(), expected)
    near(x.grad, leaf.grad)
    for name, head in heads.items():
        near(gradient(head), grads[name])

    x_all.requires_grad_()
    dense = sum(
        (FACTORS[name] * reference(head, x_all, labels_all[name], REFERENCES[name]) for name, head in heads.items()),
        x_all.sum() * 0,
    )
    dense.backward()
    near(loss.detach(), dense.detach())
    assert x.grad is not None and x_all.grad is not None
    near(x.grad, x_all.grad[here] * world)


def reference(head: PartialFC, x: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Dense, in one process, over the classes that the head selected, for the samples that are of it."""
    ids = selected_by_all(head)
    return loss(x, whole(head.weight)[ids], positions(labels, ids, head.num_classes, head.ignore_index), ids)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("counts", [(5, 0, 3), (2, 7, 1), (0, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("names", [["plates", "faces"], ["glyphs", "faces", "plates"], ["glyphs"]])
def test_heads_on_one_gather_equal_heads_on_their_own_and_a_dense_reference(ranks, world, counts, names):
    ranks(world).run(joint, names, counts)


def weighted(rank: int, world: int, shared: bool) -> None:
    """Several labels a sample in one set, one in the other; sample weights of all sets, or of one."""
    counts = (4, 0, 3)[:world]
    x_all, labels_all = everyones(counts)
    generator = torch.Generator().manual_seed(3)
    n, here = sum(counts), samples_of(counts, rank)
    both = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(n)])
    both[0] = 255
    shares = torch.rand(n, 2, generator=generator, dtype=torch.float64).softmax(1)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    heads = {"faces": build("faces"), "plates": build("plates")}
    x = x_all[here].clone().requires_grad_()
    batch = gather(
        x,
        {"faces": labels_all["faces"][here], "plates": both[here]},
        label_weights={"plates": shares[here]},
        sample_weights=weights[here] if shared else {"plates": weights[here]},
    )
    assert batch["faces"].label_weights is None and batch["plates"].label_weights is not None
    near(batch["plates"].mesh_label_weights, shares)
    assert (batch["faces"].sample_weights is not None) == shared
    loss = sum(head(batch[name]) for name, head in heads.items())
    loss.backward()
    x_all.requires_grad_()
    faces = REFERENCES["faces"](
        x_all, whole(heads["faces"].weight), labels_all["faces"], sample_weights=weights if shared else None
    )
    share, _ = share_of(both, 5, shares, ignore=255)
    plates = REFERENCES["plates"](x_all, whole(heads["plates"].weight), share, sample_weights=weights)
    expected = faces + plates
    expected.backward()
    assert x.grad is not None and x_all.grad is not None
    near(loss.detach(), expected.detach())
    near(x.grad, x_all.grad[here] * world)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_weights_of_several_label_sets(ranks, world, shared):
    ranks(world).run(weighted, shared)


def of_one_head(rank: int, world: int) -> None:
    """A batch without a sample of a head: that head's loss is 0 and the other's gradients are as if it were alone."""
    x = torch.randn(3, D, dtype=torch.float64)
    faces, plates = build("faces"), build("plates")
    labels = torch.tensor([0, 3, 8])
    alone, leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    faces(alone, labels).backward()
    expected = gradient(faces)
    faces.zero_grad()
    batch = gather(leaf, {"faces": labels, "plates": torch.full((3,), 255)})
    loss = plates(batch["plates"])
    assert loss.item() == 0
    (faces(batch["faces"]) + loss).backward()
    near(leaf.grad, alone.grad)
    near(gradient(faces), expected)
    assert not gradient(plates).any()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_samples_of_one_head_only(ranks, world):
    ranks(world).run(of_one_head)


def with_centers(rank: int, world: int) -> None:
    """A center loss takes a batch of the dict like a head, and a rank without data joins the backward of the others."""
    x = torch.randn(3, D, dtype=torch.float64).requires_grad_()
    mine = x[: 3 * (rank != world - 1)] if world > 1 else x
    mine = mine if len(mine) else torch.empty(0, D, dtype=torch.float64)
    labels = torch.arange(len(mine))
    batch = gather(mine, {"faces": labels, "plates": labels})
    center = CenterLoss(D, 5, ignore_index=255, dtype=torch.float64)
    (build("faces")(batch["faces"]) + 0.1 * center(batch["plates"]) + build("plates")(batch["plates"])).backward()
    assert (x.grad is not None) == bool(len(mine))


@pytest.mark.parametrize("world", [1, 3])
def test_centers_and_a_rank_without_data(ranks, world):
    ranks(world).run(with_centers)


def on_a_mesh(rank: int, world: int) -> None:
    """4 ranks as 2 replicas of 2 shards against all 4 as shards, with label and sample weights in one of two sets."""
    mesh = two_by_two()
    counts = (2, 0, 3, 1)
    x_all, labels_all = everyones(counts)
    here = samples_of(counts, rank)
    generator = torch.Generator().manual_seed(3)
    both = torch.randint(0, 5, (6, 2), generator=generator)
    shares = torch.rand(6, 2, generator=generator, dtype=torch.float64).softmax(1)
    weights = torch.rand(6, generator=generator, dtype=torch.float64)
    results = []
    for group in (mesh, None):
        heads = {name: build(name, group) for name in ("glyphs", "plates")}
        x = x_all[here].clone().requires_grad_()
        batch = gather(
            x,
            {"glyphs": labels_all["glyphs"][here], "plates": both[here]},
            label_weights={"plates": shares[here]},
            sample_weights={"glyphs": weights[here]},
            group=group,
        )
        near(batch["plates"].mesh_label_weights, shares)
        assert torch.equal(batch["glyphs"].mesh_labels, labels_all["glyphs"])
        near(batch["glyphs"].mesh_sample_weights, weights)
        assert len(batch["plates"].labels) == (6 if group is None else (2, 4)[rank // 2])
        loss = sum(head(batch[name]) for name, head in heads.items())
        loss.backward()
        results.append((loss.detach(), x.grad))
    for mine, expected in zip(*results, strict=True):
        near(mine, expected)
    shares[here] = torch.nan
    options = {"label_weights": {"plates": shares[here]}, "group": mesh}
    labels = {"glyphs": labels_all["glyphs"][here], "plates": both[here]}
    assert "rank 0, 'plates': label_weights[0, 0] is nan" in message_of(gather, x_all[here], labels, **options)
    names = {f"head {rank // 2}": labels["glyphs"]}  # the replicas differ, not the shards
    assert "'head 0' on rank 0 and a dict of 'head 1' on rank 2" in message_of(gather, x_all[here], names, group=mesh)


def test_replicas_of_shards_equal_one_set_of_shards(ranks):
    ranks(4).run(on_a_mesh)


# ---------------------------------------------------------------------------------------------------- communication


def collectives_of(rank: int, world: int, names: list[str]) -> list[tuple[str, int]]:
    counts = (4, 2)
    x_all, labels_all = everyones(counts)
    here = slice(4 * rank, 4 + 2 * rank)
    x, heads = x_all[here].clone().requires_grad_(), {name: build(name) for name in names}
    with collectives() as calls:
        batch = gather(x, {name: labels_all[name][here] for name in names})
        sum(head(batch[name]) for name, head in heads.items()).backward()
    return calls


STATUS = 24 * 8


@pytest.mark.parametrize("names", [["faces"], ["faces", "plates"], ["faces", "plates", "glyphs"]])
def test_any_number_of_heads_makes_one_payload_and_one_reduce_scatter(ranks, names):
    others = len(names) - 1
    for calls in ranks(2).run(collectives_of, names):
        status = [("all_gather", STATUS)] + [("all_gather", others * STATUS)] * bool(others)
        exchange = [*status, ("all_gather", 4 * (D * 8 + 8 * len(names)))]
        assert calls[: len(exchange)] == exchange
        of_heads = calls[len(exchange) : -1]  # of each head: what all ranks must have alike, then statistics
        assert [name for name, _ in of_heads] == ["all_gather"] * 2 * len(names)
        assert [size for _, size in of_heads[::2]] == [STATUS] * len(names)
        assert calls[-1] == ("reduce_scatter", 2 * 4 * D * 8)


def test_the_status_waits_for_no_device():
    """Tensors without storage have no values that a host could wait for."""
    x, labels = torch.empty(4, D, device="meta"), torch.empty(4, 2, dtype=torch.int64, device="meta")
    weights = torch.empty(4, 2, device="meta"), torch.empty(4, device="meta")
    sets = [LabelSet("a", labels, *weights), LabelSet("b", labels[:, 0])]
    assert inspect(x, sets, "", wants_grad=True, look=True).shape == (2, len(Status._fields))


# ---------------------------------------------------------------------------------------------------- errors agree


def good() -> tuple[Tensor, dict[str, Any]]:
    labels = {"faces": torch.tensor([0, 1, -100, 8]), "plates": torch.tensor([[0, 1], [2, 3], [255, 255], [4, 0]])}
    weights = {"plates": torch.tensor([[0.5, 0.5], [0.7, 0.3], [0.2, 0.8], [1.0, 0.0]])}
    return torch.ones(4, D), {"labels": labels, "label_weights": weights, "sample_weights": torch.ones(4)}


def spoil(kind: str, x: Tensor, options: dict[str, Any]) -> Tensor:
    labels, label_weights, sample_weights = options["labels"], options["label_weights"], options["sample_weights"]
    if kind == "other names":
        labels["cars"] = labels.pop("faces")
    elif kind == "more names":
        labels["cars"] = labels["faces"]
    elif kind == "fewer names":
        del labels["faces"]
    elif kind == "no dict":
        options |= {"labels": labels["faces"], "label_weights": None}
    elif kind == "empty dict":
        options |= {"labels": {}, "label_weights": None}
    elif kind == "names that are no strings":
        labels[7] = labels["faces"]
    elif kind == "no labels":
        labels["faces"] = None
    elif kind == "weights are no dict":
        options["label_weights"] = label_weights["plates"]
    elif kind == "weights are a dict":
        options["labels"] = labels["faces"]
    elif kind == "weights of nobody":
        options["sample_weights"] = {"face": sample_weights}
    elif kind == "weights in a list":
        label_weights["plates"] = label_weights["plates"].tolist()
    elif kind == "weights elsewhere":
        options["sample_weights"] = sample_weights.to("meta")
    elif kind == "weights of other shape":
        label_weights["plates"] = torch.full((4, 3), 1 / 3)
    elif kind == "sample weights of other shape":
        options["sample_weights"] = sample_weights[:, None]
    elif kind == "weights of plain labels":
        label_weights["faces"] = torch.ones(4)
    elif kind == "a column of labels":
        labels["faces"] = labels["faces"][:, None]
    elif kind == "labels without weights":
        del label_weights["plates"]
    elif kind == "more labels each":
        labels["plates"] = torch.zeros(4, 3, dtype=torch.int64)
        label_weights["plates"] = torch.tensor([1.0, 0.0, 0.0]).expand(4, 3)
    elif kind == "no sample weights":
        options["sample_weights"] = None
    elif kind == "length":
        labels["plates"] = labels["plates"][:3]
    elif kind == "width":
        return x[:, :3]
    elif kind == "sum":
        label_weights["plates"][3] = torch.tensor([1.0, 0.7])
    elif kind == "sum a little off":
        label_weights["plates"][1, 1] += 2e-3
    elif kind == "negative weight":
        label_weights["plates"][3] = torch.tensor([1.2, -0.2])
    elif kind == "nan weight of an ignored sample":
        label_weights["plates"][2, 1] = torch.nan
    elif kind == "infinite weight":
        label_weights["plates"][0, 1] = torch.inf
    elif kind == "negative sample weight":
        sample_weights[1] = -0.5
    elif kind == "nan sample weight":
        sample_weights[2] = torch.nan
    elif kind == "infinite sample weight of one set":
        options["sample_weights"] = {"faces": torch.tensor([1.0, 1.0, 1.0, torch.inf]), "plates": sample_weights}
    elif kind == "label":
        labels["plates"][3, 1] = 5
    elif kind == "nan":
        x[1, 2] = torch.nan
    return x


def step(x: Tensor, options: dict[str, Any], heads: dict[str, PartialFC]) -> float:
    batch = gather(x, **options)
    return sum(head(batch[name]) for name, head in heads.items()).item()


def bad_batch(rank: int, world: int, kind: str) -> tuple[str, float]:
    """The last rank brings a bad batch; then all bring a good one, and the group still works."""
    heads = {"faces": PartialFC(D, 9), "plates": PartialFC(D, 5, Softmax(), ignore_index=255)}
    x, options = good()
    if rank == world - 1:
        x = spoil(kind, x, options)
    text = message_of(step, x, options, heads)
    return text, step(*good(), heads)


DISTRIBUTION = "the weights of a sample's labels are a distribution: each at least 0, together 1"
OF_A_RANK = {
    "empty dict": ": labels are an empty dict; it needs a name and labels for each head",
    "names that are no strings": ": the names of labels must be strings, not 7",
    "no labels": ", 'faces': labels must be an int64 tensor, not NoneType",
    "weights are no dict": ": labels are a dict, so label_weights must be one too, with the names that have weights",
    "weights are a dict": ": label_weights are a dict, but labels are not",
    "weights of nobody": ": sample_weights are given for 'face', labels for 'faces', 'plates' only",
    "weights in a list": ", 'plates': label_weights must be a tensor, not list",
    "weights elsewhere": ", 'faces': sample_weights are on meta, embeddings on cpu",
    "weights of other shape": ", 'plates': label_weights must have the shape of labels, [4, 2], but are [4, 3]",
    "sample weights of other shape": ", 'faces': sample_weights must be [N], here [4], but are [4, 1]",
    "weights of plain labels": ", 'faces': labels are [N], one a sample, which takes no label_weights; those go with labels [N, L] and "
    "have their shape",
    "a column of labels": ", 'faces': labels are [N, 1]; squeeze them, or give gather label_weights [N, L] for several labels a sample",
    "labels without weights": ", 'plates': labels are [N, 2], 2 a sample; give gather label_weights [N, 2], or bring one label "
    "a sample, [N]",
    "length": ", 'plates': labels are for 3 samples, embeddings for 4",
    "sum": f", 'plates': label_weights[3] sums to 1.7; {DISTRIBUTION}",
    "sum a little off": f", 'plates': label_weights[1] sums to 1.002; {DISTRIBUTION}",
    "negative weight": f", 'plates': label_weights[3, 1] is -0.2; {DISTRIBUTION}",
    "nan weight of an ignored sample": f", 'plates': label_weights[2, 1] is nan; {DISTRIBUTION}",
    "infinite weight": f", 'plates': label_weights[0, 1] is inf; {DISTRIBUTION}",
    "negative sample weight": ", 'faces': sample_weights[1] is -0.5; the weight of a sample is finite and at least 0",
    "nan sample weight": ", 'faces': sample_weights[2] is nan; the weight of a sample is finite and at least 0",
    "infinite sample weight of one set": ", 'faces': sample_weights[3] is inf; the weight of a sample is finite and at least 0",
    "label": ", 'plates': labels[3, 1] is 5; valid are 0 to 4 and ignore_index 255; labels are counted from 0",
    "nan": ", 'faces': embeddings[1] (label 1) holds a NaN or infinity",
}
BETWEEN_RANKS = {
    "other names": ": labels are a dict of 'faces', 'plates' on rank 0 and a dict of 'cars', 'plates' on",
    "more names": ": labels are a dict of 'faces', 'plates' on rank 0 and a dict of 'cars', 'faces', 'plates' on",
    "fewer names": ": labels are a dict of 'faces', 'plates' on rank 0 and a dict of 'plates' on",
    "no dict": ": labels are a dict of 'faces', 'plates' on rank 0 and no dict on",
    "more labels each": ", 'plates': labels [N, 2] on rank 0 and [N, 3] on",
    "no sample weights": ", 'faces': weights sample_weights on rank 0 and none on",
    "width": ": embedding width 6 on rank 0 and 3 on",
}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", OF_A_RANK)
def test_a_bad_batch_on_one_rank_raises_the_same_error_on_all(ranks, world, kind):
    texts, losses = zip(*ranks(world).run(bad_batch, kind, timeout=20), strict=True)
    error = NonFiniteError if kind == "nan" else ValueError
    assert set(texts) == {f"{error.__name__}: rank {world - 1}{OF_A_RANK[kind]}"}
    assert len(set(losses)) == 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", BETWEEN_RANKS)
def test_ranks_that_disagree_raise_the_same_error(ranks, world, kind):
    texts, losses = zip(*ranks(world).run(bad_batch, kind, timeout=20), strict=True)
    names = " names" if kind.endswith(("names", "dict")) else ""
    assert set(texts) == {
        f"ValueError: ranks disagree{BETWEEN_RANKS[kind]} rank {world - 1}; every rank must pass the same{names}"
    }
    assert len(set(losses)) == 1


def test_a_plain_gather_names_no_set():
    labels, x = torch.tensor([[0, 1], [2, 3]]), torch.randn(2, D)
    with pytest.raises(ValueError, match=r"rank 0: label_weights\[1\] sums to 0; the weights"):
        gather(x, labels, label_weights=torch.tensor([[1, 0], [0, 0]]))
    with pytest.raises(ValueError, match=r"rank 0: labels are \[N, 1\]; squeeze them"):
        PartialFC(D, 4)(x, labels[:, :1])
    with pytest.raises(ValueError, match="int64 tensor, not dict"):
        PartialFC(D, 4)(x, {"a": labels})  # type: ignore[arg-type]


def test_weights_that_are_allowed():
    """Rounded to half precision, off by less than 0.001, not added up where a sample is of no class, whole numbers,
    truth values."""
    labels, x = torch.tensor([[0, 1, 2]] * 3), torch.randn(3, D)
    thirds = torch.tensor([0.1, 0.2, 0.7]).expand(3, 3)
    for weights in (
        thirds.bfloat16(),
        thirds.half(),
        thirds + 3e-4,
        thirds.double(),
        torch.tensor([0, 1, 0]).expand(3, 3),
    ):
        assert (
            gather(x, labels, label_weights=weights, sample_weights=torch.tensor([True, False, True])).label_weights
            is not None
        )
    labels, weights = torch.tensor([[-100, -100], [3, -100]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    head = PartialFC(D, 4)
    near(head(gather(x[:2], labels, label_weights=weights)), head(x[:2], labels[:, 0]))
