"""A rule applied to a model: the multipliers of each parameter, from width, depth and kind of module."""

from __future__ import annotations

from dataclasses import dataclass

from .blocks import DepthRatio
from .kinds import kind_of
from .modules import Module
from .roles import Decided
from .rules import Rule
from .scale import Multipliers, Scale


@dataclass(frozen=True, slots=True)
class Applied:
    """A rule, and which parameters are inside the residual blocks.

    Args:
        rule: the rule.
        in_depth: gives the depth ratio of a parameter, or None outside of the blocks.
    """

    rule: Rule
    in_depth: DepthRatio

    def scale(self, found: Decided) -> Scale:
        """Return the exponents of the width ratio of a parameter."""
        module = self._module(found)
        if module is not None and module.scale is not None:
            return module.scale
        if found.role == "vector" and self.rule.block_vector is not None and self.in_depth(found)[0] is not None:
            return self.rule.block_vector
        return self.rule[found.role]

    def multipliers(self, found: Decided, m: float | None) -> Multipliers:
        """Return the multipliers of a parameter.

        Args:
            found: the parameter.
            m: its width ratio; None where the multipliers do not depend on it.
        """
        multipliers = self.scale(found).at(1.0 if m is None else m)
        m_depth, _ = self.in_depth(found)
        if self.rule.depth is not None and m_depth is not None:
            by_depth = self.rule.depth.at(found.role, m_depth)
            multipliers = Multipliers(*(a * b for a, b in zip(multipliers, by_depth, strict=True)))
        module = self._module(found)
        return multipliers if module is None else module.on(multipliers)

    def branch(self, found: Decided) -> float | None:
        """Return the factor that the model has to put on the residual branch of a parameter; None where there is none."""
        m_depth, _ = self.in_depth(found)
        return None if self.rule.depth is None or m_depth is None else self.rule.depth.factor(m_depth)

    def remark(self, found: Decided) -> str:
        """Return what `summary` says of the depth and of the kind of module of a parameter, after the evidence of its role."""
        _, remark = self.in_depth(found)
        if found.role == "output" and self.branch(found) is not None:
            remark += ", not scaled: no source says how a router follows the depth"
        return remark if self._module(found) is None else f"{remark}; {kind_of(found)} of the rule"

    def _module(self, found: Decided) -> Module | None:
        kind = kind_of(found) if self.rule.modules else None
        return None if kind is None else self.rule.modules.get(kind)


def needs_depth(rule: Rule) -> bool:
    """Return whether a rule has to know the residual blocks, so that `param_groups` needs `base_depth`."""
    return rule.depth is not None or rule.block_vector is not None


def check_depth(rule: Rule, base_depth: object, depth: int | None) -> None:
    """Raise a ValueError if a rule and the arguments of `param_groups` for the depth do not belong together.

    Args:
        rule: the rule.
        base_depth: what was given for the depth of the proxy; None: nothing.
        depth: what was given for the depth of the model; None: nothing.

    Raises:
        ValueError: the rule needs the depth of the proxy, or can do nothing with it.
    """
    if base_depth is not None and rule.depth is None:
        raise ValueError(
            f"param_groups: base_depth is given, but the rule {rule.name!r} says nothing of the depth. Take "
            'rule="completep", or give your rule depth exponents: rule=dataclasses.replace(lwadamw.RULES["kosson2025"], '
            'depth=lwadamw.DEPTHS["completep"]). Or leave base_depth out.'
        )
    if base_depth is None and needs_depth(rule):
        raise ValueError(
            f"param_groups: the rule {rule.name!r} scales residual blocks, so it has to know the blocks. Give "
            "base_depth=<number of blocks of the proxy>; this model may have as many."
        )
    if base_depth is None and depth is not None:
        raise ValueError(f"param_groups: depth={depth} needs base_depth, the number of blocks of the proxy.")


def outside(found: Decided) -> tuple[None, str]:
    """Give no depth ratio, for a model whose depth is not scaled."""
    return None, ""
