"""What contestants are timed on: parameters with gradients, and the state that the contestants share."""

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
    """An optimizer that is timed.

    Attributes:
        step: takes one step.
        bytes_per_element: bytes that one step reads and writes per element of the parameters.
        optimizer: the optimizer that `step` belongs to.
    """

    step: Callable[[], object]
    bytes_per_element: float
    optimizer: torch.optim.Optimizer


@dataclass
class Field:
    """Parameters with gradients, divided into groups, and the state that contestants share.

    Attributes:
        params: parameters with gradients, all on one device.
        n_groups: number of parameter groups.
        combination: a key of COMBINATIONS, the storage types.
    """

    params: Sequence[Tensor]
    n_groups: int
    combination: str = "fp32"

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.params[0].device

    @property
    def storage(self) -> Storage:
        """The storage types of this combination."""
        return COMBINATIONS[self.combination].storage

    @property
    def uniform(self) -> bool:
        """Whether everything has the type of the parameter and there is no companion, as in torch."""
        return len(set(self.storage[:4])) == 1 and self.storage.weight == "plain"

    @property
    def itemsize(self) -> int:
        """Bytes of one element of a parameter."""
        return self.storage.param.itemsize

    @cached_property
    def state(self) -> list[dict[str, Any]]:
        """The state that lwadamw keeps for every parameter, without the step: one dict per parameter."""
        states: list[dict[str, Any]] = [{} for _ in self.params]
        for state, p in zip(states, self.params, strict=True):
            create_state(state, p, {**COMBINATIONS[self.combination].options, "amsgrad": False})
        return states

    @cached_property
    def moments(self) -> list[dict[str, Tensor]]:
        """The moments as torch keeps them, in the type of the parameter: one dict per parameter."""
        keys = ("exp_avg", "exp_avg_sq")
        if all(state[k].dtype == p.dtype for p, state in zip(self.params, self.state, strict=True) for k in keys):
            return [{k: state[k] for k in keys} for state in self.state]
        return [{k: torch.zeros_like(p) for k in keys} for p in self.params]

    @property
    def bytes_per_element(self) -> float:
        """Bytes that one pass has to read and write per element: the mean of `Storage.moved_bytes` over all elements."""
        options = COMBINATIONS[self.combination].options
        moved = sum(
            p.numel() * storage_of(p, p.grad, options, state).moved_bytes()
            for p, state in zip(self.params, self.state, strict=True)
        )
        return moved / sum(p.numel() for p in self.params)

    def groups(self, n_groups: int | None = None) -> list[dict[str, Any]]:
        """Parameter groups with new Parameter objects over the same memory.

        Every contestant needs its own Parameter objects, because lwadamw notices when another optimizer has stepped a
        Parameter that it holds.

        Args:
            n_groups: number of groups; None: the number of this field.
        """
        own = [torch.nn.Parameter(p.data) for p in self.params]
        for alias, p in zip(own, self.params, strict=True):
            alias.grad = p.grad
        return make_groups(own, n_groups or self.n_groups)

    def counter(self) -> Tensor:
        """A new step counter with the value 1, float32[] on the device of the parameters."""
        return torch.ones((), device=self.device)

    def enter(
        self,
        optimizer: torch.optim.Optimizer,
        bytes_per_element: float,
        shared: Sequence[dict[str, Any]] | None = None,
        **state: Any,
    ) -> Contestant:
        """Give an optimizer its state and return it as a contestant.

        Args:
            optimizer: an optimizer over `groups()`.
            bytes_per_element: bytes that one step reads and writes per element.
            shared: the shared state, one dict per parameter; None: `moments`.
            **state: further entries for the state of every parameter. A function is called once per parameter and returns
                the value; other values are used as they are.
        """
        states = self.moments if shared is None else shared
        by_address = {p.data_ptr(): held for p, held in zip(self.params, states, strict=True)}
        # Do not use `optimizer.state` here. Once it has been read, lwadamw verifies every moment at every step.
        own = vars(optimizer)["state"]
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            own[p] = {**by_address[p.data_ptr()], **{k: v() if callable(v) else v for k, v in state.items()}}
        return Contestant(optimizer.step, bytes_per_element, optimizer)
