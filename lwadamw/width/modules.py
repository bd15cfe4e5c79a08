"""Modules as data: what a recipe gives to the embedding, the head, routers, norms, biases and experts, within their roles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from .scale import Multipliers, Scale

Kind = Literal["embedding", "head", "router", "norm", "bias", "expert"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
# The role that the parameters of a kind have.
_ROLES: Final[Mapping[str, str]] = {
    "embedding": "vector",
    "norm": "vector",
    "bias": "vector",
    "head": "output",
    "router": "output",
    "expert": "matrix",
}


@dataclass(frozen=True, slots=True)
class Module:
    """What a recipe gives one kind of module: constants that do not depend on the width, and exponents of its own.

    Args:
        lr: factor on the learning rate.
        wd: factor on the weight decay. None: 1.
        eps: factor on epsilon.
        scale: exponents of the width ratio in place of those of the role. None: those of the role. Norms and embeddings have no
            weight decay under most rules. `scale=Scale()` gives them the base weight decay, times `wd`, at every width.

    Raises:
        ValueError: a factor is not a finite number >= 0, or lr is 0.

    Examples:
        >>> Module(lr=10.0).on(Multipliers(0.5, 2.0, 1.0))
        Multipliers(lr=5.0, wd=2.0, eps=1.0)
    """

    lr: float = 1.0
    wd: float | None = None
    eps: float = 1.0
    scale: Scale | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "wd", "eps"):
            value = getattr(self, name)
            if name == "wd" and value is None:
                continue
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"Module: {name}={value!r} is not a finite number >= 0. Give a factor, such as 1.0.")
        if self.lr == 0:
            raise ValueError(
                "Module: lr=0 would freeze the module. Give a factor > 0, or set requires_grad=False on its parameters."
            )

    def on(self, multipliers: Multipliers) -> Multipliers:
        """Return multipliers times the factors."""
        by = (self.lr, 1.0 if self.wd is None else self.wd, self.eps)
        return Multipliers(*(a * b for a, b in zip(multipliers, by, strict=True)))


def check_modules(modules: Mapping[Any, object], scales: Mapping[str, Scale], where: str) -> None:
    """Raise an error if these are not modules by kind, or if they ask for something that the rule does not allow.

    Args:
        modules: what was given.
        scales: exponents of the rule by role.
        where: the name of the argument, for the message.

    Raises:
        ValueError: a key is no kind, or a factor on a weight decay that the rule does not have.
        TypeError: a value is no `Module`.
    """
    for kind, module in modules.items():
        if kind not in KINDS:
            raise ValueError(f"{where}: unknown kind of module {kind!r}. Kinds are {', '.join(KINDS)}.")
        if not isinstance(module, Module):
            raise TypeError(
                f"{where}[{kind!r}] is {type(module).__name__}. Give a lwadamw.Module, like lwadamw.Module(lr=10.0)."
            )
        scale = module.scale or scales[_ROLES[kind]]
        if module.wd and scale.wd is None:
            raise ValueError(
                f"{where}[{kind!r}]: wd={module.wd:g} is a factor, but the rule gives this kind no weight decay. For the base "
                f"weight decay times {module.wd:g} at every width, give lwadamw.Module(wd={module.wd:g}, "
                "scale=lwadamw.Scale(wd=0.0)) with the other exponents of its role."
            )
