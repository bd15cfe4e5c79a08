"""Options: the arguments of an optimizer that no parameter group holds, and the checks of all arguments of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..state import keys
from ..state.decay import law_of
from ..state.storage import check_options

BACKENDS: Final = (None, "triton", "torch")
NONFINITE: Final = ("skip", "raise", "pass")


@dataclass(frozen=True)
class Options:
    """The arguments of `lwadamw.AdamW` that are fixed for the whole optimizer. Read them from `optimizer.options`.

    An optimizer keeps its options for life. Its deepcopies and pickles have the same options. A checkpoint
    (`state_dict()`) does not contain them.

    Args:
        backend: which backend updates the parameters: None, "triton" or "torch". See `AdamW`.
        nonfinite: what happens to a step whose global gradient norm is not finite: "skip", "raise" or "pass".
            See `AdamW`.
        norms: whether every step measures the norms that `AdamW.norms()` returns.
        group: group keys and values that every new parameter group gets, unless the group has the key already. Only
            storage options and decay options that differ from their default are in it. So the groups and checkpoints of
            a plain AdamW have the keys of torch.optim.AdamW and no others.

    Raises:
        ValueError: `backend` or `nonfinite` is not one of the values above.

    Examples:
        >>> Options(backend="torch").norms
        True
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

    @classmethod
    def from_arguments(
        cls,
        *,
        backend: str | None,
        nonfinite: str,
        norms: bool,
        amsgrad: bool,
        foreach: bool | None,
        differentiable: bool,
        fused: bool | None,
        group: Mapping[str, Any],
    ) -> Options:
        """Check the arguments of `AdamW` against each other and build the options from them.

        Args:
            backend: as in `AdamW`.
            nonfinite: as in `AdamW`.
            norms: as in `AdamW`.
            amsgrad: as in `AdamW`. It is only checked.
            foreach: as in `AdamW`. It is only checked.
            differentiable: as in `AdamW`. It is only checked.
            fused: as in `AdamW`. It is only checked.
            group: all storage options and decay options by their group key, with or without their default value.

        Returns:
            The options. `Options.group` holds the values of `group` that differ from their default.

        Raises:
            ValueError: an argument has an unknown value, or two arguments exclude each other.
        """
        options = cls(backend, nonfinite, bool(norms), keys.given((*keys.STORAGE, *keys.LAW), group))
        if backend == "triton" and (foreach or differentiable or fused is False):
            asked = "foreach=True" if foreach else "differentiable=True" if differentiable else "fused=False"
            raise ValueError(
                f"backend='triton' excludes {asked}: {asked} asks for torch's own implementation. Drop one of the two."
            )
        check_options({**group, "foreach": foreach, "differentiable": differentiable, "amsgrad": amsgrad}, "")
        law_of(group)
        return options
