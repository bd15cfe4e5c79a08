"""A step notices that a parameter, a gradient or state has become another tensor, although its address has stayed the same."""

import pytest
import torch

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS
from tests.state.storages import assert_same_bits, give_grads, make, optimizer_of

pytestmark = pytest.mark.matrix

STORAGES = ("fp32", "bf16", "bf16, master", "bf16, remainder", "bf16, kahan", "bf16, stochastic", "fp32, 8-bit moments")
CUTS = {
    "rows cut off": lambda d: d[:20],
    "reshaped": lambda d: d.view(-1, 2),
    "flattened": lambda d: d.view(-1),
    "one element": lambda d: d[0, 0],
    "viewed as another dtype": lambda d: d.view(torch.float16 if d.dtype == torch.float32 else torch.float32),
}


def _shape(name):
    return (64, 70) if "8-bit" in name else (24, 6)  # moments of 8 bits need 4096 elements


def _stepped(name, backend, **more):
    c = COMBINATIONS[name]
    (p,), optimizer = make(c, [_shape(name)], backend=backend, **more)
    give_grads(c, [p])
    optimizer.step()
    return c, p, optimizer


def _refused_without_a_write(optimizer, tensors, match="'w0'"):
    """Assert that the step is refused, and that no byte of the memory behind the tensors has changed."""
    storages = [t.untyped_storage() for t in tensors]
    before = [bytes(s) for s in storages]
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert [bytes(s) for s in storages] == before


@pytest.mark.parametrize("fresh", [True, False], ids=["with a fresh gradient", "with the gradient from before"])
@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("cut", CUTS)
def test_a_parameter_cut_at_its_address_is_refused(cut, name, fresh, backend):
    _, p, optimizer = _stepped(name, backend)
    whole = p.data
    p.data = CUTS[cut](p.data)
    if fresh:
        p.grad = None
        p.grad = torch.ones_like(p)
    _refused_without_a_write(optimizer, [whole, *optimizer.state[p].values()])


@pytest.mark.parametrize("name", STORAGES)
def test_a_parameter_transposed_at_its_address_is_followed(name, backend):
    c = COMBINATIONS[name]
    (p,), optimizer = make(c, [(64, 64)], backend=backend)
    q = torch.nn.Parameter(p.detach().clone())
    twin = optimizer_of(c, [q], backend=backend)
    for transposed in (False, True):
        if transposed:
            for param, owner in ((p, optimizer), (q, twin)):
                param.grad = None
                param.data = (
                    param.data.t() if owner is optimizer else param.data.t().clone(memory_format=torch.preserve_format)
                )
        give_grads(c, [p], [q])
        optimizer.step()
        twin.step()
    assert_same_bits(optimizer, twin)


def _in_place(tensor, change):
    tensor.data = change(tensor.data)


GRADIENTS = {
    "rows cut off": lambda g: g[:3],
    "reshaped": lambda g: g.view(-1, 2),
    "one element": lambda g: g[0, 0],
    "twice as long": lambda g: torch.cat([g, g]),
}


@pytest.mark.parametrize("attribute", ["grad", "main_grad", "decoupled_grad"])
@pytest.mark.parametrize("what", GRADIENTS)
@pytest.mark.parametrize("name", ["fp32", "bf16, remainder", "fp32, 8-bit moments"])
def test_a_gradient_of_another_shape_is_refused(what, name, attribute, backend):
    c = COMBINATIONS[name]
    (p,), optimizer = make(c, [_shape(name)], backend=backend, grad_attribute=attribute)
    for wrong in (False, True):
        gradient = torch.randn_like(p, dtype=c.grad)
        if attribute == "grad":
            p.grad = gradient
            if wrong:
                _in_place(gradient, GRADIENTS[what])  # torch checks the shape of a gradient only when it is assigned
        else:
            setattr(p, attribute, GRADIENTS[what](gradient) if wrong else gradient)
        if wrong:
            _refused_without_a_write(optimizer, [p, *optimizer.state[p].values()], match=f"'w0'.*p.{attribute}")
        else:
            optimizer.step()


