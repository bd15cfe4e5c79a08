"""Storage types, loss scaling and gradient release on a GPU. Every test is a plain function, as in test_gpu.py."""

from __future__ import annotations

import torch

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS
from tests.kernels import test_gpu

pytestmark = getattr(test_gpu, "pytestmark", [])
DEVICE = "cuda"
SHAPES = ((64, 70), (3,), (0,), (300, 1024), (17, 241), (5000,))
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def _params(c):
    return [torch.nn.Parameter(torch.randn(s, device=DEVICE).to(c.param)) for s in SHAPES]


def _optimizer(c, params, **more):
    return AdamW([(f"w{i}", p) for i, p in enumerate(params)], **{**SETTINGS, **c.options, **more})


def _give_grads(c, *copies):
    """Give the parameters of all copies the same new random gradients, in the gradient type of the combination."""
    for same in zip(*copies, strict=True):
        grad = torch.randn_like(same[0]).to(c.grad)
        for p in same:
            p.grad = grad.to(p.device, copy=True)


def _same_bits(a, b):
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q.to(p.device))
        for key, value in a.state[p].items():
            assert torch.equal(value, b.state[q][key].to(value.device)), key


def test_every_combination_stores_the_same_as_the_torch_backend_on_the_cpu():
    """Both backends draw the same random bits and store the same codes.

    The last bit of an fp32 value may differ. Now and then this difference changes a code or the rounding of a weight.
    """
    for name, c in COMBINATIONS.items():
        ours = _params(c)
        theirs = [torch.nn.Parameter(p.detach().to("cpu", copy=True)) for p in ours]
        kernels, twin = _optimizer(c, ours, backend="triton"), _optimizer(c, theirs, backend="torch")
        for _ in range(3):
            _give_grads(c, ours, theirs)
            kernels.step()
            twin.step()
        nearest = c.param == torch.bfloat16 and c.storage.weight == "plain"
        for p, q in zip(ours, theirs, strict=True):
            if not p.numel():
                continue
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if not nearest else {"rtol": 2**-6, "atol": 1e-4}
            close = torch.isclose(kernels.master_weight(p).cpu(), twin.master_weight(q), **tolerance)
            assert close.float().mean() >= 0.99, name
            for key in ("exp_avg", "exp_avg_sq"):
                same = kernels.state[p][key].cpu() == twin.state[q][key]
                codes = kernels.state[p][key].dtype in (torch.int8, torch.uint8)
                assert not codes or same.float().mean() >= 0.99, (name, key)


def test_alignment_is_bit_identical_in_every_combination():
    for c in COMBINATIONS.values():
        n = 3 * 4096 + 77
        start = torch.randn(n, device=DEVICE).to(c.param)
        runs = []
        for offset in (0, 1):
            buffer = torch.zeros(n + 8, device=DEVICE, dtype=c.param)
            p = torch.nn.Parameter(buffer[offset : offset + n].view(1, n))  # vectors have no moments in 8 bits
            p.data.copy_(start)
            optimizer = _optimizer(c, [p], backend="triton")
            torch.manual_seed(1)
            for _ in range(3):
                p.grad = torch.randn(1, n, device=DEVICE).to(c.grad)
                optimizer.step()
            runs.append(optimizer)
        _same_bits(*runs)


def test_a_resumed_run_is_bit_identical_in_every_combination():
    for c in COMBINATIONS.values():
        params = _params(c)
        optimizer = _optimizer(c, params)
        for _ in range(2):
            _give_grads(c, params)
            optimizer.step()
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = _optimizer(c, others)
        resumed.load_state_dict({**optimizer.state_dict(), "state": _cloned(optimizer.state_dict()["state"])})
        for _ in range(2):
            _give_grads(c, params, others)
            optimizer.step()
            resumed.step()
        _same_bits(optimizer, resumed)


def _cloned(state):
    return {i: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for i, s in state.items()}


def test_scaled_and_skipped_steps_never_wait_for_the_device():
    """The loss scale and found_inf are given as GradScaler gives them. It cannot look at bfloat16 gradients itself."""
    for options in ({}, {"max_grad_norm": 1.0}):
        for c in (COMBINATIONS["fp32"], COMBINATIONS["bf16, remainder, 8-bit moments"]):
            params = _params(c)
            optimizer = _optimizer(c, params, **options)
            optimizer.grad_scale = torch.full((), 1024.0, device=DEVICE)
            for step in range(4):
                for p in params:
                    p.grad = (torch.randn_like(p, dtype=torch.float32) * 1024.0).to(c.grad)
                optimizer.found_inf = torch.full((), float(step == 2), device=DEVICE)
                before = [p.detach().clone() for p in params]
                torch.cuda.set_sync_debug_mode("error" if step else "default")
                try:
                    optimizer.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                assert all(map(torch.equal, params, before)) == (step == 2)
            assert int(optimizer.skipped_steps) == 1
            assert float(optimizer.state[params[0]]["step"]) == 3


def test_a_grad_scaler_never_waits_for_the_device():
    for name in ("fp32", "fp16, master"):
        c = COMBINATIONS[name]
        params = _params(c)
        optimizer = _optimizer(c, params)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        scaler.scale(torch.ones((), device=DEVICE))  # creates the scale on the device
        for step in range(4):
            for p in params:
                p.grad = torch.randn_like(p).to(c.grad)
            if step == 2:
                params[0].grad.fill_(float("inf"))
            before = [p.detach().clone() for p in params]
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                scaler.step(optimizer)
                scaler.update()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(map(torch.equal, params, before)) == (step == 2), name
        assert int(optimizer.skipped_steps) == 1


def test_an_infinite_norm_raises_at_a_later_step_and_never_waits_for_the_device():
    c = COMBINATIONS["fp32"]
    params = _params(c)
    optimizer = AdamW(params, max_grad_norm=1.0, nonfinite="raise")
    _give_grads(c, params)
    optimizer.step()
    for p in params:
        p.grad = torch.full_like(p, float("inf"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "global gradient norm of a step was inf" in str(error)
    else:
        raise AssertionError("did not raise")


def _model(dtype):
    return torch.nn.Sequential(*(torch.nn.Linear(128, 128, device=DEVICE, dtype=dtype) for _ in range(4)))


def test_released_steps_are_bit_identical_to_whole_steps():
    for c in (COMBINATIONS["fp32"], COMBINATIONS["bf16, remainder"], COMBINATIONS["bf16, stochastic, 8-bit moments"]):
        torch.manual_seed(0)
        one, two = _model(c.param), _model(c.param)
        two.load_state_dict(one.state_dict())
        ours, theirs = (AdamW(m.named_parameters(), **SETTINGS, **c.options) for m in (one, two))
        ours.release_gradients()
        for step in range(3):
            for model, optimizer in ((one, ours), (two, theirs)):
                torch.manual_seed(step)
                model(torch.randn(8, 128, device=DEVICE, dtype=c.param)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        _same_bits(ours, theirs)
