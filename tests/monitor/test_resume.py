"""A resumed run continues the monitor of its first part."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lwadamw import AdamW, Monitor
from tests.cases import make_params


def test_a_resumed_run_is_monitored_as_one_that_never_stopped(backend, device):
    """The learning rate warms up. The state of the monitor goes through JSON."""
    weights = [p.detach().clone() for p in make_params([(30, 20), (5, 40)], device)]
    grads = [[torch.randn_like(w) for w in weights] for _ in range(15)]

    def begin(values):
        params = [nn.Parameter(v.clone()) for v in values]
        groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1])], "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=0.35, weight_decay=1.0, backend=backend)
        return params, optimizer

    def watch(optimizer):
        return Monitor(optimizer, every=3, spectrum_every=6, steps=15)

    def train(params, optimizer, steps):
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.35 * min(1.0, (step + 1) / 6)
            for p, g in zip(params, grads[step], strict=True):
                p.grad = g
            optimizer.step()

    params, optimizer = begin(weights)
    whole = watch(optimizer)
    train(params, optimizer, range(8))
    saved, state = copy.deepcopy(optimizer.state_dict()), json.loads(json.dumps(whole.state_dict()))
    values = [p.detach().clone() for p in params]
    train(params, optimizer, range(8, 15))

    params, optimizer = begin(values)
    with pytest.raises(ValueError, match="the state is of step 8, and the optimizer has taken 0"):
        watch(optimizer).load_state_dict(state)
    optimizer.load_state_dict(saved)
    resumed = watch(optimizer)
    resumed.load_state_dict(state)
    train(params, optimizer, range(8, 15))
    assert [reading.step for reading in resumed.readings] == [9, 12, 15]
    assert resumed.verdicts == whole.verdicts
    assert "steady from step" in resumed.verdicts["a"]
    for ours, theirs in zip(resumed.readings, list(whole.readings)[-3:], strict=True):
        for column, expected in theirs.columns.items():
            if column in ("top", "second", "bulk", "calibrated_at"):
                continue
            np.testing.assert_allclose(ours.columns[column], expected, rtol=1e-5, err_msg=column)
    assert np.isfinite(resumed.readings[0].columns["top"][0])


def test_a_run_with_skipped_steps_is_resumed_between_two_readings():
    def begin():
        optimizer = AdamW([("w", nn.Parameter(torch.ones(4, 3)))], lr=0.02, weight_decay=1.0, max_grad_norm=1.0)
        return optimizer, Monitor(optimizer, every=5, spectrum_every=0)

    def train(optimizer, steps):
        for step in steps:
            optimizer.param_groups[0]["params"][0].grad = torch.full((4, 3), math.nan if step in (2, 7) else 1.0)
            optimizer.step()

    first, monitor = begin()
    unsaved = Monitor(first, every=5, spectrum_every=0)
    train(first, range(1, 9))
    saved, state = copy.deepcopy(first.state_dict()), json.loads(json.dumps(monitor.state_dict()))
    train(first, range(9, 11))
    for name, values in unsaved.latest.columns.items():  # to save changes nothing
        np.testing.assert_array_equal(monitor.latest.columns[name], values)
    optimizer, resumed = begin()
    optimizer.load_state_dict(saved)
    resumed.load_state_dict(state)
    train(optimizer, range(9, 11))
    for one in (monitor, resumed):
        assert one.step == one.latest.step == 10
        assert one.latest.columns["taus"] == pytest.approx([7 * 0.02])
    # The state of the resumed run fits its optimizer too, which has taken 8 steps.
    resumed.load_state_dict(resumed.state_dict())
    assert resumed.step == 10


def test_a_monitor_may_be_attached_before_the_optimizer_loads_its_checkpoint():
    def begin():
        optimizer = AdamW([("w", nn.Parameter(torch.ones(4, 3)))], lr=0.2, weight_decay=1.0)
        return optimizer, Monitor(optimizer, every=5, spectrum_every=0)

    def train(optimizer, steps):
        for _ in range(steps):
            optimizer.param_groups[0]["params"][0].grad = torch.randn(4, 3)
            optimizer.step()

    first, whole = begin()
    train(first, 12)
    saved, state = copy.deepcopy(first.state_dict()), whole.state_dict()
    for with_state in (False, True):
        optimizer, monitor = begin()
        optimizer.load_state_dict(copy.deepcopy(saved))
        if with_state:
            monitor.load_state_dict(state)
        train(optimizer, 8)
        assert [reading.step for reading in monitor.readings] == ([15, 20] if with_state else [13, 15, 20])
        assert monitor.latest.columns["taus"] == pytest.approx([0.2 * (19 if with_state else 7)])
    # A checkpoint of step 12 is loaded after step 20: what was seen of later steps does not count.
    optimizer.load_state_dict(copy.deepcopy(saved))
    train(optimizer, 1)
    assert [reading.step for reading in monitor.readings] == [13]
    monitor.remove()
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_a_monitor_attached_in_the_middle_of_a_run_reads_at_its_first_step_and_at_multiples_of_every():
    """Torch takes a step of its own on an empty state before it loads a checkpoint. The monitor does not count this step."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def begin():
        model = nn.Linear(3, 4)
        return model, AdamW(model.parameters())

    def train(model, optimizer, steps):
        for _ in range(steps):
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()

    model, optimizer = begin()
    train(model, optimizer, 5)
    saved = get_optimizer_state_dict(model, optimizer, options=options)

    model, optimizer = begin()
    monitor = Monitor(optimizer, every=4)
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    train(model, optimizer, 12)
    assert [reading.step for reading in monitor.readings] == [6, 8, 12, 16]
