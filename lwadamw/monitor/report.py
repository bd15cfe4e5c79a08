"""A monitor's reading as a table for people, and as flat numbers for loggers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from ..state.arrays import Array
from .growth import Growth, fastest_by_type
from .kinds import types_of
from .reading import Reading
from .text import aligned, with_short_names

_RATIOS: Final = ("rms/steady", "rms/expected", "update/steady", "rotation/steady")
_RANGES: Final = "smallest to largest"
# What a table that is too wide leaves out, in this order. Names are shortened last.
LEFT_OUT: Final = ("rotation/steady", _RANGES, "rms/expected", "role", "update/steady", "taus")
UNBOUNDED: Final = (
    "no weight decay, so nothing bounds these norms. At a constant lr, a norm grows about as the root of the steps if updates "
    "are noise, and as the steps if all updates agree:"
)


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
        medians = {name: _median(values[of_role]) for name, values in reading.columns.items() if name != "top_of"}
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


def table(
    reading: Reading, verdicts: Sequence[str], steps: int | None, growth: Sequence[Growth] = (), width: int = 10**6
) -> str:
    """Return a reading as a table: one line per role, then one line per type of layer.

    Segments share a line if their names differ only in the layer numbers, or in the numbers of many experts, and their roles
    are the same. A table that is too wide leaves out what LEFT_OUT lists, and then shortens names.

    Args:
        reading: one reading of a monitor.
        verdicts: the verdict on every segment, in the order of `reading.names`.
        steps: length of the run in steps. None means that the length is not known.
        growth: how everything without weight decay has grown.
        width: the largest length of a line in characters.
    """
    shown = _columns(reading)
    lines = _lines(reading)
    for count in range(len(LEFT_OUT) + 1):
        missing = LEFT_OUT[:count]
        cells = _cells(reading, verdicts, lines, {key: x for key, x in shown.items() if key not in missing}, missing)
        if max(map(len, aligned(cells))) <= width:
            break
    of = f" of {steps}" if steps else ""
    median = "median" if _RANGES in missing else f"median ({_RANGES})"
    title = f"step {reading.step}{of}   {median}; each line has the verdict of its slowest weight"
    said = [*_wrapped(title, width), *with_short_names(cells, width)]
    for text in _largest(reading, lines):
        said += _wrapped(text, width)
    if growth:
        said += ["", *_wrapped(UNBOUNDED, width), *with_short_names(_growth_cells(growth), width)]
    return "\n".join(said)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)


def _cells(
    reading: Reading,
    verdicts: Sequence[str],
    lines: Mapping[tuple[str, str], Sequence[int]],
    shown: Mapping[str, Array],
    missing: Sequence[str],
) -> list[list[str]]:
    """Return the cells of the table, a row for each line, without the columns that are missing."""
    taus = reading.columns["taus"]
    has_role, has_taus = "role" not in missing, "taus" not in missing
    cells = [["", *["role"] * has_role, *shown, *["taus"] * has_taus, "verdict"]]
    for (key, role), some in lines.items():
        indices = list(some)
        label = reading.names[indices[0]] if role and len(indices) == 1 else f"{key} x{len(indices)}"
        known = not np.isnan(taus[indices]).all()
        slowest = indices[int(np.nanargmin(taus[indices]))] if known else indices[0]
        broken = [i for i in indices if math.isnan(reading.columns["weight_rms"][i])]
        spreads = [_spread(values[indices], _RANGES not in missing) for values in shown.values()]
        verdict = verdicts[slowest]
        if broken:
            of_all = "" if len(broken) == len(indices) else f"{len(broken)} of {len(indices)} "
            verdict = of_all + verdicts[broken[0]]
        cells.append([label, *[role] * has_role, *spreads, *[_number(taus[slowest])] * has_taus, verdict])
    return cells


def _largest(reading: Reading, lines: Mapping[tuple[str, str], Sequence[int]]) -> list[str]:
    """Return a sentence for each type of layer that packs matrices into one parameter: which of them has the largest top."""
    top, inside = (reading.columns.get(key, np.full(len(reading.names), np.nan)) for key in ("top", "top_of"))
    out = []
    for (key, role), indices in lines.items():
        known = [i for i in indices if not math.isnan(top[i])]
        if not role or not known or (not key.endswith("[*]") and np.isnan(inside[known]).all()):
            continue
        worst = max(known, key=lambda i: float(top[i]))
        name = reading.names[worst] + ("" if math.isnan(inside[worst]) else f"[{inside[worst]:.0f}]")
        out.append(f"largest top of {key}: {_number(top[worst])} in {name}")
    return out


def _growth_cells(growth: Sequence[Growth]) -> list[list[str]]:
    """Return the cells of the table of what has no weight decay, a row for the fastest of each type of layer."""
    first = growth[0]
    header = ["", "rms", f"since step {first.since}", "top", f"rms at step {first.until}", "top up to"]
    cells = [header]
    for one in fastest_by_type(growth).values():
        later = "-" if math.isnan(one.noise) else f"x{_number(one.noise)} to x{_number(one.aligned)}"
        up_to = "-" if math.isnan(one.top * one.top_aligned) else f"x{_number(one.top_aligned)}"
        grown = "-" if math.isnan(one.grown) else f"x{_number(one.grown)}"
        grown += "" if one.since == first.since else f" since step {one.since}"
        cells.append([one.name, _number(one.rms), grown, _number(one.top), later, up_to])
    return cells


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
    for i, (role, kind) in enumerate(zip(reading.roles, types_of(reading.names), strict=True)):
        lines.setdefault((kind, role), []).append(i)
    return lines


def _median(values: Array) -> float:
    """Return the median of the known values, or NaN if no value is known."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan


def _spread(values: Array, ranges: bool) -> str:
    """Return the median, and the smallest and the largest value if there are at least two and `ranges` asks for them."""
    known = values[~np.isnan(values)]
    if len(known) < 2 or not ranges:
        return _number(_median(known))
    return f"{_number(_median(known))} ({_number(known.min())} to {_number(known.max())})"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
