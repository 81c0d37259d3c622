"""A GPU to test with where there is none: a device `gpu` in a CPU build of torch, whose work is counted.

    register()                              gives the device to this process, until it ends: not to that of pytest
    with PretendGpu() as gpu:
        head = PartialFC(16, 300, device=gpu.device)
        gpu.clear()
        head(x, y).backward()
        gpu.counts.launches, gpu.counts.waits, gpu.counts.bytes
        gpu.table()                         the same by line of partial_fc

A tensor of the device holds its values in memory of the CPU, which the same operator of the CPU computes: so autograd,
DTensors, optimizers and collectives run, and their numbers are right. What a GPU would refuse raises `DeviceMistake`,
and is in `gpu.mistakes` even if somebody catches it:

    a tensor of the CPU beside one of the device, except where torch takes a number (0-d) or an index
    a tensor of the CPU for a collective of a group of the device, as NCCL refuses it; and the other way round

A group is the device's if its backend is `pretend`: all ranks after `join`, and the groups of a DeviceMesh. One of
`dist.new_group(backend="gloo")` is for data of the host, one of `backend=BOTH` for either, as "cpu:gloo,cuda:nccl".
"""

from __future__ import annotations

import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from device_counts import (
    INDEXED,
    UPLOAD,
    Counts,
    Event,
    Operator,
    bytes_of,
    each_tensor,
    launches_of,
    tensors_in,
    wait_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import partial_fc

NAME, BACKEND = "gpu", "pretend"
BOTH = f"cpu:gloo,{NAME}:{BACKEND}"
PACKAGE = str(Path(partial_fc.__file__).parent) + os.sep
OUTSIDE = (str(Path(torch.__file__).parent) + os.sep, __file__)

PLAIN = (Tensor, torch.nn.Parameter)

# whether this torch can have a device that is written in Python
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

_kept: list[Any] = []  # what must live as long as the process
_of_both: set[str] = set()  # names of groups for tensors of the CPU, too
_on_host: dict[str, dist.ProcessGroup] = {}  # by the name of a group of the device: a group of the same ranks for CPUs


class DeviceMistake(AssertionError):
    """What a GPU, or NCCL, would refuse. No RuntimeError, which some code catches to try something else."""


# ------------------------------------------------------------------------------------------------ the device


@cache
def register() -> None:
    """Give this process the device, and a backend for its collectives.

    Before its first backward, for which torch starts a thread for each device.
    """
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_module())
    autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    autocast.fallback(torch.library.fallthrough_kernel)  # the package casts by itself
    _kept.append(autocast)
    torch.tensor = _without_pinning(torch.tensor)
    torch.accelerator.synchronize = getattr(torch, NAME).synchronize  # type: ignore[assignment]  # C++ has none
    dist.Backend.register_backend(BACKEND, _backend, extended_api=True, devices=[NAME])


def _module() -> types.ModuleType:
    """`torch.gpu`: what torch asks of the module of a device."""
    module = types.ModuleType(f"torch.{NAME}")
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "manual_seed_all": None,
        "_is_in_bad_fork": False,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }
    for name, answer in answers.items():
        setattr(module, name, lambda *given, answer=answer: answer)
    vars(module).update(Stream=_Stream, Event=_Event, synchronize=_synchronize)
    vars(module).update(current_stream=lambda *given: _Stream(), stream=lambda *given: nullcontext())
    return module


def _without_pinning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which pins memory before the device sees it."""
    return wraps(make)(lambda data, *, pin_memory=False, **options: make(data, **options))


def _synchronize(device: Any = None) -> None:
    if PretendGpu.entered is not None:
        PretendGpu.entered._note("synchronize", 0, 0, "synchronize")


class _Stream:
    """The one stream, on which everything has happened when it is asked."""

    def synchronize(self) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, other: object) -> None: ...


class _Event:
    """A place in the stream. To wait for it is a wait for the device."""

    def __init__(self, **options: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _synchronize()


def join(rank: int, world: int, store: str) -> None:
    """Make this process a rank whose default group is the device's; alone it has none. For `Ranks(world, join)`."""
    register()
    if world > 1:
        dist.init_process_group(BACKEND, init_method=f"file://{store}", rank=rank, world_size=world)


