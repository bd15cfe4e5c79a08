"""Promise 5: norms equal float64 norms to 1e-5, can be added up over shards, and describe what the step really did."""

import math

import numpy as np
import pytest
import torch

from lwadamw import AdamW, Norms
from tests.cases import make_params, make_reference, reference_step, set_grads

SHAPES = [(33, 65), (7,), (1,), (3000,), (0,), (2, 3, 5), (), (9000,)]


def _norms_of(before, params, grads):
    """Return float64 norms of a step, computed from weights before and after it and from gradients."""
    out = []
    for b, p, g in zip(before, params, grads, strict=True):
        b, p = b.double().flatten(), p.detach().double().flatten()
        cosine = (b @ p / (b.norm() * p.norm())).clamp(-1, 1)
        out.append(
            (p.norm().item(), (p - b).norm().item(), g.double().norm().item(), math.acos(cosine) if len(p) else 0)
        )
    return np.array(out).T


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # masked elements with eps 0
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"max_grad_norm": 0.3}, {"eps": 0.0}])
def test_norms_equal_float64_of_the_weights(options, backend, device):
    params = make_params(SHAPES, device)
    optimizer = AdamW(params, lr=3e-2, weight_decay=0.3, backend=backend, **options)
    for _ in range(2):
        set_grads(params)
        before = [p.detach().clone() for p in params]
        grads = [p.grad for p in params]
        if "max_grad_norm" in options:
            total = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
            grads = [g.double() * (0.3 / (total + 1e-6)) for g in grads]
        optimizer.step()
        norms = optimizer.norms()
        weight, update, grad, angle = _norms_of(before, params, grads)
        np.testing.assert_allclose(norms.weight, weight, rtol=1e-5)
        # The weights have rounded the update to their own digits, in torch's loop over operators more than once.
        assert (np.abs(norms.update - update) <= 1e-5 * update + 1e-7 + 2**-22 * weight).all()
        np.testing.assert_allclose(norms.grad, grad, rtol=1e-5)
        # If an update only changes the length, as that of a scalar, fp32 sums do not resolve smaller angles.
        floor = 1e-3 * update / np.maximum(weight, 1e-30)
        assert (np.abs(norms.angle - angle) <= 1e-3 * angle + floor).all()


@pytest.mark.parametrize("lr", [1e-2, 1e-7])
def test_norms_equal_the_reference_at_any_learning_rate(lr, backend, device):
    """At lr 1e-7 the update is smaller than the last digit of the weights. Its norm and angle are still known."""
    options = {"lr": lr, "weight_decay": 0.1}
    params = make_params([(900,), (30, 30)], device)
    expected = make_reference(params, options)
    optimizer = AdamW(params, **options, backend=backend)
    set_grads(params)
    reference = reference_step(expected, params, options)
    optimizer.step()
    norms = optimizer.norms()
    for i, r in enumerate(reference):
        assert norms.weight[i] == pytest.approx(r.weight, rel=1e-5)
        assert norms.update[i] == pytest.approx(r.update, rel=1e-5)
        assert norms.grad[i] == pytest.approx(r.grad, rel=1e-5)
        assert norms.angle[i] == pytest.approx(r.angle, rel=1e-4)


def test_a_parameter_without_gradient_has_update_grad_and_angle_zero(backend, device):
    params = make_params([(50,), (60,), (70,)], device)
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    optimizer.step()
    set_grads(params)
    params[1].grad = None
    optimizer.step()
    norms = optimizer.norms()
    assert norms.names == ("0.0", "0.1", "0.2")
    assert norms.weight == pytest.approx([p.detach().double().norm().item() for p in params], rel=1e-5)
    assert (norms.update[1], norms.grad[1], norms.angle[1]) == (0, 0, 0)
    assert norms.update[0] > 0
    assert norms.update[2] > 0


def test_a_parameter_appears_with_its_first_gradient(backend, device):
    params = make_params([(50,), (60,), (70,)], device)
    optimizer = AdamW(params, backend=backend)
    for missing, names in ((2, ("0.0", "0.1")), (0, ("0.0", "0.1", "0.2"))):
        set_grads(params)
        params[missing].grad = None
        optimizer.step()
        norms = optimizer.norms()
        assert norms.names == names
        assert norms.update[1] > 0
    assert norms.update[0] == 0
    assert norms.weight[1:] == pytest.approx([p.detach().double().norm().item() for p in params[1:]], rel=1e-5)


