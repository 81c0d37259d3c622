"""A backbone's weights and optimizer state in one format for all engines, for `save_checkpoint` or `Checkpointer`.

    Checkpointer(folder).save(step, backbone=BackboneState(model), optimizer=OptimizerState(model, optimizer), ...)

    DDP, no engine, ZeRO-0       the module and the optimizer themselves
    FSDP2                        themselves: each rank has its rows of each parameter (DTensor)
    DeepSpeed, ZeRO 1, 2, 3      flat pieces of float32 weights and state on each rank
                                     ── gather, one parameter at a time ──>  this rank's rows of it (DTensor)

Names and shapes are those of the plain module and the plain optimizer, so that a checkpoint of one engine loads in
another, on any number of ranks, or without an engine. No rank holds more than its share and one whole parameter. All
methods are collectives.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from partial_fc.distributed.groups import ranks_of
from partial_fc.distributed.shards import ClassShards
from partial_fc.engines.joint import JointOptimizer
from partial_fc.optim.protocol import step_quietly
from partial_fc.optim.row_optimizer import RowOptimizer


def BackboneState(model: nn.Module) -> Any:  # noqa: N802
    """Return an object with the state dict of the plain module.

    model: the module, or its wrapper of DDP, FSDP2, Accelerate or DeepSpeed.

    Raises ValueError for an engine whose float32 weights cannot be read (bf16 with ZeRO-0).
    """
    if _zero(model) is not None:
        return _ZeroBackbone(model)
    return getattr(model, "module", model)


def OptimizerState(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:  # noqa: N802
    """Return an object with the state dict of the plain optimizer.

    optimizer: the one that was passed to the engine. Raises ValueError for that of a head beside a DeepSpeed engine.
    """
    if _zero(model) is not None and isinstance(optimizer, RowOptimizer | JointOptimizer):
        raise ValueError(
            f"a {type(optimizer).__name__} is not the optimizer of the DeepSpeed engine; save it by a name of its own, "
            "save_checkpoint(path, backbone=..., optimizer=..., head=head, head_optimizer=head_optimizer)"
        )
    return _ZeroOptimizer(model, optimizer) if _zero(model) is not None else optimizer


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the plain module's weights and buffers, whole on every rank, for evaluation or export."""
    state = BackboneState(model).state_dict()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in state.items()
    }


def _zero(model: nn.Module) -> Any:
    """Return the ZeRO optimizer of a DeepSpeed engine; None for other models and for ZeRO-0, which has none."""
    if not hasattr(model, "zero_optimization_stage"):
        return None
    engine: Any = model  # has attributes that a module does not have
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() > 0:
        if getattr(optimizer, "swap_optimizer", False):
            raise ValueError(
                "optimizer state on NVMe cannot be saved in the format for all engines; use engine.save_checkpoint"
            )
        return optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            "half precision with ZeRO-0 does not expose its float32 weights; use ZeRO-1 or engine.save_checkpoint"
        )
    return None


class _Rows:
    """Splits full tensors into DTensors with this rank's rows."""

    def __init__(self, device: torch.device) -> None:
        group: Any = dist.group.WORLD
        self._mesh = DeviceMesh.from_group(group, device.type)

    def of(self, full: Tensor) -> Tensor:
        if not full.ndim:
            return full
        shards = ClassShards.split(len(full), ranks_of(self._mesh), full.device)
        return shards.wrap(full[shards.lo : shards.hi].clone())

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not len(shape):
            return torch.zeros(shape, dtype=dtype, device=device)
        shards = ClassShards.split(shape[0], ranks_of(self._mesh), device)
        return shards.wrap(torch.zeros(shards.local, *shape[1:], dtype=dtype, device=device))


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


class _ZeroBackbone:
    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._module = engine.module
        self._rows = _Rows(engine.device)

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = dict(self._module.named_parameters())
        state = dict(self._module.state_dict())
        for name in state:
            if name in parameters:
                parameter = parameters[name]
                full = safe_get_full_fp32_param(parameter)
                if full is None:  # frozen: DeepSpeed keeps no float32 weights of it
                    with _gathered(parameter):
                        full = parameter.detach().clone()
                state[name] = self._rows.of(full)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = dict(self._module.named_parameters())
        buffers = dict(self._module.named_buffers())
        for name, value in state_dict.items():
            full = _whole(value)
            if name in parameters:
                with _gathered(parameters[name]):
                    parameters[name].data.copy_(full)
                _set_piece(parameters[name], full.to(self._engine.device))
            else:
                buffers[name].copy_(full)


def _gathered(parameter: nn.Parameter) -> Any:
    """Return a context manager in which a ZeRO-3 parameter is whole, and which keeps changes by rank 0.

    Other parameters are always whole.
    """
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id"))


