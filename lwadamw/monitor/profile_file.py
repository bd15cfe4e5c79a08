"""Profiles in files: JSON that keeps every digit and is replaced as a whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from ..state import keys
from ..state.members import local, members_of
from ..state.names import names_of
from ..version import __version__
from .profile import Profile, SegmentProfile
from .reading import Reading
from .standing import rules_of

FORMAT: Final = "lwadamw profile"
VERSION: Final = 1
HISTORY: Final = 50  # the file keeps the run up to this many readings, evenly chosen


class Monitored(Protocol):
    """What `save` needs of a `lwadamw.Monitor`: its optimizer and its readings."""

    @property
    def optimizer(self) -> Any:
        """The optimizer of the run."""
        ...

    @property
    def readings(self) -> Sequence[Reading]:
        """The readings of the run, oldest first."""
        ...


def save(monitor: Monitored, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> Profile:
    """Write the profile of a run: the average of each segment's statistics over the last tenth of the steps.

    A statistic that no reading in the last tenth has is left out. The statistics of a probe, for instance, are measured less
    often. The file is JSON with all digits of every number, and null for NaN.

    Args:
        monitor: the monitor of the run. It can go on afterwards.
        path: path of the file. An existing file is replaced as a whole.
        meta: anything else to keep, for instance batch size, tokens or commit. JSON must be able to hold it.

    Returns:
        The profile that was written. If parameters are split over processes, the first one of them writes it.

    Raises:
        RuntimeError: the monitor has no reading yet.
        TypeError: `meta` holds something that JSON cannot hold.
    """
    if not monitor.readings:
        raise RuntimeError(
            "Monitor.save: the monitor has no reading yet. Save after at least one reading, or make `every` smaller."
        )
    groups: Sequence[dict[str, Any]] = monitor.optimizer.param_groups
    shapes = _shapes(monitor.optimizer, monitor.readings[-1])
    unknown: tuple[tuple[int, ...], int | None] = ((), None)
    index = next((i for i, g in enumerate(groups) if keys.ROLE.of(g) == "matrix"), 0)
    group = groups[index]
    readings = list(monitor.readings)
    base = {"lr": _peak_lr(group, set(names_of(group, index)), readings), "weight_decay": float(group["weight_decay"])}
    found = Profile.of(readings)
    kept = sorted({round(i) for i in np.linspace(0, len(readings) - 1, min(HISTORY, len(readings)))})
    profile = replace(
        found,
        segments=tuple(
            replace(x, shape=shape, fan_in=x.fan_in if fan_in is None else fan_in)
            for x in found.segments
            for shape, fan_in in (shapes.get(x.name, unknown),)
        ),
        rule=rules_of(groups),
        base=base | {"betas": [float(b) for b in group["betas"]]},
        meta=dict(meta or {}),
        package=__version__,
        history=tuple(Profile.of(readings[: i + 1]).by_type() for i in kept),
    )
    if readings[-1].writes:
        write(path, profile)
    return profile


def _peak_lr(group: Mapping[str, Any], names: Collection[str], readings: Sequence[Reading]) -> float:
    """Return the highest base learning rate of a group that is known: of a schedule that has decayed, the peak.

    `peak_lr` and `initial_lr`, which schedulers write, say it. Otherwise the readings do, as far as they are kept.
    """
    known = [float(group[key]) for key in ("lr", "initial_lr", "peak_lr") if group.get(key) is not None]
    multiplier = keys.WIDTH_LR_MULT.of(group)
    for reading in readings:
        seen = [lr for name, lr in zip(reading.names, reading.lr.tolist(), strict=True) if name in names]
        known += [lr / multiplier for lr in seen[:1] if multiplier and math.isfinite(lr)]
    return max(known)


def _shapes(optimizer: Any, reading: Reading) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Return shape and fan_in of every parameter and of every segment, by name. A plain part without a place has no shape."""
    evidence = getattr(optimizer, "evidence", {})
    shards = getattr(optimizer, "shards", None)
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {}
    for name, shape in reading.shapes.items():
        shapes[name] = (shape, evidence[name].fan_in if name in evidence else None)
    for member in members_of(optimizer.param_groups):
        if member.name in shapes:
            continue
        is_part = shards is not None and local(member.param) is member.param and shards.split_of(member).groups
        shape = () if is_part else tuple(member.param.shape)
        fan_in = evidence[member.name].fan_in if member.name in evidence else None
        shapes[member.name] = (shape, fan_in)
        for name, size in zip(member.segment_names(), () if is_part else member.segments, strict=False):
            shapes[name] = ((size * shape[0] // max(member.param.numel(), 1), *shape[1:]), fan_in)
    return shapes


def write(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile to a file. A reader never sees half a file, and if writing fails, an existing file stays as it is.

    Args:
        path: path of the file.
        profile: the profile to write.

    Raises:
        TypeError: `profile.meta` holds something that JSON cannot hold.
    """
    path = Path(path)
    data = {
        "format": FORMAT,
        "version": VERSION,
        "lwadamw": profile.package,
        "rule": profile.rule,
        "base": profile.base,
        "steps": profile.steps,
        "window": profile.window,
        "meta": profile.meta,
        "layers": [{**vars(segment), "verdict": segment.verdict} for segment in profile.segments],
        "history": [{"step": past.steps, "layers": [vars(x) for x in past.segments]} for past in profile.history],
    }
    try:
        text = json.dumps(_finite(data), indent=1, allow_nan=False)
    except TypeError as error:
        raise TypeError(
            f"Monitor.save: meta holds what JSON cannot hold ({error}). Give numbers, texts, lists and dicts."
        ) from None
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


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile from a file.

    Args:
        path: path of a file that `save` wrote.

    Raises:
        ValueError: the file is not a profile, or its format has another version.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no JSON ({error}). Give a file that Monitor.save() wrote.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)!r} is no profile of lwadamw. Give a file that Monitor.save() wrote.")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has version {data.get('version')} of the format. It was written by lwadamw "
            f"{data.get('lwadamw')}, and this lwadamw reads version {VERSION}. Save the profile again with this lwadamw, or "
            "read it with the lwadamw that wrote it."
        )
    try:
        first, last = data["window"]
        return Profile(
            _segments(data["layers"]),
            data["steps"],
            data["rule"],
            data["base"],
            (first, last),
            data["meta"],
            str(data["lwadamw"]),
            tuple(Profile(_segments(past["layers"]), past["step"]) for past in data["history"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is a damaged profile: {error!r}. Save it again.") from None


def _finite(value: Any) -> Any:
    """Return the value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _segments(rows: Sequence[Mapping[str, Any]]) -> tuple[SegmentProfile, ...]:
    return tuple(
        SegmentProfile(
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