def test_a_skipped_step_has_update_grad_and_angle_zero(backend, device):
    params = make_params([(50,), (60,)], device)
    optimizer = AdamW(params, max_grad_norm=1.0, backend=backend)
    set_grads(params)
    optimizer.step()
    weight = optimizer.norms().weight
    params[0].grad[3] = math.inf
    optimizer.step()
    norms = optimizer.norms()
    assert (norms.weight == weight).all()
    assert not norms.update.any()
    assert not norms.grad.any()
    assert not norms.angle.any()
    optimizer.max_grad_norm = None
    set_grads(params)
    optimizer.step()
    assert optimizer.norms().update.all(), "the next step did not move the parameters"


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)])
def test_norms_of_the_torch_backend_do_not_depend_on_a_later_schedule(lr):
    """The torch backend computes norms when they are read. It has to use the learning rate of the step."""
    params = make_params([(50,)])
    optimizer = AdamW(params, lr=lr, backend="torch")
    before = params[0].detach().clone()
    set_grads(params)
    optimizer.step()
    if isinstance(lr, float):
        optimizer.param_groups[0]["lr"] = 1e-5
    else:
        lr.fill_(1e-5)
    assert optimizer.norms().update[0] == pytest.approx((params[0] - before).detach().double().norm().item(), rel=1e-4)


def test_norms_of_the_torch_backend_have_no_grad_after_zero_grad():
    params = make_params([(50,)])
    optimizer = AdamW(params, backend="torch")
    set_grads(params)
    optimizer.step()
    optimizer.zero_grad()
    norms = optimizer.norms()
    assert math.isnan(norms.grad[0])
    assert norms.update[0] > 0
    assert list(norms.as_dict()) == ["weight/0.0", "update/0.0", "angle/0.0"]


def test_reading_norms_changes_nothing(backend, device):
    params = make_params([(50,), (3000,)], device)
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    first, second = optimizer.norm_sums(), optimizer.norm_sums()
    assert torch.equal(first, second)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_sums_of_shards_add_up_to_the_whole(device):
    whole = make_params([(4000,)], device)
    shards = [torch.nn.Parameter(part.clone()) for part in whole[0].detach().split([1500, 2500])]
    one, two = AdamW(whole, backend="triton"), AdamW(shards, backend="triton")
    set_grads(whole)
    for p, grad in zip(shards, whole[0].grad.split([1500, 2500]), strict=True):
        p.grad = grad
    one.step()
    two.step()
    together = Norms.from_sums(["w"], two.norm_sums().sum(0, keepdim=True).cpu())
    alone = one.norms()
    for statistic in ("weight", "update", "grad", "angle"):
        assert getattr(together, statistic)[0] == pytest.approx(getattr(alone, statistic)[0], rel=1e-6)


def test_norms_before_any_step_are_empty(backend, device):
    norms = AdamW(make_params(device=device), backend=backend).norms()
    assert len(norms) == 0
    assert norms.as_dict() == {}


def test_as_dict_is_flat_floats_by_name():
    norms = Norms.from_sums(["a", "b.w"], [[4.0, 1.0, 9.0, 0.0], [1.0, 0.0, math.nan, 0.0]])
    assert norms.as_dict("l2/") == {
        "l2/weight/a": 2.0,
        "l2/weight/b.w": 1.0,
        "l2/update/a": 1.0,
        "l2/update/b.w": 0.0,
        "l2/grad/a": 3.0,
        "l2/angle/a": pytest.approx(math.atan2(math.sqrt(3.0), 3.0)),
        "l2/angle/b.w": 0.0,
    }
    assert list(norms) == ["a", "b.w"]


def test_from_sums_refuses_another_shape():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), 2 names need \(2, 4\)"):
        Norms.from_sums(["a", "b"], np.zeros((2, 3)))


def test_norms_false_says_how_to_get_them(backend, device):
    optimizer = AdamW(make_params(device=device), norms=False, backend=backend)
    with pytest.raises(RuntimeError, match="norms=True"):
        optimizer.norms()


