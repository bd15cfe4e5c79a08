"""A run with one optimizer for matrices and another one for the rest gets its groups by role, with names."""

import pytest
import torch
from torch import nn

from lwadamw import AdamW, by_role, param_groups, summary
from lwadamw.width.groups import Groups


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16), nn.LayerNorm(16))


@pytest.mark.parametrize("options", [{}, {"fold": True, "lr": 0.1, "weight_decay": 0.2}], ids=["unfolded", "folded"])
def test_groups_split_by_role_keep_names_evidence_and_every_parameter(options):
    net = model()
    roles = by_role(param_groups(net, 8, **options))
    assert set(roles) == {"matrix", "vector"}
    optimizers = {role: AdamW(groups, lr=0.1) for role, groups in roles.items()}
    names = {role: [n for g in o.param_groups for n in g["param_names"]] for role, o in optimizers.items()}
    assert names == {"matrix": ["1.weight", "2.weight"], "vector": ["0.weight", "2.bias", "3.weight", "3.bias"]}
    assert all(g["role"] == role for role, o in optimizers.items() for g in o.param_groups)
    assert optimizers["matrix"].evidence["1.weight"].role == "matrix"
    assert "Linear" in summary(optimizers["matrix"])


def test_folded_groups_hold_tensors_for_optimizers_that_know_no_pairs():
    groups = param_groups(model(), 8, fold=True, lr=0.1, weight_decay=0.2)
    assert all(isinstance(p, torch.Tensor) for g in groups for p in g["params"])
    assert not any(key.startswith("width_") or key == "rule" for g in groups for key in g)
    torch_groups = torch.optim.AdamW(groups).param_groups
    assert [g["param_names"] for g in torch_groups] == [g["param_names"] for g in groups]


def test_groups_without_a_role_are_refused():
    with pytest.raises(ValueError, match="group 0 with 1 parameters has no role"):
        by_role([{"params": [nn.Parameter(torch.ones(2))]}])


def test_groups_that_are_joined_again_keep_their_evidence():
    roles = by_role(param_groups(nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64)), 16))
    joined = roles["vector"] + roles["matrix"]
    assert list(joined) == [*roles["vector"], *roles["matrix"]]
    assert isinstance(joined, Groups)
    assert set(joined.evidence) == {"0.weight", "1.weight", "1.bias"}
