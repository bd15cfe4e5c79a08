"""A weight that is kept in two arrays survives a change of the parameter's dtype, or the change is refused."""

import copy
import io
import warnings

import pytest
import torch

from lwadamw import AdamW
from lwadamw.state import packing
from tests.state.storages import B, F, H

pytestmark = pytest.mark.matrix

D = torch.float64
OPTIONS = {
    "master": {"master_weights": torch.float32},
    "remainder": {"master_weights": "remainder"},
    "kahan": {"rounding": "kahan"},
}
# (companion, dtype before, dtype after): all that there are.
FOLLOWED = [
    *[(kept, B, wide) for kept in OPTIONS for wide in (F, D)],
    *[(kept, H, wide) for kept in ("master", "kahan") for wide in (F, D)],
    ("master", B, H),
    ("master", H, B),
]
REFUSED = [("remainder", B, H), ("kahan", B, H), ("kahan", H, B), *[(kept, B, torch.complex64) for kept in OPTIONS]]
LR = 1e-3


def _run(kept, dtype, backend, steps=3):
    p = torch.nn.Parameter((torch.randn(7, 9) * torch.logspace(-3, 2, 9)).to(dtype))
    optimizer = AdamW([("w", p)], lr=LR, weight_decay=0.1, backend=backend, **OPTIONS[kept])
    for _ in range(steps):
        p.grad = torch.randn_like(p)
        optimizer.step()
    return p, optimizer


def _saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def _step_of_float64(weight, moments, step, grad):
    """Return the weight after one step, in float64."""
    m = 0.9 * moments["exp_avg"].double() + 0.1 * grad.double()
    v = 0.999 * moments["exp_avg_sq"].double() + 0.001 * grad.double() ** 2
    update = m / (1 - 0.9**step) / (v.sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8)
    return weight - LR * 0.1 * weight - LR * update


def _assert_it_goes_on_from(whole, q, new):
    """Assert that the next step starts from a weight, and not from a rounded copy of it."""
    moments = {key: new.state[q][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    step = int(new.state[q]["step"]) + 1
    q.grad = torch.randn(q.shape, dtype=torch.float32).to(q.dtype)
    expected = _step_of_float64(whole.double(), moments, step, q.grad)
    new.step()
    after = q if q.dtype in (F, D) else new.master_weight(q)
    torch.testing.assert_close(after.double(), expected, rtol=3e-7, atol=3e-7)
    if q.dtype in (F, D):
        assert not {"master_param", "kahan_comp"} & new.state[q].keys()
    else:
        assert torch.equal(q, after.to(q.dtype))


@pytest.mark.parametrize("source", ["the rounded copy", "the whole weight"])
@pytest.mark.parametrize(("kept", "before", "after"), FOLLOWED, ids=str)
def test_a_run_that_resumes_in_another_dtype_keeps_its_whole_weight(kept, before, after, source, backend):
    if backend == "triton" and after == D:
        pytest.skip("the kernels do not update float64 parameters")
    p, optimizer = _run(kept, before, backend)
    whole = optimizer.master_weight(p)
    assert not torch.equal(whole, p.float())
    q = torch.nn.Parameter((p.detach() if source == "the rounded copy" else whole).to(after))
    options = {} if after == D else OPTIONS[kept]
    new = AdamW([("w", q)], lr=LR, weight_decay=0.1, backend=backend, **options)
    new.load_state_dict(_saved(optimizer))
    torch.testing.assert_close(new.master_weight(q).float(), whole, rtol=0, atol=0)
    _assert_it_goes_on_from(whole, q, new)


@pytest.mark.parametrize(("kept", "before", "after"), FOLLOWED, ids=str)
def test_a_parameter_cast_in_the_middle_of_a_run_keeps_its_whole_weight(kept, before, after, backend):
    if backend == "triton" and after == D:
        pytest.skip("the kernels do not update float64 parameters")
    p, optimizer = _run(kept, before, backend)
    whole = optimizer.master_weight(p)
    p.grad = None
    p.data = p.data.to(after)
    _assert_it_goes_on_from(whole, p, optimizer)


@pytest.mark.parametrize(("kept", "before", "after"), REFUSED, ids=str)
def test_a_companion_that_cannot_serve_the_parameter_is_refused_at_load_and_at_the_step(kept, before, after, backend):
    p, optimizer = _run(kept, before, backend)
    q = torch.nn.Parameter(p.detach().to(after))
    new = AdamW([("w", q)], backend="torch")
    untouched = copy.deepcopy(new.state_dict())
    state_dict = _saved(optimizer)
    with pytest.raises(ValueError, match=r"load_state_dict: the state of 'w' \(7, 9\) does not fit") as error:
        new.load_state_dict(state_dict)
    assert new.state_dict() == untouched
    if after in (B, H):
        exec(str(error.value).split("\n")[1].strip())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the group still asks for a companion
            new.load_state_dict(state_dict)

    p.grad = None
    p.data = q.detach().clone()
    p.grad = torch.ones_like(p)
    state = {key: value.clone() for key, value in optimizer.state[p].items()}
    with pytest.raises(RuntimeError, match=r"'w' \(7, 9\)"):
        optimizer.step()
    assert torch.equal(p, q)
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["master_param", "kahan_comp"])
def test_a_companion_of_an_unknown_dtype_is_refused(name, backend):
    p, optimizer = _run("master", B, backend)
    optimizer.state[p].pop("master_param")
    optimizer.state[p][name] = torch.zeros(7, 9, dtype=torch.int32)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=rf"{name} is torch.int32"):
        optimizer.step()


