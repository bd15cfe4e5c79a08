"""Profiles: what the weights of a run settled to, in a file, so that a run at another width can be compared with it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from ..state import keys
from ..state.arrays import Array
from ..state.members import members_of
from ..state.names import layer_type
from ..version import __version__
from ..width.steady_state import STEADY_TAUS
from .reading import Reading

FORMAT: Final = "lwadamw profile"
VERSION: Final = 1
WINDOW: Final = 0.1  # readings of this last part of the steps are averaged
HISTORY: Final = 50  # readings of the way there that are kept
_NO_STATISTICS: Final = ("taus", "calibrated_at")


def geometric_mean(values: Sequence[float]) -> float:
    """NaN if one of them is not positive."""
    if not all(value > 0 and math.isfinite(value) for value in values):
        return math.nan
    return math.exp(math.fsum(map(math.log, values)) / len(values))


class Monitored(Protocol):
    """What `save` needs of a `lwadamw.Monitor`."""

    @property
    def optimizer(self) -> Any: ...
    @property
    def readings(self) -> Sequence[Reading]: ...


@dataclass(frozen=True)
class Layer:
    """One segment of a run: a parameter, or a part of one."""

    name: str
    role: str
    m: float  # width ratio; NaN where the rule does not use it
    lr: float  # effective, mean over the window
    weight_decay: float
    taus: float = math.nan  # elapsed, sum of lr wd, when the window began
    shape: tuple[int, ...] = ()  # (): not known
    fan_in: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)  # statistic -> mean over the window; NaN: not known

    @property
    def verdict(self) -> str:
        """Whether the window may be compared with a steady state: "steady", "too early" or "no decay"."""
        if not self.lr * self.weight_decay > 0:
            return "no decay"
        return "steady" if self.taus >= STEADY_TAUS else "too early"


@dataclass(frozen=True)
class Profile:
    """A run, or one reading of it."""

    layers: tuple[Layer, ...]
    steps: int
    rule: str = "none"
    base: Mapping[str, Any] = field(default_factory=dict)  # lr, weight_decay, betas as they were when it was saved
    window: tuple[int, int] = (0, 0)  # steps of the first and the last reading that were averaged
    meta: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""
    history: tuple[Profile, ...] = ()  # the run up to earlier readings, one layer for all of a type; oldest first

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> Profile:
        """From readings alone, without shapes: means over those of the last tenth of the steps, at least the last one."""
        last = readings[-1]
        window = [r for r in readings if r.step > (1 - WINDOW) * last.step]
        statistics = dict.fromkeys(key for r in window for key in r.columns if key not in _NO_STATISTICS)
        names = last.names
        lr = _over([(r.names, r.lr) for r in window], names)
        weight_decay = _over([(r.names, r.weight_decay) for r in window], names)
        taus = _over([(r.names, r.columns["taus"]) for r in window[:1] if "taus" in r.columns], names)
        values = {
            key: _over([(r.names, r.columns[key]) for r in window if key in r.columns], names) for key in statistics
        }
        layers = (
            Layer(
                name,
                last.roles[i],
                float(last.m[i]),
                float(lr[i]),
                float(weight_decay[i]),
                float(taus[i]),
                values={key: float(column[i]) for key, column in values.items()},
            )
            for i, name in enumerate(names)
        )
        return cls(tuple(layers), last.step, window=(window[0].step, last.step))

    def by_type(self) -> Profile:
        """The same with one layer for all of a type: geometric means, and the fewest taus."""
        types: dict[tuple[str, str], list[Layer]] = {}
        for layer in self.layers:
            types.setdefault((layer.role, layer_type(layer.name)), []).append(layer)
        layers = (
            Layer(
                name,
                role,
                geometric_mean([x.m for x in some]),
                geometric_mean([x.lr for x in some]),
                geometric_mean([x.weight_decay for x in some]),
                taus=min((x.taus for x in some), key=lambda taus: -math.inf if math.isnan(taus) else taus),
                values={key: geometric_mean([x.values[key] for x in some]) for key in some[0].values},
            )
            for (role, name), some in types.items()
        )
        return replace(self, layers=tuple(layers), history=())

    def at(self, step: int) -> Profile:
        """What the history had at this step or last before; the run itself where it has no history, or has ended."""
        if step >= self.steps or not self.history:
            return self
        return next((past for past in reversed(self.history) if past.steps <= step), self.history[0])


def save(monitor: Monitored, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> Profile:
    """Write the profile of a run: what each layer's statistics were, on average, in the last tenth of its steps.

    A statistic that no reading of this last tenth has, as a probe's may be that is asked more seldom, is left out. The file is
    JSON and replaces an older one in one go. Numbers are kept to the last digit, NaN as null.

    Args:
        monitor: the run's monitor; it may go on afterwards.
        path: of the file.
        meta: anything else worth keeping that JSON can hold: batch, tokens, commit.

    Returns:
        What was written.

    Raises:
        RuntimeError: the monitor has no reading yet.
        TypeError: meta holds what JSON cannot.
    """
    if not monitor.readings:
        raise RuntimeError(
            "profile.save: the monitor has no reading yet. Save after at least one, or make `every` smaller."
        )
    groups: Sequence[dict[str, Any]] = monitor.optimizer.param_groups
    evidence = getattr(monitor.optimizer, "evidence", {})
    known: dict[str, tuple[tuple[int, ...], int | None]] = {}
    for member in members_of(groups):
        shape = tuple(member.param.shape)
        fan_in = evidence[member.name].fan_in if member.name in evidence else None
        known[member.name] = (shape, fan_in)
        for name, size in zip(member.segment_names(), member.segments, strict=False):
            known[name] = ((size * shape[0] // max(member.param.numel(), 1), *shape[1:]), fan_in)
    group = next((g for g in groups if keys.ROLE.of(g) == "matrix"), groups[0])
    readings = list(monitor.readings)
    found = Profile.of(readings)
    kept = sorted({round(i) for i in np.linspace(0, len(readings) - 1, min(HISTORY, len(readings)))})
    base = {key: float(group[key]) for key in ("lr", "weight_decay")}
    profile = replace(
        found,
        layers=tuple(replace(x, shape=known[x.name][0], fan_in=known[x.name][1]) for x in found.layers),
        rule=", ".join(dict.fromkeys(g["rule"] for g in groups if "rule" in g)) or "none",
        base=base | {"betas": [float(b) for b in group["betas"]]},
        meta=dict(meta or {}),
        package=__version__,
        history=tuple(Profile.of(readings[: i + 1]).by_type() for i in kept),
    )
    _write(Path(path), profile)
    return profile


def load(path: str | os.PathLike[str]) -> Profile:
    """The profile in a file.

    Raises:
        ValueError: the file is none, or one of another version of the format.
        OSError: it cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no JSON ({error}). Give a file that Monitor.save() wrote.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)!r} is no profile of lwadamw. Give a file that Monitor.save() wrote.")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has version {data.get('version')} of the format, written by lwadamw {data.get('lwadamw')}; "
            f"this lwadamw reads version {VERSION}. Save it again with this one, or read it with that one."
        )
    try:
        first, last = data["window"]
        return Profile(
            _layers(data["layers"]),
            data["steps"],
            data["rule"],
            data["base"],
            (first, last),
            data["meta"],
            str(data["lwadamw"]),
            tuple(Profile(_layers(past["layers"]), past["step"]) for past in data["history"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is a damaged profile: {error!r}. Save it again.") from None


def _write(path: Path, profile: Profile) -> None:
    data = {
        "format": FORMAT,
        "version": VERSION,
        "lwadamw": profile.package,
        "rule": profile.rule,
        "base": profile.base,
        "steps": profile.steps,
        "window": profile.window,
        "meta": profile.meta,
        "layers": [{**vars(layer), "verdict": layer.verdict} for layer in profile.layers],
        "history": [{"step": past.steps, "layers": [vars(layer) for layer in past.layers]} for past in profile.history],
    }
    try:
        text = json.dumps(_finite(data), indent=1, allow_nan=False)
    except TypeError as error:
        raise TypeError(
            f"profile.save: meta holds what JSON cannot ({error}). Give numbers, texts, lists and dicts."
        ) from None
    # A reader never sees half a file, and a full disk leaves the old one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _layers(rows: Sequence[Mapping[str, Any]]) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            str(row["name"]),
            str(row["role"]),
            _number(row["m"]),
            _number(row["lr"]),
            _number(row["weight_decay"]),
            taus=_number(row["taus"]),
            shape=tuple(row["shape"]),
            fan_in=row["fan_in"],
            values={str(key): _number(value) for key, value in row["values"].items()},
        )
        for row in rows
    )


def _over(columns: Sequence[tuple[tuple[str, ...], Array]], names: tuple[str, ...]) -> Array:
    """Mean of columns, each with the names of its rows, over those that know a value: float64[len(names)]."""
    rows = []
    for own, values in columns:
        place = dict(zip(own, values, strict=True))
        rows.append(values if own == names else [place.get(name, math.nan) for name in names])
    table = np.asarray(rows, dtype=np.float64).reshape(-1, len(names))
    known = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, table, 0.0).sum(axis=0) / known.sum(axis=0)
    return mean
