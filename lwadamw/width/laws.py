"""Laws as data: how base values follow batch size, tokens and parameters, with source and with how firmly each is known.

m_B, m_D and m_P are ratios of target over proxy: of the tokens per step, of all tokens, of the parameters. The number of steps
follows m_D / m_B. tau is 1/(lr weight_decay) steps, so tau as a share of the run follows m_B / (lr weight_decay m_D).

The laws disagree. All of them give lr * weight_decay proportional to m_B, and split it differently. If only the tokens change,
they give lr * weight_decay proportional to m_D^-1, or to m_D^-0.48.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

# tau as a share of the run that is best follows (tokens per parameter) to this power; 10 % and 90 % quantiles -0.529, -0.507.
TAU_TPP: Final = -0.52
# The tokens per parameter of the runs to which the power was fitted.
TAU_TPP_RANGE: Final = (20.0, 1280.0)
# The batch size that is best, and the one from which on a larger batch saves few steps, follow the tokens to these powers.
BATCH_BEST: Final = 0.38
BATCH_CRITICAL: Final = 0.47


class Powers(NamedTuple):
    """Exponents of m_B, m_D and m_P for one value."""

    batch: float = 0.0
    tokens: float = 0.0
    parameters: float = 0.0

    def at(self, batch: float, tokens: float, parameters: float) -> float:
        """Return the factor at ratios of the tokens per step, of all tokens, and of the parameters."""
        return float(batch**self.batch * tokens**self.tokens * parameters**self.parameters)


_SAME: Final = Powers()


@dataclass(frozen=True, slots=True)
class Law:
    """How base values follow batch size, tokens and parameters.

    Args:
        name: name of the law.
        lr: exponents of the learning rate.
        wd: exponents of the weight decay.
        eps: exponents of epsilon.
        beta: exponents of 1 - beta, for both betas.
        holds: what the law keeps constant, in words.
        source: the paper or the code.
        known: how firmly it is known, and how we know it.
    """

    name: str
    lr: Powers = _SAME
    wd: Powers = _SAME
    eps: Powers = _SAME
    beta: Powers = _SAME
    holds: str = ""
    source: str = ""
    known: str = ""

    @property
    def needs_parameters(self) -> bool:
        """Whether the law needs the number of parameters."""
        return any(powers.parameters for powers in (self.lr, self.wd, self.eps, self.beta))


LAWS: Final[Mapping[str, Law]] = {
    law.name: law
    for law in (
        Law(
            "constant_tau",
            wd=Powers(batch=1.0, tokens=-1.0),
            holds="tau as a share of the run, at the same lr",
            source="Wang & Aitchison 2405.13698",
            known="several papers agree on the share; we read notes on this one, not the paper",
        ),
        Law(
            "power_lines",
            wd=Powers(batch=1.0, tokens=-1.0 - TAU_TPP, parameters=TAU_TPP),
            holds="tau as a share of the run times (tokens per parameter)^0.52, at the same lr",
            source="Bergsma et al. 2505.13738",
            known="a fit to 20 to 1280 tokens per parameter, R^2 .975, muP, lr linear to 0; linear in the batch up to the "
            "critical batch; we read notes, not the paper",
        ),
        Law(
            "completedp",
            lr=Powers(batch=0.5, tokens=-0.5),
            wd=Powers(batch=0.5, tokens=-0.5),
            eps=Powers(batch=-0.5, tokens=0.5),
            beta=Powers(batch=1.0, tokens=-1.0),
            holds="tau as a share of the run, half of it in the lr; the memory of the moments in tokens of a fixed run",
            source="Complete(d)P 2512.22382, Table 1",
            known="one paper; we read its table, and found no code",
        ),
        Law(
            "nanochat",
            lr=Powers(batch=0.5),
            wd=Powers(batch=0.5, tokens=-1.0),
            holds="tau as a share of the run; lr as the root of the batch",
            source="nanochat, commit 92d63d4",
            known="one code that is in use, where the weight decay is that of Muon's matrices; we read it",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is, and how large its steps.

    Args:
        steps: number of steps.
        batch_tokens: tokens per step.
        parameters: number of parameters; None where it is not known.

    Raises:
        ValueError: a value is not positive.
    """

    steps: int
    batch_tokens: int
    parameters: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "parameters"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"Length: {name}={value} is not a positive number.")

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole run."""
        return self.steps * self.batch_tokens

    @property
    def tokens_per_parameter(self) -> float | None:
        """Tokens per parameter; None where the number of parameters is not known."""
        return None if self.parameters is None else self.tokens / self.parameters


class Factors(NamedTuple):
    """Factors on base values. `beta` multiplies 1 - beta of both betas."""

    lr: float
    wd: float
    eps: float
    beta: float


def factors(law: Law, base: Length, target: Length) -> Factors:
    """Return the factors that a law gives.

    Args:
        law: the law.
        base: the run of the proxy.
        target: the run of the target.

    Raises:
        ValueError: the law needs the parameters of both runs, and a run does not have them.

    Examples:
        >>> factors(LAWS["nanochat"], Length(1000, 1000), Length(1000, 4000))
        Factors(lr=2.0, wd=0.5, eps=1.0, beta=1.0)
    """
    parameters = 1.0
    if law.needs_parameters:
        if base.parameters is None or target.parameters is None:
            raise ValueError(
                f"law {law.name!r} follows the tokens per parameter. Give the number of parameters of both proxy and target."
            )
        parameters = target.parameters / base.parameters
    ratios = (target.batch_tokens / base.batch_tokens, target.tokens / base.tokens, parameters)
    return Factors(*(powers.at(*ratios) for powers in (law.lr, law.wd, law.eps, law.beta)))
