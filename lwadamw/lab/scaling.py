"""Runs in which more than the width changes: width with depth, and batch size with horizon."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from .arms import arm_rule
from .study import Training
from .training import Settings


@dataclass(frozen=True, slots=True)
class Deeper(Training):
    """The full setting of a run whose depth differs from the proxy's. `Training` has the other fields.

    Args:
        base_depth: number of blocks of the proxy.
    """

    base_depth: int = 2

    def shared(self) -> Training:
        """Return a setting that is equal for arms that differ in depth exponents only, where the depth is the proxy's."""
        if self.depth != self.base_depth:
            return self
        return replace(self, arm=self.arm.partition("+")[0])

    @property
    def settings(self) -> Settings:
        """The settings for `Run`, with the rule of the arm."""
        names = {field.name for field in fields(Settings)} - {"rule"}
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return Settings(rule=arm_rule(self.arm), **given)


def deeper(
    arms: Sequence[str], widths: Sequence[int], depths: Sequence[int], lrs: Sequence[float], seeds: int, **shared: Any
) -> list[Deeper]:
    """Return the runs of a study of width and depth. The first width and the first depth are the proxy's.

    Args:
        arms: a rule, or a rule with depth exponents like `kosson2025+completep`; see `arms.arm_rule`.
        widths: widths of the models.
        depths: numbers of blocks.
        lrs: base learning rates.
        seeds: the seeds 0 to seeds - 1 are used.
        shared: the other fields of `Settings`.
    """
    runs = []
    for seed, width, depth, lr, arm in itertools.product(range(seeds), widths, depths, lrs, arms):
        settings = Settings(depth=depth, lr=lr, seed=seed, base_width=widths[0], **shared)
        task = Training.of(arm, width, settings)
        given = {field.name: getattr(task, field.name) for field in fields(task)}
        runs.append(Deeper(**given, base_depth=depths[0]))
    return runs


def horizons(
    cells: Sequence[tuple[int, int]],
    weight_decays: Sequence[float],
    seeds: int,
    *,
    width: int,
    lr: float,
    **shared: Any,
) -> list[Training]:
    """Return the runs of a study of batch size and horizon at one width and one learning rate.

    Args:
        cells: pairs of windows per step and number of steps.
        weight_decays: weight decays.
        seeds: the seeds 0 to seeds - 1 are used.
        width: width of the model.
        lr: learning rate.
        shared: the other fields of `Settings`.
    """
    return [
        Training.of(
            "standard",
            width,
            Settings(batch=batch, steps=steps, lr=lr, weight_decay=decay, seed=seed, base_width=width, **shared),
        )
        for seed, (batch, steps), decay in itertools.product(range(seeds), cells, weight_decays)
    ]


_SHORT: Final = {"context": 64, "batch": 8, "steps": 100, "cooldown": 0.2, "weight_decay": 0.3125}
_LRS: Final = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
_ARMS: Final = ("kosson2025", "kosson2025+completep")
_SEEDS: Final = 4
# Windows per step and steps. Each batch size has three horizons, and most numbers of tokens have several batch sizes.
_CELLS: Final = tuple(itertools.product((4, 8, 16, 32), (75, 150, 300)))
_DECAYS: Final = (0.027, 0.08, 0.24, 0.72, 2.16, 6.48, 19.4)


def deep_runs() -> list[Deeper]:
    """Return the runs of width and depth in docs/scaling.md, those of the first seed first."""
    runs = [
        *deeper(_ARMS, (32,), (2, 4, 8), _LRS, _SEEDS, **_SHORT),
        *deeper(_ARMS, (32, 64), (2, 4, 8), _LRS[1:], _SEEDS, **_SHORT),
    ]
    return sorted(dict.fromkeys(runs), key=lambda run: run.seed)


def horizon_runs() -> list[Training]:
    """Return the runs of batch size and horizon in docs/scaling.md, those of the first seed first."""
    return horizons(_CELLS, _DECAYS, _SEEDS, width=32, lr=0.01, depth=2, context=64, cooldown=0.2)
