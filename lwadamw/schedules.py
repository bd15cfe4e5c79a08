r"""Width warm-ups: what muP's learning rate does early in training, without what it does later (Kosson et al. 2510.19093).

With lr/m and weight decay m wd, a matrix of width ratio m has relative updates of 1/m at first, and later the same as with
lr and wd: lr wd is equal. These are factors on an lr that is not scaled, which do about the same:

    exponential   s_t = m^min(0, t/T - 1)                                                       Eq. 12
    equilibrium   s_t = sqrt((1 + (q - 1) a^2t) / (1 + (m^2 q - 1) a^2t))                       Eq. 11
                  a = 1 - lr wd     q = (rms_0 / rms_inf)^2     rms_inf = sqrt(lr / 2wd)

Eq. 11 is the ratio of two weight RMS at a constant lr, one that starts at rms_0 and one, that of lr/m and m wd times m, at
m rms_0. Both follow noise of every step's own lr as

    square <- (1 - lr wd)^2 square + (1 - (1 - lr wd)^2) lr/2wd

which is how the scheduler here takes a varying lr. The paper has a form for that too, Eq. 13, which we have not read; this
one is ours. Its product of (1 - lr wd)^2 is in the difference of the two squares.

Eq. 11 has the narrow weights grow and decay with lr, not with s_t lr as they will. So on noise, relative updates are off by
some 20 % on the way where weights start near their steady state, and by more where they start far below it
(docs/decay.md). `self_consistent=True` takes s_t lr for them, and is exact there: ours too. Momentum and correlated gradients
are not modelled; the paper says that Eq. 11 overestimates the time to equilibrium.

The schedulers write a factor of their own into the groups, `group["width_warmup"]`, which the step multiplies lr with. So
they go with any schedule of `group["lr"]`, scheduler or loop: step them beside it.
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
from .width.steady_state import weight_rms_of


def exponential_warmup(t: float, m: float, steps: float) -> float:
    """Factor after t steps of a warm-up of so many, at width ratio m: 1/m at first, 1 at the end. Eq. 12.

    >>> [exponential_warmup(t, 4, 10) for t in (0, 5, 10, 20)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return float(m ** min(0.0, t / steps - 1))


def equilibrium_warmup(t: float, m: float, lr: float, weight_decay: float, rms: float) -> float:
    """Factor after t steps at constant effective lr and weight decay, for weights of root mean square `rms` at first. Eq. 11.

    >>> round(equilibrium_warmup(0, 4, 0.01, 0.1, 0.3), 6), round(equilibrium_warmup(10**5, 4, 0.01, 0.1, 0.3), 6)
    (0.25, 1.0)
    """
    remaining = (1 - lr * weight_decay) ** (2 * t)
    q = (rms / weight_rms_of(lr, weight_decay)) ** 2
    return math.sqrt((1 + (q - 1) * remaining) / (1 + (m**2 * q - 1) * remaining))


def ratios_of(name: str, optimizer: Optimizer, m: float | Sequence[float], roles: Sequence[Role]) -> list[float]:
    """Width ratio of each group of an `AdamW`, for a scheduler of that name.

    m: that of all groups of those roles, where the others have 1; or one per group

    Raises:
        TypeError: the optimizer is not an `AdamW`.
        ValueError: m is not positive, not one per group, or no group has such a role.
    """
    from .step.optimizer import AdamW

    if not isinstance(optimizer, AdamW):
        raise TypeError(
            f"{name}: {type(optimizer).__name__} does not multiply by group[{keys.WIDTH_WARMUP.name!r}]. Use "
            "lwadamw.AdamW, or the factor's function in a LambdaLR."
        )
    groups = optimizer.param_groups
    if isinstance(m, Sequence):
        ratios = [float(ratio) for ratio in m]
        if len(ratios) != len(groups):
            raise ValueError(f"{name}: m has {len(ratios)} values for {len(groups)} groups. Give one for each.")
    else:
        ratios = [float(m) if keys.ROLE.of(group) in roles else 1.0 for group in groups]
        if not any(keys.ROLE.of(group) in roles for group in groups):
            raise ValueError(
                f"{name}: no group has a role among {tuple(roles)}. Make groups with lwadamw.param_groups, or give m as "
                "a list, one number per group."
            )
    for i, ratio in enumerate(ratios):
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"{name}: m={ratio} of group {i} is not a positive number. It is width / base width.")
    return ratios


