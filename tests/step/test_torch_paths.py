"""The torch backend's choice of an implementation: 16-bit parameters, norms, strides, dtypes and loss scales."""

import pytest
import torch

from lwadamw import AdamW
from tests.cases import FEW_SHAPES, assert_equal, clone_params, make_params, set_grads

pytestmark = pytest.mark.matrix

HALVES = [torch.bfloat16, torch.float16]
ASKED = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}]


def _halves(dtype, device, scale=1.0):
    return [torch.nn.Parameter((p.detach() * scale).to(dtype)) for p in make_params(FEW_SHAPES, device)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"max_grad_norm": 0.1}], ids=str)
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_16_bit_parameters_of_the_torch_backend_are_updated_as_the_kernels_do(
    dtype, options, tensors, capturable, device
):
    """Half of the gradients are 0, and in the first step the others are tiny, where arithmetic in float16 gives 0/0."""
    ours = _halves(dtype, device)
    theirs = clone_params(ours)
    lr = torch.tensor(1e-2, device=device) if tensors else 1e-2
    a = AdamW(ours, lr=lr, backend="torch", capturable=capturable, **options)
    b = AdamW(theirs, lr=1e-2, backend="triton", **options)
    for scale in (1e-4, 1.0, 1.0):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * scale * (torch.rand(p.shape, device=device) < 0.5).to(dtype)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert p.isfinite().all()
            torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            with torch.no_grad():  # one digit of a tiny v would be many digits of the next weight
                q.copy_(p)
                for key, value in b.state[q].items():
                    value.copy_(a.state[p][key])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("lr", [1e-7, 1e-2])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=str)
def test_norms_of_16_bit_parameters_are_those_of_the_stored_weights(dtype, asked, lr, options, device):
    """At lr 1e-7 rounding loses every update, so the update is exactly 0."""
    params = _halves(dtype, device)
    optimizer = AdamW(params, lr=lr, eps=1e-3, weight_decay=0.0, backend="torch", **asked, **options)
    for _ in range(2):
        set_grads(params)
        before = [p.detach().double() for p in params]
        optimizer.step()
        grads = [p.grad.double() for p in params]
        clip = 1.0
        if options:
            clip = min(1.0, 0.1 / sum(float(g.square().sum()) for g in grads) ** 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        norms = optimizer.norms()
        moved = [(p.detach().double() - old).norm().item() for p, old in zip(params, before, strict=True)]
        assert norms.update == pytest.approx(moved, rel=1e-6)
        assert norms.grad == pytest.approx([g.norm().item() * clip for g in grads], rel=1e-3)
        assert norms.weight == pytest.approx([p.detach().double().norm().item() for p in params], rel=1e-6)
        assert (lr == 1e-2) == (norms.update[2] > 0)
        if lr == 1e-7:
            assert not norms.update[:3].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_off_copies_no_weight(dtype, device, monkeypatch):
    from lwadamw.step import torch_backend

    monkeypatch.setattr(torch_backend, "HalfNorms", None)
    params = _halves(dtype, device)
    optimizer = AdamW(params, norms=False, backend="torch", foreach=True)
    set_grads(params)
    optimizer.step()
    assert optimizer.steps_taken() == 1


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("both", ["torch", "triton"])
def test_norms_and_gradients_under_a_loss_scale(dtype, asked, clip, both, device):
    """norms().grad is the norm of the unscaled gradient on every path, and 0 after a skipped step."""
    if both == "triton" and (asked.get("foreach") or asked.get("fused") is False):
        pytest.skip("the Triton backend excludes them")
    params = _halves(dtype, device, 0.5)
    optimizer = AdamW(params, lr=1e-3, eps=1e-3, backend=both, max_grad_norm=clip, **asked)
    unscales = optimizer._step_supports_amp_scaling
    if dtype == torch.float16 and not unscales:
        pytest.skip("GradScaler refuses to unscale float16 gradients")
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0, growth_interval=100)
    for bad in (False, True, False):
        true = [torch.randn(p.shape, device=device) * 0.1 for p in params]
        scale = scaler.scale(torch.ones((), device=device))
        for p, g in zip(params, true, strict=True):
            p.grad = (g * scale).to(dtype)
        true = [p.grad.double() / float(scale) for p in params]
        if bad:
            params[0].grad[3] = float("inf")
        scaled = [p.grad.clone() for p in params]
        before = [p.detach().double() for p in params]
        scaler.step(optimizer)
        scaler.update()
        if bad and not unscales:
            continue  # GradScaler did not call the optimizer at all
        norms = optimizer.norms()
        moved = [(p.detach().double() - old).norm().item() for p, old in zip(params, before, strict=True)]
        if bad:
            assert not norms.grad.any()
            assert not norms.update.any()
            assert moved == [0.0] * 4
            continue
        factor = 1.0 if clip is None else min(1.0, clip / sum(float(g.square().sum()) for g in true) ** 0.5)
        assert norms.grad == pytest.approx([g.norm().item() * factor for g in true], rel=2e-3)
        assert norms.update == pytest.approx(moved, rel=1e-2)
        left = all(torch.equal(p.grad, g) for p, g in zip(params, scaled, strict=True))
        in_place = both == "torch" and (not unscales or (asked.get("fused") and clip is None))
        assert left == (not in_place), "docs say where p.grad is unscaled in place"


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "contiguous": lambda t: t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("state_layout", LAYOUTS)
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_any_mixture_of_strides_is_updated_element_by_element(
    layout, grad_layout, state_layout, asked, backend, device
):
    """torch.optim.AdamW(fused=True) pairs elements by their place in memory, and so mixes them up."""
    if backend == "triton" and (asked.get("fused") is False or "foreach" in asked or layout == "every other column"):
        pytest.skip("the Triton backend refuses it")
    p = torch.nn.Parameter(LAYOUTS[layout](torch.randn(6, 10, device=device)))
    q = torch.nn.Parameter(p.detach().contiguous().clone())
    ours, theirs = AdamW([p], lr=0.1, backend=backend, **asked), torch.optim.AdamW([q], lr=0.1, foreach=False)
    for step in range(3):
        grad = torch.randn(6, 10, device=device)
        p.grad, q.grad = None, grad.clone()
        p.grad = LAYOUTS[grad_layout](grad)
        if step == 1:
            for key in ("exp_avg", "exp_avg_sq"):
                ours.state[p][key] = LAYOUTS[state_layout](ours.state[p][key])
        ours.step()
        theirs.step()
        assert_equal([p], [q])
        for key in ("exp_avg", "exp_avg_sq"):
            assert_equal([ours.state[p][key]], [theirs.state[q][key]])
        norms = ours.norms()
        assert norms.grad[0] == pytest.approx(grad.norm().item(), rel=1e-5)
        assert norms.weight[0] == pytest.approx(q.norm().item(), rel=1e-5)


