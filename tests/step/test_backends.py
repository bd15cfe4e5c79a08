"""Both backends equal the float64 reference, for every option, shape and memory layout."""

import pytest
import torch

from lwadamw import AdamW
from tests.cases import (
    OPTIONS,
    assert_matches_reference,
    clone_params,
    make_optimizer,
    make_params,
    make_reference,
    reference_step,
    set_grads,
)


@pytest.mark.parametrize("name", OPTIONS)
def test_backend_matches_reference(name, backend, device):
    options = OPTIONS[name]
    params = make_params(device=device)
    expected = make_reference(params, options)
    optimizer = make_optimizer(params, options, backend=backend)
    for step in range(4):
        set_grads(params, scale=10.0 ** (step % 3 - 1))
        if step in (1, 2):
            params[4].grad = params[7].grad = None
        reference_step(expected, params, options)
        optimizer.step()
        assert_matches_reference(optimizer, params, expected)


def test_groups_with_different_options_share_a_step(backend, device):
    params = make_params(device=device)
    names = list(OPTIONS)[:8]
    expected = [make_reference([p], OPTIONS[n])[0] for p, n in zip(params, names, strict=True)]
    optimizer = AdamW([{"params": [p], **OPTIONS[n]} for p, n in zip(params, names, strict=True)], backend=backend)
    for _ in range(3):
        set_grads(params)
        reference_step(expected, params, {})
        optimizer.step()
        assert_matches_reference(optimizer, params, expected)


