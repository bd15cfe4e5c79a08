"""max_grad_norm has the result of clip_grad_norm_ before the step. A step with a non-finite norm changes nothing."""

import math

import pytest
import torch

from lwadamw import AdamW, kernels
from lwadamw.step import torch_fused_cpu
from lwadamw.tables.launches import make_launch
from lwadamw.tables.variants import total_bits
from tests.cases import clone_params, make_params, set_grads

# NumPy, which runs the interpreted kernels, reports what a GPU does silently: sums of squares become inf.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 60.0, 1e9, math.inf])
def test_equals_clip_grad_norm_then_step(max_norm, backend, device):
    ours = make_params(device=device)
    theirs = clone_params(ours)
    a = AdamW(ours, lr=1e-2, max_grad_norm=max_norm, backend=backend)
    b = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for step in range(3):
        set_grads(ours, theirs, scale=10.0**-step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm.cpu(), norm.cpu(), rtol=1e-5, atol=0)
        assert a.grad_norm.shape == ()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)
            torch.testing.assert_close(a.state[p]["exp_avg"], b.state[q]["exp_avg"], rtol=1.3e-6, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 64, 2000])
def test_gradients_clipped_piece_by_piece_equal_those_clipped_at_once(piece, monkeypatch):
    monkeypatch.setattr(torch_fused_cpu, "PIECE", piece)
    ours = make_params()
    theirs = clone_params(ours)
    a = AdamW(ours, lr=1e-2, max_grad_norm=0.5, amsgrad=True, backend="torch")
    b = torch.optim.AdamW(theirs, lr=1e-2, amsgrad=True, foreach=False)
    for _ in range(3):
        set_grads(ours, theirs)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)
            assert a.state[p]["step"] == b.state[q]["step"]


NEGATIVE_NAN = torch.tensor(-1, dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, NEGATIVE_NAN])
def test_a_step_with_a_norm_that_is_not_finite_changes_nothing(bad, backend, device):
    params = make_params(device=device)
    optimizer = AdamW(params, max_grad_norm=1.0, backend=backend)
    set_grads(params)
    optimizer.step()
    frozen = [p.detach().clone() for p in params]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    set_grads(params)
    params[5].grad[700] = bad
    optimizer.step()
    assert not math.isfinite(float(optimizer.grad_norm))
    for p, before, s in zip(params, frozen, state, strict=True):
        assert torch.equal(p, before)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in s.items())
    set_grads(params)
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 2
    assert not torch.equal(params[3], frozen[3])


def test_the_norm_covers_every_group_and_leaves_out_missing_gradients(backend, device):
    params = make_params([(30,), (40,), (50,)], device)
    optimizer = AdamW([{"params": [p]} for p in params], max_grad_norm=1.0, betas=(0.0, 0.9), backend=backend)
    for missing, elements in ((None, 120), (1, 80), (0, 90)):
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.full_like(p, 2.0)
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(2 * math.sqrt(elements), rel=1e-6)
        assert float(optimizer.state[params[2]]["exp_avg"][0]) == pytest.approx(1 / math.sqrt(elements), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-15, 1e15, 1e19, 3e36])
def test_the_norm_of_very_small_and_very_large_gradients_is_exact(scale, dtype, backend, device):
    params = make_params([(5000,)], device)
    max_norm = min(scale / 10, 1e15)
    optimizer = AdamW(params, max_grad_norm=max_norm, betas=(0.0, 0.9), backend=backend, grad_attribute="main_grad")
    for p in params:
        p.main_grad = (torch.randn_like(p).double() * scale).to(dtype)
    grad = params[0].main_grad.double()
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(grad.norm().item(), rel=1e-5)
    # The factor is max_norm / (norm + 1e-6).
    clipped = grad * min(1.0, max_norm / (grad.norm().item() + 1e-6))
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"].double(), clipped, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_finite_norm_beyond_float32_is_shown_as_the_largest_number(nonfinite, backend, device):
    """inf would say that the step did not happen."""
    params = make_params([(5000,), (3,)], device)
    optimizer = AdamW(params, max_grad_norm=1.0, betas=(0.0, 0.9), nonfinite=nonfinite, backend=backend)
    for p in params:
        p.grad = torch.full_like(p, 3.4e38)
    optimizer.step()
    assert float(optimizer.grad_norm) == torch.finfo(torch.float32).max
    assert optimizer.steps_taken() == 1
    expected = torch.full_like(params[0], 5003**-0.5)
    # The clip factor is a subnormal float32 number with five digits.
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("place", [0, 4999])
@pytest.mark.parametrize("other", [0.0, 1e30])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_reach_the_norm_from_any_element(bad, other, place, backend, device):
    params = make_params([(5000,)], device)
    optimizer = AdamW(params, max_grad_norm=1.0, backend=backend)
    params[0].grad = torch.full_like(params[0], other)
    params[0].grad[place] = bad
    optimizer.step()
    norm = float(optimizer.grad_norm)
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


