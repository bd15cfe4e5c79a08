"""The saved form of state: views of the state, marked where an array is no plain number, and read back bit for bit."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import CODES
from tests.cases import clone_params
from tests.state.storages import assert_same_bits, give_grads, make, optimizer_of

# torch says that it saves from a single process, which is what is meant. Before torch 2.7 it also warns about its own writer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]
# Rows of whole blocks, bundles of rows that are whole blocks, a last block of one element, and parameters without codes.
SHAPES = [(33, 128), (64, 192), (17, 241), (3,), (), (0, 4), (5000,)]
KINDS = ["bf16, remainder, 8-bit moments", "bf16, master", "bf16, kahan", "fp32, 8-bit moments"]


def _stepped(name):
    c = COMBINATIONS[name]
    params, optimizer = make(c, SHAPES, backend="torch")
    for _ in range(2):
        give_grads(c, params)
        optimizer.step()
    return c, params, optimizer


def _unmarked(optimizer):
    """A state dict as versions without marks wrote it."""
    saved = optimizer.state_dict()
    params = [p for g in optimizer.param_groups for p in g["params"]]
    groups = [{**g, "params": s["params"]} for g, s in zip(optimizer.param_groups, saved["param_groups"], strict=True)]
    return {"state": {i: dict(optimizer.state[params[i]]) for i in saved["state"]}, "param_groups": groups}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_everything_that_is_no_plain_number_is_marked_and_the_state_itself_is_not(name):
    c, params, optimizer = _stepped(name)
    saved = optimizer.state_dict()["state"]
    for i, p in enumerate(params):
        state = optimizer.state[p]
        assert saved[i].keys() == state.keys()
        for key, value in state.items():
            assert value.data_ptr() == saved[i][key].data_ptr()
            if key not in ("step", "exp_avg_scale", "exp_avg_sq_scale"):
                assert value.shape == p.shape
                number = value.dtype.is_floating_point and not (key == "exp_avg" and c.storage.companion)
                expected = () if number else (2,) if value.dtype == torch.int16 else (1,)
                assert saved[i][key].shape == (*p.shape, *expected)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_checkpoints_with_marks_and_without_load_bit_for_bit(name):
    c, params, optimizer = _stepped(name)
    for saved in (optimizer.state_dict(), _unmarked(optimizer)):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        others = clone_params(params)
        twin = optimizer_of(c, others, backend="torch")
        twin.load_state_dict(torch.load(buffer, weights_only=True))
        assert_same_bits(optimizer, twin)
        settings = [{k: v for k, v in g.items() if k != "params"} for g in (optimizer.param_groups + twin.param_groups)]
        assert settings[0] == settings[1]
        give_grads(c, others)
        for p, q in zip(params, others, strict=True):
            p.grad = q.grad.clone()
        before = copy.deepcopy(optimizer)
        for p, q in zip(params, before.param_groups[0]["params"], strict=True):
            q.grad = p.grad.clone()
        before.step()
        twin.step()
        assert_same_bits(before, twin)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", KINDS)
def test_a_step_takes_the_saved_form_from_the_state_itself(name, backend):
    """ZeroRedundancyOptimizer puts into the state and into the groups what `state_dict()` has returned."""
    c, params, optimizer = _stepped(name)
    others = clone_params(params)
    twin = optimizer_of(c, others, backend=backend)
    saved = optimizer.state_dict()
    for i, q in enumerate(others):
        twin.state[q] = {key: value.clone() for key, value in saved["state"][i].items()}
    twin.param_groups[0].update({k: v for k, v in saved["param_groups"][0].items() if k != "params"})
    give_grads(c, others)
    for p, q in zip(params, others, strict=True):
        p.grad = q.grad.clone()
    same = optimizer_of(c, clone_params(params), backend=backend)
    same.load_state_dict(saved)
    for p, q in zip(params, same.param_groups[0]["params"], strict=True):
        q.grad = p.grad.clone()
    same.step()
    twin.step()
    assert_same_bits(same, twin)


def test_a_transposed_parameter_is_saved_in_its_own_layout_and_loads_bit_for_bit():
    p = torch.nn.Parameter(torch.randn(192, 64).T.bfloat16())
    options = COMBINATIONS["bf16, remainder, 8-bit moments"].options
    optimizer = AdamW([("w", p)], **options)
    p.grad = torch.randn_like(p)
    optimizer.step()
    q = torch.nn.Parameter(p.detach().clone())
    twin = AdamW([("w", q)], **options)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer))
    assert_same_bits(optimizer, twin)
    q.grad = p.grad = torch.randn_like(p)
    optimizer.step()
    twin.step()
    assert_same_bits(optimizer, twin)


@pytest.mark.parametrize("name", KINDS)
def test_one_process_loads_in_place_what_it_has_saved_and_refuses_other_storage(name, tmp_path):
    c, params, optimizer = _stepped(name)
    dcp.save({"optim": optimizer.state_dict()}, checkpoint_id=tmp_path)
    twin_params, twin = make(c, SHAPES, backend="torch")
    give_grads(c, twin_params)
    twin.step()
    state_dict = twin.state_dict()
    dcp.load({"optim": state_dict}, checkpoint_id=tmp_path)
    for p, q in zip(params, twin_params, strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, twin.state[q][key]), key
    plain_params, plain = make(COMBINATIONS["bf16" if c.storage.param == torch.bfloat16 else "fp32"], SHAPES)
    for p in plain_params:
        p.grad = torch.zeros_like(p)
    plain.step()
    with pytest.raises(CheckpointException, match="Size mismatch between saved.*optim.state.0.exp_avg"):
        dcp.load({"optim": plain.state_dict()}, checkpoint_id=tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_a_distributed_checkpoint_without_marks_is_loaded_into_the_state_itself(name, tmp_path):
    """The recipe of docs/storage.md."""
    c, params, optimizer = _stepped(name)
    names = [f"w{i}" for i in range(len(params))]
    old = {"state": {n: dict(optimizer.state[p]) for n, p in zip(names, params, strict=True)}}
    dcp.save({"optim": old}, checkpoint_id=tmp_path)
    others, twin = make(c, SHAPES, backend="torch")
    for p in others:
        twin.initialize_state(p)
    marked = {n: twin.state_dict()["state"][i] for i, n in enumerate(names)}
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load({"optim": {"state": marked}}, checkpoint_id=tmp_path)
    state = {n: dict(twin.state[p]) for n, p in zip(names, others, strict=True)}
    dcp.load({"optim": {"state": state}}, checkpoint_id=tmp_path)
    for p, q in zip(params, others, strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, twin.state[q][key]), key


def test_scales_without_codes_are_refused_at_load_and_at_the_step():
    p = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = AdamW([("w", p)], exp_avg_dtype=torch.int8)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = optimizer.state[p]["exp_avg"].float()
    with pytest.raises(ValueError, match=r"'w' \(64, 128\) does not fit: it has exp_avg_scale"):
        optimizer.load_state_dict(saved)
    before = p.detach().clone()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].float()
    with pytest.raises(RuntimeError, match=r"'w' \(64, 128\) does not fit: it has exp_avg_scale"):
        optimizer.step()
    assert torch.equal(p, before)


def test_groups_may_name_dtypes():
    """A state dict has names of dtypes, and so may arguments that come from a file of settings."""
    p = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = AdamW([("w", p)], exp_avg_dtype="torch.int8", exp_avg_sq_dtype="torch.uint8")
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert {optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == set(CODES)
    assert optimizer.state_dict()["param_groups"][0]["exp_avg_dtype"] == "torch.int8"
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["exp_avg_dtype"] == torch.int8
    with pytest.raises(ValueError, match="is not one of"):
        AdamW([("w", p)], exp_avg_dtype="torch.int16")


def _laid_out(shape, layout):
    p = torch.randn(shape)
    if layout == "gaps":
        wide = torch.randn(*shape[:-1], shape[-1] + 2)
        p = wide[..., 1:-1]
    elif layout == "channels last":
        p = p.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        p = torch.randn(shape[::-1]).T
    return torch.nn.Parameter(p)


_OTHER_LAYOUTS = [
    ((100, 50), "transposed"),
    ((64, 128), "transposed"),
    ((32, 16, 3, 3), "channels last"),
    ((64, 64, 1, 128), "channels last"),
]


def _eight_bits(p):
    optimizer = AdamW([("w", p)], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8, backend="torch")
    p.grad = torch.randn(p.shape) * torch.rand(p.shape) ** 4
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("target", ["same", "contiguous"])
@pytest.mark.parametrize(("shape", "layout"), _OTHER_LAYOUTS)
def test_codes_that_were_copied_into_another_memory_layout_are_refused_and_the_remedy_copies_them_back(
    shape, layout, target
):
    """Each scale would belong to the codes of another block."""
    optimizer = _eight_bits(_laid_out(shape, layout))
    (p,) = optimizer.param_groups[0]["params"]
    saved = optimizer.state_dict()
    s = saved["state"][0] = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in saved["state"][0].items()
    }
    q = _laid_out(shape, layout if target == "same" else "contiguous")
    twin = AdamW([("w", q)], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8, backend="torch")
    with pytest.raises(
        ValueError, match=r"the codes of exp_avg and exp_avg_sq of 'w'.*another memory layout"
    ) as refused:
        twin.load_state_dict(saved)
    assert not twin.state
    twin.state[q] = dict(s)
    q.grad = torch.zeros(shape)
    with pytest.raises(RuntimeError, match="exp_avg of 'w'"):
        twin.step()
    del twin.state[q]
    if target == "same":
        exec(str(refused.value).partition("\n")[2].strip(), {"torch": torch, "s": s, "p": q})
        twin.load_state_dict(saved)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(twin.get_unscaled_state(q, key), optimizer.get_unscaled_state(p, key))


def test_codes_that_become_strided_are_refused_too():
    optimizer = _eight_bits(_laid_out((100, 50), "contiguous"))
    saved = optimizer.state_dict()
    codes = saved["state"][0]["exp_avg"]
    saved["state"][0]["exp_avg"] = torch.empty(50, 100, 1, dtype=codes.dtype).transpose(0, 1).copy_(codes)
    with pytest.raises(ValueError, match="the codes of exp_avg of 'w'"):
        optimizer.load_state_dict(saved)


def test_codes_of_whole_rows_in_the_state_itself_are_refused_in_another_memory_layout():
    optimizer = _eight_bits(_laid_out((64, 128), "transposed"))
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].contiguous()
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="exp_avg_scale"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("shape", [(34, 128), (50, 100)])
def test_a_parameter_with_gaps_in_memory_resumes_and_is_copied_bit_for_bit(shape):
    optimizer = _eight_bits(_laid_out(shape, "gaps"))
    (p,) = optimizer.param_groups[0]["params"]
    twins = [copy.deepcopy(optimizer)]
    for layout in ("gaps", "contiguous"):
        q = _laid_out(shape, layout)
        q.data.copy_(p)
        twins.append(AdamW([("w", q)], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8, backend="torch"))
        twins[-1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p.grad = torch.randn(shape)
    optimizer.step()
    for twin in twins:
        (q,) = twin.param_groups[0]["params"]
        q.grad = p.grad.clone()
        twin.step()
        assert_same_bits(optimizer, twin)
