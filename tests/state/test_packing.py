"""Packing: a bfloat16 parameter and its int16 remainder are exactly the float32 weight."""

import pytest
import torch

from lwadamw.state import packing

SPECIAL = [0.0, -0.0, 1.0, float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, -1.1754944e-38, 1.00390625]


def _all_kinds_of_floats(n):
    """Random bits as float32: every exponent, subnormal numbers, halfway cases; no NaN."""
    bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32)
    bits[::7] = bits[::7] & ~0xFFFF | 0x8000
    values = bits.view(torch.float32)
    return torch.cat([values[~values.isnan()], torch.tensor(SPECIAL)])


def test_a_parameter_and_its_remainder_are_exactly_the_float32_weight():
    weight = _all_kinds_of_floats(100_000)
    upper, lower = packing.split_remainder(weight)
    assert upper.dtype == torch.bfloat16
    assert torch.equal(packing.join_remainder(upper, lower).view(torch.int32), weight.view(torch.int32))
    finite = upper.isfinite()
    assert ((upper.float() - weight).abs() <= (weight.to(torch.bfloat16).float() - weight).abs())[finite].all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_nan_stays_nan_in_both_halves(bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    upper, lower = packing.split_remainder(nan)
    assert upper.isnan().all()
    assert packing.join_remainder(upper, lower).isnan().all()
