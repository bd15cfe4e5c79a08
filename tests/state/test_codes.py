"""Packing and rounding: exact halves, unbiased draws, and 8-bit codes within their documented bounds."""

import numpy as np
import pytest
import torch

from lwadamw import AdamW
from lwadamw.state import packing
from lwadamw.state.draws import row_of
from lwadamw.state.members import Member

B = torch.bfloat16
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
    assert upper.dtype == B
    assert torch.equal(packing.join_remainder(upper, lower).view(torch.int32), weight.view(torch.int32))
    finite = upper.isfinite()
    assert ((upper.float() - weight).abs() <= (weight.to(B).float() - weight).abs())[finite].all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_nan_stays_nan_in_both_halves(bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    upper, lower = packing.split_remainder(nan)
    assert upper.isnan().all()
    assert packing.join_remainder(upper, lower).isnan().all()


def test_random_bits_are_philox_4x32_7():
    """Against the known answers of Random123 for counter and key 0."""
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    expected = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert packing.random_bits(torch.arange(8), seed=0, stream=0, step=0).tolist() == expected


@pytest.mark.parametrize("draw", [packing.random_bits, packing.hash_bits])
def test_random_bits_differ_by_every_number_they_come_from(draw):
    index = torch.arange(64)
    base = draw(index, 1, 2, 3)
    others = [draw(index, *numbers) for numbers in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**40, 2, 3))]
    for other in [*others, draw(index + 64, 1, 2, 3)]:
        assert (other == base).float().mean() < 0.1


@pytest.mark.parametrize("draw", ["random_bits", "hash_lower", "hash_upper"])
def test_random_bits_are_uniform(draw):
    """Mean, variance and chi-square of 2^20 draws of 16 bits."""
    n = 2**20
    index = torch.arange(n)
    if draw == "random_bits":
        bits = packing.random_bits(index, 7, 8, 9)
    else:
        bits = packing.hash_bits(index, 7, 8, 9)
        bits = bits & 0xFFFF if draw == "hash_lower" else bits >> 16
    u = (bits.double() + 0.5) / 2**16
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(float(u.var()) * 12 - 1) < 4 * (0.8 / n) ** 0.5
    counts = torch.bincount((bits >> 6).long(), minlength=1024).double()
    chi_square = float(((counts - n / 1024) ** 2 / (n / 1024)).sum())
    assert abs(chi_square - 1023) < 5 * (2 * 1023) ** 0.5


