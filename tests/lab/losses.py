"""Outcomes of runs whose loss is a known function."""

from pathlib import Path

from lwadamw.lab.outcomes import Outcome

DATA = Path(__file__).parents[2] / "docs" / "data"
LRS = [0.0025 * 2**i for i in range(6)]


def rows_of(loss, *, arms=("a",), widths=(64, 128, 256), lrs=LRS, decays=(None,), seeds=(None,)):
    """Outcomes of `loss(arm, width, lr, wd, seed)`."""
    return [
        Outcome(arm, width, lr, wd, seed, loss(arm, width, lr, wd, seed))
        for arm in arms
        for width in widths
        for lr in lrs
        for wd in decays
        for seed in seeds
    ]
