"""Capture: what one step inside a CUDA graph reads, kept as long as the graph may be replayed."""

from __future__ import annotations

from .dynamic_table import DynamicTable
from .launches import Launches


class Capture:
    """The tables of one captured step.

    A graph replays its copies and launches with the addresses that they had in the capture. Uncaptured steps rewrite the
    plan's own dynamic table. So every captured step has a dynamic table of its own, which nobody rewrites.

    Attributes:
        dynamic: the dynamic table that the launches read.
        launches: the launches of the step.
        kept: whatever else the graph reads and nobody else may be keeping alive.
    """

    def __init__(self, dynamic: DynamicTable, launches: Launches) -> None:
        self.dynamic, self.launches = dynamic, launches
        self.kept: list[object] = []
