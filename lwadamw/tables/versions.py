"""Versions: the version counters of a plan's parameters, which show who has written to a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..state.members import local
from ..state.packing import read_weight

_version = attrgetter("_version")


class Versions:
    """The parameters of one plan, and their versions after the last step if they have fp32 master weights.

    Args:
        params: the parameters of the plan.
        states: the state of each parameter if the parameters have fp32 master weights; else empty.
    """

    def __init__(self, params: Sequence[Tensor], states: Sequence[Mapping[str, Any]]) -> None:
        self._params, self._states = params, states
        # No version is -1, so the first step looks at everything that happened before this plan was made.
        self._seen = [-1] * len(states)

    @torch.no_grad()
    def follow(self, row: int | None = None) -> None:
        """Take what others have written to a parameter since the last step over into its fp32 master weight.

        Elements that still are the rounded master weight keep all digits of the master weight. They are what is left
        when averaged weights have been swapped in and out again.

        Args:
            row: index of the only parameter to look at; None: look at all.
        """
        rows: Iterable[int] = ()
        if self._states and (row is not None or list(map(_version, self._params)) != self._seen):
            rows = range(len(self._params)) if row is None else (row,)
        for i in rows:
            if self._params[i]._version != self._seen[i]:
                state = self._states[i]
                local(state["master_param"]).copy_(read_weight(self._params[i], state, "master"))

    def advance(self, row: int | None = None) -> None:
        """Tell autograd that the kernels have written to the parameters.

        Autograd does not see what kernels write. Without this, a backward pass through the old weights would silently
        use the new ones instead of raising an error.

        Args:
            row: index of the only parameter that has been written to; None: all of them.
        """
        torch._C._increment_version(self._params if row is None else [self._params[row]])
        if self._states and row is None:
            self._seen = list(map(_version, self._params))
        elif self._states and row is not None:
            self._seen[row] = self._params[row]._version
