"""`ShardedModule`: a module whose parameters are class rows, split over ranks. No forward or backward enters this file.

parameters   class rows [C_local, ...] on this rank, DTensors [C, ...] outside; moves and casts keep their identity
agreement    every rank must have built the same
refusals     errors for engines that would wrap the rows (`distributed/wrapping.py`)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from partial_fc import errors
from partial_fc.batch.building import agree_to_build, digest_of_values, place_in_group
from partial_fc.batch.facts import Agreed
from partial_fc.distributed.anomaly import allow_anomaly_detection
from partial_fc.distributed.given import as_whole, real, whole
from partial_fc.distributed.groups import backends_of, device_of_rows, ranks_of
from partial_fc.distributed.inside_torch import check_can_be_given, give_tensor
from partial_fc.distributed.ranks import Group, local_part
from partial_fc.distributed.shards import ClassShards
from partial_fc.distributed.tools import drawing_rows, meet_tool
from partial_fc.distributed.wrapping import DDP, FSDP2, refuse
from partial_fc.rows import ClassRows
from partial_fc.sampling import mix
from partial_fc.step_record import OnNonfinite, StepRecord, Validate
from partial_fc.tiers.initial import fill_initial_rows
from partial_fc.tiers.kinds import Storage, checked_storage
from partial_fc.tiers.store import Initial, RowStore
from partial_fc.tiers.wiring import COPIED, MOVED

Reduction = Literal["mean", "sum", "none"]
Self = TypeVar("Self", bound="ShardedModule")


@dataclass(frozen=True)
class SharedArguments:
    """The arguments that `PartialFC` and `CenterLoss` have in common; `PartialFC` says what they mean."""

    embedding_size: int
    num_classes: int
    group: Group
    seed: int
    init_std: float
    ignore_index: int
    reduction: Reduction
    scale_embedding_grad: bool
    validate: Validate
    on_nonfinite: OnNonfinite
    max_skips: int | None
    device: torch.device | str | None
    storage: Storage | None = None

    def checked(self) -> SharedArguments:
        """Return them with every number in one spelling. ValueError for values out of range."""
        numbers: dict[str, Any] = {
            "embedding_size": whole("embedding_size", self.embedding_size, least=1),
            "num_classes": whole("num_classes", self.num_classes, least=1),
            **{name: check(getattr(self, name)) for name, check in CHECKS.items()},
        }
        check_choice("validate", self.validate, ("always", "first", "never"))
        check_choice("on_nonfinite", self.on_nonfinite, ("raise", "skip", "log"))
        if self.max_skips is not None:
            most = as_whole(self.max_skips)
            if most is None or most < 0:
                raise ValueError(
                    "max_skips is how many steps in a row may be skipped, at least 0, or None for any number, not "
                    f"{self.max_skips!r}"
                )
            numbers["max_skips"] = most
        return replace(self, **numbers)


def _checked_label(value: Any) -> int:
    if value is None:
        raise ValueError("ignore_index is a label, not None: leave it at -100 if no sample is to be ignored")
    return whole("ignore_index", value)


def _checked_deviation(value: Any) -> float:
    number = real("init_std", value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"init_std must be at least 0, not {value}")
    return number


def _checked_reduction(value: Any) -> Any:
    check_choice("reduction", value, ("mean", "sum", "none"))
    return value


# arguments that are checked by themselves, whenever they are set
CHECKS: dict[str, Callable[[Any], Any]] = {
    "seed": functools.partial(whole, "seed"),
    "ignore_index": _checked_label,
    "init_std": _checked_deviation,
    "reduction": _checked_reduction,
}


def check_choice(name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {choice!r}")


class ShardedModule(nn.Module):
    """Base of `ShardedLoss`: parameters and settings.

    A subclass has a constructor that is built `together`, registers its sharded parameters with `_register` and then
    calls `_complete`. `class_rows` is what
    optimizers and everything else outside take.
    """

    class_rows: ClassRows

    # what all ranks must have alike, with every batch: the name that a message gives it, and where it stands
    FACTS: ClassVar[dict[str, str]] = {
        **{name: name for name in ("num_classes", "embedding_size", "seed", "init_std", "ignore_index", "reduction")},
        **{name: name for name in ("scale_embedding_grad", "class_changes")},
        "its place among the losses of its group": "_place",
        **{name: f"class_rows.record.{name}" for name in ("validate", "on_nonfinite", "max_skips", "skips")},
        "steps of the optimizer": "class_rows.updates",
    }

    SETTINGS: ClassVar[frozenset[str]] = frozenset({*CHECKS, "embedding_size", "num_classes"})  # see `_checked`
    _is_built = False

    def __init__(self, arguments: SharedArguments, *, sampled: bool) -> None:
        super().__init__()
        arguments = arguments.checked()
        self.embedding_size = arguments.embedding_size
        self.num_classes = arguments.num_classes
        self.seed = arguments.seed
        self.ignore_index = arguments.ignore_index
        self.reduction = arguments.reduction
        self.scale_embedding_grad = arguments.scale_embedding_grad
        self.init_std = arguments.init_std
        self._seen_batch = False
        self._place = 0
        self.class_changes = 0  # how often classes were added or removed, so that new rows are never drawn twice
        ranks = ranks_of(arguments.group)
        self._device = device_of_rows(arguments.device, ranks)
        storage = checked_storage(arguments.storage)
        home = self._device if storage is None or self._device.type == "meta" else torch.device("cpu")
        shards = ClassShards.split(self.num_classes, ranks, home)
        record = StepRecord(arguments.validate, arguments.on_nonfinite, arguments.max_skips)
        self.class_rows = ClassRows(type(self).__name__, shards, sampled=sampled, seed=self.seed, record=record)
        self._storage = storage
        if storage is not None and self._device.type != "meta":  # there a head has no rows, and never gets any
            device = torch.empty(0, device=self._device).device  # with its number, as those of tensors have
            self.class_rows.store = RowStore(storage, shards.lo, shards.local, device)

    # ------------------------------------------------------------------------------------------------ parameters

    def _register(self, name: str, local: Tensor | None) -> None:
        self.register_parameter(name, None if local is None else nn.Parameter(self.class_rows.shards.wrap(local)))

    def _new_rows(self, name: str, row_shape: tuple[int, ...], dtype: torch.dtype | None, drawn: bool = True) -> Tensor:
        """Return the memory of a parameter's local rows, `[C_local, *row_shape]`; RuntimeError if a store cannot give
        it. drawn: initial rows are drawn; else they are 0."""
        shards, store = self.class_rows.shards, self.class_rows.store
        dtype = dtype or torch.get_default_dtype()
        if store is None:
            return torch.empty(shards.local, *row_shape, device=self._device, dtype=dtype)
        initial = Initial(std=self.init_std, seed=self.seed, dtype=dtype) if drawn else Initial()
        return store.new(name, row_shape, dtype, initial)

    @property
    def _is_untouched(self) -> bool:
        """Whether rows are in a store that has all of their initial values still to give."""
        store = self.class_rows.store
        return store is not None and store.untouched == store.count

    def _draw(self, parameter: nn.Parameter) -> None:
        """Fill it with the initial rows of `seed` and `init_std`; do nothing on the meta device."""
        local, store = local_part(parameter.detach()), self.class_rows.store
        self.class_rows.writes += 1
        if local.device.type == "meta" or self._is_untouched:
            return
        if store is not None:
            store.ready(None)
        fill_initial_rows(local, self.class_rows.shards.lo, std=self.init_std, seed=self.seed)

    def _complete(self) -> None:
        """Call it when all parameters are registered."""
        self.class_rows.hold(self._own_parameters(), self._shared_parameters(), self.class_rows.shards)
        if self.class_rows.shards.mesh is not None:
            allow_anomaly_detection()
        self._is_built = True

    def _checked(self, name: str, value: Any) -> Any:
        """Return what an attribute of `SETTINGS` is to be, checked as at construction. ValueError for what it cannot
        be. Subclasses ask for it whenever one is set once the loss is built."""
        if name in CHECKS:
            return CHECKS[name](value)
        if name == "num_classes" and value != self.class_rows.shards.num_classes:
            raise ValueError("num_classes is changed by expand() and remap(), which move the rows, not by setting it")
        if name == "embedding_size" and value != self.embedding_size:
            raise ValueError(
                f"embedding_size is that of the rows, {self.embedding_size}; build another loss for {value}"
            )
        return value

    def agree_on_building(self) -> None:
        """Raise the same error on every rank unless all ranks have built the same."""
        ranks = self.class_rows.shards.ranks
        if ranks.group is not None and self._device.type != "meta":
            agree_to_build(self._agreed_at_start(), ranks, self._device)
            self._place = place_in_group(ranks)
            on_host = self._device.type == "cpu" or self._storage is not None
            if on_host and "cpu" not in backends_of(ranks.group):
                raise errors.rows_that_cannot_travel(type(self).__name__, ", ".join(backends_of(ranks.group)))

    def __getstate__(self) -> dict[str, Any]:
        if self.class_rows.store is not None and self.class_rows.store.folder is not None:
            raise TypeError(COPIED)
        self.class_rows.catch_up()  # a copy has no steps to make up for
        return {**vars(self), "_storage": self._storage if self.class_rows.store is None else None}

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._parameters.items() if p is not None}

    def _shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return parameters of submodules, which are equal on all ranks."""
        return {name: p for name, p in self.named_parameters() if "." in name}

    def extra_repr(self) -> str:
        s = self.class_rows.shards
        share = f"classes {s.lo}..{s.hi} of {s.num_classes}" if s.mesh is not None else f"{s.num_classes} classes"
        return f"embedding_size={self.embedding_size}, {share}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights, or of their rows."""
        super().zero_grad(set_to_none=set_to_none)
        self.class_rows.clear()
        self.class_rows.record.end()

    @torch.inference_mode(False)  # rows made in it could not be trained
    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast the local rows, keeping the identity of the parameters, as torch's own modules do."""
        own, store = self._own_parameters(), self.class_rows.store
        if store is None:
            self.class_rows.catch_up()
        before = {name: local_part(p.detach()) for name, p in own.items()}
        if self._storage is not None:  # rows stay as they are
            none = {name: torch.empty(0, dtype=local.dtype, device=self._device) for name, local in before.items()}
            if any(a.dtype != b.dtype or a.device != b.device for a, b in ((e, fn(e)) for e in none.values())):
                raise RuntimeError(MOVED.format(storage=type(self._storage).__name__))
            fn = _all_but(before.values(), fn)
        after = {name: fn(local) for name, local in before.items()}
        for name, parameter in own.items():
            if after[name] is not before[name]:
                check_can_be_given(name, parameter)
        everything, self._parameters = self._parameters, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters = everything
        if all(after[name] is before[name] for name in own):
            return self
        shards, device = self.class_rows.shards, next(iter(after.values())).device
        if shards.mesh is not None and device.type != shards.mesh.device_type:
            shards = ClassShards.split(self.num_classes, shards.ranks, device)
        for name, parameter in own.items():
            moved = nn.Parameter(shards.wrap(after[name]), requires_grad=parameter.requires_grad)
            parameter.grad = None
            give_tensor(parameter, moved)
        self.class_rows.hold(own, self._shared_parameters(), shards)
        if self.class_rows.live_optimizer is not None:
            self.class_rows.live_optimizer.follow_parameters()
        return self

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """As of any module; RuntimeError if DistributedDataParallel asks, which would wrap the rows, or a tool of
        torch that cannot use them."""
        refuse(DDP, self, prefix)
        meet_tool(self, prefix)
        return super().named_modules(memo, prefix, remove_duplicate)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; RuntimeError if FSDP2 asks, which would wrap the rows."""
        if not recurse:
            refuse(FSDP2, self, prefix)
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def apply(self: Self, fn: Callable[[nn.Module], None]) -> Self:
        """As of any module; `fn` draws other numbers for the rows of this rank than for those of others."""
        key = mix(self.seed, self.class_rows.shards.ranks.rank)
        return super().apply(lambda module: drawing_rows(self, fn, key) if module is self else fn(module))

    @property
    def __jit_ignored_attributes__(self) -> list[str]:
        """Refuse torch.jit, which asks for this first."""
        raise errors.scripted()

    # ------------------------------------------------------------------------------------------------ skipped steps

    @property
    def skipped(self) -> bool:
        """Whether the training step in progress, or the last one, is skipped (on_nonfinite="skip"); equal on every
        rank.

        It becomes True in forward where embeddings are bad. Bad losses and gradients are found by `clip_grad_norm_`,
        `check_gradients`, or the step() of the `RowOptimizer` or center loss, whichever comes first. It covers all
        micro-batches of a step and lasts until a training forward begins the next step. A step ends when it was
        checked, or its gradients were used or cleared. Evaluation changes nothing.
        """
        return self.class_rows.record.skipped

    @property
    def skips(self) -> int:
        """How many steps were skipped in all; a part of checkpoints. Overflows of a GradScaler do not count."""
        return self.class_rows.record.skips

    @property
    def max_skips(self) -> int | None:
        """How many steps in a row may be skipped before NonFiniteError is raised after all; None for any number."""
        return self.class_rows.record.max_skips

    @property
    def validate(self) -> Validate:
        """When to look for bad labels and non-finite values."""
        return self.class_rows.record.validate

    @validate.setter
    def validate(self, value: Validate) -> None:
        check_choice("validate", value, ("always", "first", "never"))
        self.class_rows.record.validate = value

    @property
    def on_nonfinite(self) -> OnNonfinite:
        """What to do about NaN and infinities."""
        return self.class_rows.record.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, value: OnNonfinite) -> None:
        check_choice("on_nonfinite", value, ("raise", "skip", "log"))
        self.class_rows.record.on_nonfinite = value

    def forget_notes(self) -> None:
        """Drop what the forwards of a skipped step have noted."""

    # ------------------------------------------------------------------------------------------------ agreement

    def agreed_settings(self) -> dict[str, Any]:
        """Return what must be the same on all ranks, by the name that a message gives it."""
        return self._agreed_at_start().facts

    def _agreed_at_start(self) -> Agreed:
        """Return what the building compares: also what has a value for each class."""
        values = {name: "{}, hash {:x}".format(*digest_of_values(b)) for name, b in self.named_buffers()}
        return Agreed.of(self, device=self.class_rows.device.type, **values)


def _all_but(rows: Iterable[Tensor], fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `fn` for all tensors but these, which stay what they are."""
    kept = [*rows]
    return lambda tensor: tensor if any(tensor is each for each in kept) else fn(tensor)
