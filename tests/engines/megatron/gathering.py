"""What an optimizer of Megatron holds, gathered in float64 from all processes, without the library's sums and groups."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lwadamw import Norms
from lwadamw.engines.megatron.overrides import unwrapped
from lwadamw.engines.megatron.pieces import pieces_of

from . import training
from .training import Run


def weight_of(inner: Any, held: torch.Tensor) -> torch.Tensor:
    """The weight that an inner optimizer steps, float64: with the digits of its master weight."""
    master = inner.state[held].get("master_param")
    if master is None:
        return held.detach().double()
    if master.dtype == torch.float32:
        return master.double()
    return ((held.detach().view(torch.int16).int() << 16) + master.int()).view(torch.float32).double()


def step_and_gather(run: Run, index: int) -> Norms:
    """Take a step. Return the norms of the gathered whole parameters, by name, in the order of the model."""
    wrappers = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    seen: dict[int, list[torch.Tensor]] = {}
    handles = []
    for wrapper in wrappers:
        inner, pieces = wrapper.optimizer, list(pieces_of(wrapper))

        def before(*_: Any, inner: Any = inner, pieces: Any = pieces) -> None:
            for piece in pieces:
                grad = piece.held.grad if piece.held.grad is not None else piece.held.decoupled_grad
                seen[id(piece.held)] = [weight_of(inner, piece.held).clone(), grad.detach().double().clone()]

        handles.append(inner.register_step_pre_hook(before))
    training.step(run, index)
    for handle in handles:
        handle.remove()
    local = {id(p): torch.zeros(3, p.numel(), dtype=torch.float64) for p in run.model.parameters()}
    for wrapper in wrappers:
        for piece in pieces_of(wrapper):
            stretch = slice(piece.first, piece.first + piece.held.numel())
            after, (weight, grad) = weight_of(wrapper.optimizer, piece.held), seen[id(piece.held)]
            # The model has the same elements there, after Megatron has copied them.
            model = piece.param.detach().flatten()[stretch]
            torch.testing.assert_close(model.double(), after.flatten(), rtol=2**-8, atol=0)
            local[id(piece.param)][:, stretch] = torch.stack([weight.flatten(), after.flatten(), grad.flatten()])
    for wrapper in wrappers:
        if hasattr(wrapper, "gbuf_ranges"):
            for p in (p for buffer in wrapper.buffers for p in buffer.params):
                dist.all_reduce(local[id(p)], group=wrapper.data_parallel_group)
    names, sums = [], []
    for name, p in unwrapped(run.model).named_parameters():
        before, after, grad = _whole(p, local[id(p)].view(3, *p.shape))
        update = after - before
        names.append(name)
        sums.append(
            [float((a * b).sum()) for a, b in ((after, after), (update, update), (grad, grad), (before, update))]
        )
    return Norms.from_sums(names, sums)


def _whole(p: Any, values: torch.Tensor) -> torch.Tensor:
    """The values of the whole of a tensor-parallel parameter, from [3, ...] of its parts."""
    from megatron.core import parallel_state

    if not getattr(p, "tensor_model_parallel", False):
        return values
    expert = not getattr(p, "allreduce", True)
    of = parallel_state.get_expert_tensor_parallel_group if expert else parallel_state.get_tensor_model_parallel_group
    parts = [torch.zeros_like(values) for _ in range(of().size())]
    dist.all_gather(parts, values.contiguous(), group=of())
    return torch.cat(parts, dim=p.partition_dim + 1)