def _set_piece(parameter: nn.Parameter, full: Tensor, key: str | None = None) -> None:
    """Write this rank's piece of the float32 weights, or of the state `key`, of one parameter."""
    from deepspeed import utils

    if not parameter.requires_grad:
        return
    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, full)
        else:
            utils.safe_set_full_optimizer_state(parameter, full, key)
        return
    # ZeRO-3 pads the last pieces to the size of the others, which DeepSpeed's setter of whole tensors does not support
    sharded: Any = parameter
    size = sharded.ds_tensor.numel()
    rank = dist.get_rank(sharded.ds_process_group)
    part = full.flatten()[rank * size : (rank + 1) * size]
    piece = torch.cat((part, part.new_zeros(size - len(part))))
    if key is None:
        utils.safe_set_local_fp32_param(parameter, piece)
    else:
        utils.safe_set_local_optimizer_state(parameter, piece, key)


class _ZeroOptimizer:
    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self._zero = engine.optimizer
        self._device = engine.device
        self._optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        self._rows = _Rows(engine.device)
        self._groups = [[p for p in group if p.requires_grad] for group in _parameter_groups(engine.optimizer)]

    def _parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        yield from enumerate(p for group in self._groups for p in group)

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = self._optimizer.state
        first: dict[str, Any] = next((s for s in states.values() if s), {})
        split = [k for k, v in first.items() if isinstance(v, Tensor) and v.ndim]
        state: dict[int, dict[str, Any]] = {}
        for i, parameter in self._parameters() if first else ():
            state[i] = {k: self._rows.of(safe_get_full_optimizer_state(parameter, k)) for k in split}
            state[i].update({k: v.clone() if isinstance(v, Tensor) else v for k, v in first.items() if k not in split})
        return {**self._options(), "state": state, "loss_scaler": self._loss_scaler()}

    def state_template(self) -> dict[str, Any]:
        of_element = state_of_a_step(self._optimizer, _flat_pieces(self._zero)[0].device)
        state: dict[int, dict[str, Tensor]] = {}
        for i, parameter in self._parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            state[i] = {
                k: self._rows.empty(shape, torch.float32, self._device) if v.ndim else v.clone()
                for k, v in of_element.items()
            }
        return {**self._options(), "state": state, "loss_scaler": self._loss_scaler()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, stored in zip(self._optimizer.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in stored.items() if k != "params"})
        scaler = state_dict.get("loss_scaler", {})
        if scaler.get("dynamic") and self._loss_scaler().get("dynamic"):
            vars(self._zero.loss_scaler).update(scaler)
        states = {int(i): state for i, state in state_dict["state"].items()}
        if not states:
            return
        self._allocate(states[0])
        for i, parameter in self._parameters():
            for key, value in states[i].items():
                if isinstance(value, Tensor) and value.ndim:
                    _set_piece(parameter, _whole(value).to(self._device), key)

    def _allocate(self, stored: dict[str, Any]) -> None:
        """Create the state that the first step would create for each flat piece, with numbers from `stored`."""
        for flat in _flat_pieces(self._zero):
            state = self._optimizer.state[flat]
            for key, value in stored.items():
                if not isinstance(value, Tensor):
                    state[key] = value
                elif not value.ndim:
                    state[key] = value.clone()
                elif key not in state:
                    state[key] = torch.zeros_like(flat)
        link = getattr(self._zero, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _options(self) -> dict[str, Any]:
        groups, start = [], 0
        for group, parameters in zip(self._optimizer.param_groups, self._groups, strict=True):
            options = {k: v for k, v in group.items() if k != "params"}
            groups.append({**options, "params": list(range(start, start + len(parameters)))})
            start += len(parameters)
        return {"param_groups": groups}

    def _loss_scaler(self) -> dict[str, Any]:
        scaler = getattr(self._zero, "loss_scaler", None)
        if scaler is None:
            return {}
        return {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)}


def _flat_pieces(zero: Any) -> list[Tensor]:
    """Return this rank's flat float32 weights, which are the parameters of the wrapped optimizer."""
    # ZeRO 1 and 2; ZeRO 3; ZeRO 1 with bfloat16 weights and float32 accumulation
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise ValueError(f"the weights of DeepSpeed's {type(zero).__name__} cannot be read; use engine.save_checkpoint")


def _parameter_groups(zero: Any) -> list[list[nn.Parameter]]:
    """Return the parameters of each group of the optimizer, in their original order."""
    if hasattr(zero, "bit16_groups"):  # ZeRO 1, 2
        return [list(group) for group in zero.bit16_groups]
    groups: list[list[nn.Parameter]] = [[] for _ in range(len({*zero.sub_group_to_group_id.values()}))]
    for sub_group, parameters in enumerate(zero.fp16_groups):
        groups[zero.sub_group_to_group_id[sub_group]] += parameters
    return groups


def state_of_a_step(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Tensor]:
    """Return the state tensors that the optimizer's class keeps per parameter.

    They are those of one step on a `[1, 1]` parameter with the options of the first group. device: where the
    class steps, because some options, and some classes, are for GPUs alone.
    """
    accepted = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.param_groups[0].items() if k in accepted and k != "params"}
    parameter = nn.Parameter(torch.zeros(1, 1, device=device))
    parameter.grad = torch.zeros(1, 1, device=device)
    trial = step_quietly(type(optimizer)([parameter], **options))
    trial.step()
    return {k: v for k, v in trial.state[parameter].items() if isinstance(v, Tensor)}
