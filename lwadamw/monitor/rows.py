"""The rows of a monitor's readings: where each segment stands, and how far it is from its steady state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..state import keys
from ..state.arrays import Array
from ..state.identity import same
from ..state.members import local, members_of
from ..step.norms import Norms
from ..step.optimizer import AdamW
from ..width.steady_state import STEADY_TAUS, Elapsed, earliest_steady_step, relative_update_of, weight_rms_of
from .spectrum import matrix_view

TOLERANCE: Final = 0.1  # of RMS that counts as steady
_OF_DECAY: Final = (
    "steady_rms",
    "expected_rms",
    "rms_ratio",
    "steady_update",
    "update_ratio",
    "rotation_ratio",
    "taus",
)

_STATE: Final = ("_start", "_steady_from", "_steady_to", "_was_close", "_step", "_taus", "_rate", "_earliest")


class Rows:
    """What is known of every segment from one reading to the next, by arrays of float64[len(names)].

    A segment starts at its first reading, and again where it has moved to another group.

    Args:
        names: of the optimizer's norms.
        optimizer: that has them.
        earlier: rows to take over what has started.
    """

    def __init__(self, names: Sequence[str], optimizer: AdamW, earlier: Rows | None = None) -> None:
        self.names = tuple(names)
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        places: dict[str, tuple[int, str, float, int]] = {}
        for member in members_of(optimizer.param_groups):
            found = optimizer.evidence.get(member.name)
            role = found.role if found else keys.ROLE.of(member.group)
            m = found.m if found and found.m is not None else math.nan
            # The torch backend has no norms of segments, and one row for the whole.
            sizes = {
                member.name: member.param.numel(),
                **dict(zip(member.segment_names(), member.segments, strict=False)),
            }
            places |= {name: (member.group_index, role, m, size) for name, size in sizes.items()}
        found_places = [places[name] for name in self.names]
        self.group = np.array([place[0] for place in found_places], dtype=np.int64)
        self.roles = tuple(str(place[1]) for place in found_places)
        self.m = np.array([place[2] for place in found_places], dtype=np.float64)
        self._root_numel = np.sqrt([place[3] for place in found_places])
        n = len(self.names)
        # At the start of each: its mean square, and what its group had elapsed; since then: when it got and left steady, the
        # taus and the rate lr wd of the last reading, and what of the next step is known.
        self._start = np.full((n, 4), np.nan)
        self._steady_from, self._steady_to, self._was_close = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, bool)
        self._step, self._taus, self._rate = np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan)
        self._earliest, self._decays = np.full(n, np.nan), np.zeros(n, bool)
        if earlier is not None:
            self._take_over(earlier)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, from which `from_state` makes rows to take over from."""
        arrays = {field: getattr(self, field).tolist() for field in ("group", "_decays", *_STATE)}
        return {"names": list(self.names), **arrays}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Rows:
        """Rows of names that no optimizer has been asked about yet, so that the next reading replaces them."""
        rows = cls.__new__(cls)
        rows.names, rows._params = tuple(state["names"]), []
        rows.group = np.array(state["group"], dtype=np.int64)
        for field in ("_decays", *_STATE):
            kind = bool if field in ("_decays", "_was_close") else np.float64
            setattr(rows, field, np.array(state[field], dtype=kind))
        rows._start = rows._start.reshape(-1, 4)
        return rows

    def _take_over(self, earlier: Rows) -> None:
        place = {name: i for i, name in enumerate(earlier.names)}
        pairs = [(i, place[name]) for i, name in enumerate(self.names) if name in place]
        kept = [(i, j) for i, j in pairs if self.group[i] == earlier.group[j]]
        new, old = np.array(kept, dtype=np.int64).reshape(-1, 2).T
        for field in _STATE:
            getattr(self, field)[new] = getattr(earlier, field)[old]

    def is_stale(self, optimizer: AdamW) -> bool:
        """Whether parameters have come, gone or changed their group."""
        return not same([group["params"] for group in optimizer.param_groups], self._params)

    def columns(self, norms: Norms, step: int, hyper: Array, elapsed: Sequence[Elapsed]) -> dict[str, Array]:
        """Statistics at this step, from its norms; see `Monitor`.

        Args:
            hyper: effective lr, weight decay, beta1, float64[len(names), 3].
            elapsed: of every group.
        """
        lr, wd, beta1 = hyper.T
        moved = norms.update > 0
        with np.errstate(all="ignore"):
            rms = norms.weight / self._root_numel
            steady_rms = weight_rms_of(lr, wd)
            steady_update = relative_update_of(lr, wd, beta1)
            now = np.array([(e.log_kept, e.grown, e.taus) for e in elapsed]).reshape(-1, 3)[self.group]
            self._decays = wd > 0
            fresh = np.isnan(self._start[:, 0]) | ~self._decays
            self._start[fresh] = np.column_stack([rms**2, now])[fresh]
            square, log_kept, grown, taus = self._start.T
            kept = np.exp(now[:, 0] - log_kept)
            columns = {
                "weight_rms": rms,
                "steady_rms": steady_rms,
                "expected_rms": np.sqrt(kept * square + now[:, 1] - kept * grown),
                "rms_ratio": rms / steady_rms,
                "relative_update": np.where(moved, norms.update / norms.weight, np.nan),
                "steady_update": steady_update,
                "update_ratio": np.where(moved, norms.update / norms.weight / steady_update, np.nan),
                "rotation": np.where(moved, norms.angle, np.nan),
                "rotation_ratio": np.where(moved, norms.angle / steady_update, np.nan),
                "taus": now[:, 2] - taus,
            }
        for name in _OF_DECAY:
            columns[name][~self._decays] = np.nan
        for values in columns.values():
            values[~np.isfinite(values)] = np.nan
        self._judge(step, columns["taus"], lr * wd, columns["expected_rms"], steady_rms)
        return columns

    def _judge(self, step: int, taus: Array, rate: Array, expected: Array, steady: Array) -> None:
        """Note who has become steady, who has left, and when the others can be so at the earliest."""
        with np.errstate(all="ignore"):
            crossed = self._step + np.ceil((STEADY_TAUS - self._taus) / (taus - self._taus) * (step - self._step))
            slope = (rate - self._rate) / (step - self._step)
            # Of the schedule nothing is known yet at the first reading.
            self._earliest = np.where(np.isnan(slope), step + 1, earliest_steady_step(step, taus, rate, slope))
            close = np.abs(expected / steady - 1) <= TOLERANCE
        reached = taus >= STEADY_TAUS
        new = reached & np.isnan(self._steady_from)
        self._steady_from[new] = crossed[new]
        left = reached & ~close & self._was_close & np.isnan(self._steady_to)
        self._steady_to[left] = self._step[left]
        self._steady_to[close] = np.nan
        self._was_close |= reached & close
        self._step[:], self._taus, self._rate = step, taus, rate

    def verdicts(self, steps: int | None) -> list[str]:
        """Of every segment at its last reading; see `Monitor.verdicts`."""
        return [self._verdict(i, steps) for i in range(len(self.names))]

    def _verdict(self, i: int, steps: int | None) -> str:
        if not self._decays[i]:
            return "no decay"
        if not math.isnan(self._steady_from[i]):
            until = "" if math.isnan(self._steady_to[i]) else f" to step {self._steady_to[i]:.0f}"
            return f"steady from step {self._steady_from[i]:.0f}{until}"
        if self._earliest[i] > (math.inf if steps is None else steps) or math.isinf(self._earliest[i]):
            return "never in this run"
        return f"not before step {self._earliest[i]:.0f}"

    def matrices(self, optimizer: AdamW) -> dict[str, Tensor]:
        """The rows that are matrices, by name: views of their parameters."""
        out: dict[str, Tensor] = {}
        wanted = {name for name, role in zip(self.names, self.roles, strict=True) if role != "vector"}
        for member in members_of(optimizer.param_groups):
            found = optimizer.evidence.get(member.name)
            fan_in, whole = found.fan_in if found else None, local(member.param.detach())
            per_row = math.prod(whole.shape[1:])
            parts = torch.split(whole, [size // per_row for size in member.segments]) if member.segments else [whole]
            for name, part in ((member.name, whole), *zip(member.segment_names(), parts, strict=True)):
                if name in wanted and (matrix := matrix_view(part, fan_in)) is not None:
                    out[name] = matrix
        return {name: out[name] for name in self.names if name in out}