def test_zero_gradients_are_not_clipped(backend, device):
    params = make_params([(30,)], device)
    optimizer = AdamW(params, max_grad_norm=1.0, weight_decay=0.0, backend=backend)
    before = params[0].detach().clone()
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert float(optimizer.grad_norm) == 0
    assert torch.equal(params[0], before)
    assert optimizer.steps_taken() == 1


def test_max_grad_norm_can_change_between_steps(backend, device):
    params = make_params([(30,)], device)
    optimizer = AdamW(params, betas=(0.0, 0.999), backend=backend)
    assert optimizer.grad_norm is None
    set_grads(params)
    for max_norm in (None, 1.0, 0.25):
        optimizer.max_grad_norm = max_norm
        optimizer.step()
        expected = params[0].grad.norm().item() if max_norm is None else max_norm
        assert optimizer.state[params[0]]["exp_avg"].norm().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [1, 3, 2047, 9000])
@pytest.mark.parametrize("exponent", [-140, -1, 0, 127])
def test_the_integer_sum_over_chunks_does_not_overflow(n, exponent, device):
    """All chunks have the largest norm here, which is the worst case."""
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for norms in (torch.full((n,), 1.9999999), torch.rand(n)):
        norms = (norms.double() * 2.0**exponent).float().to(device)
        padded = torch.nn.functional.pad(norms, (0, -n % kernels.layout.TOTAL_BLOCK))
        n_blocks = len(padded) // kernels.layout.TOTAL_BLOCK
        make_launch(kernels.total_kernel, 1, padded, total, n_blocks, BITS=total_bits(n))()
        assert float(total) == pytest.approx(
            float(norms.double().square().sum()) / kernels.layout.NORM_UNIT**2, rel=1e-9
        )


def test_a_backend_without_gradients_this_time_adds_nothing_to_the_norm(device, triton_takes_fp32_only):
    ours = [
        torch.nn.Parameter(torch.randn(n, device=device, dtype=d)) for n, d in ((50, torch.float32), (60, torch.double))
    ]
    theirs = clone_params(ours)
    optimizer, twin = AdamW(ours, lr=0.1, max_grad_norm=1.0), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for without in (None, 1, None, 0, None):
        set_grads(ours, theirs)
        if without is not None:
            ours[without].grad = theirs[without].grad = None
        held = [p for p in theirs if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad.double() for p in held])
        torch.nn.utils.clip_grads_with_norm_(held, 1.0, total)
        optimizer.step()
        twin.step()
        assert float(optimizer.grad_norm) == pytest.approx(float(total), rel=1e-5)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)


def test_clip_grad_norm_returns_the_norm_and_clips_the_next_step_alone(backend, device):
    params = make_params([(7, 5), (9,)], device)
    twins = clone_params(params)
    ours, theirs = AdamW(params, lr=1e-2, backend=backend), torch.optim.AdamW(twins, lr=1e-2)
    for step in range(3):
        set_grads(params, twins)
        before = [p.grad.clone() for p in params]
        if step != 1:
            found = ours.clip_grad_norm_(0.1)
            expected = torch.nn.utils.clip_grad_norm_(twins, 0.1)
            torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-6, atol=0)
        ours.step()
        theirs.step()
        assert all(map(torch.equal, before, [p.grad for p in params])), "no gradient is rewritten"
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="max_norm=0 is not positive"):
        ours.clip_grad_norm_(0)
    with ours.release_gradients(), pytest.raises(RuntimeError, match="gradients are released"):
        ours.clip_grad_norm_(1.0)


def test_a_clipping_whose_step_a_scaler_left_out_is_forgotten_with_its_gradients(device):
    p = torch.nn.Parameter(torch.ones(4, device=device))
    q = torch.nn.Parameter(torch.ones(4, device=device))
    ours, theirs = AdamW([p], lr=0.1, eps=1.0, backend="torch"), torch.optim.AdamW([q], lr=0.1, eps=1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    scaler.scale(p.sum() * math.inf).backward()
    scaler.unscale_(ours)
    ours.clip_grad_norm_(0.1)
    scaler.step(ours)
    scaler.update()
    assert torch.equal(p, torch.ones_like(p)), "the scaler leaves the step out"
    ours.zero_grad()
    set_grads([p], [q])
    ours.step()
    theirs.step()
    torch.testing.assert_close(p, q)
