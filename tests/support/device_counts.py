"""What a device was asked to do, operator by operator: kernel launches, waits of the host, bytes read and written.

    counts = Counts(events)
    counts.launches, counts.waits, counts.bytes        of all events
    counts.by_line()                                   the same by line of partial_fc
    counts.table()                                     that as text, the lines with most launches first

An operator is taken for one kernel. Of torch's CUDA kernels some are more (a sort, a `unique`), and one of many tensors
goes out in pieces, which `launches_of` counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

TENSORS_OF_A_LAUNCH = 64  # of `_foreach_` and fused operators; between 30 and 110 in torch's multi_tensor_apply
UPLOAD = "upload"  # a copy to the device for which the host waits: torch.tensor(..., device=), .to(device)

# allocate, or look at nothing but shapes; views are known by their schema
FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "is_same_size",
    "resize_",
}
WAITS = {
    "_local_scalar_dense": "item",
    "equal": "equal",
    "is_nonzero": "item",
    "nonzero": "nonzero",
    "masked_select": "boolean index",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# in place, and yet the old values are not read
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "set_"}
# read or write the rows that an index names, and not the rest of the tensor
READ_AT = {"index_select", "index", "gather", "take", "embedding"}
WRITE_AT = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_add_", "index_fill_"}
ADD_AT = {"scatter_add_", "index_add_"}


@dataclass(frozen=True)
class Event:
    """One operator, from one line. wait: why the host waits for it, or ""."""

    line: str
    operator: str
    launches: int
    bytes: int = 0
    wait: str = ""


@dataclass
class Line:
    """What one line did."""

    launches: int = 0
    bytes: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Counts:
    """All events since the device was cleared."""

    events: tuple[Event, ...]

    @property
    def launches(self) -> int:
        return sum(event.launches for event in self.events)

    @property
    def waits(self) -> int:
        """Waits of the host for the device, uploads among them."""
        return sum(bool(event.wait) for event in self.events)

    @property
    def uploads(self) -> int:
        return sum(event.wait == UPLOAD for event in self.events)

    @property
    def bytes(self) -> int:
        return sum(event.bytes for event in self.events)

    def by_line(self) -> dict[str, Line]:
        """In the order in which lines were first seen."""
        lines: dict[str, Line] = {}
        for event in self.events:
            line = lines.setdefault(event.line, Line())
            line.launches += event.launches
            line.bytes += event.bytes
            line.operators[event.operator] += 1
            if event.wait:
                line.waits[event.wait] += 1
        return lines

    def table(self) -> str:
        """A line of text for each line of code, the most launches first, and the sums last."""
        rows = [f"{'launches':>8} {'waits':>5} {'bytes':>12}  line"]
        for name, line in sorted(self.by_line().items(), key=lambda item: (-item[1].launches, -item[1].bytes, item[0])):
            what = ", ".join(f"{name} {n}" if n > 1 else name for name, n in line.operators.most_common())
            waits = "".join(f" [waits: {why} {n}]" for why, n in line.waits.items())
            rows.append(f"{line.launches:8} {sum(line.waits.values()):5} {line.bytes:12,}  {name:34} {what}{waits}")
        return "\n".join([*rows, f"{self.launches:8} {self.waits:5} {self.bytes:12,}  together"])


@dataclass(frozen=True)
class Operator:
    """What is known of an operator of torch before it runs.

    changed: arguments that it writes to; out: those of them that it does not read. free: a view of its input, or an
    allocation. numbers: a 0-d tensor of the CPU is a number to it.
    """

    name: str
    arguments: tuple[str, ...]
    positional: tuple[str, ...]
    changed: frozenset[str]
    out: frozenset[str]
    free: bool
    numbers: bool

    @staticmethod
    @cache
    def of(func: Any) -> Operator:
        schema, name = func._schema, func.__name__.split(".")[0]
        view = bool(schema.returns)
        view = view and all(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
        written = [each for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
        return Operator(
            name=name,
            arguments=tuple(each.name for each in schema.arguments),
            positional=tuple(each.name for each in schema.arguments if not each.kwarg_only),
            changed=frozenset(each.name for each in written),
            out=frozenset(each.name for each in written if each.is_out or name in OVERWRITES),
            free=view or name in FREE,
            numbers=torch.Tag.pointwise in func.tags or name.startswith("_foreach_"),
        )

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by their names."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


def tensors_in(given: Any) -> list[Tensor]:
    """The tensors of an argument, of a list or dict of arguments, or of a result."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, list | tuple):
        return [tensor for each in given for tensor in tensors_in(each)]
    return tensors_in(list(given.values())) if isinstance(given, dict) else []


def each_tensor(change: Callable[[Tensor], Any], given: Any) -> Any:
    """The same argument or result with each tensor changed."""
    if isinstance(given, Tensor):
        return change(given)
    if isinstance(given, list | tuple):
        return type(given)([each_tensor(change, each) for each in given])
    if isinstance(given, dict):
        return {name: each_tensor(change, each) for name, each in given.items()}
    return given


def launches_of(name: str, named: Mapping[str, Any]) -> int:
    """How many kernels an operator is that is not free."""
    if not name.startswith(("_foreach_", "_fused_", "_amp_foreach_")):
        return 1
    tensors = next((value for value in named.values() if isinstance(value, list | tuple)), [None])
    return math.ceil(len(tensors) / TENSORS_OF_A_LAUNCH)


def wait_of(name: str, named: Mapping[str, Any]) -> str:
    """Why the host waits for the result of an operator on the device; "" if it does not."""
    if name == "repeat_interleave" and named.get("output_size") is None:
        return "repeat_interleave"
    if name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in named["indices"]):
        return "boolean index"
    return WAITS.get(name, "")


def bytes_of(operator: Operator, named: Mapping[str, Any], results: Iterable[Tensor]) -> int:
    """How many bytes an operator reads and writes. results: tensors that it has made."""
    name = operator.name
    if name in WRITE_AT:
        return _bytes_at(name, named)
    read: list[Tensor] = []
    written = list(results)
    for argument, given in named.items():
        tensors = tensors_in(given)
        # fused optimizers write gradients only to unscale them
        if argument in operator.changed and not (argument == "grads" and named.get("grad_scale") is None):
            written += tensors
        if argument not in operator.out:
            read += tensors
    if name in READ_AT:  # as much of the first tensor as the result has
        read = [tensor for tensor in read if tensor is not named.get("self", named.get("weight"))]
        return _size(read) + 2 * _size(written)
    return _size(read) + _size(written)


def _bytes_at(name: str, named: Mapping[str, Any]) -> int:
    """The same of an operator that writes where an index says."""
    indices = tensors_in((named.get("index"), named.get("indices")))
    source = next((named[key] for key in ("source", "src", "values") if isinstance(named.get(key), Tensor)), None)
    if source is None:  # a number: as often as the index says
        row = named["self"].select(named["dim"], 0) if name == "index_fill_" and len(named["self"]) else named["self"]
        touched = len(indices[0]) * _size([row]) if name == "index_fill_" else _size(indices)
        return touched + _size(indices)
    if source.ndim == 0 and indices:
        touched = indices[0].numel() * source.element_size()
    else:
        touched = _size([source])
    adds = name in ADD_AT or bool(named.get("accumulate"))
    return _size([source, *indices]) + touched * (1 + adds)


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of different tensors; an expanded one has its elements once."""
    distinct = {(t.data_ptr(), tuple(t.shape), t.stride(), t.dtype): t for t in tensors}
    return sum(_elements(tensor) * tensor.element_size() for tensor in distinct.values())


def _elements(tensor: Tensor) -> int:
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
