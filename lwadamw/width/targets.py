"""Planning: what a rule makes of base values at another width, before anything is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from .rules import ROLES, Multipliers, Role, Rule
from .steady_state import STEADY_TAUS, SteadyState

# The top singular value goes as the steady weight RMS times width to this power: observed by Fan et al. 2510.15262 in
# LLaMA-style models, not derived. Exponents from 0.5 (noise alone) to 1 (one direction alone) are possible.
TOP_WIDTH_EXPONENT: Final = 0.75


@dataclass(frozen=True, slots=True)
class Base:
    """Base values and the width (fan_in of the proxy's matrices) they were tuned at.

    Raises:
        ValueError: a value is out of range.
    """

    width: int
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("width", "lr", "weight_decay"):
            _check_positive("Base", name, getattr(self, name))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"Base: betas={self.betas} are not both in [0, 1). Give the optimizer's, like (0.9, 0.95)."
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"Base: eps={self.eps} is not a finite number >= 0. Give the optimizer's, like 1e-8.")

    @property
    def steady(self) -> SteadyState:
        """Of the proxy's matrices."""
        return SteadyState(self.lr, self.weight_decay, self.betas[0])


@dataclass(frozen=True, slots=True)
class Horizon:
    """Length of a run, in steps, and the tokens of one step where they are known.

    Raises:
        ValueError: a value is not positive.
    """

    steps: int
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_positive("Horizon", "steps", self.steps)
        if self.batch_tokens is not None:
            _check_positive("Horizon", "batch_tokens", self.batch_tokens)

    def share(self, tau: float) -> float:
        """tau as a part of the run: the timescale B/(lr wd D) of Bergsma et al. 2505.13738."""
        return tau / self.steps

    def reaches(self, tau: float) -> bool:
        """Whether STEADY_TAUS tau pass at full lr. Warm-up and a decaying lr only make it take longer."""
        return STEADY_TAUS * tau <= self.steps


class Values(NamedTuple):
    """What one role gets at the target: effective values, and the multipliers that lead there."""

    lr: float
    weight_decay: float  # where the optimizer multiplies it by lr, as torch's and Megatron's AdamW do
    eps: float
    multipliers: Multipliers

    @property
    def decay_per_step(self) -> float:
        """lr wd: the weight decay where the optimizer does not multiply it by lr ("independent", fully decoupled)."""
        return self.lr * self.weight_decay


@dataclass(frozen=True, slots=True)
class Target:
    """One rule at one width. Ratios are target over proxy, of matrices at steady state.

    Raises:
        ValueError: the width is not positive, the rule gives matrices no decay and so no steady state, or its exponents
            lead out of the range of a float.
    """

    rule: Rule
    base: Base
    width: int

    def __post_init__(self) -> None:
        _check_positive("Target", "width", self.width)
        if self.rule.matrix.wd is None:
            raise ValueError(
                f"Target: rule {self.rule.name!r} gives matrices no weight decay, so they have no steady state. Plan with "
                "an exponent for wd."
            )
        for role in ROLES:
            try:
                values = self.values(role)
                fits = math.isfinite(values.lr) and values.lr > 0 and math.isfinite(values.eps)
                fits &= role != "matrix" or 0 < values.decay_per_step < math.inf
            except OverflowError:
                fits = False
            if not fits:
                raise ValueError(
                    f"Target: {self.rule[role]} of rule {self.rule.name!r} at m = {self.m:g} leaves the range of a float. Give "
                    "smaller exponents."
                )

    @property
    def m(self) -> float:
        return self.width / self.base.width

    def values(self, role: Role) -> Values:
        by = self.rule[role].at(self.m)
        return Values(self.base.lr * by.lr, self.base.weight_decay * by.wd, self.base.eps * by.eps, by)

    @property
    def steady(self) -> SteadyState:
        """Of matrices."""
        values = self.values("matrix")
        return SteadyState(values.lr, values.weight_decay, self.base.betas[0])

    @property
    def tau_ratio(self) -> float:
        return self.steady.tau / self.base.steady.tau

    @property
    def rms_ratio(self) -> float:
        return self.steady.weight_rms / self.base.steady.weight_rms

    @property
    def update_ratio(self) -> float:
        """Of the relative update, by which Kosson et al. 2510.19093 compare widths."""
        return self.steady.relative_update / self.base.steady.relative_update

    @property
    def top_ratio(self) -> float:
        """Of the top singular value, by which Fan et al. 2510.15262 compare widths."""
        return self.rms_ratio * math.pow(self.m, TOP_WIDTH_EXPONENT)

    def as_dict(self, horizon: Horizon | None = None) -> dict[str, Any]:
        """Everything as numbers for JSON; tau in steps, and as a part of the run where its length is known."""
        steady = self.steady
        out: dict[str, Any] = {
            "roles": {role: self._role_dict(role) for role in ROLES},
            "tau": steady.tau,
            "steady_after": STEADY_TAUS * steady.tau,
            "weight_rms": steady.weight_rms,
            "relative_update": steady.relative_update,
            "ratios": {
                "tau": self.tau_ratio,
                "weight_rms": self.rms_ratio,
                "relative_update": self.update_ratio,
                "top": self.top_ratio,
            },
            "holds": self.rule.holds,
            "source": self.rule.source,
        }
        if horizon is not None:
            out |= {"tau_of_run": horizon.share(steady.tau), "reaches_steady_state": horizon.reaches(steady.tau)}
        return out

    def _role_dict(self, role: Role) -> dict[str, Any]:
        values, scale = self.values(role), self.rule[role]
        return {
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            "decay_per_step": values.decay_per_step,
            "eps": values.eps,
            "multipliers": values.multipliers._asdict(),
            "exponents": {"lr": scale.lr, "wd": scale.wd, "eps": scale.eps},
        }


def _check_positive(owner: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{owner}: {name}={value} is not a positive number.")
