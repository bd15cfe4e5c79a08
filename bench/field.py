"""What contestants are timed on: parameters with gradients, and the state of them that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.workloads import make_groups
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.creation import create_state
from lwadamw.state.storage import Storage, storage_of


@dataclass
class Contestant:
    step: Callable[[], object]
    bytes_per_element: float
    optimizer: torch.optim.Optimizer


@dataclass
class Field:
    """Parameters with gradients, dealt out to groups, and the state that contestants share."""

    params: Sequence[Tensor]
    n_groups: int
    combination: str = "fp32"  # a key of COMBINATIONS

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def storage(self) -> Storage:
        return COMBINATIONS[self.combination].storage

    @property
    def uniform(self) -> bool:
        """Whether everything is kept in the parameter's type and nothing else is kept, as torch does."""
        return len(set(self.storage[:4])) == 1 and self.storage.weight == "plain"

    @property
    def itemsize(self) -> int:
        return self.storage.param.itemsize

    @cached_property
    def state(self) -> list[dict[str, Any]]:
        """What lwadamw keeps of every parameter, without its step."""
        states: list[dict[str, Any]] = [{} for _ in self.params]
        for state, p in zip(states, self.params, strict=True):
            create_state(state, p, {**COMBINATIONS[self.combination].options, "amsgrad": False})
        return states

    @cached_property
    def moments(self) -> list[dict[str, Tensor]]:
        """Moments of the parameter's type, as torch keeps them."""
        keys = ("exp_avg", "exp_avg_sq")
        if all(state[k].dtype == p.dtype for p, state in zip(self.params, self.state, strict=True) for k in keys):
            return [{k: state[k] for k in keys} for state in self.state]
        return [{k: torch.zeros_like(p) for k in keys} for p in self.params]

    @property
    def bytes_per_element(self) -> float:
        """What one pass has to read and write: `Storage.moved_bytes`, the mean over all elements."""
        options = COMBINATIONS[self.combination].options
        moved = sum(
            p.numel() * storage_of(p, p.grad, options, state).moved_bytes()
            for p, state in zip(self.params, self.state, strict=True)
        )
        return moved / sum(p.numel() for p in self.params)

    def groups(self, n_groups: int | None = None) -> list[dict[str, Any]]:
        """Groups of Parameters of their own over the same memory: lwadamw notices when somebody else has stepped its."""
        own = [torch.nn.Parameter(p.data) for p in self.params]
        for alias, p in zip(own, self.params, strict=True):
            alias.grad = p.grad
        return make_groups(own, n_groups or self.n_groups)

    def counter(self) -> Tensor:
        return torch.ones((), device=self.device)

    def enter(
        self,
        optimizer: torch.optim.Optimizer,
        bytes_per_element: float,
        shared: Sequence[dict[str, Any]] | None = None,
        **state: Any,
    ) -> Contestant:
        """Give the optimizer the state it shares, `moments` by default; `state` has what else it keeps, or makes that."""
        states = self.moments if shared is None else shared
        by_address = {p.data_ptr(): held for p, held in zip(self.params, states, strict=True)}
        # Not through `optimizer.state`: once that has been read, lwadamw verifies every moment at every step.
        own = vars(optimizer)["state"]
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            own[p] = {**by_address[p.data_ptr()], **{k: v() if callable(v) else v for k, v in state.items()}}
        return Contestant(optimizer.step, bytes_per_element, optimizer)
