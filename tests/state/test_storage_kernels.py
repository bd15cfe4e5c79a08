"""Storage on the two backends: kernels and torch store alike, and nothing depends on chunks, grouping or memory layout."""

import pytest
import torch

from lwadamw import AdamW
from lwadamw.state import codes, packing
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import CODES, MOMENTS
from lwadamw.tables import plan
from tests.cases import assert_same_arithmetic, clone_params
from tests.state.storages import ALIKE, BETAS, NEAREST, SHAPES, B, F, assert_same_bits, give_grads, make, optimizer_of

# The share of the numbers that a step adds up by which two float32 results may differ: 8 times the spacing of float32.
FLOAT32_ERROR = 2.0**-20


def _copy_into(optimizer, source):
    """Give an optimizer the parameters and the state of another, in place."""
    for p, q in zip(optimizer.param_groups[0]["params"], source.param_groups[0]["params"], strict=True):
        p.data.copy_(q.detach())
        for key, value in source.state[q].items():
            optimizer.state[p][key].copy_(value)


def _float32_of(optimizer, p):
    """Weight and moments of a parameter before they are rounded to where they are kept."""
    return {"weight": optimizer.master_weight(p)} | {k: optimizer.get_unscaled_state(p, k) for k in MOMENTS[:2]}


def _assert_within(one, two, bound, what):
    excess = ((one.double() - two.double()).abs() - bound).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, f"{what}: element {worst} is {one.flatten()[worst]} and {two.flatten()[worst]}"


def _step_of(x, dtype):
    """At least the distance from a number to its neighbours in a dtype."""
    return torch.finfo(dtype).eps * x.double().abs() + torch.finfo(dtype).tiny


def _assert_one_step_alike(c, before, grad, ours, theirs):
    """Every element of weight, moments and codes after one step from the same state, ours by a kernel, theirs by torch.

    In float32 the two round in another order. A number that is then rounded once more, to fewer bits, may fall on the
    neighbouring number. No element may be further apart.
    """
    (kernels, p), (twin, q) = ours, theirs
    storage, grad = c.storage, grad.double()
    # The numbers that a step adds up: its rounding errors are shares of their size, also where the sum is nearly 0.
    sizes = {
        "weight": before["weight"].double().abs() + 1e-2,
        "exp_avg": before["exp_avg"].double().abs() + grad.abs(),
        "exp_avg_sq": before["exp_avg_sq"].double() + grad.square(),
    }
    for key in MOMENTS[:2]:
        one, two = kernels.state[p][key], twin.state[q][key]
        bound = FLOAT32_ERROR * sizes[key]
        if one.dtype in CODES:
            _assert_within(one.int(), two.int(), 1.0, f"codes of {key}")
            assert (one == two).float().mean() >= 0.999
            scales = kernels.state[p][f"{key}_scale"], twin.state[q][f"{key}_scale"]
            torch.testing.assert_close(*scales, rtol=FLOAT32_ERROR, atol=0)
            continue
        if one.dtype == B:
            bound = bound + _step_of(two, B)
        _assert_within(one, two, bound, key)
    bound = FLOAT32_ERROR * sizes["weight"]
    if storage.plain and c.param != F:
        # torch takes this step itself, and rounds the update, about lr = 1e-2, to bfloat16 as well.
        bound = bound + 2 * torch.finfo(c.param).eps * 1e-2
    parameter_bound = bound + _step_of(q.detach(), c.param)
    if storage.weight in ("plain", "stochastic") and c.param != F:
        bound = bound + _step_of(q.detach(), c.param)
    if storage.weight == "stochastic":
        assert (p == q).float().mean() >= 0.999
    if storage.weight == "kahan":
        bound = bound + _step_of(twin.state[q]["kahan_comp"], c.param)
    _assert_within(kernels.master_weight(p), twin.master_weight(q), bound, "weight")
    _assert_within(p.detach(), q.detach(), parameter_bound, "parameter")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in COMBINATIONS])
