"""Width-scaling rules as data: how learning rate, weight decay and epsilon follow the width ratio m = fan_in / base fan_in.

With eta ∝ m^a and lambda ∝ m^b of a matrix, what a rule holds constant across widths (AdamW at its steady state):
    relative update     eta lambda          ∝ m^(a+b)      Kosson et al. 2510.19093
    weight RMS          sqrt(eta/2lambda)   ∝ m^((a-b)/2)
    top singular value  sqrt(eta/lambda) d^(3/4), hence sublayer gain, observed by Fan et al. 2510.15262
Which of these transfers hyperparameters best is an open question, and the exponent of the decay one argument here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, get_args

Role = Literal["matrix", "vector", "output"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)


class Multipliers(NamedTuple):
    """Factors on the base values of one parameter; `wd` 0 means no decay."""

    lr: float
    wd: float
    eps: float


@dataclass(frozen=True, slots=True)
class Scale:
    """Exponents of the width ratio for one role. `wd=None`: no weight decay at any width."""

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
        """From text, as on a command line; exponents left out are 0.

        >>> Scale.parse("lr=-0.75,wd=0.75")
        Scale(lr=-0.75, wd=0.75, eps=0.0)

        Raises:
            ValueError: it is not that.
        """
        given: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            try:
                if name not in ("lr", "wd", "eps") or name in given:
                    raise ValueError(name)
                given[name] = float(value)
            except ValueError:
                raise ValueError(f"{text!r} is not exponents of lr, wd and eps, like lr=-0.75,wd=0.75") from None
        return cls(**given)

    def at(self, m: float) -> Multipliers:
        """Multipliers at width ratio m > 0."""
        if not (math.isfinite(m) and m > 0):
            raise ValueError(f"Scale: width ratio m={m} is not a positive number. m is fan_in / base fan_in.")
        return Multipliers(m**self.lr, 0.0 if self.wd is None else m**self.wd, m**self.eps)


@dataclass(frozen=True, slots=True)
class Rule:
    """Exponents per role, and where they come from."""

    name: str
    matrix: Scale
    vector: Scale = Scale(wd=None)
    output: Scale = Scale(lr=-1.0, wd=None)
    holds: str = ""  # what the rule keeps constant across widths
    source: str = ""

    def __getitem__(self, role: Role) -> Scale:
        if role not in ROLES:
            raise ValueError(f"Rule {self.name!r}: unknown role {role!r}. Roles are {', '.join(ROLES)}.")
        scale: Scale = getattr(self, role)
        return scale


# Neither seed paper settles the output role (an untied head, a router). Its default is muP's for a model that does
# not divide its logits by m; with output="vector" a model that does gets muP's other, equivalent form.
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
    """A rule by name, or itself.

    Raises:
        ValueError: the name is not one of RULES.
        TypeError: neither a name nor a Rule.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name or a lwadamw.Rule, got {type(rule).__name__}.")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}. Rules are {', '.join(RULES)}; or pass your own lwadamw.Rule(...).")
    return RULES[rule]


def with_output(rule: Rule, output: Literal["output", "vector"]) -> Rule:
    """The rule whose output role follows its own exponents, or those of a vector."""
    if output not in ("output", "vector"):
        raise ValueError(
            f"output={output!r}: give 'output' (lr follows the rule) or 'vector' (the model divides logits by m)."
        )
    return rule if output == "output" else replace(rule, output=rule.vector)
