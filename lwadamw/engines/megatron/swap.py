"""use: Megatron builds its optimizers with `lwadamw.AdamW`, until the swap is undone."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Final

from .fused_adam import FusedAdam, check_options

# The versions of megatron-core that the tests of this package run.
TESTED: Final = ("0.16.1", "0.19.2")

_CHOICE: Final = "megatron.core.optimizer"
_DISTRIBUTED: Final = "megatron.core.optimizer.distrib_optimizer"


class Swap:
    """What `use` has changed. It is a context manager that undoes the change, and so does `undo()`.

    Attributes:
        optimizer_class: the class that Megatron builds now.
    """

    def __init__(self, optimizer_class: type[FusedAdam], before: list[tuple[Any, str, Any]]) -> None:
        self.optimizer_class = optimizer_class
        self._before = before

    def undo(self) -> None:
        """Give Megatron the optimizer class back that it had. Optimizers that exist stay what they are."""
        while self._before:
            module, name, value = self._before.pop()
            setattr(module, name, value)

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def use(**options: Any) -> Swap:
    """Let Megatron build `lwadamw.AdamW` wherever it would build Adam. Call it before `get_megatron_optimizer`.

    This works with Transformer Engine, with apex, and with neither. Megatron's OptimizerConfig goes on to decide about learning
    rates, weight decay, clipping, the dtypes of moments and master weights.

    Args:
        options: `backend`, `decay`, `norms` and `peak_lr`, as in `lwadamw.AdamW`.

    Returns:
        A context manager whose exit undoes the swap. Without `with`, the swap stays.

    Raises:
        ModuleNotFoundError: megatron-core is not installed.
        RuntimeError: this version of megatron-core does not choose its optimizer where the tested versions do.
        ValueError: `max_grad_norm`, or decay="huber".
        TypeError: another option that is Megatron's to decide.

    Examples:
        >>> from lwadamw.engines import megatron
        >>> megatron.use(max_grad_norm=1.0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ValueError: max_grad_norm=1.0: Megatron clips by itself. Set clip_grad=1.0 in the OptimizerConfig.
    """
    check_options(options)
    version = _version()
    optimizer_class = type("FusedAdam", (FusedAdam,), {"preset": dict(options), "__module__": FusedAdam.__module__})
    wanted = {
        _CHOICE: {"Adam": optimizer_class, "USING_PYTORCH_OPTIMIZER": False},
        # With these flags Megatron keeps the step count in the groups, and the optimizer is one that it accepts.
        _DISTRIBUTED: {"Adam": optimizer_class, "HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True},
    }
    modules = {name: importlib.import_module(name) for name in wanted}
    missing = [f"{of}.{name}" for of, names in wanted.items() for name in names if not hasattr(modules[of], name)]
    if missing:
        raise RuntimeError(
            f"megatron-core {version} has no {missing[0]}, by which the tested versions ({', '.join(TESTED)}) choose their "
            "optimizer. Install one of them, or build lwadamw.engines.megatron.FusedAdam yourself."
        )
    if version not in TESTED:
        warnings.warn(
            f"lwadamw.engines.megatron was not tested with megatron-core {version}. The tested versions are "
            f"{', '.join(TESTED)}. Compare the first losses with those of Megatron's own optimizer.",
            stacklevel=2,
        )
    before = []
    for of, names in wanted.items():
        for name, value in names.items():
            before.append((modules[of], name, getattr(modules[of], name)))
            setattr(modules[of], name, value)
    return Swap(optimizer_class, before)


def _version() -> str:
    core = importlib.import_module("megatron.core")
    # megatron-core appends the commit of the git repository that it was started in.
    return str(getattr(core, "__version__", "unknown")).partition("+")[0]
