"""Pieces: which part of which parameter of the model each tensor of a Megatron optimizer is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Block = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A tensor of an inner optimizer.

    Attributes:
        held: the tensor.
        param: the parameter of the model that it belongs to. It may be a tensor-parallel block.
        first: index of the first element of the tensor in the flattened parameter.
    """

    held: Tensor
    param: Tensor
    first: int


class Layout(NamedTuple):
    """How a parameter is split over processes.

    Attributes:
        whole: shape of the whole parameter.
        block: the block of it that the model of this process has; None: the whole.
        groups: the process groups over which it is split.
    """

    whole: tuple[int, ...]
    block: Block | None
    groups: list[Any]


def inner_wrappers(optimizer: Any) -> list[Any]:
    """Return the wrappers of a Megatron optimizer that have an inner optimizer.

    Args:
        optimizer: what `get_megatron_optimizer` returned.
    """
    wrappers = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    return [wrapper for wrapper in wrappers if not getattr(wrapper, "is_stub_optimizer", False)]


def pieces_of(wrapper: Any) -> Iterator[Piece]:
    """Yield every tensor of an inner optimizer with the parameter of the model that it belongs to.

    Args:
        wrapper: a FP32Optimizer, Float16OptimizerWithFloat16Params or DistributedOptimizer.
    """
    sharded = is_sharded(wrapper)
    for held, param in _pairs(wrapper):
        yield Piece(held, param, wrapper._get_model_param_range_map(param)["param"].start if sharded else 0)


def is_sharded(wrapper: Any) -> bool:
    """Return whether a wrapper is a DistributedOptimizer, which cuts parameters over the data-parallel group."""
    return hasattr(wrapper, "gbuf_ranges")


def params_of(wrapper: Any) -> list[Tensor]:
    """Return all parameters of the model that a wrapper updates, also those of which this process holds no piece."""
    if is_sharded(wrapper):
        return [p for buffer in wrapper.buffers for p in buffer.params if p.requires_grad]
    return [param for _, param in _pairs(wrapper)]


def layouts(wrappers: Sequence[Any], params: Mapping[str, Tensor]) -> dict[str, Layout]:
    """Return how every parameter is split, by name, in the order of the model.

    Args:
        wrappers: the wrappers of a Megatron optimizer.
        params: the parameters of the model by name.
    """
    state = importlib.import_module("megatron.core.parallel_state")
    data = {
        id(p): wrapper.data_parallel_group for wrapper in wrappers if is_sharded(wrapper) for p in params_of(wrapper)
    }
    out = {}
    for name, p in params.items():
        whole, block, groups = tuple(p.shape), None, [data[id(p)]] if id(p) in data else []
        if getattr(p, "tensor_model_parallel", False):
            expert = not getattr(p, "allreduce", True)
            group = state.get_expert_tensor_parallel_group() if expert else state.get_tensor_model_parallel_group()
            if group.size() > 1:
                whole, block = _tensor_parallel(p, group.rank(), group.size())
                groups.append(group)
        out[name] = Layout(whole, block, groups)
    return out


def _tensor_parallel(p: Any, rank: int, size: int) -> tuple[tuple[int, ...], Block]:
    """Return the shape of the whole of a tensor-parallel parameter, and the block of it that this process has."""
    cut = p.partition_dim % p.ndim
    whole = tuple(n * size if d == cut else n for d, n in enumerate(p.shape))
    block = tuple((rank * n, (rank + 1) * n) if d == cut else (0, n) for d, n in enumerate(p.shape))
    return whole, block


def _pairs(wrapper: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of an inner optimizer with the parameter of the model that it belongs to."""
    if is_sharded(wrapper):
        aware = wrapper.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        half = wrapper.shard_float16_groups if aware else wrapper.shard_fp32_from_float16_groups
        groups = [(half, wrapper.model_float16_groups), (wrapper.shard_fp32_groups, wrapper.model_fp32_groups)]
    elif hasattr(wrapper, "fp32_from_float16_groups"):
        groups = [
            (wrapper.fp32_from_float16_groups, wrapper.float16_groups),
            (wrapper.fp32_from_fp32_groups, wrapper.fp32_from_fp32_groups),
        ]
    else:
        own = [group["params"] for group in wrapper.optimizer.param_groups]
        groups = [(own, own)]
    for held, whole in groups:
        for some, params in zip(held, whole, strict=True):
            yield from zip(some, params, strict=True)
