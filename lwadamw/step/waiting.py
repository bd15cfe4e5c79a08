"""Waiting: notice an optimizer whose parameters never get a gradient, and say what the likely reason is."""

from __future__ import annotations

import warnings
from typing import Final

from ..state import keys
from ..state.callers import caller_level
from ..state.fingerprint import State
from ..state.members import ParamGroups, gradients_of

# One step without gradients is usual: a loop may take it before training to satisfy a scheduler. A few in a row are not.
_STEPS: Final = 3


class Waiting:
    """Counts the steps that an optimizer takes before the first gradient, and warns once.

    Attributes:
        over: whether nothing is left to look at: some parameter has had a gradient or state, or the warning has been given.
    """

    def __init__(self) -> None:
        self.over = False
        self._steps = 0

    def look(self, groups: ParamGroups, state: State) -> None:
        """Count a step, and warn if it is the third in a row in which no parameter had a gradient.

        Groups without a parameter that requires a gradient wait for nothing, and are not counted.

        Args:
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter.
        """
        params = [p for group in groups for p in group["params"]]
        if any(state.get(p) for p in params) or any(
            grad is not None
            for group in groups
            for grad in gradients_of(group["params"], keys.GRAD_ATTRIBUTE.of(group))
        ):
            self.over = True
            return
        trained = sum(p.requires_grad for p in params)
        self._steps += trained > 0
        if self._steps < _STEPS:
            return
        self.over = True
        warnings.warn(
            f"lwadamw.AdamW: none of its {trained} parameters that require a gradient had one in the first {_STEPS} steps, so "
            "nothing was trained. Probably fully_shard, parallelize_module or another wrapper has put new parameters in the "
            "place of those that the groups hold. Build the optimizer of lwadamw.rebind(groups, model) after the model has "
            "been wrapped. If gradients come later, ignore this.",
            stacklevel=caller_level(),
        )
