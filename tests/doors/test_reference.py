"""The NumPy reference equals torch.optim.AdamW in float64, with clipping, width multipliers and skipped steps."""

import math

import numpy as np
import pytest
import torch

from lwadamw import reference
from tests.cases import GROUP_KEYS, OPTIONS, SHAPES, make_params


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_equals_torch_in_float64(name):
    options = OPTIONS[name]
    params = [torch.nn.Parameter(p.detach().double()) for p in make_params()]
    ours = [reference.Parameter(p.detach().numpy().copy(), _group(options)) for p in params]
    base = {k: v for k, v in options.items() if k not in (*GROUP_KEYS, "max_grad_norm")}
    if "width_lr_mult" in options:
        base["lr"] *= options["width_lr_mult"]
        base["weight_decay"] *= options["width_wd_mult"]
        base["eps"] *= options["width_eps_mult"]
    theirs = torch.optim.AdamW(params, foreach=False, **base)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        reference.step(ours, [p.grad.numpy().copy() for p in params], max_grad_norm=options.get("max_grad_norm"))
        if "max_grad_norm" in options:
            torch.nn.utils.clip_grad_norm_(params, options["max_grad_norm"])
        theirs.step()
    for p, r in zip(params, ours, strict=True):
        np.testing.assert_allclose(r.value, p.detach().numpy(), rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(r.exp_avg_sq, theirs.state[p]["exp_avg_sq"].numpy(), rtol=1e-11, atol=1e-16)


def _group(options):
    return reference.Group(**{k: v for k, v in options.items() if k != "max_grad_norm"})


def test_reference_leaves_parameters_without_gradient_alone():
    p = reference.Parameter(np.ones(3))
    assert reference.step([p], [None]) == [None]
    assert (p.step, p.exp_avg) == (0, None)
    assert (p.value == 1).all()


@pytest.mark.parametrize("bad", [{"found_inf": True}, {"max_grad_norm": 1.0}])
def test_reference_skips_the_whole_step(bad):
    params = [reference.Parameter(np.ones(3)), reference.Parameter(np.ones(2))]
    grads = [np.array([1.0, math.inf, 0.0]), np.ones(2)]
    assert reference.step(params, grads, **bad) == [None, None]
    assert all(p.step == 0 and (p.value == 1).all() for p in params)


def test_reference_unscales_before_it_clips():
    one, two = (reference.Parameter(np.zeros(4)) for _ in range(2))
    grad = np.arange(4.0)
    reference.step([one], [grad], max_grad_norm=1.0)
    reference.step([two], [grad * 1024], max_grad_norm=1.0, grad_scale=1024.0)
    np.testing.assert_allclose(one.exp_avg, two.exp_avg, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(one.exp_avg), 0.1, rtol=1e-6)


def test_small_angles_are_exact():
    before = np.array([1.0, 0.0])
    for angle in (1e-9, 1e-4, 1.0):
        change = np.array([math.cos(angle) - 1, math.sin(angle)])
        assert reference.angle(before, change) == pytest.approx(angle, rel=1e-6)


def test_the_norms_and_the_angle_describe_the_step():
    rng = np.random.default_rng(0)
    p = reference.Parameter(rng.standard_normal(SHAPES[4]), reference.Group(lr=0.1, weight_decay=0.5))
    before, grad = p.value.copy(), rng.standard_normal(SHAPES[4])
    (norms,) = reference.step([p], [grad])
    cosine = (before * p.value).sum() / np.linalg.norm(before) / np.linalg.norm(p.value)
    assert norms.weight == np.linalg.norm(p.value)
    assert norms.update == pytest.approx(np.linalg.norm(p.value - before))
    assert norms.grad == np.linalg.norm(grad)
    assert norms.angle == pytest.approx(math.acos(cosine), rel=1e-9)
