"""Several optimizers of one model as one, for a monitor: ours measures its steps, and others are measured here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..state import keys
from ..state.arrivals import placed_like
from ..state.collectives import READING
from ..state.members import Member, is_elsewhere, local, members_of
from ..state.names import has_names
from ..state.shards import Shards
from ..step.norms import Norms
from ..step.optimizer import AdamW

# Another optimizer does not apply these keys, even if its groups have them.
_OURS_ALONE: Final = keys.named((*keys.WIDTH, keys.WIDTH_WARMUP, keys.SEGMENTS, *keys.LAW))


class Together:
    """What a monitor reads of an optimizer, of several optimizers that share the parameters of a model.

    A step is over when every optimizer has stepped once, or when one of them begins its next step.

    Args:
        ours: the optimizer that measures its own steps.
        others: the other optimizers, of any class. At readings their weights are copied before the step and compared after it.
        due: says whether there will be a reading after the step that is being taken.

    Raises:
        TypeError: one of `others` is no `torch.optim.Optimizer`.
        ValueError: one of `others` measures its own steps, or two optimizers have the same parameter or the same name.
    """

    def __init__(self, ours: AdamW, others: Sequence[Optimizer], due: Callable[[], bool]) -> None:
        for other in others:
            _check(other)
        self._ours, self._others, self._due = ours, list(others), due
        self._measured: dict[int, dict[str, Tensor]] = {}  # sums of each other optimizer by name of the parameter
        self._before: dict[int, Tensor] = {}  # weights before the step, by id() of the parameter
        self._open, self._stepped = False, set[int]()
        self._on_begin: list[Callable[..., Any]] = []
        self._on_end: list[Callable[..., Any]] = []
        self._handles: list[Any] = []
        self._check_names()

    def _check_names(self) -> None:
        try:
            names = [member.name for member in members_of(self.param_groups)]
        except RuntimeError as error:
            raise ValueError(f"Monitor: others: {error}") from None
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(
                f"Monitor: others: two optimizers have a parameter that is called {twice[0]!r}. Give every optimizer (name, "
                "parameter) pairs, or groups of lwadamw.param_groups."
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, ours first. Those of the others have `betas`, NaN if they are no AdamW."""
        groups = list(self._ours.param_groups)
        for number, other in enumerate(self._others):
            adam = isinstance(other, torch.optim.AdamW)
            for index, group in enumerate(other.param_groups):
                kept = {key: value for key, value in group.items() if key not in _OURS_ALONE}
                if not has_names(group):
                    place = f"{type(other).__name__.lower()}{number or ''}.{index}"
                    kept["param_names"] = [f"{place}.{i}" for i in range(len(group["params"]))]
                known = {"betas": group["betas"]} if adam else {"betas": (math.nan, math.nan)}
                groups.append({"weight_decay": 0.0, "eps": 0.0, **kept, **known})
        return groups

    @property
    def evidence(self) -> dict[str, Any]:
        """What our optimizer knows about parameters, by name."""
        return self._ours.evidence

    @property
    def shards(self) -> Shards:
        """What our optimizer knows about the processes that hold other parts of parameters."""
        return self._ours.shards

    @property
    def skipped_steps(self) -> Tensor:
        """The steps that our optimizer has skipped."""
        return self._ours.skipped_steps

    def steps_taken(self) -> int:
        """Return the steps that our optimizer has taken."""
        return self._ours.steps_taken()

    def norm_names(self) -> list[str]:
        """Return the names of the rows of `norms()`."""
        return [*self._ours.norm_names(), *(name for rows in self._measured.values() for name in rows)]

    def norms(self) -> Norms:
        """Return the norms of the last step of all optimizers. This is collective if parameters are split over processes."""
        ours = self._ours.norms()
        members = {member.name: member for member in members_of(self.param_groups)}
        rows = {name: row for some in self._measured.values() for name, row in some.items() if name in members}
        if not rows:
            return ours
        device = next(iter(rows.values())).device
        table = torch.stack([row.to(device) for row in rows.values()])
        names, whole = Shards().whole_rows([(members[name], name) for name in rows], table, READING)
        theirs = Norms.from_sums(names, whole.cpu().numpy())
        columns = ((getattr(ours, key), getattr(theirs, key)) for key in ("weight", "update", "grad", "angle"))
        return Norms((*ours.names, *theirs.names), *map(np.concatenate, columns))

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call a function when a step begins. The result has `remove()`."""
        self._attach()
        self._on_begin.append(hook)
        return self

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Any:
        """Call a function when a step is over. The result has `remove()`."""
        self._attach()
        self._on_end.append(hook)
        return self

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> Any:
        """Call a function after our optimizer has loaded its state. The result has `remove()`."""
        return self._ours.register_load_state_dict_post_hook(hook)

    def remove(self) -> None:
        """Detach from all optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._on_begin, self._on_end = [], [], []
        self._before.clear()

    def _attach(self) -> None:
        if not self._handles:
            for optimizer in (self._ours, *self._others):
                self._handles.append(optimizer.register_step_pre_hook(self._begin))
                self._handles.append(optimizer.register_step_post_hook(self._end))

    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) in self._stepped:
            self._close()
        if not self._open:
            self._open = True
            for hook in self._on_begin:
                hook()
        if optimizer is not self._ours and self._due():
            for member in self._members(optimizer):
                self._before[id(member.param)] = local(member.param.detach()).clone()

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer is not self._ours and self._due():
            self._measured[id(optimizer)] = {
                member.name: _sums(member, self._before.pop(id(member.param), None))
                for member in self._members(optimizer)
            }
            self._before.clear()
        self._stepped.add(id(optimizer))
        if len(self._stepped) == 1 + len(self._others):
            self._close()

    def _close(self) -> None:
        for other in self._others:
            if id(other) not in self._stepped and self._due():
                # Others may have written to its weights, but it has taken no step.
                self._measured[id(other)] = {m.name: _sums(m, None, stepped=False) for m in self._members(other)}
        self._open = False
        self._stepped.clear()
        for hook in self._on_end:
            hook()

    def _members(self, optimizer: Optimizer) -> list[Member]:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [m for m in members_of(self.param_groups) if id(m.param) in own and not is_elsewhere(m.param)]


@torch.no_grad()
def _sums(member: Member, before: Tensor | None, stepped: bool = True) -> Tensor:
    """Return what `Norms.from_sums` needs of one parameter after a step, float64[4] on its device.

    This is collective if the gradient is placed otherwise than the parameter, for instance as parts of a sum.

    Args:
        member: the parameter.
        before: what this process held of it before the step; None where that is not known.
        stepped: whether its optimizer has taken the step. If not, update and gradient count as 0.
    """
    now = local(member.param.detach()).double()
    change = torch.zeros_like(now) if before is None or before.shape != now.shape else now - before
    grad = member.gradient if stepped else None
    held = None if grad is None else local(placed_like(member.param, grad.detach())).double()
    square = now.new_zeros(()) if held is None else held.square().sum()
    return torch.stack([now.square().sum(), change.square().sum(), square, ((now - change) * change).sum()])


def _check(other: object) -> None:
    """Raise an error if one of `others` cannot be measured."""
    if isinstance(other, AdamW):
        raise ValueError(
            "Monitor: one of others is an lwadamw.AdamW. Give it a Monitor of its own, or put its groups into the first one."
        )
    if not isinstance(other, Optimizer):
        raise TypeError(
            f"Monitor: others has a {type(other).__module__}.{type(other).__qualname__}, which has no step hooks. Give "
            "optimizers that derive from torch.optim.Optimizer."
        )