def _backend(options: Any, unused: Any) -> Any:
    """The backend of a new group: gloo, which is given the values of tensors of the device (`_communicate`)."""
    rank, world = options.group_rank, options.group_size
    gloo = dist.ProcessGroupGloo(options.store, rank, world, timeout=options.timeout)
    group = dist.ProcessGroup(options.store, rank, world)
    kind = dist.ProcessGroup.BackendType.GLOO
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, gloo)
    name = f"{options.group_id} on the host"
    group._set_group_name(name)
    torch._C._distributed_c10d._register_process_group(name, group)
    _on_host[options.group_id] = group
    return gloo


def group_of_both() -> dist.ProcessGroup:
    """A group of all ranks that exchanges tensors of the device and of the CPU."""
    made = dist.new_group(backend=BOTH)
    _of_both.add(made.group_name)
    return made


class GpuTensor(Tensor):
    """A tensor of the device. values: of the CPU; views have views of them."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> GpuTensor:
        assert not isinstance(values, GpuTensor)
        made: GpuTensor = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _machine()._dispatch(func, types, args, kwargs or {})

    def tolist(self) -> Any:
        _machine()._note("tolist", 1, self.nbytes, "tolist")
        return self.values.tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return GpuTensor, (self.values,)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{NAME}({self.values!r})"


# ------------------------------------------------------------------------------------------------ its machine


def _machine() -> PretendGpu:
    if PretendGpu.entered is None:
        raise DeviceMistake("a tensor of the pretend GPU is used outside of `with PretendGpu()`")
    return PretendGpu.entered


class PretendGpu(TorchDispatchMode):
    """The device at work. counts: of everything since `clear`. mistakes: what was refused since it was entered.

    counting: False where nobody asks for counts, which take half of the time.
    """

    entered: PretendGpu | None = None

    def __init__(self, counting: bool = True) -> None:
        register()
        super().__init__()
        self.device = torch.device(NAME, 0)
        self.mistakes: list[str] = []
        self._counting = counting
        self._events: list[Event] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> PretendGpu:
        assert PretendGpu.entered is None, "there is one pretend GPU"
        PretendGpu.entered = self
        # torch.tensor(..., device=) makes a tensor of the CPU, and then a copy that is seen here
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        PretendGpu.entered = None
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    @property
    def counts(self) -> Counts:
        return Counts(tuple(self._events))

    def clear(self) -> None:
        """Count from here."""
        self._events = []

    def table(self) -> str:
        return self.counts.table()

    def __torch_dispatch__(
        self, func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._dispatch(func, types, args, kwargs or {})

    # ------------------------------------------------------------------------------------------------ one operator

    def _dispatch(self, func: Any, types: tuple[type, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if FakeTensor in types and not any(issubclass(each, GpuTensor) for each in types):
            return func(*args, **kwargs)  # shapes that DTensors of the CPU try
        if not all(each in PLAIN or issubclass(each, GpuTensor) for each in types):
            return NotImplemented  # DTensors and the like, which come again with their local parts
        tensors = tensors_in((args, kwargs))
        here = [t for t in tensors if isinstance(t, GpuTensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            return self._communicate(func, args, kwargs, here, len(here) < len(tensors))
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else ""
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # all memory of the host is as good as pinned
        if not here and to != NAME:
            return args[0].clone() if func is torch.ops.aten._pin_memory.default else func(*args, **kwargs)
        operator = Operator.of(func)
        named = operator.named(args, kwargs)
        on_host = [t for t in tensors if not isinstance(t, GpuTensor)]
        wait = self._copy_or_mix(operator, named, on_host, to)
        given, options = each_tensor(_values, args), each_tensor(_values, kwargs)
        if to == NAME:
            options["device"] = torch.device("cpu")
        out = (_in_float32 if operator.name.startswith("_fused_") else _as_it_is)(func, given, options)
        made, known = tensors_in(out), {id(t.values): t for t in here}
        if self._counting and func.namespace == "aten" and not operator.free:
            wait = wait or wait_of(operator.name, named)
            fresh = [] if to == "cpu" else [t for t in made if id(t) not in known and not any(t is o for o in on_host)]
            size = bytes_of(operator, each_tensor(_of_device, named), fresh)
            self._note(operator.name, launches_of(operator.name, named), size, wait)
        if not made or (to == "cpu" and here):
            return out
        if operator.name == "copy_" and not isinstance(args[0], GpuTensor):
            return args[0]
        return each_tensor(lambda each: _wrapped(each, known), out)

    def _copy_or_mix(self, operator: Operator, named: dict[str, Any], on_host: list[Tensor], to: str) -> str:
        """Return why a copy between host and device waits, "" if it is none; refuse other mixes of both."""
        name, blocking = operator.name, not named.get("non_blocking")
        if name == "_to_copy":
            if to == "cpu" and not on_host:
                return "copy to the host" if blocking else ""
            return UPLOAD if on_host and blocking else ""
        if not on_host:
            return ""
        if name == "copy_":
            return (UPLOAD if isinstance(named["self"], GpuTensor) else "copy to the host") if blocking else ""
        if name in INDEXED:  # torch copies an index itself; a 0-d value is a number
            others = [t for t in on_host if t is not named.get("values") or t.ndim]
            if all(any(t is index for index in named["indices"]) for t in others):
                return UPLOAD if others else ""
        if to == NAME or (operator.numbers and all(t.ndim == 0 for t in on_host)):
            return ""
        raise self._refuse(f"{name} of tensors of the device and of the CPU")

    def _communicate(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], here: list[GpuTensor], any_on_host: bool
    ) -> Any:
        """Run a collective of a group of the device on the values, among the same ranks."""
        operator = Operator.of(func)
        named = operator.named(args, kwargs)
        name = named.get("group_name", "")
        if "process_group" in named:
            name = dist.ProcessGroup.unbox(named["process_group"]).group_name
        if name and name not in _on_host:
            if here:
                raise self._refuse(f"a tensor of the device for {func} of a group of the host")
            return func(*args, **kwargs)
        if name and any_on_host and not here and name in _of_both:
            return func(*args, **kwargs)
        if name and any_on_host:
            raise self._refuse(f"a tensor of the CPU for {func} of a group of the device")
        values = {key: each_tensor(_values, value) for key, value in named.items()}
        if "process_group" in named:
            values["process_group"] = _on_host[name].boxed()
        elif name:
            values["group_name"] = f"{name} on the host"
        given = [values.pop(each) for each in operator.positional if each in values]
        known = {id(t.values): t for t in here}
        return each_tensor(lambda each: _wrapped(each, known), func(*given, **values))

    # ------------------------------------------------------------------------------------------------ notes

    def _note(self, operator: str, launches: int, size: int, wait: str) -> None:
        if self._counting:
            self._events.append(Event(self._line(), operator, launches, size, wait))

    def _refuse(self, what: str) -> DeviceMistake:
        self.mistakes.append(f"{what}, at {self._line()}")
        return DeviceMistake(self.mistakes[-1])

    def _line(self) -> str:
        """The innermost line of partial_fc that is running; else that of its caller.

        Backward of a device runs in a thread of its own: there the line is the one that waits for it.
        """
        waiting = sys._current_frames().get(self._thread)
        stacks = [sys._getframe(1)] + ([waiting] if threading.get_ident() != self._thread and waiting else [])
        for stack in stacks:
            for name, number in _lines(stack):
                if name.startswith(PACKAGE):
                    return f"{name.removeprefix(PACKAGE)}:{number}"
        for stack in reversed(stacks):
            for name, number in _lines(stack):
                if not name.startswith(OUTSIDE):
                    return f"{Path(name).name}:{number} (caller)"
        return "?"


def _lines(frame: types.FrameType | None) -> Iterator[tuple[str, int]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def _values(given: Tensor) -> Tensor:
    return given.values if isinstance(given, GpuTensor) else given


def _of_device(given: Tensor) -> Tensor | None:
    """Its values, for a count of bytes: memory of the host is none of the device's."""
    return given.values if isinstance(given, GpuTensor) else None


def _as_it_is(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _in_float32(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a fused optimizer as a GPU does, which computes in float32; the CPU's does not move all half precision."""
    wide: list[tuple[Tensor, Tensor]] = []

    def widened(each: Tensor) -> Tensor:
        if each.dtype not in (torch.bfloat16, torch.float16):
            return each
        wide.append((each, each.float()))
        return wide[-1][1]

    out = func(*each_tensor(widened, args), **each_tensor(widened, kwargs))
    for narrow, values in wide:
        narrow.copy_(values)
    return out


def _wrapped(made: Tensor, known: dict[int, GpuTensor]) -> Tensor:
    """A result as a tensor of the device: the one that was given, where it was changed in place."""
    if id(made) not in known:
        return GpuTensor(made)
    given = known[id(made)]
    if (given.shape, given.stride()) != (made.shape, made.stride()):  # unsqueeze_, resize_, ...
        with no_dispatch():
            given.data = GpuTensor(made)
    return given
