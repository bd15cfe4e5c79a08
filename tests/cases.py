"""Option sets that every backend is tested with, and the shapes and helpers for those tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from lwadamw import AdamW, reference

# 0-d, empty, one element, and odd sizes just below or above the block sizes (256, 1024) and the smallest chunk (2048).
SHAPES: Sequence[tuple[int, ...]] = ((), (0,), (1,), (63,), (5, 51), (1025,), (4, 65), (2049,))
FEW_SHAPES: Sequence[tuple[int, ...]] = ((30,), (5, 7), (1030,), ())

# Arguments of AdamW and group keys. Most values differ from the default.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_decay": {"weight_decay": 0.0},
    "decay": {"lr": 0.1, "weight_decay": 1.0},
    "betas": {"lr": 1e-2, "betas": (0.5, 0.8), "eps": 1e-4},
    "zero_betas": {"betas": (0.0, 0.0), "eps": 1e-6},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad_maximize": {"amsgrad": True, "maximize": True, "betas": (0.8, 0.9)},
    "clip": {"max_grad_norm": 0.5, "lr": 1e-2},
    "clip_amsgrad": {"max_grad_norm": 3.0, "amsgrad": True},
    "clip_never": {"max_grad_norm": 1e6},
    "widths": {
        "width_lr_mult": 0.25,
        "width_wd_mult": 2.0,
        "width_eps_mult": 0.5,
        "lr": 0.1,
        "weight_decay": 1.0,
        "eps": 0.1,
    },
}
GROUP_KEYS = ("width_lr_mult", "width_wd_mult", "width_eps_mult")


def make_params(shapes: Sequence[tuple[int, ...]] = SHAPES, device: torch.device | str = "cpu") -> list[Parameter]:
    """Return one fp32 parameter per shape, with normally distributed values."""
    return [Parameter(torch.randn(shape, device=device)) for shape in shapes]


def clone_params(params: Sequence[Tensor]) -> list[Parameter]:
    """Return equal parameters with the same memory layout."""
    return [Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]


def assert_same_arithmetic(actual: Tensor, expected: Tensor, backend: str) -> None:
    """Assert that float32 weights that are stored otherwise took the same steps, to the last bit where one code takes both.

    On a GPU, the torch backend leaves float32 parameters to torch's operators, and computes with its own for all else.
    """
    exact = backend == "triton" or expected.device.type == "cpu"
    torch.testing.assert_close(actual, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def set_grads(*copies: Sequence[Tensor], scale: float = 1.0) -> None:
    """Give every list of parameters the same new random gradients."""
    for same in zip(*copies, strict=True):
        grad = torch.randn_like(same[0]) * scale
        for p in same:
            p.grad = grad.clone(memory_format=torch.preserve_format)


def train_on_noise(optimizer: AdamW, steps: int, schedule: Callable[[int], float] | None = None) -> None:
    """Take steps with new random gradients. The schedule maps a step, from 1 on, to the first group's learning rate."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(1, steps + 1):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule(step)
        set_grads(params)
        optimizer.step()


def make_optimizer(params: Sequence[Tensor], options: dict[str, Any], **more: Any) -> AdamW:
    """Return an AdamW with one group. Options that are group keys go into the group."""
    group = {"params": list(params), **{k: v for k, v in options.items() if k in GROUP_KEYS}}
    return AdamW([group], **{k: v for k, v in options.items() if k not in GROUP_KEYS}, **more)


def make_twins(backend: str, device: torch.device, **options: Any) -> tuple[list[Parameter], list[Parameter], Any, Any]:
    """Return parameters, equal parameters, our AdamW over the first and torch's (foreach=False) over the second."""
    ours = make_params(FEW_SHAPES, device)
    theirs = clone_params(ours)
    return ours, theirs, AdamW(ours, backend=backend, **options), torch.optim.AdamW(theirs, foreach=False, **options)


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Assert that tensors are equal within torch's own fp32 tolerances."""
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)


def make_reference(params: Sequence[Tensor], options: dict[str, Any]) -> list[reference.Parameter]:
    """Return the parameters as float64 arrays for `reference.step`."""
    group = reference.Group(**{k: v for k, v in options.items() if k != "max_grad_norm"})
    return [reference.Parameter(p.detach().double().cpu().numpy().copy(), group) for p in params]


def reference_step(
    parameters: list[reference.Parameter], params: Sequence[Tensor], options: dict[str, Any], **more: Any
) -> list[reference.StepNorms | None]:
    """Take one float64 reference step with the gradients of `params`."""
    grads = [None if p.grad is None else p.grad.double().cpu().numpy() for p in params]
    return reference.step(parameters, grads, max_grad_norm=options.get("max_grad_norm"), **more)


def assert_matches_reference(optimizer: AdamW, params: Sequence[Tensor], parameters: list[reference.Parameter]) -> None:
    """Assert that parameters, moments and steps equal the float64 reference within torch's own fp32 tolerances."""
    state = optimizer.state
    for i, (p, r) in enumerate(zip(params, parameters, strict=True)):
        _close(p, r.value, f"parameter {i} {tuple(p.shape)}")
        if r.step == 0:
            assert p not in state or float(state[p]["step"]) == 0
            continue
        assert float(state[p]["step"]) == r.step
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            expected = getattr(r, key)
            assert (expected is not None) == (key in state[p]), key
            if expected is not None:
                _close(state[p][key], expected, f"{key} of parameter {i}")


def _close(actual: Tensor, expected: np.ndarray, what: str) -> None:
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1.3e-6,
        atol=1e-5,
        msg=lambda message: f"{what}: {message}",
    )


def matrix_over_vector(optimizer):
    """Take a step from 0 with equal gradients. Return how far the matrix moved, divided by how far the vector moved."""
    moved = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            with torch.no_grad():
                p.zero_()
                p.grad = torch.ones_like(p)
    optimizer.step()
    for group in optimizer.param_groups:
        moved[group["role"]] = float(group["params"][0].detach().abs().max())
    return moved["matrix"] / moved["vector"]


def pretend_sharded(p, shard):
    """Give a plain parameter what tells that this process holds a shard of it, as a DTensor over two processes would."""
    p._local_tensor = shard
    p.device_mesh = SimpleNamespace(size=lambda dimension: 2, get_coordinate=lambda: [0])
    p.placements = (SimpleNamespace(is_shard=lambda: True),)
