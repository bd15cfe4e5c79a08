"""AdamW for width scaling: one fused Triton step for all parameter groups, with width rules and norms inside.

`lwadamw.schedules` has the width warm-ups, and `lwadamw.loggers` passes readings on to experiment trackers.
"""

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
from .version import __version__ as __version__
from .width.groups import Groups, param_groups
from .width.hybrids import by_role
from .width.rebinding import rebind
from .width.registry import register_role
from .width.rules import RULES, Rule, Scale
from .width.specs import Matrix, Output
from .width.steady_state import SteadyState

__all__ = [
    "RULES",
    "AdamW",
    "DriftWarning",
    "DriftWatch",
    "Groups",
    "Matrix",
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
