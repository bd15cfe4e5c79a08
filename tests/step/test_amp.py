"""Loss scaling: torch.amp.GradScaler works as with torch's fused AdamW. Skipped steps change no bit. The host never waits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.shards import Shards
from tests.cases import assert_equal, clone_params, make_params
from tests.state.storages import give_grads, make

SHAPES = [(30,), (5, 7), (1030,)]
INF = float("inf")


class Reads(TorchDispatchMode):
    """Collects operators that make the host wait for a device: operators that read a value, and blocking copies."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        copied = (
            name in ("_to_copy", "copy_") and not (kwargs or {}).get("non_blocking") and not _is_blocking_free(args)
        )
        if name in self.WAITING or copied:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _is_blocking_free(args):
    """Return whether a copy_ is non-blocking or stays on one device."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    return True in args[2:] or len({t.device for t in tensors}) == 1


def _twins(device, groups=2, **options):
    ours = make_params(SHAPES, device)
    theirs = clone_params(ours)

    def split(params):
        return [{"params": params[i::groups]} for i in range(groups)]

    return ours, theirs, AdamW(split(ours), **options), torch.optim.AdamW(split(theirs), fused=True)


def _backward(scaler, params, factor=1.0, bad=None):
    """Compute scaled random gradients. One element of the gradient of parameter number `bad` is infinite."""
    for i, p in enumerate(params):
        grad = torch.randn_like(p) * factor
        if i == bad:
            grad.view(-1)[0] = INF
        p.grad = None
        scaler.scale((p * grad).sum()).backward()


def _scalers(device, n=2, **options):
    return [torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2, **options) for _ in range(n)]


@pytest.mark.parametrize("clip", [False, True])
def test_growth_backoff_and_skipping_equal_those_of_torch_fused(clip, backend, device):
    """One of two groups has an infinite gradient in some steps. With `clip`, gradients are unscaled and clipped outside."""
    ours, theirs, one, two = _twins(device, backend=backend)
    first, second = _scalers(device)
    scales = []
    for step in range(8):
        bad = 1 if step in (3, 4) else None
        for scaler, params, optimizer in ((first, ours, one), (second, theirs, two)):
            torch.manual_seed(step)
            _backward(scaler, params, bad=bad)
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
        assert first.get_scale() == second.get_scale()
        scales.append(first.get_scale())
        assert_equal(ours, theirs)
        assert {float(one.state[p]["step"]) for p in ours} == {float(two.state[p]["step"]) for p in theirs}
    assert max(scales) > scales[0]
    assert min(scales) < max(scales)
    assert float(one.state[ours[0]]["step"]) == 6
    if backend == "triton":
        assert int(one.skipped_steps) == 2


def test_several_optimizers_share_a_scaler(backend, device):
    """An infinite gradient in one optimizer skips the step of that optimizer only."""
    sets = [_twins(device, backend=backend) for _ in range(2)]
    first, second = _scalers(device)
    for step in range(3):
        for scaler, which in ((first, 0), (second, 1)):
            torch.manual_seed(step)
            for i, twins in enumerate(sets):
                _backward(scaler, twins[which], bad=0 if step == 1 and i == 0 else None)
            for twins in sets:
                scaler.step(twins[2 + which])
            scaler.update()
    for ours, theirs, one, two in sets:
        assert_equal(ours, theirs)
        assert float(one.state[ours[0]]["step"]) == float(two.state[theirs[0]]["step"])
    assert [float(t[2].state[t[0][0]]["step"]) for t in sets] == [2, 3]


def test_gradients_are_not_rewritten_when_the_step_unscales(device):
    ours, _, optimizer, _ = _twins(device, backend="triton")
    (scaler,) = _scalers(device, 1)
    _backward(scaler, ours)
    before = [p.grad.clone() for p in ours]
    scaler.step(optimizer)
    for p, grad in zip(ours, before, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "nonfinite": "pass"}])
def test_a_scaled_step_does_not_wait_for_the_device(options, device):
    ours, _, optimizer, _ = _twins(device, backend="triton", **options)
    (scaler,) = _scalers(device, 1)
    for step in range(3):
        _backward(scaler, ours, bad=0 if step == 1 else None)
        if step == 0:  # makes the plan
            scaler.step(optimizer)
            scaler.update()
            continue
        with Reads() as reads:
            scaler.step(optimizer)
            scaler.update()
            optimizer.skipped_steps  # noqa: B018
        assert reads.found == []


def test_the_collector_finds_a_read():
    with Reads() as reads:
        torch.ones(()).item()
    assert reads.found == ["aten._local_scalar_dense.default"]


SKIPPED = ["fp32", "bf16, remainder, 8-bit moments", "bf16, master", "bf16, kahan", "bf16, stochastic", "bf16"]


@pytest.mark.parametrize("name", SKIPPED)
@pytest.mark.parametrize("cause", ["found_inf", "norm"])
def test_a_skipped_step_leaves_everything_bit_for_bit(name, cause, backend, device):
    c = COMBINATIONS[name]
    clip = 1.0 if cause == "norm" else None
    params, optimizer = make(c, [(64, 70), (3,)], device, backend=backend, max_grad_norm=clip)
    give_grads(c, params)
    optimizer.step()
    assert optimizer.steps_taken() == 1
    before = [[p.detach().clone(), *(t.clone() for t in optimizer.state[p].values())] for p in params]
    give_grads(c, params)
    if cause == "norm":
        params[1].grad[0] = INF
    else:
        optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert all(map(torch.equal, [p, *optimizer.state[p].values()], old))
    assert int(optimizer.skipped_steps) == 1
    assert optimizer.steps_taken() == 1
    norms = optimizer.norms()
    assert (norms.update == 0).all()
    assert (norms.weight > 0).all()


def test_the_count_of_skipped_steps_survives_a_new_group(backend, device):
    params = make_params([(40,), (50,)], device)
    optimizer = AdamW(params[:1], max_grad_norm=1.0, backend=backend)
    for bad in (False, True, True, False, True):
        for p in params:
            p.grad = torch.full_like(p, INF if bad else 1.0)
        optimizer.step()
        if len(optimizer.param_groups) == 1 and bad:
            optimizer.add_param_group({"params": params[1:]})
    assert int(optimizer.skipped_steps) == 3


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in Triton's interpreter
def test_with_nonfinite_pass_the_step_happens(backend, device):
    """The result equals that of clip_grad_norm_ and torch's step."""
    ours = make_params(SHAPES, device)
    theirs = clone_params(ours)
    optimizer = AdamW(ours, max_grad_norm=1.0, nonfinite="pass", backend=backend)
    twin = torch.optim.AdamW(theirs, foreach=False)
    for bad in (1.0, INF, float("nan")):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            p.grad.view(-1)[0] *= bad
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        twin.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert int(optimizer.skipped_steps) == 0


