"""What the callbacks of all frameworks share."""

import copy
import json

import torch
from torch import nn

from lwadamw import AdamW
from lwadamw.engines.callbacks import Watching


def _train(optimizer, steps):
    for _ in range(steps):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()


def _optimizer():
    return AdamW(nn.Linear(3, 4).named_parameters())


def test_a_reading_is_logged_once():
    callback, optimizer = Watching({"every": 2}, "norms/", roles_only=False), _optimizer()
    assert callback.unlogged() == {}
    callback.attach(optimizer)
    _train(optimizer, 1)
    assert callback.has_unlogged()
    assert "norms/weight_rms/weight" in callback.unlogged()
    assert not callback.has_unlogged()
    assert callback.unlogged() == {}


def test_a_second_training_logs_a_reading_of_the_same_step_as_the_last_one_of_the_first():
    callback = Watching({"every": 50}, "", roles_only=False)
    for _ in range(2):
        optimizer = _optimizer()
        callback.attach(optimizer)
        _train(optimizer, 3)
        assert callback.unlogged()
        callback.detach()


def test_the_state_of_a_checkpoint_is_for_the_training_that_resumes_and_not_for_the_next_one():
    first, optimizer = Watching({"every": 2}, "", roles_only=False), _optimizer()
    first.attach(optimizer)
    _train(optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())

    second, resumed = Watching({"every": 2}, "", roles_only=False), _optimizer()
    resumed.load_state_dict(saved)
    second.load_state_dict(first.state_dict())
    assert json.dumps(second.attach(resumed).state_dict()) == json.dumps(first.state_dict())  # NaN is not NaN
    second.detach()
    assert second.attach(_optimizer()).step == 0
