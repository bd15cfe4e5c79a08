"""Exponents of a ratio, and the multipliers that they give at one value of the ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Multipliers(NamedTuple):
    """Width multipliers of one parameter.

    Attributes:
        lr: factor on the base learning rate.
        wd: factor on the base weight decay; 0 means that the parameter has no weight decay.
        eps: factor on the base epsilon.
    """

    lr: float
    wd: float
    eps: float


@dataclass(frozen=True, slots=True)
class Scale:
    """Exponents of the width ratio m for one role.

    Args:
        lr: exponent of the learning rate, lr ∝ m^lr.
        wd: exponent of the weight decay, weight_decay ∝ m^wd. None: no weight decay at any width.
        eps: exponent of epsilon, eps ∝ m^eps.

    Raises:
        ValueError: an exponent is infinite or NaN.

    Examples:
        >>> Scale(lr=-1.0, wd=0.5).at(4.0)
        Multipliers(lr=0.25, wd=2.0, eps=1.0)
    """

    lr: float = 0.0
    wd: float | None = 0.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "wd", "eps"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(
                    f"Scale: exponent {name}={value} is not finite. Give a number, or wd=None for no decay."
                )

    @classmethod
    def parse(cls, text: str) -> Scale:
        """Read exponents from text, as the command line gives them.

        Args:
            text: `name=number` pairs, separated by commas. The names are lr, wd and eps, each at most once. An exponent
                that is left out is 0.

        Returns:
            The exponents.

        Raises:
            ValueError: the text has another form, or an exponent is not finite.

        Examples:
            >>> Scale.parse("lr=-0.75,wd=0.75")
            Scale(lr=-0.75, wd=0.75, eps=0.0)
        """
        given: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            try:
                if name not in ("lr", "wd", "eps") or name in given:
                    raise ValueError(name)
                given[name] = float(value)
            except ValueError:
                raise ValueError(
                    f"{text!r} is not a list of exponents of lr, wd and eps, like lr=-0.75,wd=0.75"
                ) from None
        return cls(**given)

    def at(self, m: float) -> Multipliers:
        """Return the width multipliers at a width ratio.

        Args:
            m: width ratio, fan_in / base fan_in; a positive number.

        Raises:
            ValueError: m is not a positive, finite number.
            OverflowError: a multiplier is too large for a float.
        """
        if not (math.isfinite(m) and m > 0):
            raise ValueError(f"Scale: width ratio m={m} is not a positive number. m is fan_in / base fan_in.")
        return Multipliers(m**self.lr, 0.0 if self.wd is None else m**self.wd, m**self.eps)
