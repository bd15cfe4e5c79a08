"""Depth as data: how values follow the depth ratio m_L = depth / base depth, and what the model itself has to do.

The depth is the number of residual blocks. The exponents of a width rule are in `rules.py`. Both are multiplied: a matrix in a
block has the learning rate base * m^a * m_L^c.

    item                              CompleteP, Dey et al. 2505.01618, Table 1
    output of every residual branch   times m_L^-alpha, by the model
    matrices inside blocks            lr times m_L^(alpha - 1), eps times m_L^-alpha
    norms and biases inside blocks    lr times m_L^(alpha - 1), eps times m_L^-alpha
    embedding, final norm, head       unchanged

alpha = 1 is CompleteP. Then no learning rate and no weight decay depends on the depth, and what does the work is the factor in
the model. alpha = 1/2 is the other end of the range that the paper studies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .scale import Multipliers, Scale

_SAME: Final = Scale()


@dataclass(frozen=True, slots=True)
class Depth:
    """Exponents of the depth ratio m_L = depth / base depth for what is inside the residual blocks.

    What is outside of the blocks does not follow the depth: the embedding, the last norm, the head. Routers inside the blocks
    do not follow it either, because no source that we have read says how.

    Args:
        name: name of these exponents.
        branch: exponent of the factor on the output of every residual branch. The model has to apply this factor:
            x = x + m_L**branch * f(norm(x)).
        matrix: exponents of the matrices inside the blocks.
        vector: exponents of norms and biases inside the blocks.
        source: where the exponents are from.
        known: how firmly they are known.
        unknown: what the source does not say.

    Raises:
        ValueError: `branch` is not finite, or an exponent of the weight decay is None.

    Examples:
        >>> Depth("mine", branch=-1.0, matrix=Scale(eps=-1.0)).factor(4.0)
        0.25
    """

    name: str
    branch: float
    matrix: Scale = _SAME
    vector: Scale = _SAME
    source: str = ""
    known: str = ""
    unknown: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.branch):
            raise ValueError(f"Depth: exponent branch={self.branch} is not finite. Give a number, like -1.0.")
        for name in ("matrix", "vector"):
            if getattr(self, name).wd is None:
                raise ValueError(
                    f"Depth: {name} has the exponent wd=None, but only a width rule takes the decay away. Give wd=0.0."
                )

    def factor(self, m_depth: float) -> float:
        """Return the factor by which the model has to multiply the output of every residual branch.

        The factor is relative to the proxy. If the proxy has a factor of its own, the target has the product of both.

        Args:
            m_depth: depth ratio, depth / base depth; a positive number.

        Raises:
            ValueError: m_depth is not a positive, finite number.
        """
        _check_ratio(m_depth)
        return float(m_depth**self.branch)

    def at(self, role: str, m_depth: float) -> Multipliers:
        """Return the multipliers of a parameter inside a block.

        Args:
            role: its role. The role `output` (a router) does not follow the depth.
            m_depth: depth ratio, depth / base depth; a positive number.

        Raises:
            ValueError: m_depth is not a positive, finite number.
        """
        _check_ratio(m_depth)
        scale = {"matrix": self.matrix, "vector": self.vector}.get(role, Scale())
        return scale.at(m_depth)


def _check_ratio(m_depth: float) -> None:
    if not (math.isfinite(m_depth) and m_depth > 0):
        raise ValueError(f"Depth: depth ratio {m_depth} is not a positive number. It is depth / base depth.")


def completep(alpha: float = 1.0, name: str | None = None) -> Depth:
    """Return the depth exponents of CompleteP, or of another alpha.

    Source: Dey et al. 2505.01618, Table 1.

    Args:
        alpha: exponent of the factor on residual branches, from 0.5 to 1 in the paper. 1 is CompleteP.
        name: name of the exponents; None: it says alpha.

    Raises:
        ValueError: alpha is not from 0.5 to 1, the range for which the paper gives the table.

    Examples:
        >>> completep().factor(8.0), completep(0.5).at("matrix", 4.0).lr
        (0.125, 0.5)
    """
    if not 0.5 <= alpha <= 1:
        raise ValueError(
            f"completep: alpha={alpha} is outside of 0.5 to 1, for which Dey et al. give the exponents. Give a number in this "
            "range, or a lwadamw.Depth(...) of your own."
        )
    inside = Scale(lr=alpha - 1.0, eps=-alpha)
    return Depth(
        name or f"completep, alpha {alpha:g}",
        branch=-alpha,
        matrix=inside,
        vector=inside,
        source=f"Dey et al. 2505.01618, Table 1, alpha = {alpha:g}",
        known="one paper and its code, which agree on branches, lr and weight decay of hidden layers; "
        + ("the paper recommends this alpha" if alpha == 1 else "the paper recommends alpha = 1 instead"),
        unknown="routers and experts; eps outside of the blocks, which the table leaves alone and the code scales; the weight "
        "decay of all but hidden matrices, of which the table says nothing",
    )


DEPTHS: Final[Mapping[str, Depth]] = {
    "completep": completep(1.0, "completep"),
    "completep_half": completep(0.5, "completep_half"),
}