def _views_at_odd_offsets(shapes, device):
    """Return parameters and gradients with every misalignment of a multiple of 4 bytes."""
    params, grads = [], []
    for i, n in enumerate(shapes):
        params.append(torch.nn.Parameter(torch.randn(n + 4, device=device)[i % 4 : i % 4 + n]))
        grads.append(torch.randn(n + 4, device=device)[(i // 2) % 4 : (i // 2) % 4 + n])
    return params, grads


def test_unaligned_tensors_match_reference(backend, device):
    params, grads = _views_at_odd_offsets([1, 3, 1024, 1025, 2048, 2049, 1023, 255], device)
    expected = make_reference(params, {})
    optimizer = make_optimizer(params, {}, backend=backend)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    for _ in range(2):
        reference_step(expected, params, {})
        optimizer.step()
    assert_matches_reference(optimizer, params, expected)


def test_alignment_does_not_change_one_bit(device):
    shape = (3000,)
    aligned = torch.nn.Parameter(torch.randn(shape, device=device))
    buffer = torch.empty(3001, device=device)
    buffer[1:] = aligned.detach()
    shifted = torch.nn.Parameter(buffer[1:])
    assert aligned.data_ptr() % 16 == 0
    assert shifted.data_ptr() % 16 == 4
    one, two = AdamW([aligned], backend="triton"), AdamW([shifted], backend="triton")
    for _ in range(3):
        set_grads([aligned], [shifted])
        one.step()
        two.step()
        assert torch.equal(aligned, shifted)
        assert torch.equal(one.state[aligned]["exp_avg_sq"], two.state[shifted]["exp_avg_sq"])


def test_neighbouring_memory_is_left_alone(backend, device):
    buffers = [torch.full((n + 64,), 7.0, device=device) for n in (1, 63, 1025, 2050)]
    params = [torch.nn.Parameter(b[32 : 32 + len(b) - 64]) for b in buffers]
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    optimizer.step()
    for b in buffers:
        assert (b[:32] == 7).all()
        assert (b[-32:] == 7).all()
        assert (b[32:-32] != 7).all()


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "channels_last": lambda t: t.reshape(4, 3, 2, -1).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["same", "contiguous", "transposed", "expanded"])
def test_memory_layouts_match_reference(layout, grad_layout, backend, device):
    p = torch.nn.Parameter(LAYOUTS[layout](torch.randn(24, 50, device=device)))
    assert p.is_contiguous() == (layout == "contiguous")
    expected = make_reference([p], {})
    optimizer = AdamW([p], backend=backend)
    for _ in range(3):
        grad = torch.randn_like(p)
        if grad_layout == "contiguous":
            grad = grad.contiguous()
        elif grad_layout == "transposed":
            grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
        elif grad_layout == "expanded":
            grad = torch.randn((), device=device).expand(p.shape)
        p.grad = grad
        reference_step(expected, [p], {})
        optimizer.step()
        assert_matches_reference(optimizer, [p], expected)
        assert torch.equal(p.grad, grad)


def test_moments_in_another_memory_layout_are_used_correctly(backend, device):
    p = torch.nn.Parameter(torch.randn(24, 50, device=device).t())
    (expected,) = make_reference([p], {})
    optimizer = AdamW([p], backend=backend)
    moments = torch.randn(50, 24, device=device), torch.rand(50, 24, device=device)
    optimizer.state[p].update(exp_avg=moments[0].clone(), exp_avg_sq=moments[1].clone(), step=torch.tensor(3.0))
    expected.exp_avg, expected.exp_avg_sq = (m.double().cpu().numpy() for m in moments)
    expected.step = 3
    set_grads([p])
    reference_step([expected], [p], {})
    optimizer.step()
    assert_matches_reference(optimizer, [p], [expected])


def test_gradients_are_not_rewritten(backend, device):
    params = make_params(device=device)
    set_grads(params)
    before = [p.grad.clone() for p in params]
    optimizer = AdamW(params, max_grad_norm=0.1, maximize=True, backend=backend)
    optimizer.step()
    assert optimizer.steps_taken() == 1
    for p, grad in zip(params, before, strict=True):
        assert torch.equal(p.grad, grad)


def test_segments_change_nothing_but_the_norms(device):
    whole = make_params([(12, 200)], device=device)
    parts = clone_params(whole)
    one = AdamW([("w", whole[0])], backend="triton")
    two = AdamW([{"params": [("w", parts[0])], "segments": {"w": (1, 8, 3)}}], backend="triton")
    for _ in range(2):
        set_grads(whole, parts)
        one.step()
        two.step()
    assert torch.equal(whole[0], parts[0])
    norms = two.norms()
    assert norms.names == ("w[0]", "w[1]", "w[2]")
    for rows, weight in zip(parts[0].detach().split([1, 8, 3]), norms.weight, strict=True):
        assert weight == pytest.approx(rows.double().norm().item(), rel=1e-6)


def test_many_chunks_match_reference(device):
    params = make_params([(10 * 2048 + 1029,), (3,)], device=device)
    expected = make_reference(params, {})
    optimizer = AdamW(params, backend="triton", max_grad_norm=1.0)
    set_grads(params)
    reference_step(expected, params, {"max_grad_norm": 1.0})
    optimizer.step()
    assert_matches_reference(optimizer, params, expected)


def test_complex_parameters_go_to_torch():
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = AdamW([p]), torch.optim.AdamW([q])
    for _ in range(3):
        set_grads([p], [q])
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q)
    assert ours.norms().weight[0] == pytest.approx(p.detach().abs().square().sum().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
def test_a_group_that_asks_for_an_implementation_of_torchs_gets_its_bits(dtype, asked):
    p = torch.nn.Parameter(torch.randn(70).to(dtype))
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = AdamW([p], eps=1e-3, **asked), torch.optim.AdamW([q], eps=1e-3, **asked)
    for _ in range(3):
        set_grads([p], [q])
        ours.step()
        theirs.step()
    assert torch.equal(p, q)


def test_float64_parameters_go_to_torch():
    p = torch.nn.Parameter(torch.randn(70).double())
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = AdamW([p], eps=1e-3), torch.optim.AdamW([q], eps=1e-3)
    for _ in range(3):
        set_grads([p], [q])
        ours.step()
        theirs.step()
    assert torch.equal(p, q)


def _mixed_twins(device):
    """Return two fp32 parameters, a bf16 and an fp64 one, and equal copies of all four."""
    ours = [*make_params([(40,), (1030,)], device), *make_params([(50,), (60,)], device)]
    ours[2], ours[3] = (
        torch.nn.Parameter(p.detach().to(d)) for p, d in zip(ours[2:], (torch.bfloat16, torch.float64), strict=True)
    )
    return ours, clone_params(ours)


def _tolerance(p):
    """Return the relative tolerance for weights and moments: one unit in the last place for bf16, torch's for others."""
    return {"rtol": 2.0**-7 if p.dtype == torch.bfloat16 else 1.3e-6, "atol": 1e-5}


def test_backends_share_one_optimizer_and_one_norm(device, triton_takes_fp32_only):
    """fp32 parameters on the Triton backend, bf16 and fp64 ones on the torch backend, clipped by their common norm.

    The bf16 parameter is updated in float32. So its twin is a float32 parameter that starts every step at its values.
    """
    ours, theirs = _mixed_twins(device)
    theirs[2] = torch.nn.Parameter(theirs[2].detach().float())
    a, b = (
        optimizer_class([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], lr=0.1, **options)
        for optimizer_class, params, options in (
            (AdamW, ours, {"max_grad_norm": 1.0}),
            (torch.optim.AdamW, theirs, {"foreach": False}),
        )
    )
    for step in range(1, 4):
        set_grads(ours)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.to(q.dtype, copy=True)
        before = [p.detach().clone() for p in ours]
        total = torch.nn.utils.get_total_norm([p.grad.double() for p in theirs])
        torch.nn.utils.clip_grads_with_norm_(theirs, 1.0, total)
        a.step()
        b.step()
        assert float(a.grad_norm) == pytest.approx(float(total), rel=1e-5)
        for p, q, old in zip(ours, theirs, before, strict=True):
            torch.testing.assert_close(p, q.to(p.dtype), **_tolerance(p))
            assert (p != old).double().mean() > 0.9
            assert float(a.state[p]["step"]) == step
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(a.state[p][key], b.state[q][key].to(p.dtype), **_tolerance(p))
        norms = a.norms()
        assert norms.names == ("0.0", "0.1", "1.0", "1.1")
        assert norms.weight == pytest.approx([p.detach().double().norm().item() for p in ours], rel=1e-5)
        assert norms.grad == pytest.approx([p.grad.double().norm().item() / float(total) for p in ours], rel=1e-5)
        moved = [(p.detach().double() - old.double()).norm().item() for p, old in zip(ours, before, strict=True)]
        assert norms.update == pytest.approx(moved, rel=1e-2)
        with torch.no_grad():  # so that rounding differences do not add up over steps
            for p, q in zip(ours, theirs, strict=True):
                q.copy_(p)
                for key, value in b.state[q].items():
                    value.copy_(a.state[p][key])


@pytest.mark.parametrize("bad", range(4))
def test_a_gradient_that_is_not_finite_stops_both_backends(bad, device, triton_takes_fp32_only):
    ours, _ = _mixed_twins(device)
    optimizer = AdamW(ours, max_grad_norm=1.0)
    set_grads(ours)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in ours] == [1] * len(ours)
    before = [[p.detach().clone(), *(t.clone() for t in optimizer.state[p].values())] for p in ours]
    set_grads(ours)
    ours[bad].grad[7] = float("inf")
    optimizer.step()
    for p, old in zip(ours, before, strict=True):
        assert all(map(torch.equal, [p, *optimizer.state[p].values()], old))
    assert int(optimizer.skipped_steps) == 1
