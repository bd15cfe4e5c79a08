"""Width warm-ups: the factors of the paper, under any schedule of lr, and the relative updates that they lead to."""

import io
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from lwadamw import AdamW, param_groups
from lwadamw.schedules import EquilibriumWidthWarmup, ExponentialWidthWarmup, equilibrium_warmup, exponential_warmup
from tests.cases import matrix_over_vector

M = 4.0

WITHOUT_GRADIENTS = pytest.mark.filterwarnings("ignore:lwadamw.AdamW. none of its")  # only the schedule is looked at


def _simulated(rates, m, weight_decay, rms):
    """Return the factors as the ratio of two weight RMS that are followed step by step (Kosson et al. 2510.19093)."""
    narrow, wide, out = rms**2, (m * rms) ** 2, []
    for lr in rates:
        out.append(math.sqrt(narrow / wide))
        kept = (1 - lr * weight_decay) ** 2
        narrow, wide = (kept * square + (1 - kept) * lr / (2 * weight_decay) for square in (narrow, wide))
    return out


def test_exponential_factor_at_hand_values():
    assert [exponential_warmup(t, 16, 8) for t in (0, 2, 4, 6, 8, 9)] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1]
    assert exponential_warmup(3, 1, 8) == 1


@pytest.mark.parametrize("m", [0.5, 1.0, 4.0, 16.0])
@pytest.mark.parametrize("rms", [0.01, 0.1, 1.0])
def test_equilibrium_factor_is_the_ratio_of_two_weight_rms(m, rms):
    lr, weight_decay = 0.02, 0.5
    expected = _simulated([lr] * 300, m, weight_decay, rms)
    found = [equilibrium_warmup(t, m, lr, weight_decay, rms) for t in range(300)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[0] == pytest.approx(1 / m)
    assert equilibrium_warmup(10**5, m, lr, weight_decay, rms) == pytest.approx(1)


def test_equilibrium_factor_of_weights_that_start_at_the_steady_state():
    lr, weight_decay = 0.02, 0.5
    factor = equilibrium_warmup(70, M, lr, weight_decay, math.sqrt(lr / (2 * weight_decay)))
    assert factor == pytest.approx((1 + (M**2 - 1) * 0.99**140) ** -0.5)


def _model():
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))


def _optimizer(backend="torch", rule="standard", **options):
    groups = param_groups(_model(), 4, rule, width=16, roles={"0.weight": "matrix"})
    return AdamW(groups, lr=1e-2, weight_decay=0.1, backend=backend, **options)


def _chained(optimizer):
    warmup = ExponentialWidthWarmup(optimizer, M, 6)
    return lr_scheduler.ChainedScheduler([warmup, lr_scheduler.ExponentialLR(optimizer, 0.8)])


def _beside(make):
    def build(optimizer):
        both = [make(optimizer), ExponentialWidthWarmup(optimizer, M, 6)]
        return type("Both", (), {"step": lambda self: [s.step() for s in both]})()

    return build


SCHEDULES = {
    "nothing": _beside(lambda o: type("Nothing", (), {"step": lambda self: None})()),
    "LambdaLR": _beside(lambda o: lr_scheduler.LambdaLR(o, lambda t: (t + 1) / 10)),
    "CosineAnnealingLR": _beside(lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=3e-3)),
    "OneCycleLR": _beside(lambda o: lr_scheduler.OneCycleLR(o, max_lr=5e-2, total_steps=20)),
    "SequentialLR": _beside(
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 8)], [4]
        )
    ),
    "ChainedScheduler": _chained,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("rule", "backend"), [("standard", "torch"), ("fan2025", "torch"), ("fan2025", "triton")])
def test_the_factor_multiplies_any_schedule_and_any_rule(name, rule, backend):
    plain, optimizer = _optimizer(rule=rule), _optimizer(backend, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch warns about epochs.
        theirs = None if name in ("nothing", "ChainedScheduler") else SCHEDULES[name](plain)
        ours = SCHEDULES[name](optimizer)
        for t in range(7):
            scaled = 1.0 if rule == "standard" else 1 / M
            assert matrix_over_vector(optimizer) == pytest.approx(scaled * exponential_warmup(t, M, 6), rel=1e-5)
            if theirs is not None:
                assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in plain.param_groups]
                plain.step()
                theirs.step()
            ours.step()


