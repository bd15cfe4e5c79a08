"""AdamW for width scaling: one fused Triton step for all parameter groups, with width rules and norms inside.

`lwadamw.schedules` has the width warm-ups, and `lwadamw.loggers` passes readings on to experiment trackers.

Everything is imported when it is first asked for. So `python -m lwadamw --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import loggers as loggers
    from . import schedules as schedules
    from .monitor.drift import DriftWarning, DriftWatch
    from .monitor.monitor import Monitor
    from .monitor.probe import Probe
    from .monitor.summary import summary
    from .state.groups import effective
    from .state.places import place_flat_shard
    from .state.reduction import reduce_sums
    from .step.norms import Norms
    from .step.optimizer import AdamW
    from .width.depth import DEPTHS, Depth
    from .width.groups import Groups, param_groups
    from .width.hybrids import by_role
    from .width.modules import Module
    from .width.rebinding import rebind
    from .width.registry import register_role
    from .width.rules import RECIPES, RULES, Rule, Scale
    from .width.specs import Matrix, Output
    from .width.steady_state import SteadyState

    kernels: Any  # compiled code has no types

__all__ = [
    "DEPTHS",
    "RECIPES",
    "RULES",
    "AdamW",
    "Depth",
    "DriftWarning",
    "DriftWatch",
    "Groups",
    "Matrix",
    "Module",
    "Monitor",
    "Norms",
    "Output",
    "Probe",
    "Rule",
    "Scale",
    "SteadyState",
    "by_role",
    "effective",
    "param_groups",
    "place_flat_shard",
    "rebind",
    "reduce_sums",
    "register_role",
    "summary",
]

# Module -> the public names that it defines.
_HOMES: Final = {
    "monitor.drift": ("DriftWarning", "DriftWatch"),
    "monitor.monitor": ("Monitor",),
    "monitor.probe": ("Probe",),
    "monitor.summary": ("summary",),
    "state.groups": ("effective",),
    "state.places": ("place_flat_shard",),
    "state.reduction": ("reduce_sums",),
    "step.norms": ("Norms",),
    "step.optimizer": ("AdamW",),
    "width.depth": ("DEPTHS", "Depth"),
    "width.groups": ("Groups", "param_groups"),
    "width.hybrids": ("by_role",),
    "width.modules": ("Module",),
    "width.rebinding": ("rebind",),
    "width.registry": ("register_role",),
    "width.rules": ("RECIPES", "RULES", "Rule", "Scale"),
    "width.specs": ("Matrix", "Output"),
    "width.steady_state": ("SteadyState",),
}
_HOME: Final = {name: module for module, names in _HOMES.items() for name in names}
_MODULES: Final = ("loggers", "schedules", "kernels", "monitor", "state", "step", "tables", "width")


if not TYPE_CHECKING:  # With this function, a type checker would accept any name.

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of the package, when it is first asked for."""
        if name in _HOME:
            value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        elif name in _MODULES:
            value = importlib.import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
