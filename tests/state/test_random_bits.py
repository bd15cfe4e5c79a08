"""Random bits: the numbers of Philox, uniform, different for every seed, stream and step; rounding with them is unbiased."""

import pytest
import torch

from lwadamw.kernels import layout
from lwadamw.state import packing
from lwadamw.state.draws import rounding_row
from lwadamw.state.members import Member
from lwadamw.state.random_bits import hash_bits, random_bits


def test_random_bits_are_philox_4x32_7():
    """The known answer of Random123 for counter 0 and key 0."""
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    expected = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert random_bits(torch.arange(8), seed=0, stream=0, step=0).tolist() == expected


@pytest.mark.parametrize("draw", [random_bits, hash_bits])
def test_random_bits_differ_by_every_number_they_come_from(draw):
    index = torch.arange(64)
    base = draw(index, 1, 2, 3)
    others = [draw(index, *numbers) for numbers in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**40, 2, 3))]
    for other in [*others, draw(index + 64, 1, 2, 3)]:
        assert (other == base).float().mean() < 0.1


@pytest.mark.parametrize("draw", [random_bits, hash_bits])
def test_random_bits_are_uniform(draw):
    """Mean, variance and chi-square of 2^20 draws of 16 bits."""
    n = 2**20
    bits = draw(torch.arange(n), 7, 8, 9)
    u = (bits.double() + 0.5) / 2**16
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(float(u.var()) * 12 - 1) < 4 * (0.8 / n) ** 0.5
    counts = torch.bincount((bits >> 6).long(), minlength=1024).double()
    chi_square = float(((counts - n / 1024) ** 2 / (n / 1024)).sum())
    assert abs(chi_square - 1023) < 5 * (2 * 1023) ** 0.5


def test_stochastic_rounding_is_unbiased(device):
    """A million draws: the mean is within 4 standard errors, and each result is one of the two neighbours."""
    n, steps = 100_000, 10
    fractions = torch.linspace(0.02, 0.98, 25, device=device)
    start = torch.ones(n, device=device, dtype=torch.bfloat16)
    wanted = 1 + fractions.repeat(n // 25) * 2**-7
    drawn = torch.zeros(n, device=device, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    for step in range(steps):
        packing.write_weight(
            p, {}, "stochastic", wanted.clone(), random_bits(torch.arange(n, device=device), 0, 5, step)
        )
        assert {float(v) for v in p.detach().unique()} <= {1.0, 1 + 2**-7}
        drawn += p.detach().double()
    mean = ((drawn / steps - 1) * 2**7).view(-1, 25).mean(0)
    error = (fractions * (1 - fractions) / (n * steps / 25)).sqrt()
    assert ((mean - fractions).abs() < 4 * error).all()
    total = float((drawn / steps - wanted).mean() * 2**7)
    assert abs(total) < 4 * float((fractions * (1 - fractions)).mean() / (n * steps)) ** 0.5


def test_a_whole_parameter_is_one_run():
    """The run is longer than any tensor, and kernels can divide its length by the elements of a draw."""
    group = {"params": [], "rounding_seed": 3}
    _, _, first, run, stride = rounding_row(Member(torch.zeros(5, 7), "w", group, 0, 0, ()))
    assert first == 0
    assert run == stride > 2**40
    assert run % layout.DRAW == 0
