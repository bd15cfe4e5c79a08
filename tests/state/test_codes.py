"""8-bit codes are within their documented bounds, unbiased, and hide nothing that is not finite."""

import numpy as np
import pytest
import torch

from lwadamw import AdamW
from lwadamw.state.codes import decode, encode


def _moments(n=128 * 400):
    """Blocks whose values span many magnitudes: one of zeros, one of subnormal numbers, one of equal numbers."""
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
    """The bounds of kernels/moments.py, as shares of the largest value of a block.

    Rounded at random, |m|^1/4 is off by at most 1/127 and v^1/8 by at most 1/255; rounded to nearest, by half of that.
    m is off by at most 3.1 %, sqrt(v) by at most 1.6 %.
    """
    x = _moments()
    x = x if dtype == torch.int8 else x.square()
    random = torch.randint(0, 2**16, x.shape) if stochastic else None
    codes, scales = encode(x, dtype, random)
    assert codes.dtype == dtype
    assert scales.shape == (400,)
    back = decode(codes, scales)
    exact, found = (t.double() if dtype == torch.int8 else t.double().sqrt() for t in (x, back))
    largest = exact.abs().view(-1, 128).amax(1).repeat_interleave(128)
    top, share = (127, 0.0312) if dtype == torch.int8 else (255, 0.0157)
    spacing = largest**0.25 / top * (1 if stochastic else 0.5)
    counted = largest > 2.0**-90
    if dtype == torch.uint8:  # code 1 stands for values that would have code 0
        spacing = spacing.maximum(torch.where(exact**0.25 < largest**0.25 / 255, largest**0.25 / 255, 0.0))
    error = (found.abs() ** 0.25 - exact.abs() ** 0.25).abs()
    assert (error <= spacing * (1 + 1e-5))[counted].all()
    assert ((found - exact).abs() <= share * largest * (1 + 1e-5))[counted].all()
    assert (found[~counted] == 0).all()
    assert ((found.sign() == exact.sign()) | (codes == 0))[counted].all() or dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_unbiased(dtype):
    """2000 encodings of one block: the mean of m, and of v, is within 5 standard errors of the exact value."""
    x = torch.randn(128) * torch.logspace(0, -3, 128)
    x = x if dtype == torch.int8 else x.square()
    repeats = 2000
    random = torch.randint(0, 2**16, (repeats * 128,))
    codes, scales = encode(x.repeat(repeats), dtype, random)
    mean = decode(codes, scales).double().view(repeats, 128).mean(0)
    power = 4 if dtype == torch.int8 else 8
    size, scale = x.double().abs(), scales[0].double() ** (power // 4)
    lower = ((size / scale) ** (1 / power)).floor()
    low, high = lower**power * scale, (lower + 1) ** power * scale
    up = ((size - low) / (high - low)).clamp(0, 1)
    error = (high - low) * ((up * (1 - up) / repeats).sqrt() + 1 / repeats)
    assert ((mean - x.double()).abs() <= 5 * error)[lower > 0].all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_inf_and_nan_make_their_whole_block_not_finite(dtype, value):
    x = torch.rand(256)
    x[5] = value
    back = decode(*encode(x, dtype))
    assert not back[:128].isfinite().any()
    assert back[128:].isfinite().all()


def test_a_positive_second_moment_is_never_zero():
    x = torch.cat([torch.full((127,), 1e-20), torch.ones(1)])
    for random in (None, torch.full((128,), 2**16 - 1)):
        assert (decode(*encode(x, torch.uint8, random)) > 0).all()


def test_a_moment_without_gradients_fades_as_in_fp32(backend, device):
    """Rounded to nearest, 0.9 m would stay m while v fades, and the updates would grow without bound.

    After 10 steps without a gradient they would have moved the weights 1.6 times as far as in fp32.
    """
    ways = []
    for kind, options in (("torch", {}), (backend, {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8})):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(32, 128, device=device))
        optimizer = AdamW([("w", p)], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, backend=kind, **options)
        for _ in range(2):
            p.grad = torch.randn_like(p)
            optimizer.step()
        before = p.detach().clone()
        stale = torch.arange(128, device=device) < 32
        for _ in range(10):
            p.grad = torch.randn_like(p).masked_fill(stale, 0.0)
            optimizer.step()
        ways.append((p.detach() - before)[:, stale].abs().mean().item())
    assert ways[1] == pytest.approx(ways[0], rel=0.1)


def test_codes_of_any_memory_layout_are_by_memory_order():
    x = torch.randn(64, 256)
    codes, scales = encode(x.t(), torch.int8)
    assert codes.stride() == x.t().stride()
    plain, plain_scales = encode(x, torch.int8)
    assert torch.equal(codes.t(), plain)
    assert torch.equal(scales, plain_scales)
    np.testing.assert_array_equal(decode(codes, scales).t(), decode(plain, plain_scales))
