"""The torch backend keeps its buckets while only learning rates and weight decays move, and takes the same steps."""

import copy

import pytest
import torch

import lwadamw
from lwadamw.step import torch_backend

KINDS = {
    "fused": {},
    "packed": {"exp_avg_dtype": torch.bfloat16},
    "width": {"width_lr_mult": 0.25, "width_wd_mult": 2.0},
    "law": {"decay": "independent", "peak_lr": 0.1},
}


@pytest.fixture
def fills(monkeypatch):
    """How many times buckets have been filled."""
    counted, real = [], torch_backend.fill_buckets

    def filling(*arguments):
        counted.append(1)
        return real(*arguments)

    monkeypatch.setattr(torch_backend, "fill_buckets", filling)
    return counted


def _optimizer(kind):
    params = [torch.nn.Parameter(torch.arange(1.0, n)) for n in (5, 9, 6)]
    groups = [{"params": params[:1]}, {"params": []}, {"weight_decay": 0.2, "params": params[1:]}]
    return lwadamw.AdamW([{**group, **KINDS[kind]} for group in groups], lr=0.1, backend="torch"), params


def _step(optimizer, i, **values):
    for group in optimizer.param_groups:
        group.update(values)
        for p in group["params"]:
            p.grad = torch.full_like(p, 0.1 * (i + 1))
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_moved_numbers_keep_the_buckets_and_take_the_steps_of_new_buckets(kind, fills):
    optimizer, params = _optimizer(kind)
    for i in range(4):
        new = copy.deepcopy(optimizer)  # it makes all buckets anew
        values = {"lr": 0.1 / (i + 1), "weight_decay": 0.5 * (i + 1)}
        fills.clear()
        _step(new, i, **values)
        assert len(fills) == 1
        fills.clear()
        _step(optimizer, i, **values)
        assert len(fills) == (i == 0)
        others = [p for group in new.param_groups for p in group["params"]]
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
        assert torch.equal(optimizer.norm_sums(), new.norm_sums())


@pytest.mark.parametrize(
    ("change", "value"),
    [("lr", torch.tensor(0.05)), ("betas", (0.5, 0.6)), ("maximize", True), ("fused", False), ("new key", 1)],
    ids=str,
)
def test_whatever_else_has_changed_fills_the_buckets_again(change, value, fills):
    optimizer, params = _optimizer("fused")
    _step(optimizer, 0)
    new = copy.deepcopy(optimizer)
    for one in (new, optimizer):
        fills.clear()
        _step(one, 1, **{change: value})
        assert len(fills) == 1
    others = [p for group in new.param_groups for p in group["params"]]
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_groups_that_shared_a_bucket_part_when_their_values_do():
    optimizer, params = _optimizer("fused")
    twin = torch.optim.AdamW([{"params": [p.detach().clone().requires_grad_()]} for p in params], lr=0.1)
    optimizer = lwadamw.AdamW([{"params": [p]} for p in params], lr=0.1, backend="torch")
    for i in range(3):
        for one in (optimizer, twin):
            one.param_groups[0]["lr"] = 0.1 / (i + 1)
            _step(one, i)
    for p, group in zip(params, twin.param_groups, strict=True):
        torch.testing.assert_close(p.detach(), group["params"][0].detach())


def test_a_step_that_failed_does_not_leave_old_values_in_the_buckets():
    optimizer, params = _optimizer("fused")
    _step(optimizer, 0, weight_decay=0.1)  # so that all groups share a bucket
    new = copy.deepcopy(optimizer)
    optimizer.param_groups[0]["lr"] = new.param_groups[0]["lr"] = 0.01
    params[0].grad = torch.zeros(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    for one in (optimizer, new):
        _step(one, 1)
    others = [p for group in new.param_groups for p in group["params"]]
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_packed_parameter_whose_gradient_has_another_dtype_is_looked_at_again(fills):
    p = torch.nn.Parameter(torch.arange(1.0, 9).bfloat16())
    optimizer = lwadamw.AdamW([p], lr=0.1, backend="torch", master_weights=torch.float32)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
        p.grad = None
        if dtype == torch.float32:
            p.grad_dtype = None
        p.grad = torch.ones(8, dtype=dtype)
        fills.clear()
        optimizer.step()
    assert len(fills) == 1
