"""Rounding of 8-bit codes in the kernels: over all random bits, the mean of a decoded moment is exact."""

import pytest
import torch
import triton
import triton.language as tl

from lwadamw.kernels import layout
from lwadamw.kernels.moments import dither, round_code
from lwadamw.tables.variants import current_backend, launch_options


@triton.jit
def _round(powers, bits, codes, SQUARED: tl.constexpr, SIZE: tl.constexpr):
    lanes = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    code = round_code(tl.load(powers + lanes), dither(tl.load(bits + lanes)), SQUARED)
    tl.store(codes + lanes, (code & 0xFF).to(tl.int32))


def _codes(power, squared, device):
    """The codes of fourth powers, [n], with each of the 2^16 random bits, [n, 2^16]."""
    bits = torch.arange(2**16, dtype=torch.int32, device=device).repeat(len(power))
    powers = power.float().to(device).repeat_interleave(2**16)
    codes = torch.empty_like(bits)
    size = 2**16 if layout.INTERPRETED else 1024  # a program of the interpreter takes as long whatever its size
    _round[(len(bits) // size,)](powers, bits, codes, squared, size, **launch_options(current_backend()))
    return codes.view(len(power), -1).cpu()


@pytest.mark.parametrize("squared", [False, True])
def test_the_mean_of_a_code_is_exact(squared, device):
    """Of m for fourth powers, and of v for fourth powers of which the codes hold the squares, as a share of a code's width.

    16 bits give a share of 1.5e-5. float32 loses as much in powers of the largest codes. Below code 10, the threshold of v is
    less exact: such a v is less than 1e-11 of the largest of its block.
    """
    k = torch.tensor([0, 1, 2, 10, 32, 63, 100, 126, *[180, 254] * squared]).double()
    place = torch.tensor([0.001, 0.3, 0.5, 0.77, 0.999]).double()
    exponent = 8 if squared else 4
    low, high = (k**exponent)[:, None], ((k + 1) ** exponent)[:, None]
    exact = (low + place * (high - low)).flatten()
    codes = _codes(exact**0.5 if squared else exact, squared, device)
    mean = (codes.double() ** exponent).mean(1)
    error = ((mean - exact) / (high - low).expand(-1, 5).flatten()).abs().view(len(k), 5).amax(1)
    assert (error[k >= 32] <= 1e-4).all(), error
    assert (error[k >= 10] <= 1e-3).all(), error
    if squared:
        assert codes.min() == 1
    else:
        assert (error <= 1e-2).all(), error


def test_zero_keeps_the_code_zero_and_the_largest_value_the_largest_code(device):
    codes = _codes(torch.tensor([0.0, 127.0**4 * (1 - 2.0**-20)]), False, device)
    assert codes[0].max() == 0
    assert set(codes[1].unique().tolist()) <= {126, 127}
    assert (codes[1] == 127).double().mean() > 0.999
    codes = _codes(torch.tensor([0.0, 255.0**4 * (1 - 2.0**-20)]), True, device)
    assert codes[0].max() == codes[0].min() == 1
    assert set(codes[1].unique().tolist()) <= {254, 255}


@pytest.mark.parametrize("squared", [False, True])
def test_a_code_is_less_than_one_code_away_whatever_the_random_bits(squared, device):
    """And at least 1 if the codes hold squares, so that what is below the code 1 has it."""
    k = torch.tensor([0, 1, 2, 3, 5, 10, 100]).double()
    place = torch.tensor([0.0, 0.05, 0.5, 0.9, 0.97, 0.999]).double()
    roots = (k[:, None] + place).flatten()
    codes = _codes(roots**4, squared, device).double()
    distance = (codes - roots[:, None]).abs().amax(1)
    allowed = roots.lt(1) & squared
    assert (codes[allowed] == 1).all()
    assert (distance[~allowed] <= 1 + 1e-5).all(), dict(zip(roots.tolist(), distance.tolist(), strict=True))