@pytest.mark.parametrize("tensor", [False, True])
def test_a_loop_that_assigns_learning_rates_keeps_the_factor(tensor, backend):
    optimizer = _optimizer(backend)
    warmup = ExponentialWidthWarmup(optimizer, M, 4)
    for t in range(6):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3 * (t + 1)) if tensor else 1e-3 * (t + 1)
        assert matrix_over_vector(optimizer) == pytest.approx(exponential_warmup(t, M, 4), rel=1e-5)
        warmup.step()
        assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([1e-3 * (t + 1)] * 2)


def test_the_decay_scales_with_the_factor():
    optimizer = _optimizer()
    ExponentialWidthWarmup(optimizer, M, 4)
    (matrix,) = [g for g in optimizer.param_groups if g["role"] == "matrix"]
    (p,) = matrix["params"]
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before * (1 - 1e-2 * 0.1 / M))


@pytest.mark.parametrize("decay", ["coupled", "independent"])
def test_equilibrium_scheduler_is_eq_11_at_a_constant_rate(decay):
    wd = 50.0 if decay == "coupled" else 0.5
    optimizer = AdamW(param_groups(_model(), 4, "standard", width=16, roles={"0.weight": "matrix"}), 1e-2, decay=decay)
    for group in optimizer.param_groups:
        group["weight_decay"] = wd if group["role"] == "matrix" else 0.0
    (i,) = [i for i, g in enumerate(optimizer.param_groups) if g["role"] == "matrix"]
    rms = float(optimizer.param_groups[i]["params"][0].detach().square().mean().sqrt())
    warmup = EquilibriumWidthWarmup(optimizer, M)
    for t in range(50):
        expected = equilibrium_warmup(t, M, 1e-2, 50.0, rms)
        assert optimizer.effective()[i]["lr"] == pytest.approx(1e-2 * expected, rel=1e-6)
        assert optimizer.effective()[1 - i]["lr"] == 1e-2
        matrix_over_vector(optimizer)
        warmup.step()


@WITHOUT_GRADIENTS
def test_equilibrium_scheduler_follows_a_learning_rate_that_varies():
    optimizer = _optimizer()
    warmup = EquilibriumWidthWarmup(optimizer, M, rms=0.05)
    rates = [1e-2 * min((t + 1) / 5, 1 - t / 80) for t in range(60)]
    found = []
    for lr in rates:
        for group in optimizer.param_groups:
            group.update(lr=lr, weight_decay=5.0)
        found.append(warmup.factors()[[g["role"] for g in optimizer.param_groups].index("matrix")])
        optimizer.step()
        warmup.step()
    np.testing.assert_allclose(found, _simulated(rates, M, 5.0, 0.05), rtol=1e-9)


@WITHOUT_GRADIENTS
def test_the_equilibrium_scheduler_without_decay_follows_the_growth_of_the_weights():
    optimizer = _optimizer()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    warmup = EquilibriumWidthWarmup(optimizer, [M, M], rms=0.05)
    for _ in range(9):
        optimizer.step()
        warmup.step()
    grown = 0.05**2 + 9 * 1e-4
    assert warmup.factors() == pytest.approx([math.sqrt(grown / (grown + (M**2 - 1) * 0.05**2))] * 2)
    zeros = EquilibriumWidthWarmup(_optimizer(), M, rms=0.0)
    assert sorted(zeros.factors()) == [1 / M, 1.0]


def _relative_updates(m, steps, rms, decaying, **warm):
    """Return the relative updates under noise gradients, without the decay, as means of 20 steps."""
    lr, wd = 1e-2 / m, 1.0 * m
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(24, 24) * rms)
    optimizer = AdamW([p], lr=lr, weight_decay=wd, betas=(0.9, 0.95))
    warmup = EquilibriumWidthWarmup(optimizer, [M], **warm) if warm else None
    relative = []
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * t / steps if decaying else 1.0)
        used = optimizer.effective()[0]
        before, p.grad = p.detach().clone(), torch.randn_like(p)
        optimizer.step()
        added = p.detach() - before * (1 - used["lr"] * wd)
        relative.append(float(added.norm() / before.norm()))
        if warmup is not None:
            warmup.step()
    return np.array(relative).reshape(-1, 20).mean(1)


