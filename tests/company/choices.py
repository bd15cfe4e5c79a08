"""Choices of the state machine: the values of hyperparameters, a random pick, and the form of a rule."""

import functools

import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule

NUMBERS = {
    "lr": (1e-3, 1e-2, 0.1, 0.0),
    "weight_decay": (0.0, 0.1, 1.0),
    "eps": (1e-8, 1e-4),
    "betas": ((0.9, 0.999), (0.9, 0.95), (0.5, 0.8), (0.0, 0.5)),
    "maximize": (False, True),
}


def act_rule(**strategies):
    """Make a rule of an act, which a step may follow at once."""

    def decorate(act):
        @functools.wraps(act)
        def act_and_step(self, then_step, **values):
            act(self, **values)
            if then_step:
                self._step([True] * len(self.world.held), True, 1.0)

        return rule(then_step=st.booleans(), **strategies)(act_and_step)

    return decorate


def pick(values):
    """Return one of the values, from torch's generator, which `build` seeds."""
    return values[int(torch.randint(len(values), ()))]