@pytest.mark.parametrize("attribute", ["grad", "main_grad"])
@pytest.mark.parametrize(
    "change", [lambda g: g.t().contiguous().t(), lambda g: g.double(), lambda g: g.half(), lambda g: g]
)
def test_a_gradient_of_another_layout_or_dtype_is_followed(change, attribute, backend):
    (p,), optimizer = make(COMBINATIONS["fp32"], [(33, 70)], backend=backend, grad_attribute=attribute)
    (q,), twin = make(COMBINATIONS["fp32"], [(33, 70)], backend=backend, grad_attribute=attribute)
    q.data.copy_(p.data)
    for step in range(4):
        gradient = torch.randn_like(p).half().float()
        changed = change(gradient.clone()) if step % 2 else gradient
        p.grad = None
        if attribute == "grad" and hasattr(p, "grad_dtype"):
            p.grad_dtype = changed.dtype
        elif changed.dtype != p.dtype and attribute == "grad":
            pytest.skip("this torch has no grad_dtype")
        setattr(p, attribute, changed)
        setattr(q, attribute, gradient)
        optimizer.step()
        twin.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_complex_gradient_of_a_real_parameter_is_refused(backend):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([("w0", p)], backend=backend, grad_attribute="main_grad")
    p.main_grad = torch.ones(3, dtype=torch.complex64)
    _refused_without_a_write(optimizer, [p], match="'w0'.*complex64")


STATES = {
    "shape": lambda t: t[:2].clone(),
    "dtype": lambda t: t.double(),
    "dtype of the other moment's codes": lambda t: t.to(torch.int16),
    "device": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("what", STATES)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_does_not_fit_is_refused(what, key, backend):
    _, p, optimizer = _stepped("fp32", backend)
    give_grads(COMBINATIONS["fp32"], [p])
    optimizer.state[p][key] = STATES[what](optimizer.state[p][key])
    others = [v for k, v in optimizer.state[p].items() if k != key]
    _refused_without_a_write(optimizer, [p, *others])


def test_a_maximum_of_another_dtype_than_its_moment_is_refused(backend):
    _, p, optimizer = _stepped("fp32", backend, amsgrad=True)
    optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].bfloat16()
    _refused_without_a_write(optimizer, [p, *optimizer.state[p].values()], match="max_exp_avg_sq of 'w0'")


def test_another_dict_with_other_values_is_followed(backend):
    _, p, optimizer = _stepped("fp32", backend)
    moved = {k: v.clone() for k, v in optimizer.state[p].items()}
    optimizer.state[p] = moved
    give_grads(COMBINATIONS["fp32"], [p])
    optimizer.step()
    assert optimizer.state[p] is moved
    assert moved["step"].item() == 2
    optimizer.state[p] = dict(moved)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 3


@pytest.mark.parametrize("shared", ["parameters", "moments", "a parameter and a moment"])
def test_the_kernels_refuse_tensors_that_share_memory(shared):
    memory = torch.randn(100)
    p, q = (torch.nn.Parameter(torch.randn(60)) for _ in range(2))
    optimizer = AdamW([("first", p), ("second", q)], backend="triton")
    p.grad, q.grad = torch.randn(60), torch.randn(60)
    optimizer.step()
    if shared == "parameters":
        p.data, q.data = memory[:60], memory[40:]
    elif shared == "moments":
        optimizer.state[p]["exp_avg"], optimizer.state[q]["exp_avg_sq"] = memory[:60], memory[40:]
    else:
        optimizer.state[p]["exp_avg"] = q.data
    before = [t.clone() for t in (memory, p.data, q.data)]
    with pytest.raises(RuntimeError, match=r"first.*second.*share memory"):
        optimizer.step()
    assert all(map(torch.equal, before, (memory, p.data, q.data)))
    p.data, q.data = memory[:50].clone().repeat(2)[:60], memory[40:].clone()
    for tensor in (p, q):
        optimizer.state[tensor]["exp_avg"] = torch.zeros(60)
        optimizer.state[tensor]["exp_avg_sq"] = torch.zeros(60)
    optimizer.step()
