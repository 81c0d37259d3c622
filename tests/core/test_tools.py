"""Tools of torch that look at a head: each works, in one process and on two ranks, or says what to do instead."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import any_message_of, local
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from partial_fc import ArcFace, CenterLoss, PartialFC, RowOptimizer, clip_grad_norm_

WIDTH, CLASSES = 6, 13
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "sampled": (0.5, {}),
    "exact": (1.0, {}),
    "in backward": (1.0, {"update_in_backward": True}),
}


class Model(nn.Module):
    def __init__(self, rate: float = 0.5, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(8, WIDTH, dtype=dtype)
        self.head = PartialFC(WIDTH, CLASSES, ArcFace(scale=16.0), sample_rate=rate, dtype=dtype)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(images), labels)


def build(kind: str) -> tuple[Model, RowOptimizer]:
    rate, options = KINDS[kind]
    model = Model(rate)
    return model, RowOptimizer(torch.optim.SGD, model.head, lr=0.1, momentum=0.9, **options)


def batch(rank: int = 0, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 8, generator=generator), torch.randint(0, CLASSES, (4,), generator=generator)


def rank_of() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def train(model: nn.Module, optimizer: RowOptimizer, first: int = 0, steps: int = 2) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = model(*batch(rank_of(), step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: Model) -> Tensor:
    return local(model.head.weight.detach()).clone()


# ---------------------------------------------------------------------------------------------------- what works
# each takes (model, optimizer, kind) and trains as a model does that nobody looks at


def anomaly(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        with torch.autograd.detect_anomaly():
            losses = train(model, optimizer)
        torch.autograd.set_detect_anomaly(True)
        try:
            return losses + train(model, optimizer, 2)
        finally:
            torch.autograd.set_detect_anomaly(False)


def module_hooks(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    seen: list[Any] = []
    head = model.head
    head.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments)))
    head.register_forward_hook(lambda module, arguments, loss: seen.append(loss.shape))
    head.register_full_backward_pre_hook(lambda module, grads: seen.append(grads[0].item()))
    head.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs[0].shape))
    losses = train(model, optimizer)
    assert seen == 2 * [2, torch.Size([]), 1.0, torch.Size([4, WIDTH])]
    return losses + train(model, optimizer, 2)


def global_hooks(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    seen: list[str] = []
    add = nn.modules.module
    handles = [
        add.register_module_forward_pre_hook(lambda module, arguments: seen.append(f"+{type(module).__name__}")),
        add.register_module_forward_hook(lambda module, arguments, loss: seen.append(f"-{type(module).__name__}")),
    ]
    try:
        losses = train(model, optimizer)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == 2 * ["+Model", "+Linear", "-Linear", "+PartialFC", "-PartialFC", "-Model"]
    return losses + train(model, optimizer, 2)


def hooks_of_embeddings(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    seen: list[Any] = []
    model.backbone.register_forward_hook(
        lambda module, arguments, out: out.register_hook(lambda grad: seen.append(grad.shape)) and None
    )
    losses = train(model, optimizer, steps=4)
    assert seen == 4 * [torch.Size([4, WIDTH])]
    return losses


def hooks_of_an_exact_weight(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    seen: list[Any] = []
    if kind == "exact":
        model.head.weight.register_hook(lambda grad: seen.append(grad.shape))
        model.head.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.shape))
    losses = train(model, optimizer, steps=4)
    assert kind != "exact" or seen == 8 * [torch.Size([CLASSES, WIDTH])]
    return losses


def profiles(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    with torch.profiler.profile() as profile, torch.profiler.record_function("mine"):
        losses = train(model, optimizer, steps=4)
    names = {event.key for event in profile.key_averages()}
    assert {"mine", "partial_fc::gather", "partial_fc::update", "Optimizer.step#RowOptimizer.step"} <= names
    assert "Optimizer.step#SGD.step" not in names  # the stand-in of a RowOptimizer is nobody's
    return losses


def compiled(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    losses = train(torch.compile(model, backend="eager"), optimizer)
    torch._dynamo.reset()
    return losses + train(model, optimizer, 2)


def summaries(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    """As torchinfo and torchsummary do: hooks on all modules, numbers and bytes of parameters."""
    found: dict[str, tuple[Any, int, int]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, out: Tensor) -> None:
            own = list(module.parameters(recurse=False)) if not list(module.children()) else list(module.parameters())
            found[name] = tuple(out.shape), sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    losses = train(model, optimizer, steps=1)
    for handle in handles:
        handle.remove()
    assert found["head"] == ((), CLASSES * WIDTH, 4 * CLASSES * WIDTH)  # of all ranks together
    assert found[""] == ((), CLASSES * WIDTH + 54, 4 * (CLASSES * WIDTH + 54))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()}["head.weight"] == (CLASSES, WIDTH)
    assert f"embedding_size={WIDTH}" in repr(model)
    own = local(model.head.weight).numel()
    assert own == model.head.shards.local * WIDTH
    return losses + train(model, optimizer, 1, 3)


def copies(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    losses = train(model, optimizer)
    if kind != "in backward":
        model(*batch(rank_of(), 2)).backward()  # a copy has no gradients
    twin, own = copy.deepcopy((model, optimizer))
    assert all(p.grad is None for p in twin.parameters()) and twin.head.row_grad is None
    optimizer.zero_grad()
    twin.head.forward_count = model.head.forward_count = 2
    of_twin = train(twin, own, 2)
    before = weights(model)
    of_model = train(model, optimizer, 2)
    assert of_model == of_twin and not torch.equal(weights(model), before)
    assert torch.equal(weights(model), weights(twin))
    return losses + of_model


def averages(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.75), use_buffers=True)
    average.update_parameters(model)
    first = weights(model)
    losses = train(model, optimizer)
    average.update_parameters(model)
    torch.testing.assert_close(weights(average.module), 0.75 * first + 0.25 * weights(model))
    update_bn([batch()[0]], model.backbone)
    with torch.no_grad():
        assert average.eval()(*batch(rank_of())).isfinite()
    alone = AveragedModel(model.head, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    before = weights(model)
    alone.update_parameters(model.head)
    losses += train(model, optimizer, 2)
    alone.update_parameters(model.head)
    torch.testing.assert_close(local(alone.module.weight.detach()), 0.75 * before + 0.25 * weights(model))
    return losses


def by_hand(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    """Moves and toggles that change nothing."""
    losses = train(model, optimizer)
    model.to("cpu").share_memory()
    model.requires_grad_(False).requires_grad_(True)
    model.apply(lambda module: None)
    if kind == "exact" or not dist.is_initialized():
        norm = torch.nn.utils.get_total_norm([p.detach() for p in model.head.parameters()])
        assert norm > 0
    return losses + train(model, optimizer, 2)


def containers(model: Model, optimizer: RowOptimizer, kind: str) -> list[float]:
    return train(nn.DataParallel(model), optimizer, steps=4)  # of no GPU: it calls the model


WORKS = (
    anomaly, module_hooks, global_hooks, hooks_of_embeddings, hooks_of_an_exact_weight, summaries, copies, averages,
    by_hand, containers,
)  # fmt: skip
SLOW_TO_IMPORT = (profiles, compiled)  # in each rank


def look(rank: int, world: int, more: tuple[Any, ...] = ()) -> None:
    for kind in KINDS if world == 1 else ("sampled", "exact"):
        expected = train(*build(kind), steps=4)
        for tool in (*WORKS, *more):
            assert tool(*build(kind), kind) == expected, (kind, tool.__name__)


def test_what_works_changes_nothing():
    look(0, 1, SLOW_TO_IMPORT)


def test_what_works_changes_nothing_on_ranks(ranks):
    ranks(2).run(look)


# ---------------------------------------------------------------------------------------------------- what is refused


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def with_hook(model: Model) -> None:
    model.head.weight.register_hook(lambda grad: grad)
    model(*batch(rank_of()))


def with_post_hook(model: Model) -> None:
    model.head.weight.register_post_accumulate_grad_hook(lambda weight: None)
    model(*batch(rank_of()))


def parametrized(how: Callable[[Model], Any]) -> Callable[[Model], None]:
    def use(model: Model) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how(model)
        model(*batch(rank_of()))

    return use


def functional(model: Model) -> None:
    with_weight = {"weight": model.head.weight.detach() * 1}
    torch.func.functional_call(model.head, with_weight, (model.backbone(batch(rank_of())[0]), batch(rank_of())[1]))


def gradient_of_a_function(model: Model) -> None:
    images, labels = batch(rank_of())
    embeddings, weight = model.backbone(images).detach(), model.head.weight.detach()
    torch.func.grad(lambda w: torch.func.functional_call(model.head, {"weight": w}, (embeddings, labels)))(weight)


def mapped(model: Model) -> None:
    images, labels = batch(rank_of())
    torch.func.vmap(model)(images[:, None], labels[:, None])


def clipped(function: Callable[..., Any]) -> Callable[[Model], None]:
    def use(model: Model) -> None:
        model(*batch(rank_of())).backward()
        function(model.parameters(), 1.0)

    return use


def onnx(model: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.export(model, batch(rank_of()))


def jit(how: Callable[..., Any], *arguments: Any) -> Callable[[Model], None]:
    def use(model: Model) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how(model, *arguments)

    return use


def averaged_at_once(model: Model) -> None:
    AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).update_parameters(model)


def replicated(model: Model) -> None:
    frame = {"__name__": "torch.nn.parallel.replicate"}  # the real one asks for GPUs first
    exec("def replicate(network):\n    return list(network.parameters())", frame)
    frame["replicate"](model)


def traced(model: Model) -> None:
    torch.fx.symbolic_trace(model)


SAMPLED, GROUP, ALWAYS = ("sampled", "in backward"), "in a group", tuple(KINDS)
HOOKS = "has hooks that would never be called, because there is no gradient of all of its rows"
APART = "weight was taken apart by a parametrization or by pruning"
CLIP = "Use partial_fc.clip_grad_norm_(backbone.parameters(), head, max_norm=...)"
REFUSED: dict[str, tuple[Callable[[Model], Any], str, Any]] = {
    "hook": (with_hook, HOOKS, SAMPLED),
    "post hook": (with_post_hook, HOOKS, SAMPLED),
    "weight norm": (parametrized(lambda m: parametrizations.weight_norm(m.head)), APART, ALWAYS),
    "spectral norm": (parametrized(lambda m: parametrizations.spectral_norm(m.head)), APART, "alone"),
    "orthogonal": (parametrized(lambda m: parametrize.register_parametrization(m.head, "weight", Twice())), APART, ALWAYS),
    "old weight norm": (parametrized(lambda m: nn.utils.weight_norm(m.head)), APART, ALWAYS),
    "prune": (parametrized(lambda m: prune.random_unstructured(m.head, "weight", 0.5)), APART, "alone"),
    "functional_call": (functional, "functional_call gave this head another weight", SAMPLED),
    "grad": (gradient_of_a_function, "cannot be transformed by torch.func", ALWAYS),
    "vmap": (mapped, "cannot be transformed by torch.func", ALWAYS),
    "clip norm": (clipped(torch.nn.utils.clip_grad_norm_), CLIP, (*SAMPLED, GROUP)),
    "clip value": (clipped(torch.nn.utils.clip_grad_value_), CLIP, (*SAMPLED, GROUP)),
    "vector": (lambda m: nn.utils.parameters_to_vector(m.parameters()), "cannot be part of one vector", GROUP),
    "to vector": (
        lambda m: nn.utils.vector_to_parameters(torch.zeros(132), m.parameters()), "cannot be part of one vector", GROUP
    ),
    "averages": (averaged_at_once, "avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.999)", GROUP),
    "replicate": (replicated, "DataParallel cannot copy a PartialFC", ALWAYS),
    "fx": (traced, "torch.fx cannot trace a head", ALWAYS),
    "script": (jit(torch.jit.script), "torch.jit (script, trace) cannot take in a head", ALWAYS),
    "trace": (jit(torch.jit.trace, batch()), "torch.jit (script, trace) cannot take in a head", ALWAYS),
    "export": (onnx, "torch.export and torch.onnx.export cannot take in a head", "alone"),  # slow to import in each rank
    "pickle": (pickle.dumps, "partial_fc.save_checkpoint(path, model=model)", GROUP),
    "save": (lambda m: torch.save(m, io.BytesIO()), "partial_fc.save_checkpoint(path, model=model)", GROUP),
}  # fmt: skip


def refused(rank: int, world: int, kind: str) -> dict[str, str]:
    """The words of each tool that has to be refused for this kind of head."""
    words = {}
    for name, (use, _, where) in REFUSED.items():
        grouped = dist.is_initialized()
        if kind in where or (where == GROUP and grouped) or (where == "alone" and not grouped):
            model, optimizer = build(kind)
            words[name] = any_message_of(use, model)
            assert optimizer.param_groups[0]["lr"] == 0.1
        elif GROUP in where and grouped:
            words[name] = any_message_of(use, build(kind)[0])
    return words


def refused_of_all(rank: int, world: int) -> dict[str, dict[str, str]]:
    return {kind: refused(rank, world, kind) for kind in KINDS}


def test_what_is_refused_is_refused_alike_in_words(ranks):
    first, second = ranks(2).run(refused_of_all)
    assert first == second
    for of_kinds in (refused_of_all(0, 1), first):
        for kind, words in of_kinds.items():
            assert len(words) > 8
            for name, text in words.items():
                early = kind == "in backward" and name.startswith("clip")
                assert ("Clip those of the backbone alone" if early else REFUSED[name][1]) in text, (kind, name)


def one_rank_looks(rank: int, world: int) -> str:
    model, optimizer = build("sampled")
    assert optimizer.param_groups
    if rank == 1:
        model.head.weight.register_hook(lambda grad: grad)
    return any_message_of(model, *batch(rank))


def test_what_one_rank_did_is_told_by_all(ranks):
    first, second = ranks(2).run(one_rank_looks)
    assert first == second and "rank 1: weight has hooks" in first


# ---------------------------------------------------------------------------------------------------- one process


def test_a_head_is_pickled_where_there_is_no_group():
    for kind in KINDS:
        model, optimizer = build(kind)
        train(model, optimizer)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for loaded in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
            own = RowOptimizer(torch.optim.SGD, loaded.head, lr=0.1, momentum=0.9)
            own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            twin, of_twin = copy.deepcopy((model, optimizer))
            assert train(loaded, own, 2) == train(twin, of_twin, 2)


def test_gradients_are_those_of_differences():
    """gradcheck in one process. On ranks, each would move its own embeddings in the same forward."""
    sampled, exact, center = Model(0.5, torch.float64), Model(1.0, torch.float64), CenterLoss(WIDTH, CLASSES)
    optimizer = RowOptimizer(torch.optim.SGD, sampled.head, lr=0.1)
    embeddings = sampled.backbone(batch()[0].double()).detach().requires_grad_()

    def loss(head: Any) -> Callable[[Tensor], Tensor]:
        def of(embeddings: Tensor) -> Tensor:
            head.forward_count = 0  # the same window each time
            return head(embeddings, batch()[1])

        return of

    for head in (sampled.head, exact.head, center.double()):
        assert torch.autograd.gradcheck(loss(head), (embeddings,))
    assert optimizer.param_groups


def test_an_exact_head_takes_other_weights_for_a_call():
    model, _ = build("exact")
    images, labels = batch()
    embeddings = model.backbone(images).detach()
    given = (model.head.weight.detach() + 1).requires_grad_()
    loss = torch.func.functional_call(model.head, {"weight": given}, (embeddings, labels))
    loss.backward()
    assert model.head.weight.grad is None and given.grad.any()
    with torch.no_grad():
        model.head.weight.copy_(given)
    torch.testing.assert_close(model.head(embeddings, labels), loss)
    sampled, _ = build("sampled")
    sampled.eval()
    loss = torch.func.functional_call(sampled.head, {"weight": given}, (embeddings, labels))
    torch.testing.assert_close(loss, model.head(embeddings, labels))


def test_gradients_of_selected_rows_are_clipped_by_value_in_the_optimizers_group():
    model, optimizer = build("sampled")
    model(*batch()).backward()
    assert model.head.weight.grad is None
    nn.utils.clip_grad_value_(optimizer.param_groups[0]["params"], 1e-3)
    assert float(model.head.row_grad[1].abs().max()) == pytest.approx(1e-3)
    assert float(clip_grad_norm_(model.backbone.parameters(), model.head, max_norm=1e-4)) > 1e-4


DTYPES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float64),
    "to": lambda module: module.to(torch.float64),
}


@pytest.mark.parametrize("name", DTYPES)
def test_casts_after_steps_are_followed_by_the_optimizer(name):
    """State stays, and steps go on as those of a dense parameter."""
    model, optimizer = build("exact")
    dense = nn.Linear(WIDTH, CLASSES, bias=False)
    with torch.no_grad():
        dense.weight.copy_(model.head.weight)
    plain = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        if step == 2:
            DTYPES[name](model.head), DTYPES[name](dense)
        images, labels = batch(0, step)
        model.head(model.backbone(images).to(model.head.weight.dtype).detach(), labels).backward()
        dense.weight.grad = model.head.weight.grad.clone()
        optimizer.step(), plain.step()
        optimizer.zero_grad()
        assert model.head.weight.dtype == dense.weight.dtype
        torch.testing.assert_close(model.head.weight.detach(), dense.weight.detach(), rtol=1e-2, atol=1e-2)


def test_a_head_on_the_meta_device_comes_back_empty():
    model, optimizer = build("sampled")
    train(model, optimizer)
    model.head.to("meta")
    model.head.to_empty(device="cpu")
    model.head.reset_parameters()
    assert torch.equal(weights(model), weights(build("sampled")[0]))
    assert all(loss == loss for loss in train(model, optimizer, 2))


def drawn(rank: int, world: int, own: bool) -> tuple[Tensor, Tensor]:
    """This rank's rows after model.apply(init), and what is drawn afterwards."""
    model, _ = build("exact")

    def draw(module: nn.Module) -> None:
        if isinstance(module, PartialFC | nn.Linear):
            nn.init.normal_(module.weight, std=0.5)

    torch.manual_seed(5)
    (model.head if own else model).apply(draw)
    return weights(model), torch.rand(3)


@pytest.mark.parametrize("own", [True, False])
def test_rows_that_are_drawn_on_ranks_differ(ranks, own):
    (first, after), (second, after_too) = ranks(2).run(drawn, own)
    assert torch.equal(after, after_too)  # ranks go on with the same numbers
    everything = torch.cat((first, second))
    assert len(everything.unique(dim=0)) == CLASSES
    assert 0.3 < float(everything.std()) < 0.7
