"""torch.set_default_device and torch.set_default_dtype change nothing that a step computes."""

import copy
from contextlib import contextmanager

import pytest
import torch

from lwadamw import AdamW, Monitor
from lwadamw.state.combinations import COMBINATIONS

pytestmark = pytest.mark.matrix

OPTIONS = {
    "clipped": {"max_grad_norm": 0.5, "amsgrad": True},
    "huber": {"decay": "huber", "weight_decay": 0.5},
    "8-bit moments": COMBINATIONS["bf16, stochastic, 8-bit moments"].options,
    "master": COMBINATIONS["bf16, master"].options,
    "kahan": COMBINATIONS["bf16, kahan"].options,
    "remainder": COMBINATIONS["bf16, remainder"].options,
    "corrected": {"decay": "corrected", "lr": 0.01, "peak_lr": 0.1},
}


@contextmanager
def _defaults(device, dtype):
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def _run(option, backend, params, grads):
    """Take steps, load a checkpoint into a second optimizer, take more steps. Return all that can be seen of it."""
    options = {**OPTIONS[option], "backend": backend}
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    optimizer = AdamW(named, **options)
    monitor = Monitor(optimizer, every=1, spectrum_every=2) if option == "clipped" else None
    for step_grads in grads[:2]:
        for p, g in zip(params, step_grads, strict=True):
            p.grad = g
        optimizer.step()
    norms = optimizer.norms()
    seen = [torch.from_numpy(column) for column in (norms.weight, norms.update, norms.grad, norms.angle)]
    seen += [] if monitor is None else [torch.from_numpy(c) for c in monitor.latest.columns.values()]
    resumed = AdamW(named, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, g in zip(params, grads[2], strict=True):
        p.grad = g
    resumed.step()
    resumed.convert_state()
    seen += [resumed.skipped_steps, *(p.detach() for p in params)]
    return seen + [v for p in params for key, v in sorted(resumed.state[p].items()) if key != "step"]


@pytest.mark.parametrize("option", OPTIONS)
def test_default_device_and_dtype_change_nothing(option, backend, device):
    dtype = torch.bfloat16 if option in ("8-bit moments", "master", "kahan", "remainder") else torch.float32
    start = [torch.randn(shape, device=device).to(dtype) for shape in ((33, 128), (7,))]
    grads = [[torch.randn(p.shape, device=device).to(dtype) for p in start] for _ in range(3)]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    expected = _run(option, backend, params, grads)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    with _defaults("meta", torch.float64):
        seen = _run(option, backend, params, grads)
    assert [(t.device, t.dtype) for t in seen] == [(t.device, t.dtype) for t in expected]
    for t, e in zip(seen, expected, strict=True):
        assert torch.equal(t.nan_to_num(), e.nan_to_num()), (t.shape, t.dtype)


def test_a_kernel_table_has_the_same_types_whatever_the_default_dtype(device):
    """With float64 as the default, a step of the Triton backend keeps float32 steps and coefficients."""
    p = torch.nn.Parameter(torch.ones(5, device=device))
    p.grad = torch.ones_like(p).detach()
    optimizer = AdamW([p], backend="triton", decay="huber")
    with _defaults("meta", torch.float64):
        optimizer.step()
    (tracked,) = optimizer._engine._triton._plans
    tables = tracked.plan._tables
    assert tables.steps.dtype == tables.coefficients.dtype == tables.partials.dtype == torch.float32
    assert {t.device.type for t in (*tables.static[:6], *tables.thresholds.tables, tables.steps)} == {device.type}
