"""torch's own engines with a rule: ZeroRedundancyOptimizer keeps names, and DCP loads a checkpoint of torch's AdamW."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lwadamw

from . import models
from .processes import run

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def _zero(world: int) -> Any:
    from lwadamw.engines.zero import ZeroRedundancyOptimizer

    warnings.simplefilter("ignore")

    def made(net: nn.Module) -> Any:
        return ZeroRedundancyOptimizer(_net_groups(net), max_grad_norm=0.3, **OPTIONS)

    single, split = models.net(8, 16), models.net(8, 16)
    one, many = lwadamw.AdamW(_net_groups(single), max_grad_norm=0.3, **OPTIONS), made(split)
    monitor = lwadamw.Monitor(many.optim, every=1, spectrum_every=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(many, lambda step: 1.0)

    def train(net: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            models.backward(net, step)
            optimizer.step()
            optimizer.zero_grad()

    train(single, one, range(1))
    train(split, many, range(1))
    scheduler.step()
    names = [name for group in many.optim.param_groups for name in group["param_names"]]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, names)
    assert sorted(name for some in everyone for name in some) == sorted(name for name, _ in split.named_parameters())
    assert all(everyone)
    by_name = dict(split.named_parameters())
    for group in many.optim.param_groups:
        assert all(by_name[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
    models.backward(single, 1)
    models.backward(split, 1)
    one.step()
    many.step()
    expected = {name: i for i, name in enumerate(one.norms().names)}
    found = many.optim.norms()
    assert sorted(found.names) == sorted(expected)
    torch.testing.assert_close(
        torch.tensor(found.weight),
        torch.tensor([one.norms().weight[expected[n]] for n in found.names]),
        rtol=1e-5,
        atol=0,
    )
    assert monitor.step == 2
    assert sorted(monitor.latest.names) == sorted(expected)
    for p, q in zip(single.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-5, atol=1e-6)

    many.zero_grad()
    many.consolidate_state_dict(0)
    saved = [
        copy.deepcopy(many.state_dict()) if dist.get_rank() == 0 else None,
        {n: p.detach().clone() for n, p in by_name.items()},
    ]
    dist.broadcast_object_list(saved)
    other = models.net(8, 16)
    other.load_state_dict(saved[1])
    resumed = made(other)
    resumed.load_state_dict(saved[0])
    train(split, many, range(2, 5))
    train(other, resumed, range(2, 5))
    assert [g["param_names"] for g in resumed.optim.param_groups] == [g["param_names"] for g in many.optim.param_groups]
    return all(torch.equal(p, q) for p, q in zip(split.parameters(), other.parameters(), strict=True))


def _net_groups(net: nn.Module) -> Any:
    return lwadamw.param_groups(net, 4, width=8, segments={"layers.0.up.weight": 2})


def test_zero_redundancy_optimizer_keeps_names_norms_and_state_of_every_process():
    assert run(2, _zero, 2) == [True] * 2


def _with_rule() -> tuple[nn.Module, lwadamw.AdamW]:
    model = models.net(8, 16)
    return model, lwadamw.AdamW(_net_groups(model), **OPTIONS)


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "without a moment"])
def test_dcp_loads_a_checkpoint_of_torch_into_a_rule_and_misses_only_our_keys(missing):
    from lwadamw.engines.checkpoint import LoadPlanner

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model = models.net(8, 16)
    plain = torch.optim.AdamW(model.parameters(), **OPTIONS)
    models.backward(model, 0)
    plain.step()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        saved = get_optimizer_state_dict(model, plain, options=flat)
        # The second key is one that torch before 2.7 did not write.
        lacking = ("exp_avg_sq", "decoupled_weight_decay") if missing else "decoupled_weight_decay"
        saved = {k: v for k, v in saved.items() if not k.endswith(lacking)}
        dcp.save({"optimizer": saved}, checkpoint_id=folder)
        other, ours = _with_rule()
        state = {"optimizer": get_optimizer_state_dict(other, ours, options=flat)}
        with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*\."):
            dcp.load(state, checkpoint_id=folder)
        if missing:
            with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*exp_avg_sq"):
                dcp.load(state, checkpoint_id=folder, planner=LoadPlanner())
            return
        dcp.load(state, checkpoint_id=folder, planner=LoadPlanner())
        set_optimizer_state_dict(other, ours, state["optimizer"], options=flat)
    multipliers = {n: g["width_lr_mult"] for g in ours.param_groups for n in g["param_names"]}
    assert set(multipliers.values()) > {1.0}
    assert all(group.get("decoupled_weight_decay", True) for group in ours.param_groups)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[q][key], plain.state[p][key], rtol=0, atol=0, msg=name)