def test_with_nonfinite_raise_the_step_raises_and_changes_nothing(backend, device):
    params = make_params(SHAPES, device)
    optimizer = AdamW(params, max_grad_norm=1.0, nonfinite="raise", backend=backend)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, INF)
    if device.type == "cuda":  # the error comes in a later step
        optimizer.step()
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"global gradient norm of a step was inf. That step changed nothing"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_clipping_of_scaled_gradients_equals_that_of_unscaled_gradients(backend, device):
    ours = make_params(SHAPES, device)
    theirs = clone_params(ours)
    one, two = (AdamW(params, max_grad_norm=0.5, backend=backend) for params in (ours, theirs))
    one.grad_scale = torch.tensor(1024.0, device=device)
    start = clone_params(ours)
    for _ in range(2):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * 1024
        one.step()
        two.step()
        assert_equal(ours, theirs)
    torch.testing.assert_close(one.grad_norm, two.grad_norm)
    assert not any(map(torch.equal, ours, start))


def test_fp16_parameters_train_under_a_scaler(backend, device):
    """fp16 parameters with fp32 master weights take the same steps as fp32 parameters."""
    c = COMBINATIONS["fp16, master"]
    params, optimizer = make(c, [(50, 30)], device, backend=backend, fused=True)
    whole = [torch.nn.Parameter(p.detach().float()) for p in params]
    twin = AdamW(whole, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), backend=backend)
    (scaler,) = _scalers(device, 1)
    start = whole[0].detach().clone()
    for step in range(4):
        target = torch.randn_like(whole[0])
        optimizer.zero_grad()
        scaler.scale((params[0].float() * target).sum()).backward()
        if step == 2:
            params[0].grad[0, 0] = INF
        else:
            whole[0].grad = (params[0].grad.float() / scaler.get_scale()).clone()
            twin.step()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(optimizer.master_weight(params[0]), whole[0].detach(), rtol=1e-5, atol=1e-6)
    assert (whole[0] != start).all()


def test_a_scaler_that_asks_whether_the_step_unscales_looks_at_no_parameter_again(monkeypatch):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], fused=True)
    p.grad = torch.ones(3)
    optimizer.step()
    looks = []
    look = Shards.look
    monkeypatch.setattr(Shards, "look", lambda self, members: looks.append(1) or look(self, members))
    assert optimizer._step_supports_amp_scaling
    assert not looks
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert optimizer._step_supports_amp_scaling
    assert looks
