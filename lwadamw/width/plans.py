"""Plans: what to type at a target that differs from its proxy in width, depth, batch size, tokens and parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

from .laws import LAWS, TAU_TPP, TAU_TPP_RANGE, Factors, Law, Length, factors
from .rules import Role, Rule
from .scale import Multipliers
from .steady_state import tau_of
from .targets import Base

# Where a parameter is, as far as width and depth care.
Place = Literal["matrix", "block_vector", "vector", "output"]
PLACES: Final[tuple[Place, ...]] = get_args(Place)


class Typed(NamedTuple):
    """Effective values of one place at the target."""

    lr: float
    weight_decay: float
    eps: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rule and a law give together.

    The law acts on the base values, and so on all parameters alike. The rule then multiplies them for each parameter.

    Args:
        rule: width rule, with depth exponents if the depth differs.
        base: base values and the width of the proxy.
        width: width of the target.
        base_depth: number of blocks of the proxy; None: the depth is not scaled.
        depth: number of blocks of the target; None: the depth is not scaled.
        base_length: run of the proxy; None: not known.
        length: run of the target; None: not known.
        law: how base values follow the runs; None: they stay as they are.

    Raises:
        ValueError: a number is not positive, two belong together and one is missing, the rule says nothing of the depth, or a
            value at the target is out of range.

    Examples:
        >>> from lwadamw import RECIPES
        >>> plan = Plan(RECIPES["completep"], Base(256, lr=4e-3, weight_decay=0.1), 1024, base_depth=4, depth=16)
        >>> plan.typed("matrix").lr, plan.typed("matrix").weight_decay, plan.branch
        (0.001, 0.4, 0.25)
    """

    rule: Rule
    base: Base
    width: int
    base_depth: int | None = None
    depth: int | None = None
    base_length: Length | None = None
    length: Length | None = None
    law: Law | None = None

    def __post_init__(self) -> None:
        for name in ("width", "base_depth", "depth"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Plan: {name}={value} is not a positive number.")
        if (self.base_depth is None) != (self.depth is None):
            raise ValueError("Plan: give both base_depth and depth, or none of them.")
        if (self.base_length is None) != (self.length is None):
            raise ValueError("Plan: give the run of the proxy and that of the target, or none of them.")
        if self.m_depth != 1 and self.rule.depth is None:
            raise ValueError(
                f"Plan: the rule {self.rule.name!r} says nothing of another depth. Take the rule completep, or add depth "
                "exponents to your rule."
            )
        if self.rule.depth is not None and self.depth is None:
            raise ValueError(f"Plan: the rule {self.rule.name!r} scales the depth. Give base_depth and depth.")
        if self.law is not None and self.length is None:
            raise ValueError(f"Plan: the law {self.law.name!r} needs the run of the proxy and that of the target.")
        for beta, there in zip(self.base.betas, self.betas, strict=True):
            if not there >= 0:
                raise ValueError(
                    f"Plan: the law gives 1 - beta = {1 - there:.3g} for beta = {beta:g}, which is more than 1. The runs are "
                    "too far from each other for this law. Take a proxy with more similar steps, or a law that keeps betas."
                )
        for place in PLACES:
            if not all(math.isfinite(value) and value >= 0 for value in self.typed(place)):
                raise ValueError(f"Plan: the values of {place} leave the range of a float. Give smaller exponents.")

    @property
    def m(self) -> float:
        """Width ratio."""
        return self.width / self.base.width

    @property
    def m_depth(self) -> float:
        """Depth ratio; 1 where the depth is not scaled."""
        return 1.0 if self.depth is None or self.base_depth is None else self.depth / self.base_depth

    @property
    def factors(self) -> Factors:
        """What the law multiplies base values with."""
        if self.law is None or self.base_length is None or self.length is None:
            return Factors(1.0, 1.0, 1.0, 1.0)
        return factors(self.law, self.base_length, self.length)

    @property
    def values(self) -> Typed:
        """The base values to give to the optimizer at the target."""
        by, base = self.factors, self.base
        return Typed(base.lr * by.lr, base.weight_decay * by.wd, base.eps * by.eps)

    @property
    def betas(self) -> tuple[float, float]:
        """The betas at the target."""
        first, second = self.base.betas
        by = self.factors.beta
        return (first, second) if by == 1 else (1 - by * (1 - first), 1 - by * (1 - second))

    @property
    def branch(self) -> float:
        """The factor on the output of every residual branch, relative to the proxy. The model has to apply it."""
        return 1.0 if self.rule.depth is None else self.rule.depth.factor(self.m_depth)

    def multipliers(self, place: Place) -> Multipliers:
        """Return the multipliers that the groups have at a place."""
        if place == "block_vector":
            by_width = (self.rule.block_vector or self.rule.vector).at(self.m)
        else:
            role: Role = place
            by_width = self.rule[role].at(self.m)
        if self.rule.depth is None or place in ("vector", "output"):
            return by_width
        by_depth = self.rule.depth.at("matrix" if place == "matrix" else "vector", self.m_depth)
        return Multipliers(*(a * b for a, b in zip(by_width, by_depth, strict=True)))

    def typed(self, place: Place) -> Typed:
        """Return the effective values at a place."""
        return Typed(*(value * by for value, by in zip(self.values, self.multipliers(place), strict=True)))

    @property
    def tau_shares(self) -> tuple[float, float] | None:
        """tau of the matrices as a share of the run, at the proxy and at the target; None where the runs are not known."""
        if self.base_length is None or self.length is None:
            return None
        there = self.typed("matrix")
        if there.lr * there.weight_decay == 0:
            return None
        base = float(tau_of(self.base.lr, self.base.weight_decay)) / self.base_length.steps
        return base, float(tau_of(there.lr, there.weight_decay)) / self.length.steps

    @property
    def tau_share_by_tokens(self) -> float | None:
        """The share of the run that tau has by Bergsma et al. 2505.13738, if the share of the proxy is the best one there."""
        shares = self.tau_shares
        if shares is None or self.base_length is None or self.length is None:
            return None
        base, there = self.base_length.tokens_per_parameter, self.length.tokens_per_parameter
        return None if base is None or there is None else float(shares[0] * (there / base) ** TAU_TPP)

    def warnings(self) -> list[str]:
        """Return what a reader has to know before the values are used: each is one sentence, or two."""
        found = []
        if self.base_length is not None and self.length is not None:
            same = (self.base_length.steps, self.base_length.batch_tokens) == (
                self.length.steps,
                self.length.batch_tokens,
            )
            if not same and self.law is None:
                found.append(
                    "The batch size or the tokens change, and no law is chosen, so lr and weight decay do not follow them. "
                    "The laws below disagree; choose one."
                )
            for name, run in (("proxy", self.base_length), ("target", self.length)):
                tpp = run.tokens_per_parameter
                if tpp is not None and not TAU_TPP_RANGE[0] <= tpp <= TAU_TPP_RANGE[1]:
                    found.append(
                        f"The {name} has {tpp:.3g} tokens per parameter. The power of tau was fitted to "
                        f"{TAU_TPP_RANGE[0]:g} to {TAU_TPP_RANGE[1]:g}."
                    )
        law, shares = self.law, self.tau_shares
        exponent = self.rule.matrix.lr + (self.rule.matrix.wd or 0.0)
        if law is not None and shares is not None and exponent and self.m != 1:
            found.append(
                f"The rule {self.rule.name} lets lr*wd of the matrices follow m^{exponent:g}, so tau is not what the law "
                f"{law.name} holds. A rule with lr*wd constant, such as kosson2025, keeps it."
            )
        if self.rule.depth is not None:
            found.append(f"Of the depth, not known: {self.rule.depth.unknown}.")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return all values as plain numbers and strings, for JSON."""
        return {
            "m": self.m,
            "m_depth": self.m_depth,
            "law": None if self.law is None else self.law.name,
            "factors": self.factors._asdict(),
            "base": self.values._asdict(),
            "betas": list(self.betas),
            "branch": self.branch,
            "places": {place: self.typed(place)._asdict() for place in PLACES},
            "tau_of_run": self.tau_shares,
            "tau_of_run_by_tokens_per_parameter": self.tau_share_by_tokens,
            "warnings": self.warnings(),
        }


def by_law(plan: Plan) -> dict[str, Plan | None]:
    """Return the same plan under every law, by name; None where a law needs the parameters and a run does not have them.

    Args:
        plan: a plan with the runs of proxy and target.
    """
    found: dict[str, Plan | None] = {}
    for name, law in LAWS.items():
        try:
            found[name] = Plan(
                plan.rule, plan.base, plan.width, plan.base_depth, plan.depth, plan.base_length, plan.length, law
            )
        except ValueError:
            found[name] = None
    return found
