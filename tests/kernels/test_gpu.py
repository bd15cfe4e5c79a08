"""Tests that need a GPU: streams, synchronisation, races, graphs, more than 2^31 elements, compiled arithmetic.

Every test is a plain function without fixtures, so that `make gpu-test` can run it without pytest.
"""

from __future__ import annotations

import copy
import math
import unittest

import numpy as np
import torch

from lwadamw import AdamW, reference

try:
    import pytest

    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    ]
except ImportError:
    pass

SIZES = (1, 3, 63, 256, 1024, 1025, 2048, 4099, 65536, 278011)
VARIANTS = (
    {},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.5},
    {"max_grad_norm": 1.0},
    {"max_grad_norm": 1.0, "amsgrad": True},
)


def _params(sizes=SIZES, offset=0):
    """Parameters on the device. With an offset of 1 to 3 elements, no parameter is 16-byte aligned."""
    buffers = [torch.randn(n + 4, device="cuda") for n in sizes]
    return [torch.nn.Parameter(b[offset : offset + n]) for b, n in zip(buffers, sizes, strict=True)]


def _new_grads(*copies):
    """Give the parameters of all copies the same new random gradients."""
    for same in zip(*copies, strict=True):
        grad = torch.randn_like(same[0])
        for p in same:
            p.grad = grad.clone()


