"""torch's own descriptions of AdamW, from torch.testing: every input and every error, with lwadamw.AdamW in torch's place.

The wheel of torch has these descriptions and not the tests that use them. So the tests here do what torch's do. Where a
version of torch describes its optimizers in another way, they are skipped.
"""

import functools
from copy import deepcopy

import pytest
import torch

import lwadamw
from tests.cases import assert_equal

co = pytest.importorskip("torch.testing._internal.common_optimizers")
try:
    ERRORS = co.optim_error_inputs_func_adamw(device="cpu", dtype=torch.float32)
    THEIRS = next(info for info in co.optim_db if info.optim_cls is torch.optim.AdamW)
    INFO = co.OptimizerInfo(
        lwadamw.AdamW,
        optim_inputs_func=co.optim_inputs_func_adamw,
        scheduler_inputs=THEIRS.scheduler_inputs,
        optim_error_inputs_func=co.optim_error_inputs_func_adamw,
        supported_impls=("foreach", "differentiable", "fused"),
        has_capturable_arg=True,
        supports_fused_on=("cpu", "cuda"),
    )
    INPUTS = co._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO, skip=("differentiable",))
    # The configurations that torch runs on a GPU only. lwadamw takes them on a CPU too.
    INPUTS += [
        co.OptimizerInput(None, {"lr": torch.tensor(0.01)}, "tensor lr"),
        co.OptimizerInput(None, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}, "tensor betas"),
    ]
except (AttributeError, TypeError, StopIteration, ImportError):
    pytest.skip("this torch describes its optimizers in another way", allow_module_level=True)

SCHEDULERS = [s for group in INFO.scheduler_inputs for s in (group if isinstance(group, (list, tuple)) else [group])]


def _ids(inputs):
    return [str(i.desc if hasattr(i, "desc") else i.optimizer_error_input.desc) for i in inputs]


def _make(params, kwargs, backend):
    """Return our optimizer, on the torch backend where an argument excludes the Triton backend."""
    kwargs = {**deepcopy(kwargs), "backend": backend}
    if backend == "triton":
        if kwargs.get("foreach") or kwargs.get("differentiable"):
            pytest.skip("the argument asks for an implementation of torch's")
        kwargs = {k: v for k, v in kwargs.items() if k not in ("foreach", "differentiable", "fused") or v}
    return INFO.optim_cls(params, **kwargs)


def _model(device):
    torch.manual_seed(1)
    weight, bias = torch.nn.Parameter(torch.randn(10, 5)), torch.nn.Parameter(torch.randn(10))
    return [torch.nn.Parameter(t.detach().to(device)) for t in (weight, bias)], torch.randn(5).to(device)


def _closure(optimizer, params, x):
    optimizer.zero_grad()
    loss = (params[0].mv(x) + params[1]).pow(2).sum()
    loss.backward()
    return loss


def _plain(kwargs):
    """Return the arguments for torch's plain loop, which is the reference."""
    return {k: v for k, v in deepcopy(kwargs).items() if k not in ("foreach", "fused", "differentiable", "capturable")}


inputs = pytest.mark.parametrize("given", INPUTS, ids=_ids(INPUTS))


@inputs
def test_every_input_takes_the_steps_of_torch(given, backend, device):
    ours, x = _model(device)
    theirs, _ = _model(device)
    a = _make(ours, given.kwargs, backend)
    b = torch.optim.AdamW(theirs, foreach=False, **_plain(given.kwargs))
    for _ in range(5):
        torch.testing.assert_close(
            a.step(functools.partial(_closure, a, ours, x)),
            b.step(functools.partial(_closure, b, theirs, x)),
            rtol=1e-5,
            atol=1e-5,
        )
        assert_equal(ours, theirs)


