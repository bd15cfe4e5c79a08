"""Arms: the width rules that a study compares with each other."""

from __future__ import annotations

from lwadamw.width.rules import RULES, Rule, Scale, get_rule


def arm_rule(arm: str) -> Rule:
    """Return the rule of an arm.

    Args:
        arm: the name of a rule in `lwadamw.RULES`, or the exponents of matrices, like `lr=-0.5,wd=0.25`.

    Raises:
        ValueError: `arm` is neither.
    """
    if "=" not in arm:
        return get_rule(arm)
    try:
        scale = Scale.parse(arm)
    except ValueError as error:
        raise ValueError(f"arm {error}; nor is it one of {', '.join(RULES)}.") from None
    return Rule(arm, matrix=scale, source="given")
