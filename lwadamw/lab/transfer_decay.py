"""Effective weight decays: a table may hold them where base values are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from .outcomes import Outcome

SAME: Final = 0.01  # decays whose factor differs by less than this share have the same factor
POWER: Final = 0.05  # exponents of one power law differ by less than this
STEEPEST: Final = 2.0  # no rule scales the weight decay more steeply


def exponents(rows: Sequence[Outcome]) -> dict[str, float]:
    """Find the arms whose weight decays look like effective values, and how they scale with the width.

    They do if the arm has other weight decays at every width, and those of one width are those of the first width, all times
    a power of the ratio of the widths. Base values are equal at every width.

    Args:
        rows: the runs.

    Returns:
        arm -> exponent b of the weight decay, which is proportional to width^b.
    """
    found = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        decays: dict[int, set[float]] = {}
        for row in rows:
            if row.arm == arm and row.weight_decay:
                decays.setdefault(row.width, set()).add(row.weight_decay)
        power = _power([(width, sorted(decays[width])) for width in sorted(decays)])
        if power is not None:
            found[arm] = power
    return found


def to_base(rows: Sequence[Outcome], proxy: int) -> list[Outcome]:
    """Return the runs with base weight decays, which are those of the proxy.

    Args:
        rows: the runs, with effective weight decays.
        proxy: the width at which base and effective values are equal.

    Raises:
        ValueError: no arm has weight decays that follow a power of the width.
    """
    found = exponents(rows)
    if not found:
        raise ValueError(
            "--effective-decay: in no arm do the weight decays follow a power of the width, from the same number of values at "
            "every width. Leave the option out, or write base values into the table."
        )
    return [
        replace(row, weight_decay=_rounded(row.weight_decay * (proxy / row.width) ** found[row.arm]))
        if row.weight_decay and row.arm in found
        else row
        for row in rows
    ]


def note(found: dict[str, float]) -> str:
    """Say which arms have weight decays that look like effective values. Empty if there are none."""
    if not found:
        return ""
    listed = ", ".join(f"{arm} (∝ width^{power:.2g})" for arm, power in found.items())
    return (
        f"the weight decays of {listed} change with the width, as effective values do. So every width stands alone, and there "
        "is no drift. With --effective-decay they are turned into base values."
    )


def _power(decays: Sequence[tuple[int, list[float]]]) -> float | None:
    """Return the exponent with which the decays scale. None if they do not scale with a power of the width."""
    if len(decays) < 2:
        return None
    (base, first), *others = decays
    powers = []
    for width, values in others:
        if len(values) != len(first) or set(values) & set(first):
            return None
        factors = [value / start for value, start in zip(values, first, strict=True)]
        if max(factors) > (1 + SAME) * min(factors):
            return None
        powers.append(math.log(factors[0]) / math.log(width / base))
    if max(powers) - min(powers) > POWER or not POWER < abs(powers[0]) <= STEEPEST:
        return None
    return sum(powers) / len(powers)


def _rounded(value: float) -> float:
    """Round to four digits, so that values that were rounded before are equal again."""
    return float(f"{value:.3e}")