def test_conversion_after_a_cast_drops_the_companion_and_keeps_the_weight(backend):
    for kept in OPTIONS:
        p, optimizer = _run(kept, B, backend)
        whole = optimizer.master_weight(p)
        p.grad = None
        p.data = p.data.float()
        optimizer.convert_state()
        assert torch.equal(p, whole)
        assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_zeros_written_to_a_parameter_are_never_taken_for_a_rounded_copy(backend):
    p, optimizer = _run("master", B, backend)
    with torch.no_grad():
        optimizer.state[p]["master_param"].fill_(1e-9)  # rounds to zero in float16
        p.zero_()
    optimizer.load_state_dict(_saved(optimizer))
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p == 0).all()


def test_a_double_parameter_gets_double_moments(backend):
    if backend == "triton":
        pytest.skip("the kernels do not update float64 parameters")
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = AdamW([p], lr=LR)
    p.grad = torch.randn(5)
    optimizer.step()
    moments, before = {k: v.clone() for k, v in optimizer.state[p].items()}, p.detach().double()
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.randn(5, dtype=D)
    expected = before * (1 - LR * 0.01) - (before - _step_of_float64(before, moments, 2, p.grad) - LR * 0.1 * before)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == D
    torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [B, H])
def test_a_compensation_always_belongs_to_the_parameter_that_it_was_made_with(dtype):
    """Every exponent, every distance from the parameter up to half the spacing, and the two sides of a power of two."""
    exponents = torch.arange(-120, 120) if dtype == B else torch.arange(-24, 15)
    fractions = torch.cat([torch.rand(2000), torch.tensor([0.0, 0.5, 1.0]), 1 - torch.logspace(-8, -1, 200)])
    ulp = torch.finfo(dtype).eps
    mantissas = 1 + ulp * torch.tensor([0.0, 1.0, 2.0, 3.0, 1 / ulp - 1])[:, None] + ulp * (fractions - 0.5)
    for sign in (1.0, -1.0):
        weight = (sign * mantissas.flatten() * torch.pow(2.0, exponents.double())[:, None]).float().flatten()
        near = weight.to(dtype)
        lost = (weight - near.float()).to(dtype)
        assert torch.equal(packing.join_compensation(near, lost), near.float() + lost.float())


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-3, -2.0, 3e4, float("inf"), float("nan")])
@pytest.mark.parametrize("kept", OPTIONS)
def test_a_value_written_to_a_parameter_is_the_weight_to_half_a_digit(kept, value, backend):
    if (kept, value) == ("remainder", float("inf")):
        pytest.skip("an upper half of inf and a negative lower half are a finite weight above the largest bfloat16")
    p, optimizer = _run(kept, B, backend)
    p.data.fill_(value)
    optimizer.param_groups[0]["lr"] = 0.0
    expected = torch.full((7, 9), value).bfloat16().float()
    bound = torch.finfo(B).eps / 2 if kept != "master" else 0.0
    for _ in range(2):
        torch.testing.assert_close(optimizer.master_weight(p), expected, rtol=bound, atol=1e-40, equal_nan=True)
        if abs(value) < float("inf"):
            p.grad = torch.randn_like(p)
            optimizer.step()
            assert torch.equal(p.float(), expected)