@inputs
def test_every_input_goes_in_the_right_direction(given, backend, device):
    params, x = _model(device)
    optimizer = _make(params, given.kwargs, backend)
    first = float(_closure(optimizer, params, x).detach())
    for _ in range(5):
        optimizer.step(functools.partial(_closure, optimizer, params, x))
    last = float(_closure(optimizer, params, x).detach())
    assert last > first if given.kwargs.get("maximize") else last < first


@pytest.mark.parametrize("scheduler", range(len(SCHEDULERS)))
def test_every_scheduler_gives_the_steps_that_it_gives_torch(scheduler, backend, device):
    ours, x = _model(device)
    theirs, _ = _model(device)
    a, b = lwadamw.AdamW(ours, backend=backend), torch.optim.AdamW(theirs, foreach=False)
    pairs = [(o, ps, SCHEDULERS[scheduler](o)) for o, ps in ((a, ours), (b, theirs))]
    for _ in range(12):
        for optimizer, params, schedule in pairs:
            loss = optimizer.step(functools.partial(_closure, optimizer, params, x))
            metric = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(*([loss.detach()] if metric else []))
        assert a.param_groups[0]["lr"] == pytest.approx(b.param_groups[0]["lr"], rel=1e-6)
        assert_equal(ours, theirs)


@inputs
def test_a_group_with_a_zero_lr_does_not_move(given, backend, device):
    """torch's test_param_groups_lr: a group without values of its own has lr 1e-28."""
    params, x = _model(device)
    still = torch.nn.Parameter(torch.randn(2, device=device))
    before = still.detach().clone()
    kwargs = {"lr": 1e-3, **given.kwargs}
    flags = {k: kwargs.pop(k) for k in ("foreach", "fused", "differentiable", "capturable") if k in kwargs}
    optimizer = _make([{"params": params, **kwargs}, {"params": [still]}], {"lr": 1e-28, **flags}, backend)
    for _ in range(3):
        _closure(optimizer, params, x)
        still.grad = torch.rand_like(still)
        optimizer.step()
    assert torch.equal(still, before)


@inputs
@pytest.mark.parametrize("names", [True, False])
def test_the_state_dict_of_every_input_is_loaded_and_deep_copied(given, names, backend, device):
    params, x = _model(device)
    named = list(zip(("weight", "bias"), params, strict=True)) if names else params
    optimizer = _make(named, given.kwargs, backend)
    optimizer.step(functools.partial(_closure, optimizer, params, x))
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = _make(list(zip(("weight", "bias"), copies, strict=True)) if names else copies, given.kwargs, backend)
    saved = deepcopy(optimizer.state_dict())
    other.load_state_dict(saved)
    twin = deepcopy(optimizer)
    assert saved["param_groups"][0].get("param_names") == (["weight", "bias"] if names else None)
    for _ in range(2):
        for o, ps in ((optimizer, params), (other, copies), (twin, twin.param_groups[0]["params"])):
            o.step(functools.partial(_closure, o, ps, x))
    for p, q, r in zip(params, copies, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@inputs
def test_a_zero_gradient_moves_nothing(given, backend, device):
    """A step without gradients and a step with zeros, both without weight decay."""
    params, _ = _model(device)
    before = [p.detach().clone() for p in params]
    optimizer = _make(params, {**given.kwargs, "weight_decay": 0.0}, backend)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("given", ERRORS, ids=_ids(ERRORS))
def test_every_error_of_torch_is_raised_with_its_words(given, backend):
    wanted = given.optimizer_error_input
    params = [torch.nn.Parameter(torch.ones(1))] if wanted.params is None else wanted.params
    kwargs = dict(wanted.kwargs)
    if backend == "torch" or not kwargs.get("foreach"):
        kwargs["backend"] = backend
    if issubclass(given.error_type, Warning):
        with pytest.warns(given.error_type, match=given.error_regex):
            INFO.optim_cls(params, **kwargs)
    else:
        with pytest.raises(given.error_type, match=given.error_regex):
            INFO.optim_cls(params, **kwargs)
