"""Runs against the relative update of their matrices in the steady state, instead of against the learning rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from lwadamw.width.rules import RECIPES, RULES
from lwadamw.width.steady_state import relative_update_of

from .arms import known_arm
from .outcomes import Outcomes

SWEPT: Final = "relative update"


def against_relative_update(found: Outcomes, proxy: int, beta1: float) -> Outcomes:
    """Return the runs with the relative update in place of the learning rate.

    The relative update is sqrt(2 lr wd (1 - beta1)/(1 + beta1)) (Kosson et al. 2305.17212), with the effective lr and wd that
    the rule gives a matrix at the width of the run. It is the value that a run settles to, so it says nothing of a run that is
    shorter than some tau. A rule that holds lr wd constant over width has the same relative update at every width.

    Args:
        found: the runs. Each arm is called like a rule, as `arms.arm_rule` reads it.
        proxy: the width at which effective values are base values.
        beta1: decay rate of the first moment of all runs.

    Raises:
        ValueError: an arm is no rule, a run has no weight decay, or beta1 is not in [0, 1).
    """
    if not 0 <= beta1 < 1:
        raise ValueError(
            f"--against relative-update: beta1={beta1} is not in [0, 1). Give the runs' --beta1, for instance 0.9."
        )
    rows = []
    for row in found.rows:
        rule = known_arm(row.arm)
        if rule is None:
            raise ValueError(
                f"--against relative-update: the arm {row.arm!r} is no rule, so nothing says how its lr and weight decay "
                f"follow the width. Rules are {', '.join((*RULES, *RECIPES))}. "
                "Rename the arm in the table to the rule that it followed."
            )
        if not row.weight_decay:
            raise ValueError(
                f"--against relative-update: a run of {row.arm!r} at width {row.width} has no weight decay, so its relative "
                "update does not settle. Leave it out, or name the column: --column weight_decay=NAME."
            )
        scale = rule.matrix.at(row.width / proxy)
        relative = float(relative_update_of(row.lr * scale.lr, row.weight_decay * scale.wd, beta1))
        rows.append(replace(row, lr=float(f"{relative:.6g}")))
    note = (
        f"Where it says lr below, read relative update: sqrt(2 lr wd (1-b1)/(1+b1)), with beta1 {beta1:g} and the effective lr "
        "and wd of a matrix. A drift of 0 means that the best runs of all widths have the same."
    )
    return replace(found, rows=tuple(rows), notes=(*found.notes, note), swept=SWEPT)
