"""A monitor watches other optimizers next to ours: what it reads of them is what their steps did."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lwadamw import AdamW, Monitor, by_role, param_groups

ADAM_ALONE = ("steady_rms", "expected_rms", "rms_ratio", "steady_update", "update_ratio", "rotation_ratio")


def hybrid(other="sgd", every=2, **options):
    """A model, our optimizer for its vectors, another one for its matrices, and a monitor of both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16, bias=False), nn.LayerNorm(16))
    roles = by_role(param_groups(model, 8, fold=True, lr=0.05, weight_decay=0.1))
    ours = AdamW(roles["vector"])
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    theirs = kinds[other](roles["matrix"])
    return model, ours, theirs, Monitor(ours, every=every, others=[theirs], **options)


def backward(model, seed):
    for p in model.parameters():
        p.grad = None
    generator = torch.Generator().manual_seed(seed)
    model(torch.randint(0, 32, (8,), generator=generator)).square().sum().backward()


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_a_reading_has_what_the_step_of_the_other_optimizer_did(order):
    model, ours, theirs, monitor = hybrid()
    w = model[1].weight
    for seed in range(4):
        backward(model, seed)
        before, grad = w.detach().double().clone(), w.grad.double()
        for optimizer in (ours, theirs) if order == "ours first" else (theirs, ours):
            optimizer.step()
        assert monitor.step == seed + 1
    reading = monitor.latest
    assert (reading.step, len(monitor.readings)) == (4, 3)  # after steps 1, 2 and 4
    i = reading.names.index("1.weight")
    assert reading.roles[i] == "matrix"
    assert (reading.lr[i], reading.weight_decay[i]) == (
        theirs.param_groups[0]["lr"],
        theirs.param_groups[0]["weight_decay"],
    )
    assert reading.m[i] == 2
    after = w.detach().double()
    change = after - before
    assert reading.columns["weight_rms"][i] == pytest.approx(float(after.norm()) / 16)
    assert reading.columns["relative_update"][i] == pytest.approx(float(change.norm() / after.norm()))
    cosine = float((before * after).sum() / before.norm() / after.norm())
    assert reading.columns["rotation"][i] == pytest.approx(math.acos(cosine), rel=1e-6)
    norms = monitor.optimizer.norms()
    assert norms.grad[norms.names.index("1.weight")] == pytest.approx(float(grad.norm()))
    top = float(torch.linalg.matrix_norm(after, 2))
    assert reading.columns["top"][i] == pytest.approx(top, rel=0.05)


def test_columns_that_follow_from_adam_are_given_for_adamw_alone():
    for other, known in (("sgd", False), ("adamw", True)):
        model, ours, theirs, monitor = hybrid(other)
        for seed in range(2):
            backward(model, seed)
            ours.step()
            theirs.step()
        i = monitor.latest.names.index("1.weight")
        assert [not np.isnan(monitor.latest.columns[name][i]) for name in ADAM_ALONE] == [known] * len(ADAM_ALONE)
        assert monitor.latest.columns["taus"][i] > 0
        assert "matrix" in monitor.report()


def test_nothing_is_copied_at_steps_without_a_reading_and_nothing_after_remove():
    model, ours, theirs, monitor = hybrid(every=50, spectrum_every=0)
    seen = []
    for seed in range(3):
        backward(model, seed)
        theirs.register_step_pre_hook(lambda *_: seen.append(len(monitor.optimizer._before)))
        theirs.step()
        ours.step()
    assert monitor.step == 3
    assert seen[0] == 1
    assert not any(seen[1:])
    monitor.remove()
    backward(model, 3)
    theirs.step()
    ours.step()
    assert monitor.step == 3


def test_a_step_that_one_optimizer_leaves_out_is_over_when_the_next_begins():
    model, ours, theirs, monitor = hybrid(every=1)
    backward(model, 0)
    ours.step()
    backward(model, 1)
    ours.step()
    theirs.step()
    assert monitor.step == 2
    assert "1.weight" in monitor.latest.names


def test_a_reading_has_the_present_weights_of_an_optimizer_that_left_its_step_out():
    model, ours, theirs, monitor = hybrid("adamw", every=1)
    for seed in range(3):
        backward(model, seed)
        ours.step()
        theirs.step()
    weight = model[1].weight
    with torch.no_grad():
        weight.mul_(3)
    for seed in range(3, 5):  # the step of seed 3 is over when that of seed 4 begins
        backward(model, seed)
        ours.step()
    reading = monitor.latest
    row = reading.names.index("1.weight")
    assert reading.step == 4
    assert reading.columns["weight_rms"][row] == pytest.approx(weight.double().square().mean().sqrt().item())
    assert math.isnan(reading.columns["relative_update"][row]), "it has taken no step"


def test_a_resumed_hybrid_run_goes_on_with_what_the_monitor_knew():
    def run(steps, monitor_state=None, states=None, model_state=None, first=0):
        model, ours, theirs, monitor = hybrid("adamw", every=1)
        if states:
            model.load_state_dict(model_state)
            ours.load_state_dict(states[0])
            theirs.load_state_dict(states[1])
            monitor = (monitor.remove(), Monitor(ours, every=1, others=[theirs]))[1]
            monitor.load_state_dict(monitor_state)
        for seed in range(first, first + steps):
            backward(model, seed)
            ours.step()
            theirs.step()
        return model, ours, theirs, monitor

    straight = run(6)[3].latest
    model, ours, theirs, monitor = run(3)
    kept = (monitor.state_dict(), (ours.state_dict(), theirs.state_dict()), model.state_dict())
    resumed = run(3, *kept, first=3)[3].latest
    for name in ("weight_rms", "expected_rms", "taus", "relative_update"):
        np.testing.assert_array_equal(resumed.columns[name], straight.columns[name])


@pytest.mark.parametrize(
    ("others", "error", "message"),
    [
        (lambda p: [object()], TypeError, "has no step hooks"),
        (lambda p: [AdamW([("other", nn.Parameter(torch.ones(2)))])], ValueError, "a Monitor of its own"),
        (lambda p: [torch.optim.SGD([("w", p)])], ValueError, "group 0 and in group 1"),
        (lambda p: [torch.optim.SGD([("w", nn.Parameter(torch.ones(2)))])], ValueError, "that is called 'w'"),
    ],
)
def test_others_that_cannot_be_watched_are_refused(others, error, message):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        Monitor(AdamW([("w", p)]), others=others(p))