def test_kernels_and_torch_store_alike(name, device):
    c = COMBINATIONS[name]
    ours, kernels = make(c, device=device, backend="triton")
    theirs = clone_params(ours)
    twin = optimizer_of(c, theirs, backend="torch")
    for optimizer, params in ((kernels, ours), (twin, theirs)):
        for p in params:
            optimizer.initialize_state(p)
    for _ in range(2):
        before = [_float32_of(twin, q) for q in theirs]
        give_grads(c, ours, theirs)
        kernels.step()
        twin.step()
        for p, q, values in zip(ours, theirs, before, strict=True):
            assert kernels.state[p].keys() == twin.state[q].keys()
            if p.numel():
                _assert_one_step_alike(c, values, p.grad, (kernels, p), (twin, q))
        if name not in NEAREST:
            for column in ("weight", "update", "grad"):
                expected = getattr(twin.norms(), column)
                assert getattr(kernels.norms(), column) == pytest.approx(expected, rel=1e-3 if c.param != F else 1e-4)
        _copy_into(kernels, twin)


@pytest.mark.parametrize(
    "name",
    [
        "bf16, stochastic",
        "fp32, 8-bit moments",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("bf16, remainder", "bf16, kahan")),
    ],
)
def test_alignment_and_chunks_change_not_one_bit(name, device, monkeypatch):
    c = COMBINATIONS[name]
    n = 4096 + 2048 + 77  # full chunks and a rest for chunks of either length
    start = torch.randn(n, device=device).to(c.param)
    runs = []
    for offset, chunk in ((0, 2048), (1, 2048), (0, 4096)):
        monkeypatch.setattr(plan, "chunk_length", lambda elements, chunk=chunk: chunk)
        buffer = torch.zeros(n + 8, device=device, dtype=c.param)
        buffer[offset : offset + n] = start
        p = torch.nn.Parameter(buffer[offset : offset + n])
        optimizer = optimizer_of(c, [p], backend="triton")
        torch.manual_seed(1)
        for _ in range(2):
            give_grads(c, [p])
            optimizer.step()
        runs.append(optimizer)
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_random_bits_of_a_segment_do_not_depend_on_alignment(device):
    """The second segment begins at element 6, so the draws of Philox, 8 elements each, begin between its blocks of 16 bytes."""
    weight, grad = torch.randn(4102, device=device).to(B), torch.randn(4102, device=device).to(B)

    def at(tensor, offset):
        """A copy that begins `offset` elements after an address that 16 divides."""
        memory = torch.zeros(4102 + 16, dtype=B, device=device)
        first = -memory.data_ptr() % 16 // 2 + offset
        return memory[first : first + 4102].copy_(tensor)

    def trained(offset):
        p = torch.nn.Parameter(at(weight, offset))
        group = {"params": [("w", p)], "segments": {"w": (6, 4096)}}
        optimizer = AdamW([group], lr=1e-3, rounding="stochastic", backend="triton")
        for _ in range(2):
            p.grad = at(grad, offset)
            optimizer.step()
            # All arrays are offset alike, as views into flat buffers are.
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][key] = at(optimizer.state[p][key], offset)
        return p.detach()

    first = trained(0)
    assert not torch.equal(first, weight)
    for offset in (1, 2, 4, 7):
        assert torch.equal(trained(offset), first), offset


@pytest.mark.parametrize("name", ["bf16, stochastic, 8-bit moments", "fp32, 8-bit moments"])
def test_random_bits_follow_the_name_and_not_the_group(name, backend, device):
    c = COMBINATIONS[name]
    ours, together = make(c, [(32, 128), (33, 128)], device, backend=backend)
    theirs = clone_params(ours)
    named = [("w1", theirs[1]), ("w0", theirs[0])]
    apart = AdamW(
        [{"params": [pair]} for pair in named], lr=1e-2, weight_decay=0.1, betas=BETAS, backend=backend, **c.options
    )
    for _ in range(2):
        give_grads(c, ours, theirs)
        together.step()
        apart.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(together.state[p]["exp_avg"], apart.state[q]["exp_avg"])


def test_another_seed_rounds_otherwise(backend, device):
    c = COMBINATIONS["bf16, stochastic, 8-bit moments"]
    ours, one = make(c, [(32, 128)], device, backend=backend)
    theirs = clone_params(ours)
    two = optimizer_of(c, theirs, backend=backend, rounding_seed=2**40)
    give_grads(c, ours, theirs)
    one.step()
    two.step()
    assert not torch.equal(ours[0], theirs[0])
    assert not torch.equal(one.state[ours[0]]["exp_avg"], two.state[theirs[0]]["exp_avg"])


