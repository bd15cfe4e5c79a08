"""Step counters: each parameter counts its own steps, once per step, whatever tensor a checkpoint or a script has put there."""

import copy

import pytest
import torch

from lwadamw import AdamW


def _stepped(dtype, backend, device):
    params = [torch.nn.Parameter(torch.randn(5, device=device).to(dtype)) for _ in range(3)]
    optimizer = AdamW(params, backend=backend)
    _step(params, optimizer)
    return params, optimizer


def _step(params, optimizer):
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_counter_that_parameters_share_counts_once_for_each_of_them(dtype, loaded, backend, device):
    params, optimizer = _stepped(dtype, backend, device)
    states = copy.deepcopy(optimizer.state_dict())
    shared = torch.tensor(10.0)
    for state in states["state"].values() if loaded else optimizer.state.values():
        state["step"] = shared
    if loaded:
        optimizer.load_state_dict(states)
    _step(params, optimizer)
    params[1].grad = params[2].grad = None
    _step(params[:1], optimizer)
    assert [float(optimizer.state[p]["step"]) for p in params] == [12, 11, 11]


@pytest.mark.parametrize("counter", [torch.bfloat16, torch.float16, torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_counter_of_another_dtype_goes_on_counting(dtype, counter, backend, device):
    params, optimizer = _stepped(dtype, backend, device)
    for p in params:
        optimizer.state[p]["step"] = torch.tensor(4096, dtype=counter)
    for _ in range(2):
        _step(params, optimizer)
    assert [float(optimizer.state[p]["step"]) for p in params] == [4098] * 3