REFUSED = {
    "complex, fused": (
        lambda: torch.ones(3, dtype=torch.complex64),
        {"fused": True},
        "`fused=True` requires all the params",
    ),
    "meta, fused": (lambda: torch.ones(3, device="meta"), {"fused": True}, "`fused=True` requires all the params"),
    "integer": (lambda: torch.ones(3, dtype=torch.int32), {}, "is torch.int32, and AdamW updates floating point"),
    "integer, fused": (lambda: torch.ones(3, dtype=torch.int32), {"fused": True}, "floating point"),
    "integer, foreach": (lambda: torch.ones(3, dtype=torch.int64), {"foreach": True}, "is torch.int64"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_torch_refuses_is_refused_before_another_parameter_has_moved(what, device):
    make, options, message = REFUSED[what]
    good = make_params(FEW_SHAPES, device)
    made = make()
    bad = torch.nn.Parameter(made, requires_grad=made.is_floating_point() or made.is_complex())
    theirs = torch.optim.AdamW([torch.nn.Parameter(made, requires_grad=bad.requires_grad)], **options)
    theirs.param_groups[0]["params"][0].grad = torch.ones_like(made)
    with pytest.raises(RuntimeError, match="cast|fused=True"):
        theirs.step()
    optimizer = AdamW(
        [{"params": [("good" + str(i), p) for i, p in enumerate(good)]}, {"params": [("bad", bad)], **options}]
    )
    before = [p.detach().clone() for p in good]
    set_grads(good)
    bad.grad = torch.ones_like(bad)
    with pytest.raises(RuntimeError, match=message) as error:
        optimizer.step()
    assert "'bad' (3,)" in str(error.value)
    assert all(torch.equal(p, b) for p, b in zip(good, before, strict=True))
    bad.grad = None
    optimizer.step()
    assert optimizer.steps_taken() == 1


def test_a_tensor_lr_with_foreach_is_refused_before_another_group_has_moved():
    a, b = make_params([(3,), (4,)])
    optimizer = AdamW([{"params": [a]}, {"params": [b], "foreach": True}])
    set_grads([a, b])
    optimizer.param_groups[1]["lr"] = torch.tensor(0.1)
    before = a.detach().clone()
    with pytest.raises(
        RuntimeError, match="group 1: lr as a Tensor is not supported for capturable=False and foreach=True"
    ):
        optimizer.step()
    assert torch.equal(a, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_gradient_of_another_dtype_does_not_cost_a_wide_parameter_its_digits(dtype):
    p = torch.nn.Parameter(torch.randn(50, dtype=dtype))
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = AdamW([p], grad_attribute="main_grad"), torch.optim.AdamW([q])
    for _ in range(3):
        q.grad = torch.randn(50).to(dtype)
        p.main_grad = q.grad.to(torch.float32 if dtype == torch.float64 else torch.complex128)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_wide_parameter_refuses_moments_that_would_lose_digits_or_a_part(dtype):
    p = torch.nn.Parameter(torch.randn(50, dtype=dtype))
    optimizer = AdamW([p])
    p.grad = torch.randn(50, dtype=dtype)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].to(torch.complex128)
    with pytest.raises(RuntimeError, match=r"exp_avg of '0.0' \(50,\) is torch.complex128, and beside a parameter"):
        optimizer.step()


def test_moments_follow_a_layout_that_only_a_later_path_needs():
    """torch's loop takes arrays of any strides. The packed path, which a gradient of another dtype takes, needs one layout."""
    p = torch.nn.Parameter(torch.randn(6, 6).t())
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = AdamW([p], grad_attribute="main_grad"), torch.optim.AdamW([q])
    for step in range(4):
        if step == 1:
            p.data = p.data.contiguous()
        q.grad = torch.randn(6, 6).bfloat16().float()
        p.main_grad = q.grad.bfloat16() if step > 1 else q.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
