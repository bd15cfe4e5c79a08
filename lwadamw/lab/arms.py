"""Arms: the width rules that a study compares with each other."""

from __future__ import annotations

from dataclasses import replace

from lwadamw.width.depth import DEPTHS
from lwadamw.width.rules import RECIPES, RULES, Rule, Scale, get_rule, unknown_rule


def arm_rule(arm: str) -> Rule:
    """Return the rule of an arm.

    Args:
        arm: the name of a rule in `lwadamw.RULES` or `lwadamw.RECIPES`, or the exponents of matrices, like
            `lr=-0.5,wd=0.25`. A plus sign and a name from `lwadamw.DEPTHS` may follow, like `kosson2025+completep`.

    Raises:
        ValueError: `arm` is neither, or there are no such depth exponents.
    """
    arm, plus, depth = arm.partition("+")
    if plus:
        if depth not in DEPTHS:
            raise ValueError(f"arm {arm}+{depth}: unknown depth exponents {depth!r}. There are {', '.join(DEPTHS)}.")
        return replace(arm_rule(arm), name=f"{arm}+{depth}", depth=DEPTHS[depth])
    if "=" not in arm:
        if arm not in RULES and arm not in RECIPES:
            raise ValueError(f"{unknown_rule(arm)} An arm can also be exponents, like lr=-0.5,wd=0.25.")
        return get_rule(arm)
    try:
        scale = Scale.parse(arm)
    except ValueError as error:
        raise ValueError(f"arm {error}; nor is it one of {', '.join((*RULES, *RECIPES))}.") from None
    return Rule(arm, matrix=scale, source="given")


def known_arm(arm: str) -> Rule | None:
    """Return the rule of an arm, or None if its name says nothing of a rule, as in a table of other people."""
    try:
        return arm_rule(arm)
    except ValueError:
        return None
