"""Promise 3: every torch scheduler, a loop that assigns `lr`, and changes of the groups keep the width ratios."""

import inspect
import warnings

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from lwadamw import AdamW, param_groups
from tests.cases import matrix_over_vector

MATRIX_TO_VECTOR = 0.25 / 1.0  # fan2025 at m = 4


def _model():
    return torch.nn.Linear(8, 8)


def _optimizer(backend="torch"):
    return AdamW(param_groups(_model(), base_width=2, width=8), lr=1e-2, weight_decay=0.1, backend=backend)


# Every scheduler class, with arguments that change lr within 6 steps.
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 8, eta_min=3e-3)], [4]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=3e-3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=1e-3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-1, step_size_up=3, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=1e-3),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=3e-3, anneal_epochs=5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=5e-2, total_steps=20),
}


def test_every_torch_scheduler_is_in_the_table():
    classes = {
        name
        for name, c in vars(lr_scheduler).items()
        if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scheduler_keeps_the_ratio(name, backend):
    optimizer = _optimizer(backend)
    scheduler = SCHEDULERS[name](optimizer)
    seen = set()
    for _ in range(6):
        lr = optimizer.param_groups[0]["lr"]
        seen.add(float(lr))
        assert matrix_over_vector(optimizer) == pytest.approx(MATRIX_TO_VECTOR, rel=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the argument epoch
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    assert len(seen) > 1, "the scheduler did nothing"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_loop_that_assigns_lr_keeps_the_ratio(backend):
    optimizer = _optimizer(backend)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        assert matrix_over_vector(optimizer) == pytest.approx(MATRIX_TO_VECTOR, rel=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_tensor_lr_that_is_filled_in_place_keeps_the_ratio(backend):
    lr = torch.tensor(1e-2)
    optimizer = AdamW(param_groups(_model(), 2, width=8), lr=lr, weight_decay=0.1, backend=backend)
    moved = []
    for value in (1e-2, 1e-3, 5e-2):
        lr.fill_(value)
        assert matrix_over_vector(optimizer) == pytest.approx(MATRIX_TO_VECTOR, rel=1e-5)
        moved.append(float(optimizer.param_groups[0]["params"][0].detach().abs().max()))
    assert moved[2] > 10 * moved[1]


def test_a_tensor_lr_that_replaces_an_equal_float_is_followed():
    optimizer = _optimizer("triton")
    matrix_over_vector(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    matrix_over_vector(optimizer)
    before = float(optimizer.param_groups[0]["params"][0].detach().abs().max())
    for group in optimizer.param_groups:
        group["lr"].mul_(0.01)
    matrix_over_vector(optimizer)
    assert float(optimizer.param_groups[0]["params"][0].detach().abs().max()) < 0.05 * before


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_replaced_and_added_groups_keep_the_ratio(backend):
    optimizer = _optimizer(backend)
    matrix_over_vector(optimizer)
    optimizer.param_groups = [dict(group) for group in reversed(optimizer.param_groups)]
    assert matrix_over_vector(optimizer) == pytest.approx(MATRIX_TO_VECTOR, rel=1e-5)
    extra = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [("extra", extra)], "role": "other", "width_lr_mult": 7.0})
    assert matrix_over_vector(optimizer) == pytest.approx(MATRIX_TO_VECTOR, rel=1e-5)
    vector = next(g for g in optimizer.param_groups if g["role"] == "vector")["params"][0]
    assert float(extra.detach().abs().max()) > 5 * float(vector.detach().abs().max())
