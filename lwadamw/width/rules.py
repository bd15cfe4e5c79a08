"""Rules as data: how learning rate, weight decay and epsilon follow the width ratio m = fan_in / base fan_in.

A rule gives a matrix the effective learning rate eta ∝ m^a and the effective weight decay lambda ∝ m^b. These quantities of
AdamW at its steady state then follow the width, d being the width of the model:

    quantity                 formula                  follows m as           source
    relative update          sqrt(eta lambda)         m^((a+b)/2)            Kosson et al. 2510.19093
    weight RMS               sqrt(eta / 2 lambda)     m^((a-b)/2)            Kosson et al. 2305.17212
    top singular value       sqrt(eta/lambda) d^0.75  m^((a-b)/2 + 0.75)     observed by Fan et al. 2510.15262

The top singular value sets the gain of a sublayer. A rule holds a quantity constant if the exponent of m is 0. Which quantity
has to be constant so that hyperparameters transfer is an open question. Here the exponent of the decay is one argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, get_args

Role = Literal["matrix", "vector", "output"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)


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


@dataclass(frozen=True, slots=True)
class Rule:
    """Exponents of the width ratio for every role, and their source.

    Neither Fan et al. 2510.15262 nor Kosson et al. 2510.19093 settles the role `output` (an untied head, a router). Its
    default is the exponent of muP for a model that does not divide its logits by m. `param_groups(..., output="vector")`
    gives a model that divides its logits by m the other, equivalent form of muP.

    Args:
        name: name of the rule, as `summary` prints it.
        matrix: exponents of the role `matrix`.
        vector: exponents of the role `vector`; by default constant lr and no weight decay.
        output: exponents of the role `output`; by default lr ∝ 1/m and no weight decay.
        holds: what the rule keeps constant across widths, in words.
        source: the paper that the exponents are from.

    Examples:
        >>> Rule("mine", matrix=Scale(lr=-1.0, wd=0.25))["matrix"].wd
        0.25
    """

    name: str
    matrix: Scale
    vector: Scale = Scale(wd=None)
    output: Scale = Scale(lr=-1.0, wd=None)
    holds: str = ""
    source: str = ""

    def __getitem__(self, role: Role) -> Scale:
        """Return the exponents of a role.

        Raises:
            ValueError: there is no such role.
        """
        if role not in ROLES:
            raise ValueError(f"Rule {self.name!r}: unknown role {role!r}. Roles are {', '.join(ROLES)}.")
        scale: Scale = getattr(self, role)
        return scale


RULES: Final[Mapping[str, Rule]] = {
    rule.name: rule
    for rule in (
        Rule(
            "standard",
            matrix=Scale(lr=0.0, wd=0.0),
            output=Scale(lr=0.0, wd=None),
            holds="nothing: no width scaling",
            source="baseline",
        ),
        Rule(
            "mup",
            matrix=Scale(lr=-1.0, wd=0.0),
            holds="update size at initialisation; weight decay left alone",
            source="muP (Yang et al. 2203.03466) with unscaled decay",
        ),
        Rule(
            "fan2025",
            matrix=Scale(lr=-1.0, wd=0.5),
            holds="top singular value, hence sublayer gain",
            source="Fan et al. 2510.15262",
        ),
        Rule(
            "kosson2025",
            matrix=Scale(lr=-1.0, wd=1.0),
            holds="lr*wd, hence the relative update",
            source="Kosson et al. 2510.19093; also MuAdamW, CompleteP",
        ),
        Rule(
            "balanced",
            matrix=Scale(lr=-0.75, wd=0.75),
            holds="both of the above at once",
            source="ours, the only exponents that satisfy both; tried on small models only",
        ),
    )
}


def get_rule(rule: str | Rule) -> Rule:
    """Return the rule of a name.

    Args:
        rule: a name from `RULES`. A `Rule` is returned as it is.

    Raises:
        ValueError: no rule has this name.
        TypeError: the argument is neither a name nor a `Rule`.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name or a lwadamw.Rule, got {type(rule).__name__}.")
    if rule not in RULES:
        raise ValueError(
            f"unknown rule {rule!r}. Rules are {', '.join(RULES)}. You can also pass a lwadamw.Rule(...) of your own."
        )
    return RULES[rule]


def with_output(rule: Rule, output: Literal["output", "vector"]) -> Rule:
    """Return the rule with the exponents that the role `output` is to have.

    Args:
        rule: the rule.
        output: "output" leaves the rule as it is. "vector" gives the role `output` the exponents of the role `vector`, for
            a model that divides its logits by m.

    Raises:
        ValueError: `output` has another value.
    """
    if output not in ("output", "vector"):
        raise ValueError(
            f"output={output!r}: give 'output' (the lr of a head follows the rule) or 'vector' (the model divides its "
            "logits by m)."
        )
    return rule if output == "output" else replace(rule, output=rule.vector)