def _twins(params):
    """Copies of parameters."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def test_every_variant_matches_float64():
    for options in VARIANTS:
        for norms in (True, False):
            for offset in (0, 1):
                params = _params(offset=offset)
                group = reference.Group(**{k: v for k, v in options.items() if k != "max_grad_norm"})
                expected = [reference.Parameter(p.detach().double().cpu().numpy(), group) for p in params]
                optimizer = AdamW(params, backend="triton", norms=norms, **options)
                for _ in range(3):
                    _new_grads(params)
                    grads = [p.grad.double().cpu().numpy() for p in params]
                    result = reference.step(expected, grads, max_grad_norm=options.get("max_grad_norm"))
                    optimizer.step()
                for p, r in zip(params, expected, strict=True):
                    np.testing.assert_allclose(p.detach().cpu().numpy(), r.value, rtol=1.3e-6, atol=1e-5)
                    for key in ("exp_avg", "exp_avg_sq"):
                        actual = optimizer.state[p][key].cpu().numpy()
                        np.testing.assert_allclose(actual, getattr(r, key), rtol=1.3e-6, atol=1e-5)
                if norms:
                    read = optimizer.norms()
                    for column in ("weight", "update", "grad"):
                        wanted = [getattr(r, column) for r in result]
                        np.testing.assert_allclose(getattr(read, column), wanted, rtol=1e-5)


def test_a_thousand_steps_have_no_larger_error_than_torch_fused():
    start = _params((4096,))
    exact = [torch.nn.Parameter(p.detach().double()) for p in start]
    ours, fused = _twins(start), _twins(start)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    optimizers = (
        AdamW(ours, backend="triton", **options),
        torch.optim.AdamW(fused, fused=True, **options),
        torch.optim.AdamW(exact, foreach=False, **options),
    )
    for _ in range(1000):
        _new_grads(ours, fused)
        exact[0].grad = ours[0].grad.double()
        for optimizer in optimizers:
            optimizer.step()
    error_ours, error_fused = ((p[0].double() - exact[0]).norm().item() for p in (ours, fused))
    assert error_ours <= error_fused, (error_ours, error_fused)


def test_regrouping_is_bit_identical():
    params = _params()
    regrouped = _twins(params)
    one = AdamW(params, backend="triton", max_grad_norm=0.5)
    many = AdamW([{"params": [p]} for p in reversed(regrouped)], backend="triton", max_grad_norm=0.5)
    for _ in range(5):
        _new_grads(params, regrouped)
        one.step()
        many.step()
    assert all(torch.equal(p, q) for p, q in zip(params, regrouped, strict=True))
    assert torch.equal(one.grad_norm, many.grad_norm)
    assert torch.equal(one.norm_sums(), many.norm_sums().flip(0))


def test_alignment_is_bit_identical():
    aligned = _params()
    shifted = [torch.nn.Parameter(torch.cat([p.new_zeros(1), p.detach()])[1:]) for p in aligned]
    one, two = AdamW(aligned, backend="triton"), AdamW(shifted, backend="triton")
    for _ in range(3):
        _new_grads(aligned, shifted)
        one.step()
        two.step()
    assert all(torch.equal(p, q) for p, q in zip(aligned, shifted, strict=True))


def test_unaligned_gradients_match_torch():
    params = _params()
    twins = _twins(params)
    ours, theirs = AdamW(params, backend="triton", max_grad_norm=1.0), torch.optim.AdamW(twins, fused=True)
    for _ in range(2):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.numel() + 1, device="cuda")[1:]
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)


def test_a_step_never_waits_for_the_device():
    params = _params()
    lr = torch.tensor(1e-3, device="cuda")
    optimizer = AdamW(params, lr=lr, max_grad_norm=1.0, backend="triton")
    _new_grads(params)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            _new_grads(params)
            optimizer.step()
            optimizer.param_groups[0]["weight_decay"] *= 0.9
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_host_far_ahead_of_the_device_overwrites_no_table():
    """Many steps wait behind a long kernel. Each step has gradients at other addresses and another learning rate."""
    params = _params((1000, 5000, 64))
    twins = _twins(params)
    ours, theirs = AdamW(params, backend="triton"), torch.optim.AdamW(twins, fused=True)
    grads = [[torch.randn_like(p) for p in params] for _ in range(40)]
    busy = torch.randn(8192, 8192, device="cuda")
    for optimizer, own in ((ours, params), (theirs, twins)):
        for _ in range(30):
            busy = busy @ busy * 1e-4
        for step, step_grads in enumerate(grads):
            for p, grad in zip(own, step_grads, strict=True):
                p.grad = grad
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step % 7)
            optimizer.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-5)


def test_steps_on_a_side_stream_match_torch():
    params = _params()
    twins = _twins(params)
    ours, theirs = AdamW(params, backend="triton"), torch.optim.AdamW(twins, fused=True)
    stream = torch.cuda.Stream()
    for _ in range(5):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _new_grads(params, twins)
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


def test_a_captured_step_replays_with_a_new_learning_rate():
    params = _params()
    twins = _twins(params)
    lr = torch.tensor(1e-2, device="cuda")
    ours = AdamW(params, lr=lr, capturable=True, max_grad_norm=1.0, backend="triton")
    theirs = torch.optim.AdamW(twins, lr=1e-2, foreach=False)
    _new_grads(params, twins)

    def step_theirs(value):
        theirs.param_groups[0]["lr"] = value
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        theirs.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours.step()
    torch.cuda.current_stream().wait_stream(stream)
    step_theirs(1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for value in (1e-2, 1e-3):
        lr.fill_(value)
        for p, q in zip(params, twins, strict=True):
            grad = torch.randn_like(p)
            p.grad.copy_(grad)
            q.grad.copy_(grad)
        graph.replay()
        step_theirs(value)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)


def _train(model, optimizer, x):
    optimizer.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    optimizer.step()


def test_a_captured_training_step_replays_between_uncaptured_steps():
    """Forward, backward and step are in one graph, with gradients of the graph's own. Uncaptured steps have others."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 7)).cuda()
    theirs = copy.deepcopy(ours)
    optimizer = AdamW(ours.parameters(), lr=1e-2, capturable=True, max_grad_norm=1.0, backend="triton")
    twin = AdamW(theirs.parameters(), lr=1e-2, max_grad_norm=1.0, backend="triton")
    static = torch.randn(16, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _train(ours, optimizer, static)
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        _train(theirs, twin, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _train(ours, optimizer, static)
    for step in range(4):
        static.copy_(torch.randn_like(static))
        graph.replay()
        _train(theirs, twin, static)
        if step % 2:  # as for a last batch of another size
            x = torch.randn(5, 64, device="cuda")
            _train(ours, optimizer, x)
            _train(theirs, twin, x)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert optimizer.steps_taken() == twin.steps_taken() == 9


def test_norm_sums_of_a_captured_step_may_be_in_its_graph():
    """The uncaptured step is on another stream than the capture."""
    params = _params()
    twins = _twins(params)
    ours, theirs = (AdamW(own, capturable=True, max_grad_norm=1.0, backend="triton") for own in (params, twins))
    _new_grads(params, twins)
    for optimizer in (ours, theirs):
        optimizer.step()
        optimizer.norm_sums()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
        sums = ours.norm_sums()
    for _ in range(2):
        for p, q in zip(params, twins, strict=True):
            p.grad.copy_(torch.randn_like(p))
            q.grad.copy_(p.grad)
        graph.replay()
        theirs.step()
        assert torch.equal(sums, theirs.norm_sums())


def test_a_second_captured_step_without_prepared_tables_is_refused():
    params = _params((100,))
    optimizer = AdamW(params, capturable=True, backend="triton")
    _new_grads(params)
    optimizer.step()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
            optimizer.step()
    except RuntimeError as error:
        assert "Take one uncaptured step" in str(error), error
    else:
        raise AssertionError("the second step was captured")


def test_parameters_of_another_device_than_the_current_one():
    """The current device is idle, and the device of the parameters is far behind the host."""
    if torch.cuda.device_count() < 2:
        raise unittest.SkipTest("needs two GPUs")
    start = _params((1000, 5000))
    params = [torch.nn.Parameter(p.detach().to("cuda:1")) for p in start]
    twins = _twins(params)
    ours, theirs = AdamW(params, backend="triton"), torch.optim.AdamW(twins, fused=True)
    grads = [[torch.randn_like(p) for p in params] for _ in range(20)]
    busy = torch.randn(8192, 8192, device="cuda:1")
    for optimizer, own in ((ours, params), (theirs, twins)):
        for _ in range(30):
            busy = busy @ busy * 1e-4
        for step, step_grads in enumerate(grads):
            for p, grad in zip(own, step_grads, strict=True):
                p.grad = grad
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step % 7)
            optimizer.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-5)


