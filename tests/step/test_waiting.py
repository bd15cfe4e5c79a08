"""An optimizer whose parameters never get a gradient says so once. One that waits for its gradients does not."""

import warnings

import pytest
import torch

import lwadamw


def _parameter(requires_grad=True):
    return torch.nn.Parameter(torch.ones(4, 4), requires_grad=requires_grad)


def _steps(optimizer, n):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(n):
            optimizer.step()
    return [str(w.message) for w in caught if "lwadamw.rebind" in str(w.message)]


def test_parameters_that_never_get_a_gradient_are_told_once(backend):
    told = _steps(lwadamw.AdamW([_parameter(), _parameter()], backend=backend), 8)
    assert len(told) == 1
    assert "none of its 2 parameters" in told[0]
    assert "lwadamw.rebind(groups, model)" in told[0]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_first_steps_without_gradients_are_no_sign(backend, before):
    p, never = _parameter(), _parameter()
    optimizer = lwadamw.AdamW([p, never], backend=backend)
    assert not _steps(optimizer, before)
    p.grad = torch.ones_like(p)
    assert not _steps(optimizer, 1)
    p.grad = None
    assert not _steps(optimizer, 5)


def test_empty_and_frozen_groups_are_no_sign(backend):
    optimizer = lwadamw.AdamW([{"params": []}, {"params": [_parameter(False)]}], backend=backend)
    assert not _steps(optimizer, 5)


def test_released_gradients_are_no_sign(backend):
    p = _parameter()
    optimizer = lwadamw.AdamW([p], backend=backend)
    handle = optimizer.release_gradients()
    p.sum().backward()
    assert not _steps(optimizer, 5)
    handle.remove()


def test_gradients_in_another_attribute_are_seen(backend):
    p = _parameter()
    p.main_grad = torch.ones_like(p)
    assert not _steps(lwadamw.AdamW([p], backend=backend, grad_attribute="main_grad"), 5)
