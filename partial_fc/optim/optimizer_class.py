"""The arguments of a `RowOptimizer`, checked; what an optimizer class does to rows, found by trying it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from partial_fc.distributed.ranks import local_part
from partial_fc.optim.adam_moves import FIRST, LARGEST, SECOND, AdamMoves
from partial_fc.optim.forms import Moves
from partial_fc.optim.moves import KERNELS, LinearMoves, Probe, is_row_state, on_cpu
from partial_fc.optim.protocol import check_options, step_quietly
from partial_fc.rows import ClassRows, HasClassRows

LowPrecision = Literal["master", "stochastic"]
SOME_STEPS = 4  # times three: classes that copy weights look at them every few steps


def check_arguments(
    cls: type[torch.optim.Optimizer],
    head: HasClassRows,
    update_in_backward: bool,
    low_precision: LowPrecision | None,
    options: dict[str, Any],
) -> ClassRows:
    """Return the class rows of the head; TypeError or ValueError for what a `RowOptimizer` cannot do."""
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer_class must be a torch.optim.Optimizer class such as torch.optim.SGD, not {cls!r}")
    rows = getattr(head, "class_rows", None)
    if not isinstance(rows, ClassRows):
        raise TypeError(
            f"a RowOptimizer takes the PartialFC or CenterLoss itself, not {type(head).__name__}: "
            "RowOptimizer(torch.optim.SGD, head, lr=0.1)"
        )
    check_options(options)
    check_kernels(options, rows)
    if update_in_backward and rows.sampled:
        raise ValueError(
            "update_in_backward is for sample_rate=1.0; a sampled head has no gradient of the whole weight to save"
        )
    if low_precision not in (None, "master", "stochastic"):
        raise ValueError(f'low_precision must be None, "master" or "stochastic", not {low_precision!r}')
    if low_precision == "stochastic" and any(p.dtype == torch.float16 for p in rows.parameters.values()):
        raise ValueError('low_precision="stochastic" rounds to bfloat16, and the weights are float16; use "master"')
    check_rows_apart(cls, options)
    return rows


def check_kernels(options: dict[str, Any], rows: ClassRows) -> None:
    """Raise ValueError for an option of kernels that the device of the rows does not have."""
    if options.get("capturable") and rows.home.type == "cpu":
        raise ValueError(
            f"capturable=True is for parameters on a GPU, and this {rows.owner} is on the CPU: leave it out, or build "
            "the optimizer when the rows are on a GPU"
        )


def construct(
    cls: type[torch.optim.Optimizer], parameters: list[nn.Parameter], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """Build the class on stand-ins of the parameters, with its fused kernel where it has one and the caller did not
    choose. Those of the meta device stand for parameters of another one, which may have what is chosen."""
    of_none = [local_part(p.detach())[:0] for p in parameters]
    meta = any(each.device.type == "meta" for each in of_none)
    stand_ins = [nn.Parameter(torch.empty_like(each, device="cpu") if meta else each) for each in of_none]
    chosen = {"fused", "foreach", "differentiable"} & set(options)
    if "fused" in inspect.signature(cls).parameters and not (meta or chosen):
        try:
            return step_quietly(cls(stand_ins, **{**options, "fused": True}))
        except RuntimeError:  # no fused kernel for this device or dtype
            pass
    return step_quietly(cls(stand_ins, **options))


@lru_cache
def fused_moves(cls: type[torch.optim.Optimizer], dtype: torch.dtype) -> bool:
    """Return whether the class's fused kernel moves half precision on the CPU; that of SGD in torch 2.13 does not
    always."""
    parameter = nn.Parameter(torch.ones(64, dtype=dtype, device="cpu"))
    parameter.grad = torch.ones_like(parameter)
    step_quietly(cls([parameter], lr=0.5, fused=True)).step()  # type: ignore[call-arg]
    return bool((parameter < 1).all())


class Trial(NamedTuple):
    """A small problem after some steps: the parameter, its state, the options of its group at the beginning and now."""

    parameter: Tensor
    state: dict[str, Any]
    given: dict[str, Any]
    options: dict[str, Any]


def trial(
    cls: type[torch.optim.Optimizer],
    options: dict[str, Any],
    start: Tensor,
    grads: Sequence[Tensor] = (),
    forget: str = "",
) -> Trial:
    """Step a small problem with these gradients `[n, D]`. forget: state that is set to 0 after the first step.

    It is on the CPU, wherever the rows are, and without the options that choose kernels: they change no number.
    """
    options = {name: on_cpu(value) for name, value in options.items() if name not in KERNELS}
    parameter = nn.Parameter(start.clone())
    optimizer = step_quietly(cls([parameter], **options))
    group = optimizer.param_groups[0]
    given = {name: value for name, value in group.items() if isinstance(value, int | float)}
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        if forget:
            optimizer.state[parameter][forget].zero_()
            forget = ""
    return Trial(parameter.detach(), optimizer.state[parameter], given, group)


def initial_state(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> dict[str, float]:
    """Return what row state holds for a row that never had a gradient.

    It is what the constructor makes, else the state after a step of zero from zero.
    """
    zeros = torch.zeros(1, 2, dtype=torch.float64, device="cpu")
    state = {**trial(cls, options, zeros, [zeros]).state, **trial(cls, options, zeros).state}
    return {k: float(v.reshape(-1)[0]) for k, v in state.items() if is_row_state(v, zeros)}


def check_rows_apart(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Raise ValueError unless the class updates each row independently of the other rows, and by its own state."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(4, 3, generator=generator, dtype=torch.float64, device="cpu")
    # of several sizes, for what a class does to large gradients alone
    grads = [torch.randn(4, 3, generator=generator, dtype=torch.float64, device="cpu") * s for s in (1.0, 1e-3, 1e3)]
    undecayed = {**options, "weight_decay": 0.0} if options.get("weight_decay") else options  # decay enters the state
    try:
        with torch.random.fork_rng(devices=[]):
            together = trial(cls, options, start, grads)
            apart = [trial(cls, options, start[k : k + 1], [grad[k : k + 1] for grad in grads]) for k in range(4)]
            nothing = [torch.zeros_like(start)]
            built = [trial(cls, options, each).state for each in (start, 2 * start)]
            begun = [trial(cls, undecayed, each, nothing).state for each in (start, 2 * start)]
            later = [*nothing, *(grads * SOME_STEPS)]
            kept = trial(cls, undecayed, start, later).parameter
            used = {
                key: not torch.equal(trial(cls, undecayed, start, later, forget=key).parameter, kept)
                for key, value in begun[0].items()
                if is_row_state(value, start) and not torch.equal(value, begun[1][key])
            }
    except (RuntimeError, AssertionError, TypeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword" in str(error):
            raise
        raise ValueError(f"{cls.__name__} cannot update rows one block at a time: {error}") from error
    if not torch.allclose(together.parameter, torch.cat([each.parameter for each in apart]), rtol=1e-9, atol=1e-12):
        raise ValueError(
            f"{cls.__name__} moves a row by what other rows hold (norms or factors of the whole matrix), but "
            "those are on "
            "other ranks or not selected; use a class that treats elements apart for the head (SGD, Adam, "
            "AdamW, RMSprop, "
            "Adagrad), and this one for the backbone"
        )
    counted = [name for name, value in together.given.items() if together.options.get(name) != value]
    if counted:
        raise ValueError(
            f"{cls.__name__} counts its steps in the options of its param group ({', '.join(counted)}), but rows are "
            "stepped in blocks: use a class that keeps what changes in the state of the parameter"
        )
    state, other = built
    alike = {key: (v == other[key].reshape(-1)[0]).all() for key, v in state.items() if is_row_state(v, start)}
    copied = {key: "it is built" for key, one_number in alike.items() if not one_number}
    copied |= {key: "a row is first stepped" for key, matters in used.items() if matters}  # an average may be kept
    for key, when in copied.items():
        raise ValueError(
            f"{cls.__name__} makes its state {key} from the weights when {when}, but rows come later as well (a "
            "checkpoint is loaded, classes are added, a step selects them); use a class whose state begins with one "
            "number for all"
        )


def checked_form(cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> type[Moves]:
    """Return the form of what a step does to a row without a gradient; ValueError if it has none."""
    accepted = inspect.signature(cls).parameters.keys() - {"params"}
    options = {k: v for k, v in options.items() if k in accepted}
    tried = {**options, "lr": 1e-3} if "lr" in options else options  # a rate of 0 would hide everything
    forms: list[type[Moves]] = [LinearMoves, AdamMoves]
    form = next((form for form in forms if _fits(form, cls, tried)), None)
    if form is None:
        decays = options.get("weight_decay") and not options.get("decoupled_weight_decay")
        raise ValueError(
            f'skipped_rows="dense" needs an optimizer that does the same to all rows without a gradient, or moves them '
            f"as Adam does: SGD, AdamW, Adam, NAdam, or RMSprop, Adagrad and Adadelta without weight_decay. "
            f"{cls.__name__} with these options does neither"
            + (": decay through the gradient enters its state. Use decoupled decay (AdamW)" if decays else "")
            + ', or skipped_rows="still", which leaves rows where they are until they are selected again'
        )
    return form


def _fits(form: type[Moves], cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> bool:
    """Return whether some steps do to random rows what a table of this form says."""
    generator = torch.Generator("cpu").manual_seed(3)
    keys = tuple(sorted(initial_state(cls, options)))
    if form is AdamMoves and not {FIRST, SECOND} <= set(keys):
        return False
    n = 8
    probe, alone = Probe(cls, options, {}), Probe(cls, options, {})
    for _ in range(6):
        table = form(keys)
        # rows of many sizes; what is under a root is not negative
        size = 10.0 ** -torch.arange(0, 2 * n, 2, device="cpu", dtype=torch.float64)
        values = {"": torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")}
        for key in keys:
            values[key] = (torch.rand(n, generator=generator, dtype=torch.float64, device="cpu") + 0.5) * size
        if LARGEST in keys:
            values[LARGEST] = values[SECOND] * 2
        state = {k: v for k, v in values.items() if k} if probe.known else {}
        after = probe.step(options, values[""], state)
        step = table.find(alone, options)
        if not step.isfinite().all():
            return False
        table.extend(step)
        before = [values[""], *(values[key] if state else torch.zeros_like(values[""]) for key in keys)]
        of_rows = table.coefficients()[:1].expand(n, -1)
        moved = [torch.empty_like(v)[:, None] for v in before]
        table.move([v[:, None] for v in before], of_rows, moved)
        for key, found in zip(("", *keys), moved, strict=True):
            expected = after.get(key, torch.zeros_like(after[""]))
            if not torch.allclose(found[:, 0], expected, rtol=1e-9, atol=1e-12):
                return False
    return True
