"""No finite gradient makes a weight NaN, whatever its size, and the update keeps its magnitude."""

import math

import pytest
import torch

from lwadamw import AdamW, reference
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import storage_of
from tests.state.storages import ALIKE, BETAS, optimizer_of, shapes_of

# NumPy, which runs the interpreted kernels, reports what a GPU does silently: products and sums of squares become inf.
pytestmark = [
    pytest.mark.matrix,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
LR = 1e-2
ALL = [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in COMBINATIONS]


def _zeros(c, device):
    """Parameters of zeros, so that every weight is the sum of its updates."""
    return [torch.nn.Parameter(torch.zeros(s, dtype=c.param, device=device)) for s in shapes_of(c)[:2]]


def _optimizer(c, params, backend, **more):
    """The optimizer of a combination. Its weights do not decay, and fp16 gradients do not limit the test to 65504."""
    options = {"weight_decay": 0.0, "lr": LR, "grad_attribute": "main_grad", "backend": backend, **more}
    return optimizer_of(c, params, **options)


def _give(params, dtype, size):
    for p in params:
        p.main_grad = ((torch.rand(p.shape, device=p.device) + 1) / 2 * size).to(dtype)


def _is_torchs_own(p, optimizer, backend):
    """Whether torch's functional AdamW takes the step. Its v becomes inf, and its update 0."""
    return backend == "torch" and storage_of(p, p.main_grad, optimizer.param_groups[0], optimizer.state[p]).plain


@pytest.mark.parametrize("size", [1e18, 1e20, 3e38])
@pytest.mark.parametrize("name", ALL)
def test_updates_from_large_gradients_have_the_magnitude_of_float64(name, size, backend, device):
    c = COMBINATIONS[name]
    params = _zeros(c, device)
    optimizer = _optimizer(c, params, backend)
    group = reference.Group(lr=LR, betas=BETAS, weight_decay=0.0)
    exact = [reference.Parameter(p.detach().double().cpu().numpy().copy(), group) for p in params]
    dtype = torch.bfloat16 if c.grad == torch.float16 else c.grad
    for factor in (1.0, 0.0, 0.5):
        _give(params, dtype, factor * size)
        optimizer.step()
        reference.step(exact, [p.main_grad.double().cpu().numpy() for p in params])
        for p, theirs in zip(params, exact, strict=True):
            weight = optimizer.master_weight(p).double().cpu()
            assert weight.isfinite().all()
            if not _is_torchs_own(p, optimizer, backend):
                ratio = weight / torch.from_numpy(theirs.value)
                assert 0.6 < ratio.min() <= ratio.max() < 1.7


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1, -1)])
@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"maximize": True}, {"decay": "huber", "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("name", ["fp32", "bf16, remainder"])
def test_large_gradients_of_changing_sign_leave_weights_finite(name, options, signs, backend, device):
    c = COMBINATIONS[name]
    params = _zeros(c, device)
    optimizer = _optimizer(c, params, backend, **options)
    for sign in signs:
        _give(params, c.grad, 3e38 / 2 * sign)
        optimizer.step()
        for p in params:
            assert optimizer.master_weight(p).abs().max() < 2 * LR * len(signs)


@pytest.mark.parametrize("size", [1.0, 300.0, 6e4])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"exp_avg_sq_dtype": torch.float32}], ids=str)
def test_moments_in_fp16_stay_finite(options, size, backend, device):
    """v is fp16, unless the options say otherwise: its largest value is 65504, the square of 255.9."""
    p = torch.nn.Parameter(torch.zeros(300, dtype=torch.float16, device=device))
    optimizer = AdamW([p], lr=LR, weight_decay=0.0, backend=backend, grad_attribute="main_grad", **options)
    for step in range(1, 5):
        p.main_grad = torch.full_like(p, size, dtype=torch.float32)
        optimizer.step()
        torch.testing.assert_close(p.detach().float(), torch.full_like(p, -LR * step).float(), rtol=0.02, atol=0)
        state = optimizer.state[p]
        assert all(state[key].isfinite().all() for key in ("exp_avg", "exp_avg_sq"))


def test_converted_moments_that_fp16_cannot_hold_become_its_largest_number(device):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16, device=device))
    optimizer = AdamW([p], exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32, backend="torch")
    optimizer.initialize_state(p)
    optimizer.state[p]["exp_avg"].copy_(torch.tensor([-1e6, 2.0, math.nan]))
    optimizer.state[p]["exp_avg_sq"].copy_(torch.tensor([1e12, 4.0, math.nan]))
    for key in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        optimizer.param_groups[0][key] = None
    optimizer.convert_state()
    state = optimizer.state[p]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float16
    assert state["exp_avg"].tolist()[:2] == [-65504.0, 2.0]
    assert state["exp_avg_sq"].tolist()[:2] == [65504.0, 4.0]
    assert all(state[key][2].isnan() for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["fp32", "bf16, remainder", "bf16, kahan"])
def test_inf_and_nan_gradients_make_their_own_weight_nan_as_in_torch(name, bad, backend, device):
    c = COMBINATIONS[name]
    params = _zeros(c, device)
    optimizer = _optimizer(c, params, backend)
    _give(params, c.grad, 1.0)
    params[0].main_grad.view(-1)[77] = bad
    optimizer.step()
    isnan = optimizer.master_weight(params[0]).isnan().view(-1)
    assert isnan.nonzero().flatten().tolist() == [77]
    assert optimizer.master_weight(params[1]).isfinite().all()


@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.parametrize("size", [3e38, -3e38])
def test_a_gradient_that_overflows_when_it_is_unscaled_counts_as_the_largest(size, found, backend, device):
    c = COMBINATIONS["bf16, remainder"]
    params = _zeros(c, device)
    optimizer = _optimizer(c, params, backend)
    optimizer.grad_scale = torch.tensor(2.0**-10, device=device)
    optimizer.found_inf = None if found is None else torch.tensor(found, device=device)
    for _ in range(2):
        _give(params, c.grad, size)
        optimizer.step()
    expected = 0.0 if found else -2 * LR * math.copysign(1, size)
    for p in params:
        torch.testing.assert_close(optimizer.master_weight(p), torch.full_like(p, expected).float(), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["bf16, remainder", "bf16, master", "bf16, remainder, 8-bit moments"])
def test_both_backends_limit_gradients_alike(name, device):
    c = COMBINATIONS[name]
    ours, theirs = _zeros(c, device), _zeros(c, device)
    a, b = _optimizer(c, ours, "triton"), _optimizer(c, theirs, "torch")
    for size in (1e19, 3e38, -3e38, 1e18):
        _give(ours, c.grad, size)
        for p, q in zip(ours, theirs, strict=True):
            q.main_grad = p.main_grad.clone()
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                a.master_weight(p), b.master_weight(q), rtol=1e-2 if "8-bit" in name else 1e-5, atol=1e-6
            )
