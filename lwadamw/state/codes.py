"""8-bit codes of moments, in plain torch: what kernels/moments.py does in registers.

A moment in 8 bits is one code per element and one float32 scale per block of QUANT elements in memory order:

    exp_avg, int8 codes c in -127..127       m = scale sign(c) c^4         scale = max |m| / 127^4
    exp_avg_sq, uint8 codes c in 0..255      sqrt(v) = scale c^4           scale = max sqrt(v) / 255^4

`encode` never writes the code 0 for exp_avg_sq, so that a denominator cannot become 0. Only state that has just been created
has it.
kernels/moments.py gives the reasons for the fourth power, and the bounds on the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import QUANT
from .members import flat

_TINY = 2.0**-90  # a block whose largest value is smaller counts as zeros


def encode(values: Tensor, dtype: torch.dtype, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode a moment in 8 bits.

    With random bits, a value between two codes goes to the upper code with the probability that makes the mean of the
    decoded value exact.

    Args:
        values: dense float32 tensor of any shape; values >= 0 if the dtype is torch.uint8.
        dtype: torch.int8 for codes of the values themselves, torch.uint8 for codes of their square roots.
        random: 16 bits for each element in memory order, int32 or int64. None rounds to the nearest code.

    Returns:
        The codes, in the shape and memory layout of `values`, and the scales, float32[ceil(n / QUANT)].
    """
    largest = 127.0 if dtype == torch.int8 else 255.0
    x = flat(values) if dtype == torch.int8 else flat(values).sqrt()
    blocks = torch.nn.functional.pad(x, (0, -len(x) % QUANT)).view(-1, QUANT)
    top = blocks.abs().amax(1, keepdim=True)
    zero = top < _TINY
    power = (blocks.abs() * torch.where(zero, 0.0, largest**4 / torch.where(zero, 1.0, top))).nan_to_num_()
    roots = power.sqrt().sqrt()
    if random is None:
        codes = roots.round()
    else:
        lower = (roots - 0.5).round().clamp_(max=largest - 1).double()
        low, high = lower**4, (lower + 1) ** 4
        if dtype == torch.uint8:
            low, high, power = low**2, high**2, power.double() ** 2
        u = torch.nn.functional.pad((random.view(-1).double() + 1) / 2**16, (0, -len(x) % QUANT)).view(-1, QUANT)
        codes = lower + (low + u * (high - low) < power)
    codes = torch.where(blocks < 0, -codes, codes) if dtype == torch.int8 else codes.clamp_(min=1)
    out = torch.empty_like(values, dtype=dtype)
    flat(out).copy_(codes.view(-1)[: len(x)])
    return out, torch.where(zero, 0.0, top * (1.0 / largest**4)).view(-1)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode a moment in 8 bits.

    Args:
        codes: dense tensor of torch.int8 or torch.uint8, of any shape.
        scales: float32, one per block of QUANT elements in memory order, of any shape.

    Returns:
        float32 in the shape and memory layout of `codes`.
    """
    c = flat(codes).float()
    x = (c * c.abs()) * (c * c) * scales.reshape(-1).repeat_interleave(QUANT)[: len(c)]
    out = torch.empty_like(codes, dtype=torch.float32)
    flat(out).copy_(x * x if codes.dtype == torch.uint8 else x)
    return out
