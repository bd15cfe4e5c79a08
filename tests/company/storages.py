"""The storages that others' acts are tested with, and how parameters and gradients lie in memory."""

import torch

from lwadamw.state.combinations import COMBINATIONS

F, B, H, D = torch.float32, torch.bfloat16, torch.float16, torch.float64
BACKENDS = ("torch", "triton")

# Column of the table in docs/company.md -> the name of a combination.
COLUMNS = {
    "plain fp32": "fp32",
    "plain bf16": "bf16",
    "fp32 master": "bf16, master",
    "remainder": "bf16, remainder",
    "kahan": "bf16, kahan",
    "stochastic": "bf16, stochastic",
    "8-bit": "bf16, remainder, 8-bit moments",
}

SMALL = ((), (0,), (0, 3), (1,), (3,), (5, 7), (6, 6), (2, 3, 2, 2), (33,))
LARGE = (33, 128)  # a shape whose moments can be kept in 8 bits
LAYOUTS = ("rows", "columns", "shifted", "flat", "gaps")


def options_of(combination):
    """Return the group keys of a combination."""
    return dict(COMBINATIONS[combination].options)


def dtypes_of(combination, backend):
    """Return the dtypes that a parameter of a group with the options of a combination may have."""
    c = COMBINATIONS[combination]
    if c.options:
        return (c.param, F)
    return (c.param, F, B, H) if backend == "triton" else (c.param, F, B, H, D)


def strides_of(shape, layout):
    """Return the strides of a layout. "columns" reverses the dimensions, as a transposed or a channels-last tensor does."""
    strides, step = [0] * len(shape), 2 if layout == "gaps" else 1
    dimensions = range(len(shape)) if layout == "columns" else reversed(range(len(shape)))
    for d in dimensions:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


def weights(shape, dtype):
    """Return random weights, exact in a dtype."""
    return torch.randn(shape, dtype=D).to(dtype)


def gradient(shape, dtype, scale=1.0, zeros=0.1):
    """Return random gradients: some are exactly 0, no other is much smaller than the rest.

    A second moment that underflows in float16 would make every bound infinite.
    """
    size = (0.3 + 1.7 * torch.rand(shape, dtype=D)) * scale
    sign = torch.where(torch.rand(shape, dtype=D) < 0.5, -1.0, 1.0)
    return torch.where(torch.rand(shape, dtype=D) < zeros, 0.0, size * sign).to(dtype)
