"""AdamW for width scaling: one fused Triton step for all parameter groups, with width rules and norms inside."""

from .backends import effective
from .drift import DriftWarning, DriftWatch
from .equilibrium import SteadyState
from .groups import Groups, param_groups
from .monitor import Monitor
from .norms import Norms
from .optimizer import AdamW
from .probe import Probe
from .roles import Matrix, Output, register_role
from .rules import RULES, Rule, Scale
from .summary import summary

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
    "effective",
    "param_groups",
    "register_role",
    "summary",
]
__version__ = "0.1.0"
