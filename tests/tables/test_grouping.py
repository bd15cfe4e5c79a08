"""Regrouping parameters does not change one bit on the Triton backend."""

import random

import pytest
import torch

from lwadamw import AdamW
from tests.cases import clone_params, make_params

SHAPES = [(33, 65), (7,), (1,), (3000,), (0,), (128,), (2, 3, 5), (5000,), (64, 64), (), (1025,)]


def _groups(params, n_groups, seed):
    order = list(enumerate(params))
    random.Random(seed).shuffle(order)
    groups = [{"params": []} for _ in range(n_groups)]
    for position, (i, p) in enumerate(order):
        groups[position % n_groups]["params"].append((f"p{i}", p))
    return groups


@pytest.mark.parametrize("n_groups", [1, 7, len(SHAPES)])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"max_grad_norm": 0.7}], ids=["plain", "amsgrad", "clip"])
def test_any_grouping_in_any_order_is_bit_identical(n_groups, options, device):
    params = make_params(SHAPES, device)
    regrouped = clone_params(params)
    one = AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, weight_decay=0.1, backend="triton", **options)
    many = AdamW(_groups(regrouped, n_groups, seed=n_groups), lr=1e-2, weight_decay=0.1, backend="triton", **options)
    for step in range(4):
        for p, q in zip(params, regrouped, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 1:
            params[3].grad = regrouped[3].grad = None
        one.step()
        many.step()
    for p, q in zip(params, regrouped, strict=True):
        assert torch.equal(p, q)
        for key, value in one.state[p].items():
            assert torch.equal(value, many.state[q][key]), key
    if "max_grad_norm" in options:
        assert torch.equal(one.grad_norm, many.grad_norm)
    first, second = one.norms(), many.norms()
    where = [second.names.index(name) for name in first.names]
    for statistic in ("weight", "update", "grad", "angle"):
        assert (getattr(first, statistic) == getattr(second, statistic)[where]).all(), statistic


def test_a_step_is_reproducible_bit_for_bit(device):
    params = make_params(SHAPES, device)
    again = clone_params(params)
    results = []
    for ps in (params, again):
        torch.manual_seed(5)
        optimizer = AdamW(ps, max_grad_norm=1.0, backend="triton")
        for _ in range(3):
            for p in ps:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append((optimizer.norm_sums(), ps))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1], strict=True))
