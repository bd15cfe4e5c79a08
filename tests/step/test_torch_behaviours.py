"""What torch.optim.AdamW does besides the update, one test for each behaviour, against torch.optim.AdamW itself.

`BEHAVIOURS` is the list. Each entry is run with torch's class and with ours, on both backends, and returns what it saw. The
two have to agree.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from lwadamw import AdamW

BEHAVIOURS = {}


def behaviour(function):
    BEHAVIOURS[function.__name__] = function
    return function


def _params(device, n=2):
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(4 + i, device=device)) for i in range(n)]


def _step(optimizer, scale=1.0):
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.full_like(p, scale * (i + 1))
    return optimizer.step()


def _values(optimizer):
    return [p.detach().cpu().clone() for group in optimizer.param_groups for p in group["params"]]


def _error(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            call()
        except (Exception, UserWarning) as error:
            return type(error).__name__, str(error)
    return None


@behaviour
def step_hooks(make, device):
    """Instance hooks run in order, see args, and a pre-hook may replace the arguments."""
    seen = []
    optimizer = make(_params(device))

    def closure(value):
        return lambda: torch.tensor(value)

    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", len(args), sorted(kwargs))))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure(7.0)), {}))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", len(args))))
    loss = optimizer.step()
    handle.remove()
    optimizer.step()
    return seen, float(loss)


@behaviour
def global_step_hooks(make, device):
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post")),
    ]
    _step(make(_params(device)))
    for handle in handles:
        handle.remove()
    return seen


@behaviour
def state_dict_hooks(make, device):
    seen = []
    optimizer = make(_params(device))
    _step(optimizer)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, sd: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: seen.append(("load pre", "more" in sd)))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    return seen, sorted(saved)


@behaviour
def the_form_of_a_state_dict(make, device):
    optimizer = make(_params(device, 3))
    _step(optimizer)
    saved = optimizer.state_dict()
    state = {i: {k: (tuple(v.shape), v.dtype) for k, v in s.items()} for i, s in saved["state"].items()}
    return list(saved), state, saved["param_groups"]


@behaviour
def a_state_dict_shares_its_tensors(make, device):
    optimizer = make(_params(device))
    _step(optimizer)
    p = optimizer.param_groups[0]["params"][0]
    return optimizer.state_dict()["state"][0]["exp_avg"] is optimizer.state[p]["exp_avg"]


@behaviour
def weights_only_load(make, device):
    optimizer = make(_params(device))
    _step(optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make(_params(device))
    other.load_state_dict(torch.load(file, weights_only=True))
    _step(other)
    return _values(other)


@behaviour
def a_checkpoint_without_newer_keys(make, device):
    """As torch 1.x wrote it: no maximize, foreach, capturable, differentiable, fused, and step as a number."""
    optimizer = make(_params(device))
    _step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(key, None)
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    optimizer.load_state_dict(saved)
    _step(optimizer)
    return _values(optimizer), sorted(optimizer.param_groups[0]), optimizer.param_groups[0]["fused"]


@behaviour
def named_parameters_in_the_state_dict(make, device):
    optimizer = make(zip(("a", "b"), _params(device), strict=True))
    _step(optimizer)
    return optimizer.state_dict()["param_groups"][0]["param_names"], list(optimizer.param_groups[0])[:2]


@behaviour
def no_step_without_gradients(make, device):
    optimizer = make(_params(device))
    before = _values(optimizer)
    loss = optimizer.step()
    return loss, all(map(torch.equal, before, _values(optimizer))), len(optimizer.state)


@behaviour
def closures(make, device):
    """A closure runs once, with gradients enabled, and its loss is returned."""
    params = _params(device)
    optimizer = make(params)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss.detach()

    with torch.no_grad():
        loss = optimizer.step(closure)
    return calls, float(loss), _values(optimizer)


@behaviour
def errors_of_add_param_group(make, device):
    p, q = _params(device)
    optimizer = make([("p", p)])
    leaf = torch.nn.Parameter(torch.ones(2, device=device))
    return [
        _error(lambda: optimizer.add_param_group([q])),
        _error(lambda: optimizer.add_param_group({"params": {q}})),
        _error(lambda: optimizer.add_param_group({"params": [("q", 3)]})),
        _error(lambda: optimizer.add_param_group({"params": [("q", leaf * 2)]})),
        _error(lambda: optimizer.add_param_group({"params": [q]})),
        _error(lambda: optimizer.add_param_group({"params": [("p", p)]})),
        _error(lambda: optimizer.add_param_group({"params": [("q", q), leaf]})),
        _error(lambda: make([])),
        _error(lambda: make(q)),
        len(optimizer.param_groups),
    ]


@behaviour
def an_added_group_has_the_defaults(make, device):
    p, q = _params(device)
    optimizer = make([p])
    optimizer.add_param_group({"params": q, "lr": 0.5})
    return {k: v for k, v in optimizer.param_groups[1].items() if k != "params"}, optimizer.defaults


@behaviour
def zero_grad(make, device):
    optimizer = make(_params(device))
    _step(optimizer)
    params = optimizer.param_groups[0]["params"]
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    kept = [p.grad is g and not g.any() for p, g in zip(params, grads, strict=True)]
    optimizer.zero_grad()
    return kept, [p.grad for p in params]


@behaviour
def the_text_of_an_optimizer(make, device):
    return repr(make([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(_params(device))]))


@behaviour
def the_profiler_sees_a_step(make, device):
    optimizer = make(_params(device))
    with torch.autograd.profiler.profile() as profile:
        _step(optimizer)
    names = [event.name for event in profile.function_events if event.name.startswith("Optimizer.")]
    optimizer.zero_grad()
    return names


@behaviour
def a_tensor_lr_is_kept_and_followed(make, device):
    lr = torch.tensor(0.1)
    optimizer = make(_params(device), lr=lr)
    _step(optimizer)
    lr.fill_(0.01)
    _step(optimizer)
    return optimizer.param_groups[0]["lr"] is lr, _values(optimizer)


@behaviour
def a_scheduler_fills_a_tensor_lr(make, device):
    lr = torch.tensor(0.1)
    optimizer = make(_params(device), lr=lr)
    scheduler = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)
    for _ in range(3):
        _step(optimizer)
        scheduler.step()
    return optimizer.param_groups[0]["lr"] is lr, float(lr), _values(optimizer)


@behaviour
def schedulers_wrap_the_step(make, device):
    """A scheduler warns of a wrong order, which it sees from a wrapped step."""
    optimizer = make(_params(device))
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    early = _error(scheduler.step)
    optimizer = make(_params(device))
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    _step(optimizer)
    return early is not None and early[0], _error(scheduler.step), optimizer.param_groups[0]["initial_lr"]


@behaviour
def deep_copies_and_pickles(make, device):
    optimizer = make(_params(device))
    _step(optimizer)
    out = []
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        _step(twin)
        out += _values(twin)
    return out, _values(optimizer)


@behaviour
def param_groups_may_be_replaced(make, device):
    optimizer = make(_params(device))
    _step(optimizer)
    optimizer.param_groups = [{**g, "lr": 0.5} for g in optimizer.param_groups]
    _step(optimizer)
    return _values(optimizer)


@behaviour
def state_may_be_cleared(make, device):
    optimizer = make(_params(device))
    _step(optimizer)
    optimizer.state.clear()
    _step(optimizer)
    return _values(optimizer), [float(s["step"]) for s in optimizer.state.values()]


@behaviour
def state_is_a_default_dict_by_parameter(make, device):
    optimizer = make(_params(device))
    p = optimizer.param_groups[0]["params"][0]
    empty = optimizer.state[p]
    _step(optimizer)
    return type(optimizer.state).__name__, type(empty).__name__, [k in optimizer.state for k in _params(device)]


@behaviour
def a_sparse_gradient_is_an_error(make, device):
    optimizer = make(_params(device))
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p).to_sparse()
    name, message = _error(optimizer.step)
    return name, "sparse gradients" in message


@behaviour
def a_checkpoint_with_other_groups_is_an_error(make, device):
    saved = make(_params(device)).state_dict()
    one, two = make([{"params": [p]} for p in _params(device)]), make(_params(device, 3))
    errors = [_error(lambda: one.load_state_dict(saved)), _error(lambda: two.load_state_dict(saved))]
    return [name for name, _ in errors]


@behaviour
def a_step_changes_no_gradient(make, device):
    optimizer = make(_params(device))
    _step(optimizer)
    return [p.grad.cpu() for p in optimizer.param_groups[0]["params"]]


@behaviour
def step_increments_the_version_of_a_parameter(make, device):
    optimizer = make(_params(device))
    p = optimizer.param_groups[0]["params"][0]
    before = p._version
    _step(optimizer)
    return p._version > before


@behaviour
def requires_grad_does_not_matter(make, device):
    """A frozen parameter that still has a gradient moves."""
    optimizer = make(_params(device))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
        p.requires_grad_(False)
    optimizer.step()
    return _values(optimizer)


def _assert_same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1.3e-6, atol=1e-5)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            _assert_same(a, b)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            _assert_same(ours[key], theirs[key])
    else:
        assert ours == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_behaviour_is_torchs(name, backend, device):
    ours = BEHAVIOURS[name](lambda params, **kw: AdamW(params, **kw, backend=backend), device)
    theirs = BEHAVIOURS[name](torch.optim.AdamW, device)
    _assert_same(ours, theirs)