def test_stochastic_rounding_is_unbiased(device):
    """A million draws: the mean within 4 standard errors, and nothing but the two neighbours."""
    n, steps = 100_000, 10
    fractions = torch.linspace(0.02, 0.98, 25, device=device)
    start = torch.ones(n, device=device, dtype=B)
    wanted = 1 + fractions.repeat(n // 25) * 2**-7
    drawn = torch.zeros(n, device=device, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    for step in range(steps):
        packing.write_weight(
            p, {}, "stochastic", wanted.clone(), packing.random_bits(torch.arange(n, device=device), 0, 5, step)
        )
        assert {float(v) for v in p.detach().unique()} <= {1.0, 1 + 2**-7}
        drawn += p.detach().double()
    mean = ((drawn / steps - 1) * 2**7).view(-1, 25).mean(0)
    error = (fractions * (1 - fractions) / (n * steps / 25)).sqrt()
    assert ((mean - fractions).abs() < 4 * error).all()
    total = float((drawn / steps - wanted).mean() * 2**7)
    assert abs(total) < 4 * float((fractions * (1 - fractions)).mean() / (n * steps)) ** 0.5


def _moments(n=128 * 400):
    """Blocks whose values span many magnitudes, some of them equal, one of zeros, one of subnormal numbers."""
    x = (
        torch.randn(n)
        * torch.logspace(0, -6, n)[torch.randperm(n)]
        * torch.logspace(-12, 3, n // 128).repeat_interleave(128)
    )
    x[:128], x[128:256], x[256:384] = 0.0, 1e-40, 3.0
    return x


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_are_within_their_documented_bounds(dtype, stochastic):
    """|m|^1/4 within 1/127 and v^1/8 within 1/255 of the block's, half that to nearest; m, sqrt(v) within 3.1 and 1.6 %."""
    x = _moments()
    x = x if dtype == torch.int8 else x.square()
    random = torch.randint(0, 2**16, x.shape) if stochastic else None
    codes, scales = packing.encode(x, dtype, random)
    assert codes.dtype == dtype
    assert scales.shape == (400,)
    back = packing.decode(codes, scales)
    exact, found = (t.double() if dtype == torch.int8 else t.double().sqrt() for t in (x, back))
    largest = exact.abs().view(-1, 128).amax(1).repeat_interleave(128)
    top, share = (127, 0.0312) if dtype == torch.int8 else (255, 0.0157)
    spacing = largest**0.25 / top * (1 if stochastic else 0.5)
    counted = largest > 2.0**-90
    if dtype == torch.uint8:  # what would be code 0 is code 1
        spacing = spacing.maximum(torch.where(exact**0.25 < largest**0.25 / 255, largest**0.25 / 255, 0.0))
    error = (found.abs() ** 0.25 - exact.abs() ** 0.25).abs()
    assert (error <= spacing * (1 + 1e-5))[counted].all()
    assert ((found - exact).abs() <= share * largest * (1 + 1e-5))[counted].all()
    assert (found[~counted] == 0).all()
    assert ((found.sign() == exact.sign()) | (codes == 0))[counted].all() or dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_unbiased(dtype):
    """2000 encodings of one block: the mean of m, and of v itself, within 5 standard errors of a draw between two codes."""
    x = torch.randn(128) * torch.logspace(0, -3, 128)
    x = x if dtype == torch.int8 else x.square()
    repeats = 2000
    random = torch.randint(0, 2**16, (repeats * 128,))
    codes, scales = packing.encode(x.repeat(repeats), dtype, random)
    mean = packing.decode(codes, scales).double().view(repeats, 128).mean(0)
    power = 4 if dtype == torch.int8 else 8
    size, scale = x.double().abs(), scales[0].double() ** (power // 4)
    lower = ((size / scale) ** (1 / power)).floor()
    low, high = lower**power * scale, (lower + 1) ** power * scale
    up = ((size - low) / (high - low)).clamp(0, 1)
    error = (high - low) * ((up * (1 - up) / repeats).sqrt() + 1 / repeats)
    assert ((mean - x.double()).abs() <= 5 * error)[lower > 0].all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(dtype, value):
    x = torch.rand(256)
    x[5] = value
    back = packing.decode(*packing.encode(x, dtype))
    assert not back[:128].isfinite().any()
    assert back[128:].isfinite().all()


def test_a_positive_second_moment_is_never_zero():
    x = torch.cat([torch.full((127,), 1e-20), torch.ones(1)])
    for random in (None, torch.full((128,), 2**16 - 1)):
        assert (packing.decode(*packing.encode(x, torch.uint8, random)) > 0).all()


def test_a_moment_without_gradients_fades_as_in_fp32(backend, device):
    """Rounded to nearest, 0.9 m would stay m while v fades, and the updates would grow without bound."""
    ways = []
    for options in ({}, {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(32, 128, device=device))
        optimizer = AdamW([("w", p)], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, backend=backend, **options)
        for _ in range(5):
            p.grad = torch.randn_like(p)
            optimizer.step()
        before = p.detach().clone()
        stale = torch.arange(128, device=device) < 32
        for _ in range(25):
            p.grad = torch.randn_like(p).masked_fill(stale, 0.0)
            optimizer.step()
        ways.append((p.detach() - before)[:, stale].abs().mean().item())
    assert ways[1] == pytest.approx(ways[0], rel=0.1)


def test_a_whole_parameter_is_one_run():
    """Of a length that may be divided by, since a plan may have shards beside it whose runs are counted."""
    group = {"params": [], "rounding_seed": 3}
    _, _, first, run, stride = row_of(Member(torch.zeros(5, 7), "w", group, 0, 0, ()))
    assert first == 0
    assert run == stride > 2**40
    assert run % 8 == 0


def test_codes_of_any_memory_layout_are_by_memory_order():
    x = torch.randn(64, 256)
    codes, scales = packing.encode(x.t(), torch.int8)
    assert codes.stride() == x.t().stride()
    plain, plain_scales = packing.encode(x, torch.int8)
    assert torch.equal(codes.t(), plain)
    assert torch.equal(scales, plain_scales)
    np.testing.assert_array_equal(packing.decode(codes, scales).t(), packing.decode(plain, plain_scales))