class WidthWarmup(LRScheduler):
    """What both warm-ups have in common. Call `step()` after each step of the optimizer."""

    def __init__(self, optimizer: Optimizer, ratios: list[float]) -> None:
        self.ratios = ratios
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Set the factors of the next step."""
        super().step(epoch)
        self._apply()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; also sets the factors.

        Raises:
            ValueError: the state is that of another number of groups.
        """
        saved, here = len(state_dict["ratios"]), len(self.ratios)
        if saved != here:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the state is of {saved} groups, this optimizer had {here}. Build "
                "its groups as they were."
            )
        super().load_state_dict(state_dict)
        self._apply()

    def factors(self) -> list[float]:
        """What the next step multiplies each group's lr with."""
        raise NotImplementedError

    def _apply(self) -> None:
        # Groups that were added later have no factor.
        for group, ratio, factor in zip(self.optimizer.param_groups, self.ratios, self.factors(), strict=False):
            if ratio != 1:
                group[keys.WIDTH_WARMUP.name] = factor


class ExponentialWidthWarmup(WidthWarmup):
    """lr times m^min(0, t/steps - 1): Kosson et al. 2510.19093, Eq. 12, who took half of the training for it.

    Args:
        optimizer: an `lwadamw.AdamW`.
        m: width ratio of all groups of those roles; or one per group, 1 for those that are not to be warmed up.
        steps: after which the factor is 1.
        roles: roles of `param_groups` that warm up, where m is one number.

    Raises:
        TypeError: the optimizer is not an `lwadamw.AdamW`.
        ValueError: m or steps is not positive, m not one per group, or no group has such a role.

    Example:
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
            raise ValueError(f"ExponentialWidthWarmup: steps={steps} is not positive. Give the length of the warm-up.")
        self.steps = steps
        super().__init__(optimizer, ratios_of("ExponentialWidthWarmup", optimizer, m, roles))

    def factors(self) -> list[float]:
        return [exponential_warmup(self.last_epoch, m, self.steps) for m in self.ratios]


class EquilibriumWidthWarmup(WidthWarmup):
    """lr times the equilibrium factor of Kosson et al. 2510.19093, Eq. 11, for lr and weight decay as they are at each step.

    Step it before other schedulers, so that it sees the lr of the step just taken. An lr or a weight decay that is a tensor
    is read on the host at each of its steps.

    Args:
        optimizer, m, roles: as of `ExponentialWidthWarmup`.
        rms: root mean square of the weights at first, one number or one per group; None: as they are now.
        self_consistent: let the weights in the formula follow the factor too, which Eq. 11 does not.

    Raises:
        TypeError, ValueError: as of `ExponentialWidthWarmup`, or not one rms per group.
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
                f"EquilibriumWidthWarmup: rms has {len(squares)} values for {len(groups)} groups. Give one for each."
            )
        self.self_consistent = self_consistent
        self.narrow, self.wide = squares, [ratio**2 * square for ratio, square in zip(ratios, squares, strict=True)]
        super().__init__(optimizer, ratios)

    def step(self, epoch: int | None = None) -> None:
        """Take account of the step just taken, and set the factors of the next one."""
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
            self.narrow[i] = _next_square(self.narrow[i], lr * factor, weight_decay)
            self.wide[i] = _next_square(self.wide[i], lr, weight_decay)

    def factors(self) -> list[float]:
        # Weights of 0 that nothing has moved have no RMS to compare: 1/m, as any others start with.
        return [
            math.sqrt(narrow / wide) if wide > 0 else 1 / m
            for m, narrow, wide in zip(self.ratios, self.narrow, self.wide, strict=True)
        ]


def _next_square(square: float, lr: float, weight_decay: float) -> float:
    kept = (1 - lr * weight_decay) ** 2
    # (1 - kept) lr/2wd, which has a limit without decay.
    return kept * square + lr**2 * (1 - lr * weight_decay / 2)


@torch.no_grad()
def _mean_square(params: Sequence[torch.Tensor]) -> float:
    total = sum(float(p.detach().abs().double().square().sum()) for p in params)
    return total / max(sum(p.numel() for p in params), 1)
