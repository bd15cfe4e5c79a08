"""Checkpoints of engines that cut parameters into flat shards by themselves: bitwise, or refused on every process."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS

from . import checkpoints as c
from .processes import run

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU"),
    pytest.mark.matrix,
]
# One of each form in which state is saved.
KINDS = ("fp32", "bf16, remainder, 8-bit moments", "bf16, master", "bf16, kahan")


def _model(name, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128)).to(COMBINATIONS[name].param)


def _step(model, optimizer, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()


def _fsdp1(name, seed):
    model = FullyShardedDataParallel(_model(name, seed), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = AdamW(model.named_parameters(), lr=1e-2, backend="torch", **COMBINATIONS[name].options)
    _step(model, optimizer, seed + dist.get_rank())
    return model, optimizer


def _fsdp1_round_trip(folder, name, full):
    model, optimizer = _fsdp1(name, 0)
    other, other_optimizer = _fsdp1(name, 7)
    options = StateDictOptions(full_state_dict=full)
    saved = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=options)}
    if not full:
        dcp.save(saved, checkpoint_id=f"{folder}/{name}")
        saved = {"model": get_model_state_dict(other), "optim": get_optimizer_state_dict(other, other_optimizer)}
        dcp.load(saved, checkpoint_id=f"{folder}/{name}")
    set_model_state_dict(other, saved["model"])
    set_optimizer_state_dict(other, other_optimizer, saved["optim"], options=options)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        # FullyShardedDataParallel drops the state of what this process does not hold any element of.
        if p.numel():
            assert torch.equal(optimizer.master_weight(p), other_optimizer.master_weight(q))
            assert optimizer.state[p].keys() == other_optimizer.state[q].keys()
            for key, value in optimizer.state[p].items():
                assert value.dtype == other_optimizer.state[q][key].dtype
                assert torch.equal(value, other_optimizer.state[q][key])


def _fsdp1_of_every_storage(folder):
    warnings.simplefilter("ignore")
    for name, combination in COMBINATIONS.items():
        stored = combination.storage
        for full in (False, True):
            if len({stored.exp_avg, stored.exp_avg_sq, stored.companion} - {None}) == 1:
                _fsdp1_round_trip(folder, name, full)
            else:
                with pytest.raises(AssertionError, match="Expected dtype") as raised:
                    _fsdp1_round_trip(folder, name, full)
                c.alike(str(raised.value), dist.group.WORLD)
    return True


def test_fully_sharded_data_parallel_gathers_storage_of_one_dtype_and_refuses_the_rest(tmp_path):
    assert run(2, _fsdp1_of_every_storage, str(tmp_path)) == [True] * 2


def _zero(name, backend, seed):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    model, options = _model(name, seed), COMBINATIONS[name].options
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamW, lr=1e-2, backend=backend, **options)
    _step(model, optimizer, seed)
    return model, optimizer


def _zero_of_every_storage(backend):
    """This wrapper puts what `state_dict()` returns into the state itself, and never calls `load_state_dict`."""
    warnings.simplefilter("ignore")
    # The interpreter is slow.
    for name in COMBINATIONS if backend == "torch" else KINDS:
        model, optimizer = _zero(name, backend, 0)
        optimizer.consolidate_state_dict(to=0)
        given = [optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(given, src=0)
        other, other_optimizer = _zero(name, backend, 7)
        other.load_state_dict(model.state_dict())
        other_optimizer.load_state_dict(copy.deepcopy(given[0]))  # it keeps the tensors that it is given
        for i in (1, 2):
            _step(model, optimizer, i)
            _step(other, other_optimizer, i)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), name
            state, found = optimizer.optim.state.get(p, {}), other_optimizer.optim.state.get(q, {})
            assert state.keys() == found.keys()
            for key, value in state.items():
                assert value.dtype == found[key].dtype
                assert torch.equal(value, found[key]), (name, key)
    return True


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zero_redundancy_optimizer_goes_on_bit_for_bit_with_every_storage(backend):
    assert run(2, _zero_of_every_storage, backend) == [True] * 2
