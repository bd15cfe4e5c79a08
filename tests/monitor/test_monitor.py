"""A monitor attaches itself to an optimizer, changes nothing of the training, and refuses what it cannot monitor."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from lwadamw import AdamW, Monitor
from lwadamw.monitor.comparison import compare
from lwadamw.monitor.profile_file import load
from tests.cases import make_params, set_grads, train_on_noise


def test_training_is_the_same_with_a_monitor(backend, device):
    ours = make_params([(20, 30), (7,)], device)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    watched, plain = (AdamW(params, backend=backend, max_grad_norm=1.0) for params in (ours, theirs))
    monitor = Monitor(watched, every=2, spectrum_every=2)
    for _ in range(4):
        set_grads(ours, theirs)
        watched.step()
        plain.step()
    assert len(monitor.readings) == 3
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_remove_detaches_and_readings_stay():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    with Monitor(optimizer, every=1) as monitor:
        train_on_noise(optimizer, 2)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    train_on_noise(optimizer, 2)
    assert (monitor.step, len(monitor.readings), monitor.latest.step) == (2, 2, 2)
    monitor.remove()


def test_copies_and_checkpoints_of_the_optimizer_do_not_hold_the_monitor():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    saved = optimizer.state_dict()
    monitor = Monitor(optimizer, every=1)
    assert optimizer.state_dict() == saved
    train_on_noise(optimizer, 2)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        train_on_noise(other, 3)
    assert monitor.step == 2
    again = Monitor(other, every=1)
    train_on_noise(other, 1)
    assert again.latest.step == 6, "the copy goes on counting its steps"


def test_a_monitor_that_nobody_holds_is_freed_with_its_optimizer():
    optimizer = AdamW(make_params([(6, 5)]))
    monitor = Monitor(optimizer)
    seen = []
    weakly = weakref.ref(monitor, seen.append)
    del monitor, optimizer
    gc.collect()
    assert weakly() is None
    assert len(seen) == 1


def test_steps_with_a_closure_and_a_scaler_are_seen(device):
    model = nn.Linear(4, 3, device=device)
    optimizer = AdamW(model.parameters(), backend="triton")
    monitor = Monitor(optimizer, every=1)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(2, 4, device=device)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    loss = model(torch.randn(2, 4, device=device)).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert [reading.step for reading in monitor.readings] == [1, 2]
    assert (monitor.latest.columns["relative_update"] > 0).all()


class _Probe:
    """A probe that notes its calls and returns given columns."""

    def __init__(self, columns):
        self.columns, self.calls = columns, []

    def before_step(self):
        self.calls.append("before")

    def after_step(self):
        self.calls.append("after")
        return self.columns


def test_a_probe_is_asked_around_the_steps_with_a_spectrum():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    probe = _Probe({"gain": np.array([2.5])})
    monitor = Monitor(optimizer, every=2, spectrum_every=8, probe=probe)
    train_on_noise(optimizer, 9)
    assert [r.step for r in monitor.readings if "gain" in r.columns] == [1, 2, 4, 8]
    assert probe.calls == ["before", "after"] * 4
    assert monitor.readings[0].columns["gain"] == [2.5]
    probe.columns = {"gain": np.zeros(2)}
    with pytest.raises(ValueError, match=r"'gain' has shape \(2,\), 1 segments need \(1,\)"):
        train_on_noise(optimizer, 16)


def test_a_batch_becomes_a_probe():
    model = nn.Linear(5, 4, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    monitor = Monitor(optimizer, model, every=1, probe=torch.randn(7, 5))
    before = model.weight.detach().clone()
    train_on_noise(optimizer, 1)
    x = monitor.probe.batch
    gain = (x @ before.T).square().mean().sqrt() / x.square().mean().sqrt()
    assert monitor.latest.columns["gain"] == pytest.approx([gain.item()], rel=1e-4)


def test_readings_are_limited_and_each_one_is_announced():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    monitor = Monitor(optimizer, every=1, history=3)
    heard = []
    monitor.on_reading.append(heard.append)
    train_on_noise(optimizer, 5)
    assert [r.step for r in monitor.readings] == [3, 4, 5]
    assert [r.step for r in heard] == [1, 2, 3, 4, 5]
    assert heard[-1] is monitor.latest


def test_an_optimizer_or_argument_that_cannot_be_monitored_is_an_error_with_a_remedy():
    params = make_params([(6, 5)])
    optimizer = AdamW(params)
    with pytest.raises(TypeError, match=r"torch\.optim\.adamw\.AdamW does not measure its steps\. Use lwadamw\.AdamW"):
        Monitor(torch.optim.AdamW(params))
    with pytest.raises(RuntimeError, match="norms=False. Build it with norms=True"):
        Monitor(AdamW(params, norms=False))
    with pytest.raises(ValueError, match="every=0 is not a whole number >= 1"):
        Monitor(optimizer, every=0)
    with pytest.raises(ValueError, match="spectrum_every=-1 is not"):
        Monitor(optimizer, spectrum_every=-1)
    with pytest.raises(ValueError, match="steps=2.5 is not"):
        Monitor(optimizer, steps=2.5)
    with pytest.raises(ValueError, match="needs the model it is for. Give model="):
        Monitor(optimizer, probe=torch.randn(2, 5))
    with pytest.raises(ValueError, match="spectrum_every=0 is never asked"):
        Monitor(optimizer, probe=_Probe({}), spectrum_every=0)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_weights_that_become_nan_are_a_verdict_in_report_and_profile(tmp_path):
    model = nn.ModuleDict({f"w{i}": nn.Linear(4, 4, bias=False) for i in range(2)})
    optimizer = AdamW(model.named_parameters(), lr=0.1, weight_decay=1.0)
    monitor = Monitor(optimizer, every=1)
    train_on_noise(optimizer, 40)
    with torch.no_grad():
        model["w1"].weight[0, 0] = float("nan")
    train_on_noise(optimizer, 3)
    assert monitor.verdicts["w0.weight"].startswith("steady from step")
    assert monitor.verdicts["w1.weight"] == "not finite from step 41"
    lines = monitor.report(120).splitlines()
    assert lines[2].endswith("1 of 2 not finite from step 41"), "the line of the role says so too"
    monitor.save(tmp_path / "run.json")
    assert [x.verdict for x in load(tmp_path / "run.json").segments] == ["steady", "not finite"]


def test_a_tensor_without_elements_is_finite():
    optimizer = AdamW([("empty", nn.Parameter(torch.empty(0, 3))), ("w", nn.Parameter(torch.ones(2, 2)))])
    monitor = Monitor(optimizer, every=1)
    train_on_noise(optimizer, 1)
    assert not any("not finite" in verdict for verdict in monitor.verdicts.values())


@pytest.mark.parametrize("law", [{"amsgrad": True}, {"decay": "huber"}], ids=lambda law: next(iter(law)))
def test_nothing_is_predicted_where_no_law_holds(law, tmp_path):
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([("w", p)], lr=0.1, weight_decay=1.0, **law)
    monitor = Monitor(optimizer, every=1)
    train_on_noise(optimizer, 40)
    assert monitor.verdicts == {"w": "not known: amsgrad" if "amsgrad" in law else "not known: decay='huber'"}
    columns = monitor.latest.columns
    assert all(np.isnan(columns[name]).all() for name in ("steady_rms", "expected_rms", "rotation_ratio", "taus"))
    assert np.isfinite(columns["weight_rms"]).all()
    monitor.save(tmp_path / "run.json")
    profile = load(tmp_path / "run.json")
    assert {finding.verdict for finding in compare(profile, profile).findings} == {"no prediction"}


@pytest.mark.parametrize("law", [{"amsgrad": True}, {"decay": "huber"}], ids=lambda law: next(iter(law)))
def test_nothing_is_predicted_any_more_once_a_group_has_another_law(law):
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([("w", p)], lr=0.1, weight_decay=1.0)
    monitor = Monitor(optimizer, every=1)
    train_on_noise(optimizer, 40)
    assert monitor.verdicts["w"].startswith("steady from step")
    optimizer.param_groups[0].update(law)
    train_on_noise(optimizer, 1)
    assert monitor.verdicts["w"].startswith("not known")
    assert np.isnan(monitor.latest.columns["rms_ratio"]).all()


def test_a_parameter_that_others_have_made_larger_is_measured_with_its_new_size(backend, device):
    (p,) = make_params([(6, 5)], device)
    optimizer = AdamW([("w", p)], lr=0.1, backend=backend)
    monitor = Monitor(optimizer, every=1)
    train_on_noise(optimizer, 2)
    p.grad, p.data = None, torch.randn(24, 5, device=device)
    del optimizer.state[p]
    train_on_noise(optimizer, 1)
    assert monitor.latest.columns["weight_rms"][0] == pytest.approx(float(p.detach().double().square().mean().sqrt()))


def test_a_profile_has_the_peak_learning_rate_after_a_decay_to_zero(tmp_path):
    for scheduled in (True, False):
        (p,) = make_params([(6, 5)])
        optimizer = AdamW([{"params": [("w", p)], "width_lr_mult": 0.5}], lr=0.1, weight_decay=1.0)
        if scheduled:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        monitor = Monitor(optimizer, every=1)
        train_on_noise(optimizer, 2)
        optimizer.param_groups[0]["lr"] = 0.0
        train_on_noise(optimizer, 1)
        monitor.save(tmp_path / "run.json")
        assert load(tmp_path / "run.json").base["lr"] == pytest.approx(0.1)
