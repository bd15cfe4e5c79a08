"""Effective learning rates: a table may hold them where base values are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from .arms import known_arm
from .outcomes import Outcome
from .transfer_decay import power_of, rounded

SURE: Final = 3  # from this many widths on, one power of the width is no chance
ALIKE: Final = 0.02  # an exponent is that of a rule if it differs by less


@dataclass(frozen=True, slots=True)
class Scaled:
    """How the learning rates of an arm change with the width.

    Args:
        power: exponent a, if they are proportional to width^a. None: they follow no power, and no width has those of another.
        known: whether they are effective values. If not, they may also be base values of a grid that was moved by hand.
    """

    power: float | None
    known: bool


def exponents(rows: Sequence[Outcome], column: str = "lr") -> dict[str, Scaled]:
    """Find the arms whose learning rates change with the width, as effective values do.

    Base values are equal at every width, or some of them are, where a grid was made larger. The learning rates of an arm are
    surely effective if they follow the power of the width that the rule of this name has; or if they follow one power over
    three widths, and no learning rate is at two widths. A grid that was moved by hand may look the same otherwise. Arms with
    one learning rate at a width are left out.

    Args:
        rows: the runs.
        column: name of the column of the learning rates. `base_lr` says that they are base values.

    Returns:
        arm -> how its learning rates scale. Arms with base values are left out.
    """
    if column.strip().lower().endswith("base_lr"):
        return {}
    found = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        lrs: dict[int, set[float]] = {}
        for row in rows:
            if row.arm == arm:
                lrs.setdefault(row.width, set()).add(row.lr)
        widths = sorted(lrs)
        if min(map(len, lrs.values())) < 2:
            continue
        first, *others = (lrs[width] for width in widths)
        power = power_of([(width, sorted(lrs[width])) for width in widths])
        common = any(first & other for other in others)
        rule = known_arm(arm)
        if power is not None:
            named = rule is not None and abs(rule.matrix.lr - power) < ALIKE
            found[arm] = Scaled(power, named or (len(widths) >= SURE and not common))
        elif others and not common:
            found[arm] = Scaled(None, False)
    return found


def to_base(rows: Sequence[Outcome], proxy: int) -> list[Outcome]:
    """Return the runs with base learning rates, which are those of the proxy.

    Args:
        rows: the runs, with effective learning rates.
        proxy: the width at which base and effective values are equal.

    Raises:
        ValueError: no arm has learning rates that follow a power of the width.
    """
    powers = {arm: scaled.power for arm, scaled in exponents(rows).items() if scaled.power is not None}
    if not powers:
        raise ValueError(
            "--effective-lr: in no arm do the learning rates follow a power of the width, from the same number of values at "
            "every width. Leave the option out, or write base values into the table."
        )
    return [
        replace(row, lr=rounded(row.lr * (proxy / row.width) ** powers[row.arm])) if row.arm in powers else row
        for row in rows
    ]


def notes(found: dict[str, Scaled]) -> list[str]:
    """Say which arms have learning rates that are or may be effective values, one sentence for each kind.

    Args:
        found: the result of `exponents`.
    """
    sure = [f"{arm} (∝ width^{s.power:.2g})" for arm, s in found.items() if s.known and s.power is not None]
    open_ = [f"{arm} (∝ width^{s.power:.2g})" for arm, s in found.items() if not s.known and s.power is not None]
    none = [arm for arm, s in found.items() if s.power is None]
    said = []
    if sure:
        said.append(
            f"the learning rates of {', '.join(sure)} change with the width, as effective values do. So each drift below is "
            "one of effective values. With --effective-lr they are turned into base values, which takes the exponent off the "
            "drift."
        )
    if open_:
        said.append(
            f"the learning rates of {', '.join(open_)} change with the width. They may be effective values, or base values of "
            "a grid that was moved by hand; the table does not tell. They are taken as base values. If they are effective, "
            "give --effective-lr."
        )
    if none:
        said.append(
            f"no width of {', '.join(none)} has a learning rate of the first width, and they follow no power of the width. "
            "They are taken as base values; the table does not tell whether they are."
        )
    return said
