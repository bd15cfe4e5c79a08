"""Whatever others write to a parameter between two steps, the next step starts from there, on both backends."""

import pytest
import torch

from lwadamw import reference
from lwadamw.state import packing
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import MOMENTS
from tests.state.storages import ALIKE, BETAS, B, F, give_grads, make

# NumPy, which runs the interpreted kernels, reports what a GPU does silently.
pytestmark = [
    pytest.mark.matrix,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


def _in_place(p, values):
    with torch.no_grad():
        p.copy_(values)


def _through_data(p, values):
    p.data.copy_(values)


def _through_an_alias(p, values):
    """An alias that shares memory and no version counter, as the local tensor of a DTensor."""
    torch.from_dlpack(p.detach().data).copy_(values)


WAYS = {"in place": _in_place, "data": _through_data, "alias": _through_an_alias}
# Every way with the weights that are kept in two arrays; the kernels read them alike for all moments.
CASES = [pytest.param(n, "data", marks=[pytest.mark.slow] * (n in ALIKE)) for n in COMBINATIONS]
CASES += [(n, way) for n in ("bf16, master", "bf16, remainder") for way in ("in place", "alias")]


def _written(p):
    """New values for a third of the elements, 0 for a third and the old values elsewhere. The first ones are special."""
    old = p.detach().float()
    kind = torch.randint(0, 3, p.shape, device=p.device)
    values = torch.where(kind == 0, torch.randn_like(old), torch.where(kind == 1, 0.0, old)).to(p.dtype)
    values.view(-1)[:3] = torch.tensor([0.0, -0.0, 5.0])[: p.numel()]
    return values


def _kept_of_companion(c, before, written):
    """How far the weight may be from the parameter after a write: what the companion adds."""
    if c.storage.weight == "remainder":
        return torch.finfo(B).eps / 2 * written.double().abs() + torch.finfo(F).tiny
    return torch.finfo(B).eps * before.double().abs() if c.storage.weight == "kahan" else 0.0 * written.double()


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_step_starts_from_what_others_have_written(name, way, backend, device):
    c = COMBINATIONS[name]
    # Half a block, so that the interpreter has little to do; moments of 8 bits need 4096 elements.
    shapes = [(33, 128) if c.storage.exp_avg == torch.int8 else (600,), (), (0,)]
    params, optimizer = make(c, shapes=shapes, device=device, backend=backend)
    group = reference.Group(lr=1e-2, betas=BETAS, weight_decay=0.1)
    give_grads(c, params)
    optimizer.step()
    starts = []
    for p in params:
        before, master, values = p.detach().clone(), optimizer.master_weight(p), _written(p)
        WAYS[way](p, values)
        start = optimizer.master_weight(p).double()
        bits = torch.int16 if c.param.itemsize == 2 else torch.int32
        untouched = values.view(bits) == before.view(bits)
        assert torch.equal(start[untouched], master.double()[untouched])
        off = (start - values.double()).abs()[~untouched]
        assert (off <= _kept_of_companion(c, before, values)[~untouched]).all()
        starts.append(start)
    states = [optimizer.state[p] for p in params]
    moments = [[packing.read_moment(state, key).double() for key in MOMENTS[:2]] for state in states]
    give_grads(c, params)
    optimizer.step()
    for p, start, (m, v) in zip(params, starts, moments, strict=True):
        exact = reference.Parameter(start.cpu().numpy(), group, 1, m.cpu().numpy(), v.cpu().numpy())
        reference.step([exact], [p.grad.double().cpu().numpy()])
        expected = torch.as_tensor(exact.value).to(device)
        # In 16 bits the weight is rounded once, and torch's own step also rounds moments and update.
        eps = torch.finfo(F if c.storage.weight in ("master", "remainder") else c.param).eps
        bound = 2e-6 * expected.abs() + 1e-7 + eps * (expected.abs() + 0.2 * (eps > 1e-4))
        assert ((optimizer.master_weight(p).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", ["bf16, remainder", "bf16, master", "bf16, kahan", "bf16, stochastic", "fp16, master"])
@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), -1e-40])
def test_any_value_written_over_any_weight_is_no_nan(name, value, backend, device):
    c = COMBINATIONS[name]
    params, optimizer = make(c, shapes=[(300,)], device=device, backend=backend)
    give_grads(c, params)
    optimizer.step()
    params[0].data.fill_(value)
    assert not optimizer.master_weight(params[0]).isnan().any()
    give_grads(c, params)
    optimizer.step()
    assert not params[0].isnan().any() or abs(value) == float("inf")
    assert not optimizer.master_weight(params[0]).isnan().any() or abs(value) == float("inf")


@pytest.mark.parametrize("name", ["bf16, remainder", "bf16, master", "fp16, master"])
def test_nan_in_a_parameter_stays_nan(name, backend, device):
    c = COMBINATIONS[name]
    params, optimizer = make(c, shapes=[(300,)], device=device, backend=backend)
    give_grads(c, params)
    optimizer.step()
    params[0].data[5] = float("nan")
    give_grads(c, params)
    optimizer.step()
    assert params[0].isnan().nonzero().flatten().tolist() == [5]
