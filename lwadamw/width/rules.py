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

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

from .depth import DEPTHS, Depth
from .modules import Kind, Module, check_modules
from .scale import Multipliers as Multipliers
from .scale import Scale as Scale

Role = Literal["matrix", "vector", "output"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
_NO_DECAY: Final = Scale(wd=None)
_OUTPUT: Final = Scale(lr=-1.0, wd=None)


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
        block_vector: exponents of vectors inside the residual blocks, if they differ from those of other vectors. None: they do
            not differ. `param_groups` then needs `base_depth`, which says where the blocks are.
        depth: exponents of the depth ratio. None: the rule says nothing of another depth.
        modules: kinds of modules to factors, and to exponents where these differ from those of the role.
        holds: what the rule keeps constant across widths, in words.
        source: the paper that the exponents are from.

    Raises:
        ValueError: a kind of module is unknown, or has a factor on a weight decay that the rule does not give it.
        TypeError: the value of a kind is no `Module`.

    Examples:
        >>> Rule("mine", matrix=Scale(lr=-1.0, wd=0.25))["matrix"].wd
        0.25
    """

    name: str
    matrix: Scale
    vector: Scale = _NO_DECAY
    output: Scale = _OUTPUT
    holds: str = ""
    source: str = ""
    block_vector: Scale | None = None
    depth: Depth | None = None
    modules: Mapping[Kind, Module] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_modules(dict(self.modules), {role: self[role] for role in ROLES}, f"Rule {self.name!r}: modules")

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

# Recipes that scale width and depth together, as their papers give them. `param_groups` needs `base_depth` for them.
RECIPES: Final[Mapping[str, Rule]] = {
    rule.name: rule
    for rule in (
        Rule(
            "completep",
            matrix=Scale(lr=-1.0, wd=1.0, eps=-1.0),
            output=Scale(lr=0.0, wd=None),
            holds="lr*wd across widths and depths; the share of a residual branch in the whole",
            source="CompleteP, Dey et al. 2505.01618, Table 1 with alpha = 1",
            block_vector=Scale(wd=None, eps=-1.0),
            depth=DEPTHS["completep"],
        ),
    )
}


def get_rule(rule: str | Rule) -> Rule:
    """Return the rule of a name.

    Args:
        rule: a name from `RULES` or `RECIPES`. A `Rule` is returned as it is.

    Raises:
        ValueError: no rule has this name.
        TypeError: the argument is neither a name nor a `Rule`.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name or a lwadamw.Rule, got {type(rule).__name__}.")
    known = {**RULES, **RECIPES}
    if rule not in known:
        raise ValueError(f"{unknown_rule(rule)} You can also pass a lwadamw.Rule(...) of your own.")
    return known[rule]


def unknown_rule(name: str) -> str:
    """Return the message for a name that neither a rule nor a recipe has."""
    known = (*RULES, *RECIPES)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Closest: {close[0]!r}." if close else ""
    return f"unknown rule {name!r}.{hint} Rules are {', '.join(known)}."


def with_modules(rule: Rule, modules: Mapping[Kind, Module] | None) -> Rule:
    """Return the rule with further modules. They replace those that the rule has of the same kind.

    Args:
        rule: the rule.
        modules: kinds of modules, and what each gets. None: nothing.

    Raises:
        ValueError: a kind is unknown, or has a factor on a weight decay that the rule does not give it.
        TypeError: the value of a kind is no `Module`.
    """
    return replace(rule, modules={**rule.modules, **modules}) if modules else rule


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
