"""Huber decay: the proximal step and the threshold, alike on both backends and for every storage type."""

import re

import numpy as np
import pytest
import torch

from lwadamw import AdamW
from tests.cases import assert_same_arithmetic, clone_params, make_params, set_grads
from tests.state.decays import PEAK, STORAGES, make

# On the interpreter the other storage types run with the slow tests.
QUICK = ("fp32, 8 bits", "bf16", "bf16, stochastic")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in STORAGES])
def test_huber_kernels_and_torch_store_alike(name, device):
    """Weights, thresholds and norms, for every way to keep a weight."""
    shapes = [(33, 128) if "8 bits" in name else (33, 64), (33,)]
    runs = [make(name, "huber", backend, device, shapes) for backend in ("torch", "triton")]
    for _ in range(3):
        set_grads(*(params for params, _ in runs))
        for _, optimizer in runs:
            optimizer.step()
    (ours, one), (theirs, two) = runs
    for p, q in zip(ours, theirs, strict=True):
        distance, size = (one.master_weight(p) - two.master_weight(q)).abs(), 1 + q.detach().abs().float()
        bound = 1e-5 * size
        assert (distance > bound).float().mean() < 2e-3
        # If the last digits differ, a number may be rounded to the neighbouring number or code: once per step.
        if name in ("bf16", "bf16, stochastic"):
            bound = bound + 3 * torch.finfo(p.dtype).eps * size
        if name == "bf16, kahan":  # its companion and its moments are rounded
            bound = bound + 3 * (torch.finfo(p.dtype).eps ** 2 * size + PEAK * torch.finfo(p.dtype).eps)
        if "8 bits" in name:
            bound = bound + 3 * PEAK * 0.05
        assert (distance <= bound).all()
        assert float(one.state[p]["huber_threshold"]) == pytest.approx(float(two.state[q]["huber_threshold"]), rel=1e-4)
    np.testing.assert_allclose(one.norms().update, two.norms().update, rtol=2e-3)


@pytest.mark.parametrize("name", ["bf16, remainder", "bf16, master"])
def test_huber_on_master_weights_takes_the_steps_of_fp32(name, backend, device):
    params, optimizer = make(name, "huber", backend, device)
    whole = [torch.nn.Parameter(p.detach().float()) for p in params]
    plain = AdamW(whole, lr=PEAK, weight_decay=2.0, decay="huber", backend=backend)
    for _ in range(3):
        for p, q in zip(params, whole, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
    for p, q in zip(params, whole, strict=True):
        assert_same_arithmetic(optimizer.master_weight(p), q.detach(), backend)
        thresholds = optimizer.state[p]["huber_threshold"], plain.state[q]["huber_threshold"]
        assert_same_arithmetic(*thresholds, backend)


def test_huber_decay_takes_no_more_than_its_threshold_from_a_weight(backend, device):
    """Without gradients, with d = lr wd: w/(1 + d) below (1 + d) delta, and d delta less above it."""
    p = torch.nn.Parameter(torch.tensor([0.1, -0.1, 1.0, -8.0, 50.0], device=device))
    optimizer = AdamW([p], lr=0.5, weight_decay=0.2, decay="huber", backend=backend)
    before, delta, decay_per_step = p.detach().clone(), 59.2 / 5, 0.1
    p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = torch.cat([before[:4] / (1 + decay_per_step), before[4:] - decay_per_step * delta])
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
    assert float(optimizer.state[p]["huber_threshold"]) == pytest.approx(
        0.99 * delta + 0.01 * float(expected.abs().mean()), rel=1e-6
    )


def test_released_gradients_move_thresholds_alike(backend, device):
    ours = make_params([(40,), (9, 9)], device)
    theirs = clone_params(ours)
    one, two = (AdamW(params, lr=PEAK, weight_decay=2.0, decay="huber", backend=backend) for params in (ours, theirs))
    weights = [torch.randn_like(p) for p in ours]
    with one.release_gradients():
        for _ in range(3):
            sum((p * w).sum() for p, w in zip(ours, weights, strict=True)).backward()
    for _ in range(3):
        two.zero_grad()
        sum((p * w).sum() for p, w in zip(theirs, weights, strict=True)).backward()
        two.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(one.state[p]["huber_threshold"], two.state[q]["huber_threshold"])


def test_a_huber_checkpoint_for_torch_has_no_threshold(device):
    params = make_params([(40,)], device)
    optimizer = AdamW(params, decay="huber")
    set_grads(params)
    optimizer.step()
    optimizer.param_groups[0]["decay"] = "coupled"
    assert optimizer.to_torch_state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_huber_refuses_complex_parameters_and_a_wrong_threshold(backend, device):
    with pytest.raises(ValueError, match="decay='huber' compares weights"):
        AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))], decay="huber")
    (p,) = make_params([(4, 2)], device)
    optimizer = AdamW([("w", p)], decay="huber", backend=backend)
    set_grads([p])
    before = p.detach().clone()
    optimizer.state[p]["huber_threshold"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=re.escape("huber_threshold of 'w' (4, 2) is torch.float32[2]")):
        optimizer.step()
    assert torch.equal(p, before)
