"""What a monitor knows about every segment from one reading to the next: where it started, and whether it is steady."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..state import keys
from ..state.arrays import Array
from ..state.collectives import READING
from ..state.identity import same
from ..state.members import is_sharded, local, members_of
from ..state.places import place_of
from ..state.shards import Split
from ..state.telling import tell
from ..step.norms import Norms
from ..width.steady_state import STEADY_TAUS, Elapsed, earliest_steady_step, relative_update_of, weight_rms_of
from .measured import Measured
from .parts import Part, absent_part, matrix_shape, part_of, placed_part
from .spectrum import is_pack, matrix_view
from .standing import fan_ins, without_prediction

# A segment counts as steady while expected_rms and steady_rms differ by at most this share of steady_rms.
STEADY_TOLERANCE: Final = 0.1

# These columns mean nothing without weight decay. They are NaN for a segment whose weight decay is 0.
_NEED_DECAY: Final = (
    "steady_rms",
    "expected_rms",
    "rms_ratio",
    "steady_update",
    "update_ratio",
    "rotation_ratio",
    "taus",
)

# What a checkpoint holds: key in the file -> attribute of the tracker, and dtype of its array.
_SAVED: Final[Mapping[str, tuple[str, type[np.generic]]]] = {
    "group": ("group", np.int64),
    "decays": ("_decays", np.bool_),
    "start": ("_start", np.float64),
    "steady_from": ("_steady_from", np.float64),
    "steady_to": ("_steady_to", np.float64),
    "was_close": ("_was_close", np.bool_),
    "step": ("_step", np.float64),
    "taus": ("_taus", np.float64),
    "rate": ("_rate", np.float64),
    "earliest": ("_earliest", np.float64),
    "expected": ("_expected", np.float64),
}
# A new tracker finds these two in the optimizer. It takes all other arrays over from the earlier tracker.
_FOUND_ANEW: Final = ("group", "decays")


class _Found(NamedTuple):
    """What is known about a segment.

    Attributes:
        group: index of its parameter group.
        role: its role.
        m: its width ratio, or NaN.
        numel: its number of elements, those that this process holds until processes have told each other.
        whole: shape of the whole parameter, if it is held in pieces whose place is known.
        matrix: shape of the matrix that the pieces are cut from.
        wide: whether the whole parameter has two or more dimensions.
    """

    group: int
    role: str
    m: float
    numel: int
    whole: tuple[int, ...] = ()
    matrix: tuple[int, int] | None = None
    wide: bool = False


def _without_gradient(norms: Norms) -> NDArray[np.bool_]:
    """Return which segments had no gradient in the last step. A skipped step has zeros in all rows, and none counts then."""
    still: NDArray[np.bool_] = (norms.update == 0) & (norms.grad == 0)
    return np.zeros_like(still) if still.all() else still


def _joined(known: Sequence[_Found]) -> _Found:
    """Return what is known about a parameter of which several processes hold a part."""
    return known[0]._replace(numel=sum(found.numel for found in known))


def _found_in(optimizer: Measured) -> list[Any]:
    """Return what a tracker is made of and others may change: parameters, shapes, and what excludes a prediction."""
    return [
        (list(group["params"]), [p.shape for p in group["params"]], without_prediction(group))
        for group in optimizer.param_groups
    ]


class SegmentTracker:
    """Follows every segment from reading to reading and judges whether it has reached its steady state.

    A segment starts at its first reading. It starts again when its parameter has moved to another group. Making a tracker
    is collective if the optimizer was built with `shard_group`.

    Args:
        names: names of the segments, in the order of the optimizer's norms.
        optimizer: the optimizer that has these segments.
        earlier: the tracker that was used until now. Segments with the same name and group go on from it.

    Attributes:
        names: names of the segments.
        group: index of the parameter group of every segment, int64[len(names)].
        roles: role of every segment.
        m: width ratio of every segment, float64[len(names)]. It is NaN where the rule does not use a width ratio.
        shapes: shapes of whole parameters that are held in pieces whose place is known, by name.
        fan_in: fan_in of every segment, float64[len(names)]. It is NaN where it is not known.
    """

    def __init__(self, names: Sequence[str], optimizer: Measured, earlier: SegmentTracker | None = None) -> None:
        self.names = tuple(names)
        self._made_of = _found_in(optimizer)
        places: dict[str, _Found] = {}
        split_places: dict[Split, dict[str, _Found]] = {split: {} for split in optimizer.shards.declared}
        members = list(members_of(optimizer.param_groups))
        for member in members:
            found = optimizer.evidence.get(member.name)
            role = found.role if found else keys.ROLE.of(member.group)
            m = found.m if found and found.m is not None else math.nan
            # The whole is needed as well: other processes may hold the parameter without segments.
            sizes = {
                member.name: member.param.numel(),
                **dict(zip(member.segment_names(), member.segments, strict=False)),
            }
            place = place_of(member.param, member.name)
            # A vector by its role may be an embedding. A plain part of a matrix without a place has one dimension.
            wide = role != "vector" or len(member.param.shape if place is None else place.whole) > 1
            own = {n: _Found(member.group_index, role, m, size, wide=wide) for n, size in sizes.items()}
            if place is not None:
                matrix = matrix_shape(place.whole, place.block, found.fan_in if found else None)
                own[member.name] = own[member.name]._replace(whole=place.whole, matrix=matrix)
            split_places.get(optimizer.shards.split_of(member), places).update(own)
        self._in_pieces: dict[str, tuple[tuple[int, int], Split]] = {}
        for split, known in split_places.items():
            nameless = any(optimizer.shards.is_nameless(m) for m in members if optimizer.shards.split_of(m) == split)
            told = tell(split, known, _joined, READING, nameless)
            self._in_pieces |= {name: (one.matrix, split) for name, one in told.items() if one.matrix is not None}
            places |= told
        found_places = [places[name] for name in self.names]
        self.group = np.array([place.group for place in found_places], dtype=np.int64)
        self.roles = tuple(place.role for place in found_places)
        self.m = np.array([place.m for place in found_places], dtype=np.float64)
        self.shapes = {name: place.whole for name, place in zip(self.names, found_places, strict=True) if place.whole}
        self._wide = np.array([place.wide for place in found_places], dtype=bool)
        self._root_numel = np.sqrt([place.numel for place in found_places])
        self.fan_in = fan_ins(self.names, optimizer)
        why = [without_prediction(group) for group in optimizer.param_groups]
        self._no_prediction = np.array([why[index] for index in self.group], dtype=object)
        self._reset()
        if earlier is not None:
            self._take_over(earlier)

    def _reset(self) -> None:
        """Make the arrays of segments that have had no reading yet. NaN means: not known, or has not happened."""
        n = len(self.names)
        # At the first reading of a segment: its mean square, then log_kept, grown and taus of its group.
        self._start = np.full((n, 4), np.nan)
        # The steps at which a segment became steady and at which it left the steady state.
        self._steady_from, self._steady_to = np.full(n, np.nan), np.full(n, np.nan)
        # Whether expected_rms has been close to steady_rms at some reading after 3 tau.
        self._was_close = np.zeros(n, bool)
        # From the last reading: the step, the tau that had passed, and lr * weight_decay per step.
        self._step, self._taus, self._rate = np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan)
        # From the last reading: the mean square that noise would have made.
        self._expected = np.full(n, np.nan)
        # The earliest step at which a segment can be steady, and whether it has weight decay at all.
        self._earliest, self._decays = np.full(n, np.nan), np.zeros(n, bool)
        # The reading from which on the weights are not finite.
        self._broken_from = np.full(n, np.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return the names and arrays as lists of plain numbers, for `from_state`."""
        arrays = {key: getattr(self, attribute).tolist() for key, (attribute, _) in _SAVED.items()}
        return {"names": list(self.names), **arrays}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SegmentTracker:
        """Make a tracker from a saved state.

        The result has no roles and no parameters. So the next reading replaces it by a complete tracker, which takes the
        saved arrays over.

        Args:
            state: what `state_dict` returned. Older states have an underscore in front of every key but `names` and `group`.
                They are read too. Some older states have no `expected`.
        """
        tracker = cls.__new__(cls)
        tracker.names, tracker._made_of, tracker.shapes = tuple(state["names"]), [], {}
        for key, (attribute, dtype) in _SAVED.items():
            values = state[key] if key in state else state.get(f"_{key}", [math.nan] * len(tracker.names))
            setattr(tracker, attribute, np.array(values, dtype=dtype))
        tracker._start = tracker._start.reshape(-1, 4)
        # These two are found at the next reading.
        tracker._broken_from = np.full(len(tracker.names), np.nan)
        tracker._no_prediction = np.full(len(tracker.names), "", dtype=object)
        return tracker

    def _take_over(self, earlier: SegmentTracker) -> None:
        """Copy the arrays of every segment whose name and group are the same in the earlier tracker."""
        place = {name: i for i, name in enumerate(earlier.names)}
        pairs = [(i, place[name]) for i, name in enumerate(self.names) if name in place]
        kept = [(i, j) for i, j in pairs if self.group[i] == earlier.group[j]]
        new, old = np.array(kept, dtype=np.int64).reshape(-1, 2).T
        for key, (attribute, _) in _SAVED.items():
            if key not in _FOUND_ANEW:
                getattr(self, attribute)[new] = getattr(earlier, attribute)[old]
        self._broken_from[new] = earlier._broken_from[old]

    def unbounded(self) -> tuple[str, ...]:
        """Return the names of the segments with two or more dimensions that had no weight decay at the last reading."""
        return tuple(name for i, name in enumerate(self.names) if self._wide[i] and not self._decays[i])

    def is_stale(self, optimizer: Measured) -> bool:
        """Return whether the parameters, their shapes, or what can be predicted of their groups have changed since then."""
        return not same(_found_in(optimizer), self._made_of)

    def columns(self, norms: Norms, step: int, hyper: Array, elapsed: Sequence[Elapsed]) -> dict[str, Array]:
        """Compute the columns of a reading that need no spectrum and no probe, and judge every segment by them.

        Args:
            norms: norms of the last step.
            step: the step of the reading.
            hyper: effective lr, effective weight decay, beta1 and whether there is weight decay at some learning rate, of
                every segment, float64[len(names), 4]. beta1 is NaN where the update is not Adam's.
            elapsed: what the steps so far have done to the weights of each parameter group.

        Returns:
            The columns by name, float64[len(names)] each. `lwadamw.Monitor` describes them.
        """
        lr, wd, beta1, decays = hyper.T
        moved = norms.update > 0
        with np.errstate(all="ignore"):
            rms = norms.weight / np.maximum(self._root_numel, 1)
            # Another optimizer than Adam has no beta1 here, and its update has another size.
            steady_rms = np.where(np.isnan(beta1), np.nan, weight_rms_of(lr, wd))
            steady_update = relative_update_of(lr, wd, beta1)
            now = np.array([(e.log_kept, e.grown, e.taus) for e in elapsed]).reshape(-1, 3)[self.group]
            self._decays = decays > 0
            fresh = np.isnan(self._start[:, 0]) | ~self._decays
            self._start[fresh] = np.column_stack([rms**2, now])[fresh]
            self._leave_out(~fresh & _without_gradient(norms), now)
            square, log_kept, grown, taus = self._start.T
            kept = np.exp(now[:, 0] - log_kept)
            self._expected = kept * square + now[:, 1] - kept * grown
            columns = {
                "weight_rms": rms,
                "steady_rms": steady_rms,
                "expected_rms": np.sqrt(self._expected),
                "rms_ratio": rms / steady_rms,
                "relative_update": np.where(moved, norms.update / norms.weight, np.nan),
                "steady_update": steady_update,
                "update_ratio": np.where(moved, norms.update / norms.weight / steady_update, np.nan),
                "rotation": np.where(moved, norms.angle, np.nan),
                "rotation_ratio": np.where(moved, norms.angle / steady_update, np.nan),
                "taus": now[:, 2] - taus,
            }
        for name in _NEED_DECAY:
            columns[name][~self._decays | (self._no_prediction != "")] = np.nan
        for values in columns.values():
            values[~np.isfinite(values)] = np.nan
        broken = np.isnan(rms)
        self._broken_from = np.where(broken, np.fmin(self._broken_from, step), np.nan)
        self._judge(step, columns["taus"], lr * wd, columns["expected_rms"], steady_rms)
        return columns

    def _leave_out(self, idle: NDArray[np.bool_], now: Array) -> None:
        """Let the steps since the last reading not count for some segments: those that had no gradient.

        Args:
            idle: the segments.
            now: log_kept, grown and taus of the group of every segment, float64[len(names), 3].
        """
        idle = idle & np.isfinite(self._expected) & np.isfinite(self._taus)
        self._start[idle] = np.column_stack([self._expected, now[:, :2], now[:, 2] - self._taus])[idle]

    def _judge(self, step: int, taus: Array, rate: Array, expected: Array, steady: Array) -> None:
        """Note which segments became steady, which left the steady state, and when the others can be steady at the earliest."""
        with np.errstate(all="ignore"):
            crossed = self._step + np.ceil((STEADY_TAUS - self._taus) / (taus - self._taus) * (step - self._step))
            slope = (rate - self._rate) / (step - self._step)
            # At the first reading the slope of the schedule is not known yet. The next step is a safe lower bound.
            self._earliest = np.where(np.isnan(slope), step + 1, earliest_steady_step(step, taus, rate, slope))
            distance = np.abs(expected / steady - 1)
            close, far = distance <= STEADY_TOLERANCE, distance > STEADY_TOLERANCE
        reached = taus >= STEADY_TAUS
        new = reached & np.isnan(self._steady_from)
        self._steady_from[new] = crossed[new]
        left = reached & far & self._was_close & np.isnan(self._steady_to)
        self._steady_to[left] = self._step[left]
        self._steady_to[close] = np.nan
        self._was_close |= reached & close
        self._step[:], self._taus, self._rate = step, taus, rate

    def verdicts(self, steps: int | None) -> list[str]:
        """Return the verdict on every segment at its last reading. `Monitor.verdicts` explains the texts.

        Args:
            steps: length of the run in steps. None means that the length is not known.
        """
        return [self._verdict(i, steps) for i in range(len(self.names))]

    def _verdict(self, i: int, steps: int | None) -> str:
        if not math.isnan(self._broken_from[i]):
            return f"not finite from step {self._broken_from[i]:.0f}"
        if not self._decays[i]:
            return "no decay"
        if self._no_prediction[i]:
            return f"not known: {self._no_prediction[i]}"
        if not math.isnan(self._steady_from[i]):
            until = "" if math.isnan(self._steady_to[i]) else f" to step {self._steady_to[i]:.0f}"
            return f"steady from step {self._steady_from[i]:.0f}{until}"
        if self._earliest[i] > (math.inf if steps is None else steps) or math.isinf(self._earliest[i]):
            return "never in this run"
        return f"not before step {self._earliest[i]:.0f}"

    def matrices(self, optimizer: Measured) -> dict[str, Tensor | Part]:
        """Return the segments that are matrices, by name, in the order of `names`. They are views of their parameters.

        A segment that packs several matrices, such as experts, has three dimensions. Of a matrix that is split over processes,
        the result has what this process holds. DTensors that are split by rows and by columns are left out, and so are plain
        tensors that are parts and have no place, and packs that are split.
        """
        out: dict[str, Tensor | Part] = {}
        wanted = {name for name, role in zip(self.names, self.roles, strict=True) if role != "vector"}
        for name in wanted & self._in_pieces.keys():
            out[name] = absent_part(*self._in_pieces[name])  # until this process turns out to hold something of it
        for member in members_of(optimizer.param_groups):
            found = optimizer.evidence.get(member.name)
            fan_in, whole = found.fan_in if found else None, local(member.param.detach())
            split, place = optimizer.shards.split_of(member), place_of(member.param, member.name)
            if split.groups:
                if member.name not in wanted:
                    continue
                if is_sharded(member.param) and (held := part_of(member.param, fan_in, split)) is not None:
                    out[member.name] = held
                elif place is not None and member.name in self._in_pieces:
                    out[member.name] = placed_part(member.param, place, *self._in_pieces[member.name])
                continue
            if place is not None and place.numel == math.prod(place.whole):
                whole = whole.reshape(place.whole)  # one process holds all of a flattened parameter
            per_row = math.prod(whole.shape[1:])
            parts = torch.split(whole, [size // per_row for size in member.segments]) if member.segments else [whole]
            for name, part in ((member.name, whole), *zip(member.segment_names(), parts, strict=True)):
                matrix = matrix_view(part, fan_in)
                if name in wanted and (matrix is not None or is_pack(part.shape, fan_in)):
                    out[name] = part if matrix is None else matrix
        return {name: out[name] for name in self.names if name in out}