def test_norm_names_are_the_names_of_the_norms_without_computing_them(device, monkeypatch, triton_takes_fp32_only):
    """A parameter in two segments, one on the torch backend, one that has not stepped, one that steps later."""
    half, double, idle, late = (torch.nn.Parameter(torch.randn(s, device=device)) for s in ((6, 4), (5,), (3,), (2,)))
    double = torch.nn.Parameter(double.detach().double())
    named = [("late", late), ("double", double), ("idle", idle), ("half", half)]
    optimizer = AdamW([{"params": named, "segments": {"half": (2, 4)}}])
    for params in ([half, double], [half, double, late]):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert (optimizer.norms().update > 0).all()
    expected = optimizer.norms().names
    assert expected == ("late", "double", "half[0]", "half[1]")
    monkeypatch.setattr(optimizer._engine, "norm_sums", None)
    assert optimizer.norm_names() == list(expected)


_STORED = {
    "fp32": ({}, torch.float32),
    "rounded after the step": ({}, torch.bfloat16),
    "packed": ({"master_weights": "remainder", "rounding": "nearest"}, torch.bfloat16),
    "clipped": ({"max_grad_norm": 0.3}, torch.float32),
}


@pytest.mark.parametrize("stored", _STORED)
@pytest.mark.parametrize("released", [False, True])
def test_every_segment_has_the_norms_of_its_own_rows(stored, released, backend, device):
    """On the torch backend, one segment is longer than the pieces that are added up at a time."""
    options, dtype = _STORED[stored]
    if released and "max_grad_norm" in options:
        pytest.skip("a released gradient cannot be clipped by the norm of all")
    rows = (1, 700, 2)
    columns = 200 if backend == "torch" else 5
    p, other = (torch.nn.Parameter(torch.randn(n, columns, device=device).to(dtype)) for n in (703, 3))
    group = {"params": [("w", p), ("x", other)], "segments": {"w": rows}}
    optimizer = AdamW([group], lr=3e-2, weight_decay=0.3, backend=backend, **options)
    if released:
        optimizer.release_gradients()
    for _ in range(2):
        before = p.detach().clone()
        grad, more = (torch.randn_like(x) for x in (p, other))
        optimizer.zero_grad()
        (p * grad).sum().add((other * more).sum()).backward()
        optimizer.step()
    norms = optimizer.norms()
    assert norms.names == ("w[0]", "w[1]", "w[2]", "x") == tuple(optimizer.norm_names())
    if "max_grad_norm" in options:
        total = (grad.double().square().sum() + more.double().square().sum()).sqrt()
        grad = grad.double() * (0.3 / (total + 1e-6))
    weight, _, grads, _ = _norms_of(before.split(rows), p.split(rows), grad.split(rows))
    np.testing.assert_allclose(norms.grad[:3], grads, rtol=1e-5)
    # A remainder holds 16 bits of the weight that the parameter does not show.
    close = 1e-5 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(norms.weight[:3], weight, rtol=close)
    change = [(a.double() - b.double()).norm().item() for a, b in zip(p.split(rows), before.split(rows), strict=True)]
    np.testing.assert_allclose(norms.update[:3], change, rtol=5e-2 if dtype == torch.bfloat16 else 1e-5)
    assert (norms.angle[:3] > 0).all()


@pytest.mark.parametrize(
    "options", [{"master_weights": torch.float32}, {"master_weights": "remainder"}, {"rounding": "kahan"}]
)
def test_a_parameter_that_moved_to_a_group_with_a_companion_has_a_norm_before_its_next_step(options):
    moved, other = (torch.nn.Parameter(torch.randn(5).bfloat16()) for _ in range(2))
    wide = {"exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.float32}
    optimizer = AdamW([{"params": [moved], **wide}, {"params": [other], **wide, **options}], backend="torch")
    set_grads([moved, other])
    optimizer.step()
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    moved.grad = None
    optimizer.step()
    norms = dict(zip(*[(n := optimizer.norms()).names, n.weight], strict=True))
    assert norms["1.1"] == pytest.approx(moved.detach().double().norm().item(), rel=1e-6)
