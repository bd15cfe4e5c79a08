"""Which elements of each parameter a process holds, and gradients that are cut from the same whole gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lwadamw.state.members import local, wrap_like


def places_of(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Return the index in the whole parameter of every element that this process holds after sharding, by name.

    Args:
        model: a new model. Its weights become their own places, and it is sharded.
        wrap: shards a model.
    """
    for p in model.parameters():
        p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
    return {name: local(p.detach()).long() for name, p in wrap(model).named_parameters()}


def give_gradients(single: nn.Module, sharded: nn.Module, places: dict[str, Tensor], seed: int) -> None:
    """Give random gradients to a model, and the parts of the same gradients to its sharded copy."""
    generator = torch.Generator().manual_seed(seed)
    for (name, p), q in zip(sharded.named_parameters(), single.parameters(), strict=True):
        q.grad = torch.randn(q.shape, generator=generator).to(q.dtype)
        p.grad = wrap_like(p, q.grad.flatten()[places[name]])
