"""AdamW for width scaling: one fused Triton step for all parameter groups, with width rules and norms inside."""

from .backends import effective
from .groups import Groups, param_groups
from .norms import Norms
from .optimizer import AdamW
from .roles import Matrix, Output, register_role
from .rules import RULES, Rule, Scale
from .summary import summary

__all__ = [
    "RULES",
    "AdamW",
    "Groups",
    "Matrix",
    "Norms",
    "Output",
    "Rule",
    "Scale",
    "effective",
    "param_groups",
    "register_role",
    "summary",
]
__version__ = "0.1.0"