def test_clipping_on_the_cpu_waits_for_the_gradients_of_the_device():
    """The device is far behind the host when the parameter on the CPU takes the factor and when norms are read."""
    params = [torch.nn.Parameter(torch.randn(1000)), *_params((1000,))]
    twins = [torch.nn.Parameter(p.detach().cpu().clone()) for p in params]
    ours, theirs = (AdamW(own, lr=1e-2, eps=1.0, max_grad_norm=0.5) for own in (params, twins))
    busy = torch.randn(8192, 8192, device="cuda")
    for step in range(3):
        for p, q in zip(params, twins, strict=True):
            q.grad = torch.randn_like(q) * (step + 1)
            p.grad = q.grad.to(p.device)
        for _ in range(30):
            busy = busy @ busy * 1e-4
        params[1].grad.mul_(1.0)
        ours.step()
        theirs.step()
        np.testing.assert_allclose(ours.norm_sums().numpy(), theirs.norm_sums().numpy(), rtol=1e-4, atol=1e-9)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)


def test_a_grad_scaler_skips_and_unscales_as_with_torch():
    params = _params()
    twins = _twins(params)
    ours, theirs = AdamW(params, backend="triton"), torch.optim.AdamW(twins, fused=True)
    scalers = [torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        _new_grads(params, twins)
        for ps, scaler in ((params, scalers[0]), (twins, scalers[1])):
            for p in ps:
                p.grad *= scaler.scale(torch.ones((), device="cuda"))
        if step == 2:
            params[3].grad[0] = twins[3].grad[0] = math.inf
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)
    assert float(ours.state[params[0]]["step"]) == 4


def test_checkpoints_load_from_torch_fused_and_into_it():
    params = _params()
    first = torch.optim.AdamW(params, fused=True)
    _new_grads(params)
    first.step()
    twins = _twins(params)
    second, third = AdamW(twins, backend="triton"), torch.optim.AdamW(twins, fused=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _new_grads(params, twins)
    first.step()
    second.step()
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    _new_grads(params, twins)
    first.step()
    third.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 2**20 + 13
    free = torch.cuda.mem_get_info()[0]
    if free < 5 * 4 * n:
        raise unittest.SkipTest(f"needs {5 * 4 * n / 1e9:.0f} GB of free memory, there are {free / 1e9:.0f}")
    p = torch.nn.Parameter(torch.ones(n, device="cuda"))
    p.grad = torch.full_like(p, 0.5)
    places = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, n - 14, n - 1], device="cuda")
    p.grad[places] = -2.0
    optimizer = AdamW([p], lr=1e-2, weight_decay=0.1, max_grad_norm=1e9, backend="triton")
    optimizer.step()
    expected = torch.full((len(places),), 1 - 1e-3 + 1e-2, device="cuda")
    torch.testing.assert_close(p.detach()[places], expected)
    others = p.detach()[torch.tensor([2, 2**31 - 2, 2**31 + 2, n - 2], device="cuda")]
    torch.testing.assert_close(others, torch.full((4,), 1 - 1e-3 - 1e-2, device="cuda"))
    assert abs(float(optimizer.grad_norm) / math.sqrt(0.25 * (n - 8) + 4 * 8) - 1) < 1e-5
    assert abs(float(optimizer.norms().weight[0]) / ((1 - 1e-3 - 1e-2) * math.sqrt(n)) - 1) < 1e-5
