"""attach: norms of whole parameters under the model's names, from the shards that Megatron's wrappers hold."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...state.collectives import Call, add_over
from ...state.names import names_of
from ...step.norms import Norms
from ...step.optimizer import AdamW
from .overrides import unwrapped

_NORMS = Call("watch.norms()", "optimizer.norm_sums(local=True) of an inner optimizer is not collective.")


class Watch:
    """The parameters of a Megatron optimizer under the names of the model. `attach` makes it.

    Args:
        wrappers: Megatron's optimizers, each with an inner optimizer.
        params: parameters of the model by name, in an order that is the same on all processes that share them.
    """

    def __init__(self, wrappers: Sequence[Any], params: Mapping[str, Tensor]) -> None:
        self._wrappers, self._params = list(wrappers), params

    def norms(self) -> Norms:
        """Return the norms of the last step, of whole parameters, by the model's names.

        Call it after `optimizer.step()` and before the gradients are cleared. This is collective: all processes make the call.
        Every process gets the parameters of its own pipeline stage and its own experts. Norms of bfloat16 parameters are those
        of their float32 main weights.

        Raises:
            RuntimeError: the swap was made with norms=False.
        """
        index = {id(p): i for i, p in enumerate(self._params.values())}
        table: Tensor | None = None
        for wrapper in self._wrappers:
            inner = wrapper.optimizer
            sums, rows = inner.norm_sums(local=True), {name: i for i, name in enumerate(inner.norm_names())}
            own = sums.new_zeros(len(index), 4)
            for name, p in _whole_by_name(wrapper):
                if name in rows:
                    own[index[id(p)]] = sums[rows[name]]
            if hasattr(wrapper, "gbuf_ranges"):  # DistributedOptimizer cuts every parameter over this group
                add_over(own, wrapper.data_parallel_group, _NORMS)
            table = own if table is None else table + own
        if table is None:
            return Norms.from_sums((), torch.zeros(0, 4).numpy())
        self._add_tensor_parallel(table)
        return Norms.from_sums(tuple(self._params), table.cpu().numpy())

    def _add_tensor_parallel(self, table: Tensor) -> None:
        """Add the rows of tensor-parallel parameters over their process groups, in place."""
        state = importlib.import_module("megatron.core.parallel_state")
        split = [i for i, p in enumerate(self._params.values()) if getattr(p, "tensor_model_parallel", False)]
        experts = {i for i, p in enumerate(self._params.values()) if not getattr(p, "allreduce", True)}
        for rows, group in (
            ([i for i in split if i not in experts], state.get_tensor_model_parallel_group),
            ([i for i in split if i in experts], state.get_expert_tensor_parallel_group),
        ):
            if rows:
                part = table[rows]
                add_over(part, group(), _NORMS)
                table[rows] = part


def attach(optimizer: Any, model_chunks: Sequence[nn.Module]) -> Watch:
    """Find out which parameter of the model each tensor of a Megatron optimizer is a part of.

    Args:
        optimizer: what `get_megatron_optimizer` returned.
        model_chunks: the models that it was given.

    Returns:
        A `Watch`, whose `norms()` are those of whole parameters.

    Raises:
        TypeError: `optimizer` is no optimizer of Megatron, or its inner optimizer is not `lwadamw.AdamW`.

    Examples:
        >>> from lwadamw.engines import megatron
        >>> megatron.attach(None, [])
        Traceback (most recent call last):
        TypeError: attach: the optimizer is NoneType. Give what get_megatron_optimizer returned, after megatron.use().
    """
    wrappers = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    wrappers = [wrapper for wrapper in wrappers if not getattr(wrapper, "is_stub_optimizer", False)]
    for wrapper in wrappers:
        kind = wrapper if not hasattr(wrapper, "optimizer") else wrapper.optimizer
        if kind is wrapper or not isinstance(kind, AdamW):
            raise TypeError(
                f"attach: the optimizer is {type(kind).__name__}. Give what get_megatron_optimizer returned, after "
                "megatron.use()."
            )
    several = len(model_chunks) > 1
    params = {
        f"chunk {i}: {name}" if several else name: p
        for i, chunk in enumerate(model_chunks)
        for name, p in unwrapped(chunk).named_parameters()
        if p.requires_grad
    }
    return Watch(wrappers, params)


def _whole_by_name(wrapper: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield, for each tensor of an inner optimizer, its name there and the parameter of the model that it is a part of."""
    model_of = {id(held): p for held, p in _pairs(wrapper)}
    for i, group in enumerate(wrapper.optimizer.param_groups):
        for name, held in zip(names_of(group, i), group["params"], strict=True):
            yield name, model_of[id(held)]


def _pairs(wrapper: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of an inner optimizer with the parameter of the model that it belongs to."""
    if hasattr(wrapper, "gbuf_ranges"):
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
