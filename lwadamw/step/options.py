"""Options: what an optimizer was built with that no parameter group holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

BACKENDS: Final = (None, "triton", "torch")
NONFINITE: Final = ("skip", "raise", "pass")


@dataclass(frozen=True)
class Options:
    """Settled when the optimizer is built, and kept in copies and pickles of it.

    Args:
        backend: None, "triton" or "torch".
        nonfinite: what becomes of a step whose norm to clip by is not finite: "skip", "raise" or "pass".
        norms: whether steps measure norms.
        group: keys that a new group gets where it does not have them; those with their default value are left out, so
            that a plain AdamW's checkpoints are those of torch.

    Raises:
        ValueError: backend or nonfinite is not one of the values above.
    """

    backend: str | None = None
    nonfinite: str = NONFINITE[0]
    norms: bool = True
    group: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is not one of {', '.join(map(repr, BACKENDS))}.")
        if self.nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite={self.nonfinite!r} is not one of {', '.join(map(repr, NONFINITE))}.")
