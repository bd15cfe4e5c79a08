"""A monitor's reading for people and for loggers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from ..state.arrays import Array
from ..state.names import layer_type
from .reading import Reading
from .text import aligned

_RATIOS: Final = ("rms/steady", "rms/expected", "update/steady", "rotation/steady")


def medians_by_role(reading: Reading) -> dict[str, dict[str, float]]:
    """Medians: role -> statistic -> value; those that are not known are left out."""
    out: dict[str, dict[str, float]] = {}
    for role in dict.fromkeys(reading.roles):
        of_role = np.array([r == role for r in reading.roles])
        medians = {name: _median(values[of_role]) for name, values in reading.columns.items()}
        out[role] = {name: value for name, value in medians.items() if not math.isnan(value)}
    return out


def as_dict(reading: Reading, prefix: str) -> dict[str, float]:
    """Flat floats; values that are not known are left out."""
    out = {
        f"{prefix}{statistic}/{name}": float(value)
        for statistic, values in reading.columns.items()
        for name, value in zip(reading.names, values, strict=True)
        if not math.isnan(value)
    }
    for role, medians in medians_by_role(reading).items():
        out |= {f"{prefix}role/{role}/{statistic}": value for statistic, value in medians.items()}
    return out


def table(reading: Reading, verdicts: Sequence[str], steps: int | None) -> str:
    """A line per role, then one per kind of layer; layers differ in the numbers of their names only."""
    columns = reading.columns
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = columns["weight_rms"] / columns["expected_rms"]
    ratios = (columns["rms_ratio"], expected, columns["update_ratio"], columns["rotation_ratio"])
    shown = [*zip(_RATIOS, ratios, strict=True), *([("top", columns["top"])] if "top" in columns else [])]
    by: dict[tuple[str, str], list[int]] = {}
    for i, role in enumerate(reading.roles):
        by.setdefault(("role " + role, ""), []).append(i)
    for i, (role, name) in enumerate(zip(reading.roles, reading.names, strict=True)):
        by.setdefault((layer_type(name), role), []).append(i)
    cells = [["", "role", *(title for title, _ in shown), "taus", "verdict"]]
    for (key, role), rows in by.items():
        label = reading.names[rows[0]] if role and len(rows) == 1 else f"{key} x{len(rows)}"
        taus = columns["taus"][rows]
        slowest = rows[int(np.nanargmin(taus))] if not np.isnan(taus).all() else rows[0]
        spreads = [_spread(values[rows]) for _, values in shown]
        cells.append([label, role, *spreads, _number(columns["taus"][slowest]), verdicts[slowest]])
    of = f" of {steps}" if steps else ""
    return "\n".join(
        [f"step {reading.step}{of}   median (smallest to largest); the verdict is that of the slowest", *aligned(cells)]
    )


def _median(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


def _spread(values: Array) -> str:
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return _number(_median(known))
    return f"{_number(_median(known))} ({_number(known.min())} to {_number(known.max())})"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
