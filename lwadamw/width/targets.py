"""Planning: the values that a rule gives at another width, computed from base values before any training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from .rules import ROLES, Multipliers, Role, Rule
from .steady_state import STEADY_TAUS, SteadyState

# The top singular value follows the weight RMS at steady state times width to this power. Fan et al. 2510.15262 observed
# this in LLaMA-style models; it is not derived. Exponents from 0.5 (all of the weight is noise) to 1 (all of the weight is
# one direction) are possible.
TOP_WIDTH_EXPONENT: Final = 0.75


@dataclass(frozen=True, slots=True)
class Base:
    """Base values, and the width at which they were tuned.

    Args:
        width: width of the proxy, the fan_in of its matrices.
        lr: base learning rate.
        weight_decay: base weight decay.
        betas: decay rates of the first and the second moment.
        eps: base epsilon.

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
                f"Base: betas={self.betas} are not both in [0, 1). Give the betas of the optimizer, like (0.9, 0.95)."
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(
                f"Base: eps={self.eps} is not a finite number >= 0. Give the eps of the optimizer, like 1e-8."
            )

    @property
    def steady(self) -> SteadyState:
        """The steady state of the proxy's matrices."""
        return SteadyState(self.lr, self.weight_decay, self.betas[0])


@dataclass(frozen=True, slots=True)
class Horizon:
    """Length of a run.

    Args:
        steps: number of steps.
        batch_tokens: tokens per step; None where this is not known.

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
        """Return tau as a fraction of the run: the timescale B/(lr weight_decay D) of Bergsma et al. 2505.13738.

        B is the batch size and D the number of training tokens.

        Args:
            tau: 1/(lr weight_decay) in steps.
        """
        return tau / self.steps

    def reaches(self, tau: float) -> bool:
        """Return whether the run is long enough for STEADY_TAUS tau at the full lr.

        A warm-up and a decaying lr only make it take longer.

        Args:
            tau: 1/(lr weight_decay) in steps, at the full lr.
        """
        return STEADY_TAUS * tau <= self.steps


class Values(NamedTuple):
    """What one role gets at the target width.

    Attributes:
        lr: effective learning rate.
        weight_decay: effective weight decay, for an optimizer that multiplies it by lr, as the AdamW of torch and of
            Megatron do.
        eps: effective epsilon.
        multipliers: the width multipliers by which the base values were multiplied.
    """

    lr: float
    weight_decay: float
    eps: float
    multipliers: Multipliers

    @property
    def decay_per_step(self) -> float:
        """lr weight_decay: the weight decay for an optimizer that does not multiply it by lr.

        Such a decay is also called independent, or fully decoupled.
        """
        return self.lr * self.weight_decay


@dataclass(frozen=True, slots=True)
class Target:
    """The values that one rule gives at one width.

    Every ratio is the value of matrices at the target divided by the value at the proxy, both at steady state.

    Args:
        rule: the rule.
        base: base values and the width of the proxy.
        width: width of the target, the fan_in of its matrices.

    Raises:
        ValueError: the width is not positive, the rule gives matrices no weight decay and so no steady state, or an effective
            value is out of the range of a float.

    Examples:
        >>> from lwadamw import RULES
        >>> target = Target(RULES["fan2025"], Base(256, lr=3e-3, weight_decay=0.1), width=4096)
        >>> target.m, target.values("matrix").weight_decay, target.top_ratio
        (16.0, 0.4, 1.0)
    """

    rule: Rule
    base: Base
    width: int

    def __post_init__(self) -> None:
        _check_positive("Target", "width", self.width)
        if self.rule.matrix.wd is None:
            raise ValueError(
                f"Target: rule {self.rule.name!r} gives matrices no weight decay, so they have no steady state. Give the "
                "rule a number as the exponent wd of its matrices."
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
                    "the rule smaller exponents."
                )

    @property
    def m(self) -> float:
        """Width ratio of the matrices."""
        return self.width / self.base.width

    def values(self, role: Role) -> Values:
        """Return the effective values and the width multipliers of a role.

        Raises:
            ValueError: there is no such role.
        """
        by = self.rule[role].at(self.m)
        return Values(self.base.lr * by.lr, self.base.weight_decay * by.wd, self.base.eps * by.eps, by)

    @property
    def steady(self) -> SteadyState:
        """The steady state of the target's matrices."""
        values = self.values("matrix")
        return SteadyState(values.lr, values.weight_decay, self.base.betas[0])

    @property
    def tau_ratio(self) -> float:
        """Ratio of tau."""
        return self.steady.tau / self.base.steady.tau

    @property
    def rms_ratio(self) -> float:
        """Ratio of the weight RMS."""
        return self.steady.weight_rms / self.base.steady.weight_rms

    @property
    def update_ratio(self) -> float:
        """Ratio of the relative update, by which Kosson et al. 2510.19093 compare widths."""
        return self.steady.relative_update / self.base.steady.relative_update

    @property
    def top_ratio(self) -> float:
        """Ratio of the top singular value, by which Fan et al. 2510.15262 compare widths."""
        return self.rms_ratio * math.pow(self.m, TOP_WIDTH_EXPONENT)

    def as_dict(self, horizon: Horizon | None = None) -> dict[str, Any]:
        """Return all values and ratios as plain numbers and strings, for JSON.

        Args:
            horizon: length of the run. If it is given, the result also has tau as a fraction of the run, and whether the run
                is long enough to reach the steady state.

        Returns:
            Effective values by role; tau, and the steps until the steady state, in steps; ratios of target over proxy.
        """
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
