"""Effective weight decays: a table may hold them where base values are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from .outcomes import Outcome

SAME: Final = 0.01  # decays whose factor differs by less than this share have the same factor
POWER: Final = 0.05  # exponents of one power law differ by less than this
STEEPEST: Final = 2.0  # no rule scales a value more steeply
LEAST: Final = 3  # learning rates, from which on decays that are proportional to them are no chance


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
        power = power_of([(width, sorted(decays[width])) for width in sorted(decays)])
        first, *others = (decays[width] for width in sorted(decays)) if decays else [set()]
        if power is not None and not any(first & other for other in others):
            found[arm] = power
    return found


def to_base(rows: Sequence[Outcome], proxy: int) -> list[Outcome]:
    """Return the runs with base weight decays, which are those of the proxy.

    Where the weight decays are proportional to the learning rates, they are divided by them first.

    Args:
        rows: the runs, with effective weight decays.
        proxy: the width at which base and effective values are equal.

    Raises:
        ValueError: no arm has weight decays that follow a power of the width or the learning rate.
    """
    divided = products(rows)
    rows = [
        replace(row, weight_decay=rounded(row.weight_decay / row.lr))
        if row.weight_decay and row.arm in divided
        else row
        for row in rows
    ]
    found = exponents(rows)
    if not (found or divided):
        raise ValueError(
            "--effective-decay: in no arm do the weight decays follow a power of the width, from the same number of values at "
            "every width, or are proportional to the lr. Leave the option out, or write base values into the table."
        )
    return [
        replace(row, weight_decay=rounded(row.weight_decay * (proxy / row.width) ** found[row.arm]))
        if row.weight_decay and row.arm in found
        else row
        for row in rows
    ]


def notes(rows: Sequence[Outcome]) -> list[str]:
    """Say which arms have weight decays that are or may be effective values, one sentence for each kind.

    Args:
        rows: the runs.
    """
    divided = products(rows)
    said = [
        f"the weight decays of {', '.join(divided)} are proportional to the lr at every width. They may be products lr·wd, or "
        "decays that were swept together with the lr; the table does not tell. Every lr stands alone, so there is no optimum. "
        "If they are products, give --effective-decay."
    ]
    said = said if divided else []
    found = exponents([row for row in rows if row.arm not in divided])
    return [*said, _scaled(found)] if found else said


def _scaled(found: dict[str, float]) -> str:
    listed = ", ".join(f"{arm} (∝ width^{power:.2g})" for arm, power in found.items())
    return (
        f"the weight decays of {listed} change with the width, as effective values do. So every width stands alone, and there "
        "is no drift. With --effective-decay they are turned into base values."
    )


def products(rows: Sequence[Outcome]) -> list[str]:
    """Find the arms whose weight decays are proportional to the learning rate, as the product lr · wd is.

    Args:
        rows: the runs.

    Returns:
        Names of the arms. At three learning rates or more of one width, each has the same decays once they are divided by the
        learning rate, and other decays than the others before.
    """
    found = []
    for arm in dict.fromkeys(row.arm for row in rows):
        decays: dict[tuple[int, float], set[float]] = {}
        for row in rows:
            if row.arm == arm and row.weight_decay:
                decays.setdefault((row.width, row.lr), set()).add(row.weight_decay)
        by_width: dict[int, list[tuple[float, list[float]]]] = {}
        for (width, lr), values in decays.items():
            by_width.setdefault(width, []).append((lr, sorted(values)))
        if by_width and all(map(_proportional, by_width.values())):
            found.append(arm)
    return found


def _proportional(decays: Sequence[tuple[float, list[float]]]) -> bool:
    """Whether the decays are the same at every learning rate once they are divided by it."""
    if len(decays) < LEAST or len({len(values) for _, values in decays}) > 1:
        return False
    shares = zip(*([value / lr for value in values] for lr, values in decays), strict=True)
    return all(max(share) <= (1 + SAME) * min(share) for share in shares)


def power_of(values_at: Sequence[tuple[int, list[float]]]) -> float | None:
    """Return the exponent with which values scale. None if they do not scale with a power of the width.

    Args:
        values_at: widths and the values at each, both rising.
    """
    if len(values_at) < 2:
        return None
    (base, first), *others = values_at
    powers = []
    for width, values in others:
        if len(values) != len(first):
            return None
        factors = [value / start for value, start in zip(values, first, strict=True)]
        if max(factors) > (1 + SAME) * min(factors):
            return None
        powers.append(math.log(factors[0]) / math.log(width / base))
    if max(powers) - min(powers) > POWER or not POWER < abs(powers[0]) <= STEEPEST:
        return None
    return sum(powers) / len(powers)


def rounded(value: float) -> float:
    """Round to four digits, so that values that were rounded before are equal again."""
    return float(f"{value:.3e}")
