"""State of every storage type: saved, loaded, resumed bit for bit, converted, resharded, exchanged with torch."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS
from tests.cases import clone_params
from tests.sharded.processes import run
from tests.state.storages import ALIKE, assert_same_bits, give_grads, make, optimizer_of

B, F = torch.bfloat16, torch.float32
SHAPES = [(64, 70), (3,)]  # the larger one is large enough for 8-bit moments
EIGHT = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}


CASES = [
    pytest.param(name, backend, marks=[pytest.mark.slow] if backend == "triton" and name in ALIKE else [])
    for name in COMBINATIONS
    for backend in ("torch", "triton")
]


def _stepped(name, backend, device, steps=2, shapes=SHAPES, **more):
    """A combination, and its parameters and optimizer after some steps."""
    c = COMBINATIONS[name]
    params, optimizer = make(c, shapes, device, backend=backend, **more)
    for _ in range(steps):
        give_grads(c, params)
        optimizer.step()
    return c, params, optimizer


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_resuming_at_any_step_continues_bit_for_bit(name, backend, device):
    """A run is saved before every step, and each save is loaded and continued to the end. On the kernels, one save."""
    shapes = SHAPES if "8-bit" in name else [(33, 64), (3,)]
    c, params, optimizer = _stepped(name, backend, device, steps=0, shapes=shapes)
    saves, grads = [], []
    for step in range(3):
        if step == 1 or backend == "torch":
            buffer = io.BytesIO()
            torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, buffer)
            saves.append((step, buffer))
        give_grads(c, params)
        grads.append([p.grad for p in params])
        optimizer.step()
    for step, buffer in saves:
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        others = [torch.nn.Parameter(p) for p in loaded["params"]]
        resumed = optimizer_of(c, others, backend=backend)
        resumed.load_state_dict(loaded["optimizer"])
        for later in grads[step:]:
            for p, grad in zip(others, later, strict=True):
                p.grad = grad.clone()
            resumed.step()
        assert_same_bits(optimizer, resumed)


@pytest.mark.parametrize("name", ["bf16, remainder, 8-bit moments", "bf16, master", "bf16, kahan"])
def test_copies_continue_bit_for_bit(name, backend, device):
    c, params, optimizer = _stepped(name, backend, device)
    twin = copy.deepcopy(optimizer)
    others = twin.param_groups[0]["params"]
    give_grads(c, params, others)
    optimizer.step()
    twin.step()
    assert_same_bits(optimizer, twin)


@pytest.mark.parametrize(("name", "backend"), [case for case in CASES if "torch" in case.values])
def test_torch_loads_what_is_made_for_it(name, backend, device):
    c, params, optimizer = _stepped(name, backend, device, eps=1e-4)
    theirs = [torch.nn.Parameter(optimizer.master_weight(p)) for p in params]
    named = [(f"w{i}", p) for i, p in enumerate(theirs)]
    twin = torch.optim.AdamW(named, foreach=False)
    twin.load_state_dict(copy.deepcopy(optimizer.to_torch_state_dict()))
    assert twin.param_groups[0].keys() == torch.optim.AdamW(named).param_groups[0].keys()
    for p, q in zip(params, theirs, strict=True):
        assert set(twin.state[q]) == {"step", "exp_avg", "exp_avg_sq"}
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(twin.state[q][key], optimizer.get_unscaled_state(p, key))
        q.grad = torch.randn_like(q).to(c.grad).float()
        p.grad = q.grad.to(c.grad)
    optimizer.step()
    twin.step()
    for p, q in zip(params, theirs, strict=True):
        coarse = c.storage.weight in ("plain", "stochastic")
        tolerance = {"rtol": 2 * torch.finfo(p.dtype).eps, "atol": 1e-4} if coarse else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(optimizer.master_weight(p), q.detach(), **tolerance)


def test_folded_base_values_are_torchs():
    p = torch.nn.Parameter(torch.zeros(3))
    group = {"params": [p], "width_lr_mult": 0.25, "width_wd_mult": 4.0, "width_eps_mult": 0.5}
    saved = AdamW([group], lr=1e-2, weight_decay=0.1, eps=1e-6).to_torch_state_dict()["param_groups"][0]
    assert (saved["lr"], saved["weight_decay"], saved["eps"]) == (2.5e-3, 0.4, 5e-7)
    assert "width_lr_mult" not in saved


def test_torchs_moments_are_loaded_as_they_are(backend, device):
    p = torch.nn.Parameter(torch.randn(64, 128, device=device).to(B))
    theirs = torch.optim.AdamW([p], foreach=False)
    p.grad = torch.randn_like(p)
    theirs.step()
    ours = AdamW([p], backend=backend, **EIGHT, master_weights="remainder")
    with pytest.warns(
        UserWarning, match=r"exp_avg of '0.0' is torch.bfloat16, its group asks for torch.int8, and 2 more"
    ):
        ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"])
    assert ours.state[p]["exp_avg"].dtype == B
    ours.step()
    assert ours.state[p]["exp_avg"].dtype == B
    ours.convert_state()
    assert ours.state[p]["exp_avg"].dtype == torch.int8
    ours.step()


CONVERSIONS = [
    ({}, {"exp_avg_dtype": F, "exp_avg_sq_dtype": F}, 0.0),
    ({"master_weights": F}, {"master_weights": "remainder", "exp_avg_dtype": F, "exp_avg_sq_dtype": F}, 0.0),
    ({"master_weights": "remainder"}, {"master_weights": F}, 0.0),
    ({"master_weights": F}, {"master_weights": F, "exp_avg_dtype": B, "exp_avg_sq_dtype": B}, 2**-8),
    ({"master_weights": F}, {"master_weights": F, **EIGHT}, 0.1),
    ({**EIGHT}, {"exp_avg_dtype": F, "exp_avg_sq_dtype": F}, 0.0),
    ({"master_weights": F}, {"rounding": "kahan"}, 2**-8),
    ({"rounding": "kahan"}, {"master_weights": F, "exp_avg_dtype": B, "exp_avg_sq_dtype": B}, 0.0),
]


@pytest.mark.parametrize(("before", "after", "error"), CONVERSIONS)
def test_converting_rounds_once_and_loses_no_more(before, after, error, backend, device):
    p = torch.nn.Parameter(torch.randn(64, 128, device=device).to(B))
    optimizer = AdamW([p], backend=backend, lr=0.1, **before)
    for _ in range(2):
        p.grad = torch.randn_like(p)
        optimizer.step()
    held = {key: optimizer.get_unscaled_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
    weight = optimizer.master_weight(p)
    for name in before:
        optimizer.param_groups[0].pop(name)
    optimizer.param_groups[0].update(after)
    optimizer.convert_state()
    fresh = AdamW([torch.nn.Parameter(p.detach().clone())], **after)
    assert {k: v.dtype for k, v in optimizer.state[p].items() if k != "step"} == _dtypes(fresh)
    for key, values in held.items():
        # 8 bits resolve a moment to a few percent, or, if it is small, to a share of the largest moment of its block.
        kept = optimizer.get_unscaled_state(p, key)
        torch.testing.assert_close(kept, values, rtol=error, atol=1e-3 * error)
    if "master_weights" in after or "rounding" in after:
        assert (optimizer.master_weight(p) - weight).abs().max() <= weight.abs().max() * 2**-16 * (error > 0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 3


def _dtypes(optimizer):
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.initialize_state(p)
    return {key: value.dtype for key, value in optimizer.state[p].items() if key != "step"}


def test_state_can_be_set_and_read_in_float32(backend, device):
    """Megatron reshards state in this way."""
    c, params, optimizer = _stepped("bf16, remainder, 8-bit moments", backend, device)
    others = clone_params(params)
    twin = optimizer_of(c, others, backend=backend)
    for p, q in zip(params, others, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "master_param", "padding"):
            if name in optimizer.state[p]:
                twin.set_scaled_state(q, name, optimizer.get_unscaled_state(p, name))
        twin.state[q]["step"] = optimizer.state[p]["step"].clone()
        torch.testing.assert_close(twin.master_weight(q), optimizer.master_weight(p), rtol=0, atol=0)
        assert torch.equal(twin.state[q]["exp_avg"], optimizer.state[p]["exp_avg"])
    with pytest.raises(ValueError, match=r"exp_avg has shape \(3,\), the parameter \(64, 70\)"):
        twin.set_scaled_state(others[0], "exp_avg", torch.zeros(3))
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        optimizer.get_unscaled_state(params[0], "max_exp_avg_sq")


def test_codes_without_their_scales_are_refused(device):
    _, params, optimizer = _stepped("fp32, 8-bit moments", "triton", device)
    del optimizer.state[params[0]]["exp_avg_scale"]
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"'w0' \(64, 70\) does not fit: exp_avg_scale has shape none"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_an_8_bit_second_moment_under_amsgrad_is_refused(backend, device):
    _, params, optimizer = _stepped("fp32, 8-bit moments", backend, device)
    optimizer.param_groups[0]["amsgrad"] = True
    before = [p.detach().clone() for p in params]
    give_grads(COMBINATIONS["fp32"], params)
    with pytest.raises(RuntimeError, match=r"exp_avg_sq of 'w0' \(64, 70\) is kept in 8 bits, and amsgrad=True"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


# Large enough for 8-bit moments. Each of two shards has more than one chunk of the first, and whole blocks of the second.
WHOLE_SHAPES = ((34, 128), (17, 256))


def _reshard(world, folder, names, phase):
    """One of `world` processes: phase 0 takes two steps and saves through DCP, phase 1 loads and takes two more."""
    for name in names:
        _train_sharded(world, f"{folder}/{name}", name, phase)
        dist.barrier()


def _train_sharded(world, path, name, phase):
    torch.manual_seed(0)
    c = COMBINATIONS[name]
    mesh = init_device_mesh("cpu", (world,))
    whole = [torch.randn(shape).to(c.param) for shape in WHOLE_SHAPES]
    params = [
        torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(dim)])) for p, dim in zip(whole, (0, 1), strict=True)
    ]
    optimizer = optimizer_of(c, params, backend="triton")
    grads = [[torch.randn_like(p) for p in whole] for _ in range(4)]
    if phase:
        for p in params:
            optimizer.initialize_state(p)
        dcp.load({"params": params, "state": _tensors(optimizer)}, checkpoint_id=f"{path}/checkpoint")
        for p in params:
            optimizer.state[p]["step"] = torch.tensor(2.0)
    for step in (2, 3) if phase else (0, 1):
        for p, g in zip(params, grads[step], strict=True):
            p.grad = distribute_tensor(g, mesh, p.placements)
        optimizer.step()
    if phase:
        full = {key: t.to_local() for key, t in _tensors(optimizer).items()}
        full |= {f"param{i}": p.detach().to_local() for i, p in enumerate(params)}
        torch.save(full, f"{path}/sharded.pt")
    else:
        dcp.save({"params": params, "state": _tensors(optimizer)}, checkpoint_id=f"{path}/checkpoint")


def _tensors(optimizer):
    params = optimizer.param_groups[0]["params"]
    return {
        f"{i}.{key}": t for i, p in enumerate(params) for key, t in optimizer.state[p].items() if isinstance(t, DTensor)
    }


def _whole_run(name):
    """The optimizer after the same four steps of the whole tensors, in this process."""
    torch.manual_seed(0)
    c = COMBINATIONS[name]
    params = [torch.nn.Parameter(torch.randn(shape).to(c.param)) for shape in WHOLE_SHAPES]
    optimizer = optimizer_of(c, params, backend="triton")
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.detach()
        optimizer.step()
    return optimizer


# One test for several combinations, because starting the processes takes longer than the steps.
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["bf16, remainder, 8-bit moments", "bf16, stochastic"], marks=pytest.mark.matrix),
        pytest.param(["bf16, master"], marks=pytest.mark.slow),
    ],
    ids=", and ".join,
)
def test_resharding_changes_not_one_bit(names, tmp_path):
    """Two steps on two processes and two more on one give what four steps of the whole tensors give."""
    for name in names:
        (tmp_path / name).mkdir()
    run(2, _reshard, 2, str(tmp_path), names, 0)
    run(1, _reshard, 1, str(tmp_path), names, 1)
    for name in names:
        sharded = torch.load(tmp_path / name / "sharded.pt")
        optimizer = _whole_run(name)
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            assert torch.equal(sharded[f"param{i}"], p), name
            for key, value in optimizer.state[p].items():
                if key != "step":
                    assert torch.equal(sharded[f"{i}.{key}"], value), (name, key)