@pytest.mark.parametrize("master", [F, "remainder"])
@pytest.mark.parametrize("moments", [None, pytest.param(B, marks=pytest.mark.slow)])
def test_master_weights_are_bit_identical_to_fp32_training(master, moments, backend, device):
    moments = {"exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    half = [torch.nn.Parameter(torch.randn(s, device=device).to(B)) for s in SHAPES]
    whole = [torch.nn.Parameter(p.detach().float()) for p in half]
    settings = {"lr": 3e-3, "weight_decay": 0.1, "backend": backend, **moments}
    ours, fp32 = AdamW(half, master_weights=master, **settings), AdamW(whole, **settings)
    for step in range(4):
        for p, q in zip(half, whole, strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step % 3 - 1)
            q.grad = p.grad.float()
        ours.step()
        fp32.step()
        for p, q in zip(half, whole, strict=True):
            assert_same_arithmetic(ours.master_weight(p), q.detach(), backend)
            # Splitting off a remainder rounds halfway cases away from 0. All other numbers are rounded to nearest.
            q = ours.master_weight(p)
            distance = (p.float() - q).abs()
            assert (distance <= (q.to(B).float() - q).abs()).all()
            if master == F:
                assert torch.equal(p, q.to(B))


@pytest.mark.parametrize("name", ["bf16, remainder, 8-bit moments", "bf16, stochastic, 8-bit moments", "bf16, kahan"])
@pytest.mark.parametrize("moved", ["exp_avg", "exp_avg_sq", "companion"])
def test_state_in_another_memory_layout_is_read_by_index(name, moved, backend, device):
    c = COMBINATIONS[name]
    start = torch.randn(66, 64, device=device).to(c.param)
    runs = []
    for transposed in (False, True):
        p = torch.nn.Parameter(start.clone().t())
        optimizer = optimizer_of(c, [p], backend=backend)
        torch.manual_seed(1)
        for step in range(3):
            p.grad = torch.randn(64, 66, device=device).to(c.grad).t().contiguous().t()
            if step == 2 and transposed:
                _transpose(optimizer.state[p], moved)
            optimizer.step()
        runs.append((optimizer, p))
    (one, p), (two, q) = runs
    # When the blocks change, codes are decoded exactly and encoded again, to nearest. So they are rounded once more.
    coded = moved != "companion" and one.state[p][moved].dtype in CODES
    tolerance = {"rtol": 0.05, "atol": 5e-3} if coded else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(one.master_weight(p), two.master_weight(q), **tolerance)
    for key in ("exp_avg", "exp_avg_sq"):
        values = [o.get_unscaled_state(t, key) for o, t in runs]
        tolerance = {"rtol": 0.3, "atol": 0.02 * float(values[0].abs().max())} if coded else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(*values, **tolerance)


def _transpose(state, moved):
    """Give one array of a state the other memory layout. 8-bit codes get new scales, because their blocks change."""
    key = {"companion": "master_param" if "master_param" in state else "kahan_comp"}.get(moved, moved)
    if key not in state:
        return
    if state[key].dtype in CODES:
        values = packing.read_moment(state, key).contiguous()
        state[key], scales = codes.encode(values, state[key].dtype)
        state[f"{key}_scale"] = scales
    else:
        state[key] = state[key].contiguous()


def test_parameters_with_gaps_in_memory_leave_them_alone(device):
    """On the torch backend. The kernels refuse these parameters."""
    for name in ("bf16, stochastic", "bf16, remainder", "bf16, kahan"):
        c = COMBINATIONS[name]
        buffer = torch.randn(64, 20, device=device).to(c.param)
        p, q = torch.nn.Parameter(buffer[:, ::2]), torch.nn.Parameter(buffer[:, ::2].contiguous())
        between = buffer[:, 1::2].clone()
        ours, dense = (optimizer_of(c, [t], backend="torch") for t in (p, q))
        for _ in range(2):
            p.grad = torch.randn(64, 10, device=device).to(c.grad)
            q.grad = p.grad.clone()
            ours.step()
            dense.step()
        assert torch.equal(p, q)
        assert torch.equal(buffer[:, 1::2], between)
