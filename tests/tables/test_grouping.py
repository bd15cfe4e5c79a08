"""Moving parameters between groups does not change one bit on the Triton backend."""

import random

import pytest
import torch

from lwadamw import AdamW
from tests.cases import clone_params, make_params

# With chunks of 2048 elements: two parameters of several chunks, one with a partial block, small ones, 0-d, empty.
SHAPES = [(33, 65), (7,), (2, 3, 5), (0,), (4100,), (), (1025,)]
MISSING = 2  # the parameter that has no gradient at the second step


def _groups(params, n_groups, seed):
    """Deal parameters out to groups in a random order."""
    order = list(enumerate(params))
    random.Random(seed).shuffle(order)
    groups = [{"params": []} for _ in range(n_groups)]
    for position, (i, p) in enumerate(order):
        groups[position % n_groups]["params"].append((f"p{i}", p))
    return groups


def _train(groups, params, gradients, options):
    """An optimizer over the groups, after one step with each list of gradients."""
    optimizer = AdamW(groups, lr=1e-2, weight_decay=0.1, backend="triton", **options)
    for grads in gradients:
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "max_grad_norm": 0.7}], ids=["plain", "amsgrad and clip"])
def test_any_grouping_in_any_order_is_bit_identical(options, device):
    start = make_params(SHAPES, device)
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    gradients[1][MISSING] = None
    params = clone_params(start)
    one = _train([{"params": [(f"p{i}", p) for i, p in enumerate(params)]}], params, gradients, options)
    first = one.norms()
    for n_groups in (1, 3, len(SHAPES)):
        regrouped = clone_params(start)
        many = _train(_groups(regrouped, n_groups, seed=n_groups), regrouped, gradients, options)
        for i, (p, q) in enumerate(zip(params, regrouped, strict=True)):
            assert torch.equal(p, q), (n_groups, i)
            assert one.state[p].keys() == many.state[q].keys()
            for key, value in one.state[p].items():
                assert torch.equal(value, many.state[q][key]), (n_groups, i, key)
        if "max_grad_norm" in options:
            assert torch.equal(one.grad_norm, many.grad_norm), n_groups
        second = many.norms()
        where = [second.names.index(name) for name in first.names]
        assert second.names != first.names, "the order of parameters differs"
        for statistic in ("weight", "update", "grad", "angle"):
            assert (getattr(first, statistic) == getattr(second, statistic)[where]).all(), (n_groups, statistic)


def test_a_step_is_reproducible_bit_for_bit(device):
    start = make_params(SHAPES, device)
    gradients = [[torch.randn_like(p) for p in start] for _ in range(2)]
    results = []
    for params in (clone_params(start), clone_params(start)):
        optimizer = _train(params, params, gradients, {"max_grad_norm": 1.0})
        results.append((optimizer.norm_sums(), params))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1], strict=True))
