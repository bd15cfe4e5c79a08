"""A monitor's reading as a table for people, and as flat numbers for loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from ..state.arrays import Array
from ..state.names import layer_type
from .reading import Reading
from .text import aligned

_RATIOS: Final = ("rms/steady", "rms/expected", "update/steady", "rotation/steady")


def medians_by_role(reading: Reading) -> dict[str, dict[str, float]]:
    """Return the medians over all segments of a role.

    Args:
        reading: one reading of a monitor.

    Returns:
        role -> statistic -> median of the known values. A statistic without a known value is left out.
    """
    out: dict[str, dict[str, float]] = {}
    for role in dict.fromkeys(reading.roles):
        of_role = np.array([r == role for r in reading.roles])
        medians = {name: _median(values[of_role]) for name, values in reading.columns.items()}
        out[role] = {name: value for name, value in medians.items() if not math.isnan(value)}
    return out


def totals_by_role(reading: Reading) -> dict[str, dict[str, float]]:
    """Return the norms of all segments of a role together: the root of the sum of their squares.

    Args:
        reading: one reading of a monitor.

    Returns:
        role -> `weight_norm`, `update_norm` and `grad_norm`. A norm that is not known of every segment is left out.
    """
    norms = reading.norms
    if norms is None:
        return {}
    kinds = {"weight_norm": norms.weight, "update_norm": norms.update, "grad_norm": norms.grad}
    out: dict[str, dict[str, float]] = {}
    for role in dict.fromkeys(reading.roles):
        of_role = np.array([r == role for r in reading.roles])
        totals = {kind: float(np.linalg.norm(values[of_role])) for kind, values in kinds.items()}
        out[role] = {kind: value for kind, value in totals.items() if not math.isnan(value)}
    return out


def as_dict(reading: Reading, prefix: str, roles_only: bool = False) -> dict[str, float]:
    """Return a reading as flat floats. Values that are not known are left out.

    Args:
        reading: one reading of a monitor.
        prefix: text in front of every key.
        roles_only: leave the values of segments out.

    Returns:
        The values of segments under `{prefix}{statistic}/{name}`, and medians and totals under
        `{prefix}role/{role}/{statistic}`.
    """
    out = {
        f"{prefix}{statistic}/{name}": float(value)
        for statistic, values in ({} if roles_only else reading.columns).items()
        for name, value in zip(reading.names, values, strict=True)
        if not math.isnan(value)
    }
    for of_roles in (medians_by_role(reading), totals_by_role(reading)):
        for role, found in of_roles.items():
            out |= {f"{prefix}role/{role}/{statistic}": value for statistic, value in found.items()}
    return out


def table(reading: Reading, verdicts: Sequence[str], steps: int | None) -> str:
    """Return a reading as a table: one line per role, then one line per type of layer.

    Segments share a line if their names differ only in the layer numbers and their roles are the same.

    Args:
        reading: one reading of a monitor.
        verdicts: the verdict on every segment, in the order of `reading.names`.
        steps: length of the run in steps. None means that the length is not known.
    """
    shown = _columns(reading)
    taus = reading.columns["taus"]
    cells = [["", "role", *shown, "taus", "verdict"]]
    for (key, role), indices in _lines(reading).items():
        label = reading.names[indices[0]] if role and len(indices) == 1 else f"{key} x{len(indices)}"
        known = not np.isnan(taus[indices]).all()
        slowest = indices[int(np.nanargmin(taus[indices]))] if known else indices[0]
        broken = [i for i in indices if math.isnan(reading.columns["weight_rms"][i])]
        spreads = [_spread(values[indices]) for values in shown.values()]
        verdict = verdicts[slowest]
        if broken:
            of_all = "" if len(broken) == len(indices) else f"{len(broken)} of {len(indices)} "
            verdict = of_all + verdicts[broken[0]]
        cells.append([label, role, *spreads, _number(taus[slowest]), verdict])
    of = f" of {steps}" if steps else ""
    title = f"step {reading.step}{of}   median (smallest to largest); the verdict is that of the slowest"
    return "\n".join([title, *aligned(cells)])


def _columns(reading: Reading) -> Mapping[str, Array]:
    """Return the columns that the table shows, by their title."""
    columns = reading.columns
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = columns["weight_rms"] / columns["expected_rms"]
    ratios = (columns["rms_ratio"], expected, columns["update_ratio"], columns["rotation_ratio"])
    shown = dict(zip(_RATIOS, ratios, strict=True))
    return {**shown, "top": columns["top"]} if "top" in columns else shown


def _lines(reading: Reading) -> Mapping[tuple[str, str], list[int]]:
    """Return the indices of the segments of each line: (title, "") for a role, (layer type, role) for a type of layer."""
    lines: dict[tuple[str, str], list[int]] = {}
    for i, role in enumerate(reading.roles):
        lines.setdefault(("role " + role, ""), []).append(i)
    for i, (role, name) in enumerate(zip(reading.roles, reading.names, strict=True)):
        lines.setdefault((layer_type(name), role), []).append(i)
    return lines


def _median(values: Array) -> float:
    """Return the median of the known values, or NaN if no value is known."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


def _spread(values: Array) -> str:
    """Return the median, and the smallest and the largest value if there are at least two."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return _number(_median(known))
    return f"{_number(_median(known))} ({_number(known.min())} to {_number(known.max())})"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
