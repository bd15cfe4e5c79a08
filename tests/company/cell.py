"""Cell: one act of others on one backend and one storage, and what the optimizer does about it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from lwadamw.state import keys
from lwadamw.state.combinations import COMBINATIONS
from tests.company.storages import COLUMNS, gradient, options_of, weights
from tests.company.world import World

FOLLOWED, REFUSED, NOT_SEEN = "followed", "refused", "not seen"

# On the interpreter the other columns run with `-m matrix`.
_QUICK = ("plain fp32", "remainder")


@dataclass
class Row:
    """What others do.

    Attributes:
        name: the act, as the table names it.
        act: does it to a `Cell`. It returns nothing, or what has to be called instead of the next step.
        outcome: what happens, from backend and column. "" if the act cannot be done to this storage.
        match: the start of the error message, where the act is refused.
        error: the type of the error.
        shapes: the shapes of the parameters, from the column.
        options: more group keys.
    """

    name: str
    act: Callable
    outcome: Callable[[str, str], str]
    match: str = ""
    error: object = RuntimeError
    shapes: Callable[[str], tuple] = lambda column: (_shape_of(column),)
    options: dict = field(default_factory=dict)


def _shape_of(column):
    """Return a shape whose moments are kept as the column says."""
    return (64, 64) if column == "8-bit" else (6, 6)


class Cell:
    """An optimizer on one backend, of one storage, that has taken a step.

    Attributes:
        world: the world of the optimizer.
        held: its first parameter.
    """

    def __init__(self, row, backend, column):
        c = COMBINATIONS[COLUMNS[column]]
        self.row, self.backend, self.column = row, backend, column
        self.dtype = c.param
        self.world = World(backend)
        hyperparameters = {"lr": 0.01, "weight_decay": 0.1, "betas": [0.9, 0.95]}
        params = [(f"w{i}", self.world.parameter(weights(s, c.param))) for i, s in enumerate(row.shapes(column))]
        self.world.add_group(params, **{**hyperparameters, **options_of(COLUMNS[column]), **row.options})
        self.held = self.world.held[0]
        self.give_all()
        self.world.step()

    def give_all(self, dtype=None):
        """Give new gradients to every parameter that is not frozen."""
        for h in self.world.held:
            if h.place is not None and h.p.requires_grad:
                self.world.give(h, gradient(h.p.shape, dtype or h.p.dtype))

    def clear(self):
        """Clear all gradients."""
        for h in self.world.held:
            for attribute in keys.GRAD_ATTRIBUTE.values:
                if getattr(h.p, attribute, None) is not None:
                    setattr(h.p, attribute, None)


def run(row, backend, column):
    """Let others act, and assert that the outcome is what the table says."""
    cell, outcome = Cell(row, backend, column), row.outcome(backend, column)
    cell.clear()
    instead = row.act(cell)
    if instead is not None:
        instead()
    elif outcome == REFUSED:
        if all(cell.world.gradient(h) is None for h in cell.world.held):
            cell.give_all()
        cell.world.assert_refused(row.match, row.error)
    else:
        cell.give_all()
        cell.world.step()


def cases():
    """Return a pytest parameter for every cell: every row with every backend and every column."""
    from tests.company.rows import ROWS

    for row in ROWS:
        for backend in ("torch", "triton"):
            for column in COLUMNS:
                marks = [pytest.mark.matrix] if backend == "triton" and column not in _QUICK else []
                if row.outcome(backend, column):
                    yield pytest.param(row, backend, column, marks=marks, id=f"{row.name}-{backend}-{column}")