@pytest.mark.parametrize("decaying", [False, True])
@pytest.mark.parametrize(
    ("rms", "self_consistent", "bound"),
    [(0.125, False, 0.25), (0.125, True, 0.05), (0.02, False, 0.7), (0.02, True, 0.05)],
)
def test_relative_updates_are_close_to_those_of_lr_over_m_with_m_times_decay(rms, self_consistent, bound, decaying):
    """At every time, (lr/m, m wd) and (lr, wd) with the factor have about the same. The RMS at steady state is 0.07."""
    mup = _relative_updates(M, 400, rms, decaying)
    off = _relative_updates(1.0, 400, rms, decaying, self_consistent=self_consistent) / mup - 1
    assert np.abs(off).max() < bound
    assert np.abs(off[0]) < 0.5 * np.abs(_relative_updates(1.0, 20, rms, decaying)[0] / mup[0] - 1)


@pytest.mark.parametrize("kind", [ExponentialWidthWarmup, EquilibriumWidthWarmup])
@pytest.mark.parametrize("first", ["optimizer", "warmup"])
def test_a_warmup_resumes_exactly(kind, first):
    def build():
        torch.manual_seed(0)
        optimizer = _optimizer()
        return optimizer, kind(optimizer, M, *([6] if kind is ExponentialWidthWarmup else []))

    def train(optimizer, warmup, steps):
        seen = []
        for _ in range(steps):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, 0.5)
            seen.append([float(e["lr"]) for e in optimizer.effective()])
            optimizer.step()
            warmup.step()
        return seen

    optimizer, warmup = build()
    train(optimizer, warmup, 3)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), warmup.state_dict()), file)
    file.seek(0)
    expected = train(optimizer, warmup, 4)
    resumed, other = build()
    states = torch.load(file, weights_only=True)
    for part, state in ((resumed, states[0]), (other, states[1]))[:: 1 if first == "optimizer" else -1]:
        part.load_state_dict(state)
        # The factor is right already after the first of the two is loaded.
        assert [float(e["lr"]) for e in resumed.effective()] == expected[0]
    assert train(resumed, other, 4) == expected


def test_a_checkpoint_without_a_warmup_does_not_remove_its_factor():
    state_dict = _optimizer().state_dict()
    optimizer = _optimizer()
    ExponentialWidthWarmup(optimizer, M, 6)
    optimizer.load_state_dict(state_dict)
    assert sorted(e["lr"] for e in optimizer.effective()) == [1e-2 / M, 1e-2]
    assert sorted(g["lr"] for g in optimizer.to_torch_state_dict()["param_groups"]) == [1e-2 / M, 1e-2]
    assert "width_warmup" not in optimizer.to_torch_state_dict()["param_groups"][0]


def test_each_group_has_its_own_width_ratio():
    a, b, c = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = AdamW([{"params": [p]} for p in (a, b, c)], lr=1.0)
    ExponentialWidthWarmup(optimizer, [1, 2, 8], 10)
    assert [e["lr"] for e in optimizer.effective()] == [1.0, 0.5, 0.125]
    assert "width_warmup" not in optimizer.param_groups[0]


def test_each_error_names_the_argument_and_the_remedy():
    optimizer = _optimizer()
    bare = AdamW([torch.nn.Parameter(torch.ones(2))])
    cases = [
        (TypeError, "ExponentialWidthWarmup: SGD does not multiply by group['width_warmup']. Use lwadamw.AdamW",
         lambda: ExponentialWidthWarmup(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1), M, 5)),
        (ValueError, "ExponentialWidthWarmup: no group has a role among ('matrix',). Make groups with lwadamw.param_groups",
         lambda: ExponentialWidthWarmup(bare, M, 5)),
        (ValueError, "ExponentialWidthWarmup: m has 3 values for 2 groups",
         lambda: ExponentialWidthWarmup(optimizer, [1, 2, 3], 5)),
        (ValueError, "ExponentialWidthWarmup: m=0.0 of group 1 is not a positive number. m is width / base width",
         lambda: ExponentialWidthWarmup(optimizer, [1, 0], 5)),
        (ValueError, "ExponentialWidthWarmup: steps=0 is not positive", lambda: ExponentialWidthWarmup(optimizer, M, 0)),
        (ValueError, "EquilibriumWidthWarmup: rms has 1 values for 2 groups",
         lambda: EquilibriumWidthWarmup(optimizer, M, rms=[0.1])),
        (ValueError, "ExponentialWidthWarmup.load_state_dict: the state is of 1 groups, this optimizer had 2 groups",
         lambda: ExponentialWidthWarmup(optimizer, M, 5).load_state_dict(
             ExponentialWidthWarmup(bare, [M], 5).state_dict())),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=re.escape(message)):
            call()
