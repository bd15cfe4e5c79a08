"""Width warm-ups: what muP's learning rate does early in training, without what it does later (Kosson et al. 2510.19093).

A width warm-up is a factor on a learning rate that the width does not scale. The factor starts at 1/m and ends at 1, where m
is the width ratio. docs/steady_state.md derives the two factors, and docs/decay.md compares them.

The schedulers write the factor into a group key of its own, `group["width_warmup"]`, and the step multiplies lr by it. So
they go with any schedule of `group["lr"]`, by another scheduler or by a loop. Call `step()` of the warm-up and of the other
scheduler after each step of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .state import keys
from .state.groups import effective
from .width.rules import Role
from .width.steady_state import next_mean_square, weight_rms_of


def exponential_warmup(t: float, m: float, steps: float) -> float:
    """Return the exponential factor m^min(0, t/steps - 1): 1/m at first, 1 at the end. Kosson et al. 2510.19093, Eq. 12.

    Args:
        t: number of steps so far.
        m: width ratio.
        steps: length of the warm-up in steps.

    Examples:
        >>> [exponential_warmup(t, 4, 10) for t in (0, 5, 10, 20)]
        [0.25, 0.5, 1.0, 1.0]
    """
    return float(m ** min(0.0, t / steps - 1))


def equilibrium_warmup(t: float, m: float, lr: float, weight_decay: float, rms: float) -> float:
    """Return the equilibrium factor at a constant lr and weight decay. Kosson et al. 2510.19093, Eq. 11.

    With remaining = (1 - lr weight_decay)^(2t) and q = 2 weight_decay rms^2 / lr, the factor is
    sqrt((1 + (q - 1) remaining) / (1 + (m^2 q - 1) remaining)).

    Args:
        t: number of steps so far.
        m: width ratio.
        lr: effective learning rate.
        weight_decay: effective weight decay, not 0.
        rms: root mean square of the weights before the first step.

    Examples:
        >>> round(equilibrium_warmup(0, 4, 0.01, 0.1, 0.3), 6), round(equilibrium_warmup(10**5, 4, 0.01, 0.1, 0.3), 6)
        (0.25, 1.0)
    """
    remaining = (1 - lr * weight_decay) ** (2 * t)
    q = (rms / weight_rms_of(lr, weight_decay)) ** 2
    return math.sqrt((1 + (q - 1) * remaining) / (1 + (m**2 * q - 1) * remaining))


def ratios_of(name: str, optimizer: Optimizer, m: float | Sequence[float], roles: Sequence[Role]) -> list[float]:
    """Return the width ratio of each group of an optimizer.

    Args:
        name: name of the scheduler, for error messages.
        optimizer: an `lwadamw.AdamW`.
        m: one number, the width ratio of every group whose role is in `roles`, while other groups have 1; or one number per
            group.
        roles: roles that `m` is for, where it is one number.

    Returns:
        One width ratio per group.

    Raises:
        TypeError: the optimizer is not an `lwadamw.AdamW`.
        ValueError: m is not positive, m has not one number per group, or no group has one of the roles.
    """
    from .step.optimizer import AdamW

    if not isinstance(optimizer, AdamW):
        raise TypeError(
            f"{name}: {type(optimizer).__name__} does not multiply by group[{keys.WIDTH_WARMUP.name!r}]. Use "
            "lwadamw.AdamW. For another optimizer give a LambdaLR the function of the factor, like "
            "lwadamw.schedules.exponential_warmup."
        )
    groups = optimizer.param_groups
    if isinstance(m, Sequence):
        ratios = [float(ratio) for ratio in m]
        if len(ratios) != len(groups):
            raise ValueError(f"{name}: m has {len(ratios)} values for {len(groups)} groups. Give one value per group.")
    else:
        ratios = [float(m) if keys.ROLE.of(group) in roles else 1.0 for group in groups]
        if not any(keys.ROLE.of(group) in roles for group in groups):
            raise ValueError(
                f"{name}: no group has a role among {tuple(roles)}. Make groups with lwadamw.param_groups, or give m as "
                "a list, one number per group."
            )
    for i, ratio in enumerate(ratios):
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"{name}: m={ratio} of group {i} is not a positive number. m is width / base width.")
    return ratios


class WidthWarmup(LRScheduler):
    """The part that both width warm-ups share. Call `step()` after each step of the optimizer.

    Args:
        optimizer: an `lwadamw.AdamW`.
        ratios: width ratio of each group. A group with 1 gets no factor.
    """

    def __init__(self, optimizer: Optimizer, ratios: list[float]) -> None:
        self.ratios = ratios
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the learning rates as they are, because a warm-up does not change `group["lr"]`."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Set the factors of the next step.

        Args:
            epoch: as in torch's schedulers, where it is deprecated.
        """
        super().step(epoch)
        self._apply()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, and set the factors of the next step.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            ValueError: the state is from an optimizer with another number of groups.
        """
        saved, here = len(state_dict["ratios"]), len(self.ratios)
        if saved != here:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the state is of {saved} groups, this optimizer had {here} groups when "
                "the warm-up was made. Make the same groups as in the saved run."
            )
        super().load_state_dict(state_dict)
        self._apply()

    def factors(self) -> list[float]:
        """Return the factor on lr of each group, for the next step."""
        raise NotImplementedError

    def _apply(self) -> None:
        # Groups that were added after the warm-up was made have no ratio, so they get no factor.
        for group, ratio, factor in zip(self.optimizer.param_groups, self.ratios, self.factors(), strict=False):
            if ratio != 1:
                group[keys.WIDTH_WARMUP.name] = factor


class ExponentialWidthWarmup(WidthWarmup):
    """Multiply lr by m^min(0, t/steps - 1), where t is the number of steps so far.

    Source: Kosson et al. 2510.19093, Eq. 12. They warm up for half of the training.

    A SequentialLR no longer steps a scheduler once its milestone is reached. So in one, give this warm-up the milestone
    steps + 1. With the milestone `steps`, the last factor, m^(-1/steps), would stay for the rest of the run.

    Args:
        optimizer: an `lwadamw.AdamW`.
        m: one number, the width ratio of every group whose role is in `roles`; or one number per group, 1 for a group without
            a warm-up.
        steps: length of the warm-up in steps; after it the factor is 1.
        roles: roles of the groups that warm up, where `m` is one number.

    Raises:
        TypeError: the optimizer is not an `lwadamw.AdamW`.
        ValueError: m or steps is not positive, m has not one number per group, or no group has one of the roles.

    Examples:
        >>> import lwadamw
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
        >>> groups = lwadamw.param_groups(model, base_width=16, width=64, rule="standard", roles={"*": "matrix"})
        >>> optimizer = lwadamw.AdamW(groups, lr=1e-2)
        >>> warmup = ExponentialWidthWarmup(optimizer, m=64 / 16, steps=1000)
        >>> optimizer.effective()[0]["lr"]
        0.0025
    """

    def __init__(
        self, optimizer: Optimizer, m: float | Sequence[float], steps: float, *, roles: Sequence[Role] = ("matrix",)
    ) -> None:
        if not steps > 0:
            raise ValueError(
                f"ExponentialWidthWarmup: steps={steps} is not positive. Give the length of the warm-up in steps."
            )
        self.steps = steps
        super().__init__(optimizer, ratios_of("ExponentialWidthWarmup", optimizer, m, roles))

    def factors(self) -> list[float]:
        """Return the factor on lr of each group, for the next step."""
        return [exponential_warmup(self.last_epoch, m, self.steps) for m in self.ratios]


class EquilibriumWidthWarmup(WidthWarmup):
    """Multiply lr by the equilibrium factor of Kosson et al. 2510.19093, Eq. 11, followed step by step.

    Each step of the warm-up uses the lr and the weight decay that its group has then. So call `step()` of the warm-up before
    `step()` of other schedulers: then the group still has the lr of the step that was just taken. At a constant lr this is
    Eq. 11. For a varying lr it is our own extension. An lr or a weight decay that is a tensor is copied to the host at each
    step.

    Args:
        optimizer: an `lwadamw.AdamW`.
        m: one number, the width ratio of every group whose role is in `roles`; or one number per group, 1 for a group without
            a warm-up.
        roles: roles of the groups that warm up, where `m` is one number.
        rms: root mean square of the weights before the first step, one number or one per group. None: of the weights as they
            are now.
        self_consistent: whether the weights in the formula grow with the factor times lr, as the real weights do. In Eq. 11
            they grow with lr.

    Raises:
        TypeError: the optimizer is not an `lwadamw.AdamW`.
        ValueError: m is not positive, m or rms has not one number per group, or no group has one of the roles.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        m: float | Sequence[float],
        *,
        roles: Sequence[Role] = ("matrix",),
        rms: float | Sequence[float] | None = None,
        self_consistent: bool = False,
    ) -> None:
        ratios = ratios_of("EquilibriumWidthWarmup", optimizer, m, roles)
        groups = optimizer.param_groups
        if rms is None:
            squares = [_mean_square(group["params"]) for group in groups]
        else:
            squares = [float(r) ** 2 for r in (rms if isinstance(rms, Sequence) else [rms] * len(groups))]
        if len(squares) != len(groups):
            raise ValueError(
                f"EquilibriumWidthWarmup: rms has {len(squares)} values for {len(groups)} groups. Give one value per "
                "group."
            )
        self.self_consistent = self_consistent
        # Mean squares of the two weights whose ratio is the factor, per group: docs/steady_state.md.
        self.narrow, self.wide = squares, [ratio**2 * square for ratio, square in zip(ratios, squares, strict=True)]
        super().__init__(optimizer, ratios)

    def step(self, epoch: int | None = None) -> None:
        """Take account of the step that was just taken, and set the factors of the next step.

        Args:
            epoch: as in torch's schedulers, where it is deprecated.
        """
        if self.last_epoch >= 0:
            self._advance()
        super().step(epoch)

    def _advance(self) -> None:
        for i, (group, m) in enumerate(zip(self.optimizer.param_groups, self.ratios, strict=False)):
            if m == 1:
                continue
            used = effective({**group, keys.WIDTH_WARMUP.name: 1.0})
            lr, weight_decay = float(used.lr), float(used.weight_decay)
            factor = keys.WIDTH_WARMUP.of(group) if self.self_consistent else 1.0
            self.narrow[i] = next_mean_square(self.narrow[i], lr * factor, weight_decay)
            self.wide[i] = next_mean_square(self.wide[i], lr, weight_decay)

    def factors(self) -> list[float]:
        """Return the factor on lr of each group, for the next step."""
        # Weights of 0 that no step has moved yet have no RMS to compare. Their factor is 1/m, as at the start of all weights.
        return [
            math.sqrt(narrow / wide) if wide > 0 else 1 / m
            for m, narrow, wide in zip(self.ratios, self.narrow, self.wide, strict=True)
        ]


@torch.no_grad()
def _mean_square(params: Sequence[torch.Tensor]) -> float:
    total = sum(float(p.detach().abs().double().square().sum()) for p in params)
    return total / max(sum(p.numel() for p in params), 1)
