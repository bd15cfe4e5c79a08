"""An override of a base value is the effective value, whatever the rule says, and the summary shows it."""

import pytest
import torch
from torch import nn

from lwadamw import RULES, AdamW, effective, param_groups, summary
from tests import zoo
from tests.cases import set_grads

OVERRIDES = {
    "decay of a vector": ({"embed_tokens.weight": {"weight_decay": 0.1}}, "embed_tokens.weight", "weight_decay", 0.1),
    "lr of a matrix": ({"*.down_proj.weight": {"lr": 1e-4}}, "layers.0.down_proj.weight", "lr", 1e-4),
    "decay of a head": ({"lm_head.*": {"weight_decay": 0.3, "lr": 2e-4}}, "lm_head.weight", "weight_decay", 0.3),
    "eps of a matrix": ({"*.wq.weight": {"eps": 1e-12}}, "layers.0.wq.weight", "eps", 1e-12),
}


def _group(groups, name):
    (found,) = [g for g in groups if name in g["param_names"]]
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", OVERRIDES)
def test_the_value_is_the_effective_one_and_other_values_follow_the_rule(case, rule):
    overrides, name, key, value = OVERRIDES[case]
    plain = AdamW(param_groups(zoo.Llama(64, 1), 16, rule), lr=1e-2, weight_decay=0.2)
    given = AdamW(param_groups(zoo.Llama(64, 1), 16, rule, overrides=overrides), lr=1e-2, weight_decay=0.2)
    was, now = effective(_group(plain.param_groups, name)), effective(_group(given.param_groups, name))
    own = next(iter(overrides.values()))
    for field in ("lr", "weight_decay", "eps"):
        assert getattr(now, field) == pytest.approx(own.get(field, getattr(was, field)))
    assert getattr(now, key) == value


def test_the_step_uses_the_value():
    model, twin = zoo.Llama(64, 1), zoo.Llama(64, 1)
    twin.load_state_dict(model.state_dict())
    groups = param_groups(model, 16, overrides={"embed_tokens.weight": {"weight_decay": 0.5}})
    ours = AdamW(groups, lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(twin.embed_tokens.parameters(), lr=1e-2, weight_decay=0.5)
    set_grads(list(model.parameters()), list(twin.parameters()))
    ours.step()
    theirs.step()
    torch.testing.assert_close(model.embed_tokens.weight, twin.embed_tokens.weight)


def test_folded_groups_have_the_value_too():
    overrides = {"embed_tokens.weight": {"weight_decay": 0.1}, "*.down_proj.weight": {"lr": 1e-4}}
    model = zoo.Llama(64, 1)
    groups = param_groups(model, 16, overrides=overrides, fold=True, lr=1e-2, weight_decay=0.2)
    by_param = {id(p): g for g in groups for p in g["params"]}
    assert by_param[id(model.embed_tokens.weight)]["weight_decay"] == 0.1
    down = by_param[id(model.layers[0].down_proj.weight)]
    assert (down["lr"], down["weight_decay"]) == (1e-4, 0.4)


def test_a_multiplier_that_is_given_with_the_value_counts():
    groups = param_groups(zoo.Llama(64, 1), 16, overrides={"*.wq.weight": {"lr": 1e-4, "width_lr_mult": 0.5}})
    group = _group(AdamW(groups).param_groups, "layers.0.wq.weight")
    assert effective(group).lr == 5e-5


def test_the_summary_shows_the_override():
    overrides = {"*.down_proj.weight": {"lr": 1e-4}}
    optimizer = AdamW(param_groups(zoo.Llama(64, 1), 16, overrides=overrides), lr=1e-2, weight_decay=0.2)
    (line,) = [line for line in summary(optimizer).splitlines() if "down_proj" in line]
    assert "overrides['*.down_proj.weight']: lr" in line
    assert " 0.0001 " in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"lr": 5e-2, "weight_decay": 0.3},
            r"lr=0.05, weight_decay=0.3 would be ignored.*AdamW\(groups, lr=0.05, weight_decay=0.3\)",
        ),
        ({"weight_decay": 0.0}, r"weight_decay=0.0 would be ignored"),
        (
            {"overrides": {"*": {"weight_decy": 0.1}}},
            "'weight_decy', which is no option of AdamW. Closest: 'weight_decay'",
        ),
        ({"overrides": {"*": {"wd": 0.1}}}, "'wd', which is no option of AdamW. Options are amsgrad, betas"),
    ],
)
def test_values_that_no_step_would_read_are_refused(arguments, message):
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64, bias=False))
    with pytest.raises(ValueError, match=message):
        param_groups(model, 16, **arguments)


def test_folded_groups_take_options_of_any_optimizer():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64, bias=False))
    groups = param_groups(model, 16, overrides={"1.*": {"momentum": 0.9}}, fold=True, lr=0.1, weight_decay=0.1)
    assert [group.get("momentum") for group in groups] == [None, 0.9]
