"""DeepSpeed's ZeRO stages 1 and 2: an AdamW for an engine that flattens groups and steps one group at a time.

Nothing of DeepSpeed is imported. Run with deepspeed 0.19.8, stages 1 and 2, on one process. DeepSpeed 0.19 clips gradients at a
global norm of 1 unless its config says "gradient_clipping": 0.

ZeRO puts one flat vector in the place of the parameters of a group, and calls `step()` once for each group, with
`param_groups` cut to this group. `lwadamw.AdamW` would build its tables anew in each call, and step hooks would run in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from ..state import keys
from ..state.collectives import Call
from ..step.engine import Engine
from ..step.optimizer import AdamW as Base


class AdamW(Base):
    """An `lwadamw.AdamW` for `deepspeed.initialize(optimizer=...)` with ZeRO stage 1 or 2.

    Rules work as always, because ZeRO keeps groups apart. The vector of group i has the name `flat.{i}`, and its norms are
    those of what this process holds. With shard_group=torch.distributed.group.WORLD they are those of the whole group. Step
    hooks and a `Monitor` see one step for all groups.

    Arguments are those of `lwadamw.AdamW`. Set "gradient_clipping" in DeepSpeed's config and not `max_grad_norm`. DeepSpeed's
    default is 1.0.

    Raises:
        RuntimeError: by `step()`, if `max_grad_norm` is set: a group would be clipped by its own norm.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parts: dict[int, Engine] = {}
        super().__init__(*args, **kwargs)
        self._whole = self.param_groups
        self._given = {id(p) for group in self._whole for p in group["params"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._parts = {}
        self._whole = self.param_groups

    def _name_flat(self) -> None:
        """Give the vectors that ZeRO has put into groups names of their own."""
        for i, group in enumerate(self._whole):
            flat = [p for p in group["params"] if id(p) not in self._given]
            if len(flat) == len(group["params"]) == 1:
                group["param_names"] = [f"flat.{i}"]
                group.pop(keys.SEGMENTS.name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups, as in torch."""
        self._name_flat()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class."""
        self._name_flat()
        super().load_state_dict(state_dict)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the groups that are in `param_groups` now. Step hooks run before the first group and after the last one.

        Args:
            closure: as in torch.
        """
        now = self.param_groups
        place = next((i for i, group in enumerate(self._whole) if len(now) == 1 and group is now[0]), None)
        if place is None:
            self._whole = now
        self._name_flat()
        if place in (None, 0):
            self._call(torch_optimizer._global_optimizer_pre_hooks, self._optimizer_step_pre_hooks)
        if place is None or len(self._whole) == 1:
            self._parts.clear()
            loss = self._take_step(closure)
        else:
            loss = None if closure is None else closure()
            self._step_part(place)
        if place in (None, len(self._whole) - 1):
            self._call(self._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks)
        return loss

    # torch's constructor would wrap `step`, so that hooks ran for each group.
    step.hooked = True  # type: ignore[attr-defined]

    def _step_part(self, place: int) -> None:
        if self.max_grad_norm is not None:
            raise RuntimeError(
                f"deepspeed.AdamW: max_grad_norm={self.max_grad_norm}, and ZeRO steps one group at a time. Give "
                'max_grad_norm=None, and "gradient_clipping" in the config of DeepSpeed.'
            )
        if place not in self._parts:
            self._parts[place] = Engine(self.options.backend, self._naming, self._shards)
        verify = self._state_was_shared
        self._parts[place].step(self.param_groups, self.__dict__["state"], self._request(), verify_state=verify)

    def _call(self, *hooks: Any) -> None:
        """Call step hooks while `param_groups` has all groups."""
        now, self.param_groups = self.param_groups, self._whole
        try:
            for some in hooks:
                for hook in some.values():
                    hook(self, (), {})
        finally:
            self.param_groups = now

    def norm_names(self) -> list[str]:
        """Return the names of the rows of `norm_sums()`."""
        if not self._parts:
            return super().norm_names()
        state = self.__dict__["state"]
        return [name for _, part in sorted(self._parts.items()) for name in part.norm_names(state)]

    def _sums(self, whole: Call | None) -> tuple[list[str], Tensor]:
        if not self._parts:
            return super()._sums(whole)
        state = self.__dict__["state"]
        sums = [part.norm_sums(state, whole=whole) for _, part in sorted(self._parts.items())]
        return [name for names, _ in sums for name in names], torch.cat([rows for _, rows in sums])
