"""The steady state of noise gradients: the weights of a real run, the formulas, and the verdicts of the monitor."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lwadamw import AdamW, Monitor, SteadyState
from lwadamw.width.steady_state import STEADY_TAUS, Elapsed, earliest_steady_step, next_mean_square, weight_rms_of
from tests.cases import train_on_noise


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.filterwarnings("error")
def test_noise_takes_weights_to_the_steady_state_that_the_monitor_shows(beta2):
    p = nn.Parameter(torch.randn(60, 60) * 0.2)
    optimizer = AdamW([p], lr=1e-2, weight_decay=1.0, betas=(0.9, beta2))
    monitor = Monitor(optimizer, every=20, spectrum_every=0)
    train_on_noise(optimizer, 500)
    late = [reading.columns for reading in monitor.readings][-10:]
    for name in ("rms_ratio", "update_ratio", "rotation_ratio"):
        assert np.mean([columns[name] for columns in late]) == pytest.approx(1, abs=0.1), name
    for columns in late:
        assert columns["weight_rms"] == pytest.approx(columns["expected_rms"], rel=0.04)


STEPS = 400
SCHEDULES = {
    "constant": lambda step: 2e-2,
    "warm-up and linear to 0": lambda step: 2e-2 * min(1, step / 50) * (1 - step / STEPS),
    "cosine to 0": lambda step: 1e-2 * (1 + math.cos(math.pi * step / STEPS)),
}


@pytest.mark.parametrize(("name", "beta1"), [*((name, 0.9) for name in SCHEDULES), ("cosine to 0", 0.0)])
def test_expected_rms_is_the_rms_of_noise_under_a_schedule(name, beta1):
    p = nn.Parameter(torch.randn(50, 50) * 0.4)
    optimizer = AdamW([p], weight_decay=1.0, betas=(beta1, 0.99))
    monitor = Monitor(optimizer, every=25, spectrum_every=0)
    train_on_noise(optimizer, STEPS, SCHEDULES[name])
    for reading in monitor.readings:
        columns = reading.columns
        assert columns["weight_rms"] == pytest.approx(columns["expected_rms"], rel=0.07), reading.step
    # With a falling lr, the steady state at the reading before the last is far below the weights. At the last step lr is 0,
    # so there is no steady state.
    falling = name != "constant"
    assert (monitor.readings[-2].columns["rms_ratio"] > 1.8) == falling
    assert np.isnan(monitor.latest.columns["rms_ratio"]) == falling


def test_elapsed_follows_a_simulation_of_white_noise_exactly():
    """The second moments of w and u follow a 2x2 matrix in float64, while lr and weight_decay change at every step."""
    generator = np.random.default_rng(0)
    elapsed, beta1 = Elapsed(), 0.9
    unit = (1 - beta1) / (1 + beta1)
    moments, square = np.diag([0.0, unit]), 0.7
    started = np.diag([square, unit])
    for _ in range(60):
        lr, wd = generator.uniform(0.01, 0.05), generator.uniform(0.1, 3)
        elapsed.advance(lr, wd, beta1)
        step = np.array([[1 - lr * wd, -lr * beta1], [0, beta1]])
        noise = np.outer([-lr, 1], [-lr, 1]) * (1 - beta1**2) * unit
        moments, started = step @ moments @ step.T + noise, step @ started @ step.T + noise
    assert elapsed.grown == pytest.approx(moments[0, 0])
    assert elapsed.cross == pytest.approx(moments[0, 1])
    assert math.exp(elapsed.log_kept) * square + elapsed.grown == pytest.approx(started[0, 0])


def test_a_steady_state_is_reached_where_its_formulas_say():
    steady, elapsed = SteadyState(1e-4, 0.1, 0.9), Elapsed()
    for _ in range(int(6 * steady.tau) // 10):
        elapsed.advance(1e-3, 0.1, 0.9)  # This lr is ten times larger, so these steps are 6 of its tau.
    assert elapsed.grown == pytest.approx(1e-3 / 0.2, rel=0.01)
    assert (steady.tau, steady.weight_rms) == (pytest.approx(1e5), pytest.approx(math.sqrt(1e-4 / 0.2)))
    assert SteadyState(1e-2, 1.0, 0.9).relative_update == pytest.approx(math.sqrt(2e-2 / 19))


# lr wd is 0.02 at full lr. So 3 tau take 150 steps from the first reading, which is after step 1.
VERDICTS = [
    (lambda s: 2e-2, 60, None, "not before step 151"),
    (lambda s: 2e-2, 1, None, "not before step 2"),
    (lambda s: 2e-2, 60, 151, "not before step 151"),
    (lambda s: 2e-2, 60, 150, "never in this run"),
    (lambda s: 2e-2, 200, None, "steady from step 151"),
    (lambda s: 2e-2, 200, 200, "steady from step 151"),
    # After 100 steps of warm-up, 1.68 tau have passed and lr is 0.0333. If lr goes on to rise, the other 1.32 tau take 33.8
    # steps.
    (lambda s: s / 3000, 100, None, "not before step 134"),
    (lambda s: 2e-2 * (s < 50), 100, None, "never in this run"),
    (lambda s: 2e-2 if s <= 200 else 2e-2 * 0.9 ** (s - 200), 300, 300, "steady from step 151 to step 200"),
    (lambda s: 2e-2 if s <= 200 or s > 240 else 1e-3, 400, 400, "steady from step 151"),
]


@pytest.mark.parametrize(("schedule", "steps", "length", "verdict"), VERDICTS)
def test_the_verdict_says_when_weights_are_steady(schedule, steps, length, verdict):
    p = nn.Parameter(torch.randn(10, 10) * 0.1)
    q = nn.Parameter(torch.randn(10))
    optimizer = AdamW([{"params": [("p", p)]}, {"params": [("q", q)], "weight_decay": 0.0}], weight_decay=1.0)
    monitor = Monitor(optimizer, every=20, spectrum_every=0, steps=length)
    train_on_noise(optimizer, steps, schedule)
    assert monitor.verdicts == {"p": verdict, "q": "no decay"}
    decayless = {name: values[1] for name, values in monitor.latest.columns.items()}
    known = {"weight_rms", "relative_update", "rotation"}
    assert {name for name, value in decayless.items() if not math.isnan(value)} == known


def test_a_weight_decay_that_starts_later_counts_from_its_start():
    p = nn.Parameter(torch.randn(50, 50) * 0.1)
    optimizer = AdamW([p], lr=2e-2, weight_decay=0.0)
    monitor = Monitor(optimizer, every=10, spectrum_every=0)
    train_on_noise(optimizer, 50)
    assert np.isnan(monitor.latest.columns["expected_rms"])
    optimizer.param_groups[0]["weight_decay"] = 1.0
    train_on_noise(optimizer, 20)
    columns = monitor.latest.columns
    assert columns["taus"] == pytest.approx([0.4])
    assert columns["weight_rms"] == pytest.approx(columns["expected_rms"], rel=0.1)
    assert list(monitor.verdicts.values()) == ["not before step 200"]


def test_the_earliest_steady_step_is_a_lower_bound_for_a_linear_warm_up():
    warm = np.minimum(np.arange(1, 4001) / 1000, 1) * 1e-3
    truth = 1 + int(np.searchsorted(np.cumsum(warm), STEADY_TAUS))
    for step in (50, 500, 999, 2000, 3000):
        taus, rate = warm[:step].sum(), warm[step - 1]
        bound = earliest_steady_step(step, *(np.array([x]) for x in (taus, rate, rate - warm[step - 2])))
        assert step < bound[0] <= truth + 1


@pytest.mark.parametrize("weight_decay", [0.0, 0.5, 5.0])
def test_next_mean_square_goes_to_the_steady_state_and_has_less_noise_than_elapsed(weight_decay):
    lr, square, elapsed = 0.02, 0.3, Elapsed()
    kept = (1 - lr * weight_decay) ** 2
    elapsed.advance(lr, weight_decay, beta1=0.0)
    assert next_mean_square(square, lr, weight_decay) - kept * square == pytest.approx(
        elapsed.grown * (1 - lr * weight_decay / 2)
    )
    if weight_decay:
        steady = weight_rms_of(lr, weight_decay) ** 2
        assert next_mean_square(steady, lr, weight_decay) == pytest.approx(steady, rel=1e-14)
        assert next_mean_square(square, lr, weight_decay) == pytest.approx(kept * square + (1 - kept) * steady)
