"""Whole thresholds: the huber thresholds of parameters that are split over processes.

A threshold follows the mean of |w| over the whole parameter, and a process has the sum over its part. The sums of all split
parameters are added up together, in one all-reduce for each process group. Then all processes have the same thresholds.

The sums stand in a table with a line for each way in which parameters are split. All processes put a parameter in the same
place of its line. DTensors stand in the order of the optimizer's parameters, which is the same everywhere. Of plain parameters,
each process may hold others, so processes tell each other the names once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import decay, keys
from .checks import capturing
from .collectives import HUBER
from .members import Member, local
from .packing import read_weight
from .shards import Shards, Split, add_up
from .storage import kept_weight
from .telling import tell
from .transfer import moved


class WholeThresholds:
    """The huber thresholds of one optimizer whose parameters other processes hold parts of.

    Args:
        shards: says how each parameter is split over processes.

    Attributes:
        counts: number of elements of the whole parameter, by id() of each split parameter with huber decay.
        first: the threshold before the first step, float32[], by id() of each split parameter that has none in its state.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._members: list[Member] = []  # those of `counts`
        self._places: dict[int, int] = {}  # place in the table, by id() of the parameter
        self._lines: list[Split] = []  # how the parameters of each line of the table are split
        self._width = 0  # places in a line
        self._indices: dict[tuple[int, ...], Tensor] = {}  # places of several parameters, on a device
        self._device = torch.device("cpu")
        self._laws: list[Any] | None = (
            None  # of every group; None: no parameter is split, so no law needs other processes
        )
        # What was told to other processes last, and what they said: for each split the elements of each parameter by name.
        self._told: list[tuple[str, str, int]] | None = None
        self._heard: dict[str, dict[str, int]] = {}
        self.counts: dict[int, int] = {}
        self.first: dict[int, Tensor] = {}

    @property
    def any(self) -> bool:
        """Whether a step has to add up sums over processes."""
        return bool(self._lines)

    def fits(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether no group has changed its decay law since the last call of `sort`.

        Args:
            groups: the optimizer's parameter groups.
        """
        return self._laws is None or _laws(groups) == self._laws

    def sort(self, members: Sequence[Member], groups: Sequence[Mapping[str, Any]], state: Any) -> None:
        """Find the parameters whose thresholds need other processes. Call this whenever parameters or groups have changed.

        This is collective if the user has told how plain parameters are split, and they have not been told to others yet.

        Args:
            members: all parameters of the optimizer.
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter.

        Raises:
            RuntimeError: another process did not make the call, or a parameter is a shard of which nothing is known.
        """
        splits = [self._shards.split_of(m) for m in members]
        declared = self._shards.declared
        self._laws = _laws(groups) if declared or any(split.groups for split in splits) else None
        if not any(map(decay.is_huber, groups)):
            declared = []
        elif any(decay.is_huber(m.group) for m in members):
            self._shards.check_told(HUBER)
        own = [(m, split) for m, split in zip(members, splits, strict=True) if split.groups and decay.is_huber(m.group)]
        self._members = [m for m, _ in own]
        self._device = local(members[0].param).device if members else torch.device("cpu")
        told = [(m.name, split.label, local(m.param).numel()) for m, split in own if split in declared]
        news = bool(declared) and told != self._told
        if news:
            self._heard = {}
            for split in declared:
                counts = {name: count for name, label, count in told if label == split.label}
                nameless = any(self._shards.is_nameless(m) for m, other in own if other == split)
                self._heard[split.label] = tell(split, counts, sum, HUBER, nameless)
            self._told = told
        self._lines = sorted({*declared, *(split for _, split in own)}, key=lambda split: split.label)
        self._indices, self._places, self.counts = {}, {}, {}
        lines = [
            list(self._heard[split.label]) if split in declared else [m.name for m, other in own if other == split]
            for split in self._lines
        ]
        self._width = max(map(len, lines), default=0)
        for m, split in own:
            line = self._lines.index(split)
            self._places[id(m.param)] = line * self._width + lines[line].index(m.name)
            self.counts[id(m.param)] = self._heard[split.label][m.name] if split in declared else m.param.numel()
        if news:
            # Later no process could know that another one creates the state of a parameter that only a few hold.
            self._measure([m for m, split in own if split in declared and not _has_threshold(state, m)], state)

    def begin(self, state: Any) -> None:
        """Compute the thresholds of parameters that have a gradient and no threshold, before their state is created.

        This is collective if there are any.

        Args:
            state: the optimizer's state by parameter.
        """
        if capturing():
            return  # creating state during a capture is refused later
        for m in self._members:
            if id(m.param) in self.first and _has_threshold(state, m):
                del self.first[id(m.param)]
        new = [m for m in self._members if m.gradient is not None and not _has_threshold(state, m)]
        new = [m for m in new if id(m.param) not in self.first]
        if new:
            self._measure(new, state)

    @torch.no_grad()
    def _measure(self, members: Sequence[Member], state: Any) -> None:
        sums = []
        for m in members:
            held = state.get(m.param, {})
            sums.append(decay.absolute_sum(read_weight(m.param, held, kept_weight(m.param, {}, held))))
        totals = self.totals([([m.param], total.view(1)) for m, total in zip(members, sums, strict=True)])
        for m, total in zip(members, totals, strict=True):
            scale = keys.HUBER_SCALE.of(m.group) / max(self.counts[id(m.param)], 1)
            self.first[id(m.param)] = (total[0] * scale).float()

    @torch.no_grad()
    def totals(self, parts: Sequence[tuple[Sequence[Tensor], Tensor]]) -> list[Tensor]:
        """Add up sums over this process's parts, so that they are those over the whole parameters.

        This is collective: one all-reduce for each process group among which any parameter with huber decay is split. The host
        does not wait for the device.

        Args:
            parts: parameters of one device and their sums, float64[n] on this device.

        Returns:
            For each entry of `parts` the sums over the whole parameters, float64[n].
        """
        device = parts[0][1].device if parts else self._device
        table = torch.zeros(len(self._lines), self._width, dtype=torch.float64, device=device)
        places = [self._index(params, device) for params, _ in parts]
        for place, (_, sums) in zip(places, parts, strict=True):
            table.view(-1)[place] = moved(sums, device)
        add_up(table, self._lines, HUBER)
        return [moved(table.view(-1)[place], sums.device) for place, (_, sums) in zip(places, parts, strict=True)]

    def _index(self, params: Sequence[Tensor], device: torch.device) -> Tensor:
        key = tuple(map(id, params))
        if key not in self._indices:
            self._indices[key] = torch.tensor([self._places[i] for i in key], device=device)
        return self._indices[key]


def _laws(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [group.get(keys.DECAY.name) for group in groups]


def _has_threshold(state: Any, m: Member) -> bool:
    return decay.THRESHOLD in state.get(m.param, ())


def check_threshold_alone(member: Member, shards: Shards) -> None:
    """Raise an error if a parameter that takes its step alone has a huber threshold that needs other processes.

    Args:
        member: the parameter.
        shards: says how each parameter is split over processes.

    Raises:
        RuntimeError: the parameter has huber decay, and other processes hold other parts of it.
    """
    if decay.is_huber(member.group) and shards.split_of(member).groups:
        raise RuntimeError(
            f"release_gradients() with decay='huber': {member.name!r} {tuple(member.param.shape)} is split over processes. "
            "Its threshold needs the mean over the whole parameter, and inside backward no process knows which parameter the "
            "others are at. Call remove() on the handle of release_gradients(), or put the parameter into a group with "
            "decay='coupled'."
        )
