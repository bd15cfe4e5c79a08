"""param_groups: width ratios, multipliers and groups, and the errors that prevent wrong groups."""

import copy
import logging

import pytest
import torch
from torch import nn

from lwadamw import RULES, AdamW, Matrix, Rule, Scale, param_groups, summary
from tests import zoo
from tests.cases import set_grads


def _multipliers(groups):
    """Return {name: (lr, wd, eps)} for every parameter."""
    keys = ("width_lr_mult", "width_wd_mult", "width_eps_mult")
    return {name: tuple(g[k] for k in keys) for g in groups for name, _ in g["params"]}


def test_every_parameter_is_in_one_group_and_each_call_makes_new_dicts():
    model = zoo.Llama(128)
    one, two = param_groups(model, 32), param_groups(model, 32)
    names = [name for g in one for name, _ in g["params"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert all(p is dict(model.named_parameters())[name] for g in one for name, p in g["params"])
    one[0]["params"].clear()
    assert two[0]["params"]


def test_groups_are_merged_by_equal_multipliers():
    groups = param_groups(zoo.Llama(128, 6), 32)
    assert [(g["role"], g["width_lr_mult"], g["width_wd_mult"]) for g in groups] == [
        ("vector", 1.0, 0.0),
        ("matrix", 0.25, 2.0),
        ("output", 0.25, 0.0),
    ]


@pytest.mark.parametrize("rule", RULES)
def test_multipliers_are_powers_of_m_with_the_exponents_of_the_rule(rule):
    found = _multipliers(param_groups(zoo.Llama(128, 1), 32, rule))
    scale = RULES[rule]
    assert found["layers.0.wq.weight"] == (4.0**scale.matrix.lr, 4.0**scale.matrix.wd, 1.0)
    assert found["embed_tokens.weight"] == (1.0, 0.0, 1.0)
    assert found["lm_head.weight"] == (4.0**scale.output.lr, 0.0, 1.0)


def test_published_exponents():
    """The exponents of Fan et al. 2510.15262 and Kosson et al. 2510.19093. Two equations define those of `balanced`."""
    lr_wd = {name: (rule.matrix.lr, rule.matrix.wd) for name, rule in RULES.items()}
    assert lr_wd == {
        "standard": (0.0, 0.0),
        "mup": (-1.0, 0.0),
        "fan2025": (-1.0, 0.5),
        "kosson2025": (-1.0, 1.0),
        "balanced": (-0.75, 0.75),
    }
    a, b = lr_wd["balanced"]
    assert a + b == 0, "relative update"
    assert (a - b) / 2 + 0.75 == 0, "top singular value"


def test_every_multiplier_at_the_base_width_is_one():
    for rule in RULES:
        for name, (lr, wd, eps) in _multipliers(param_groups(zoo.Llama(32), 32, rule)).items():
            assert (lr, eps) == (1.0, 1.0), name
            assert wd in (0.0, 1.0), name


def test_a_rule_of_the_user_scales_eps_and_vectors():
    rule = Rule("mine", matrix=Scale(lr=-1, wd=0.25, eps=-1), vector=Scale(lr=-0.5, wd=0.0))
    groups = param_groups(zoo.Llama(128, 1), 32, rule)
    found = _multipliers(groups)
    assert found["layers.0.wq.weight"] == (0.25, 4**0.25, 0.25)
    assert found["norm.weight"] == (0.5, 1.0, 1.0)
    assert groups[0]["rule"] == "mine"


BASES = {
    "int": lambda: 32,
    "mapping": lambda: {"*.down_proj.weight": 96, "*": 32},
    "model": lambda: zoo.Llama(32, 2),
    "meta model": lambda: _on_meta(32, 2),
    "shallower model": lambda: _on_meta(32, 1),
}


def _on_meta(width, layers):
    with torch.device("meta"):
        return zoo.Llama(width, layers)


@pytest.mark.parametrize("base", BASES)
def test_every_form_of_base_width_gives_the_same_multipliers(base):
    model = zoo.Llama(128, 2)
    assert _multipliers(param_groups(model, BASES[base]())) == _multipliers(param_groups(model, 32))


def test_the_ratio_is_the_ratio_of_fan_ins_and_not_of_widths():
    """The feed-forward width of this proxy is the feed-forward width of the model."""
    base = {"*.down_proj.weight": 384, "*": 32}
    found = _multipliers(param_groups(zoo.Llama(128, 1), base))
    assert found["layers.0.down_proj.weight"][0] == 1.0
    assert found["layers.0.up_proj.weight"][0] == 0.25


def test_a_width_that_does_not_divide_is_refused_with_two_ways_out():
    layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 172), nn.Linear(172, 64)) for _ in range(2)])
    with pytest.raises(
        ValueError, match="fan_in 172 of 'layers.0.1.weight' .* is not a multiple of the width 64"
    ) as error:
        param_groups(nn.ModuleDict({"embed": nn.Embedding(10, 64), "layers": layers}), 16)
    text = str(error.value)
    assert 'torch.device("meta")' in text
    assert '"layers.0.1.weight": <its fan_in at the proxy>,  # 172 here; 43 if it follows the width' in text
    assert '\n    "*": 16,\n}' in text


def test_the_width_comes_from_the_config_the_embedding_or_the_user():
    class Configured(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"hidden_size": 64})()
            self.up = nn.Linear(64, 128)

    assert _multipliers(param_groups(Configured(), 16))["up.weight"][0] == 0.25
    embedded = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64))
    assert _multipliers(param_groups(embedded, 16))["1.weight"][0] == 0.25
    with pytest.raises(ValueError, match="cannot tell the model's width"):
        param_groups(nn.Linear(64, 64), 16)
    assert _multipliers(param_groups(nn.Linear(64, 64), 16, width=64))["weight"][0] == 0.25


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (0, ValueError, "base_width=0 is not a positive width. Give the width of the proxy"),
        ("256", TypeError, "base_width is str"),
        ({"*.wq.weight": 32}, ValueError, "no base_width pattern matches 'layers.0.wk.weight'"),
        ({"*.nope": 32, "*": 32}, ValueError, r"base_width pattern '\*.nope' matches no parameter"),
        ({"*": -1}, ValueError, "is not a positive fan_in"),
    ],
)
def test_a_bad_base_width_is_refused(base, error, message):
    with pytest.raises(error, match=message):
        param_groups(zoo.Llama(128, 1), base)


def test_a_base_model_of_another_class_is_refused():
    with pytest.raises(ValueError, match="the base model has no parameter"):
        param_groups(zoo.Llama(128, 1), zoo.GPT2(32))


def test_the_error_lists_all_undecided_parameters_with_the_remedy():
    with pytest.raises(ValueError, match="cannot decide a role for 2 parameters") as error:
        param_groups(zoo.MoE(64), 16, width=64)
    text = str(error.value)
    assert '\n    "experts.gate_up": <role>,  # (4, 256, 64): Parameter on Experts, not a known module\n' in text
    assert '\n    "experts.down": <role>,  # (4, 64, 128): Parameter on Experts, not a known module\n}\n' in text
    offers = [
        text.index(offer) for offer in ("Matrix(fan_in=-1)", "Matrix(fan_in=-2)", "Output(fan_in=-1)", '"vector"')
    ]
    assert offers == sorted(offers), "the role that loses the least comes first"
    param_groups(zoo.MoE(64), 16, width=64, roles={"experts.*": Matrix(fan_in=-1)})


def test_lora_is_undecided_unless_the_user_decides_it():
    with pytest.raises(ValueError, match="LoRA: no width rule is settled"):
        param_groups(zoo.LoRALinear(64), 16, width=64)
    groups = param_groups(zoo.LoRALinear(64), 64, width=64, roles={"lora_*": "vector"})
    assert [name for g in groups for name, _ in g["params"]] == ["lora_A.weight", "lora_B.weight"]


def test_without_strict_an_undecided_parameter_warns_and_keeps_its_decay():
    with pytest.warns(UserWarning, match="taken as matrices.*\n.*'experts.gate_up'"):
        groups = param_groups(zoo.MoE(64), 16, width=64, strict=False)
    assert _multipliers(groups)["experts.gate_up"] == (0.25, 2.0, 1.0)


def test_the_error_of_a_pattern_without_a_match_names_the_closest_pattern():
    with pytest.raises(
        ValueError, match=r"roles pattern '\*.wqq.weight' matches no parameter. Closest: 'layers.\*.wq.weight'"
    ):
        param_groups(zoo.Llama(64), 16, roles={"*.wqq.weight": "vector"})
    with pytest.warns(UserWarning, match="matches no parameter"):
        param_groups(zoo.Llama(64), 16, roles={"*.wqq.weight": "vector"}, strict=False)


def test_frozen_parameters_are_left_out_or_included():
    model = zoo.Llama(64, 1)
    model.embed_tokens.requires_grad_(False)
    assert "embed_tokens.weight" not in _multipliers(param_groups(model, 16))
    assert "embed_tokens.weight" in _multipliers(param_groups(model, 16, include_frozen=True))
    assert "frozen 1 (left out)" in summary(param_groups(model, 16))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups(model, 16)


def test_output_as_vector_for_models_that_divide_their_logits():
    assert _multipliers(param_groups(zoo.Llama(64), 16, output="vector"))["lm_head.weight"] == (1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="output='matrix': give 'output'"):
        param_groups(zoo.Llama(64), 16, output="matrix")


def test_tied_weights_are_one_vector_with_both_names_shown():
    groups = param_groups(zoo.GPT2(64), 16)
    assert _multipliers(groups)["wte.weight"] == (1.0, 0.0, 1.0)
    assert groups.evidence["wte.weight"].why == "Embedding; tied with lm_head.weight"
    by_alias = param_groups(zoo.GPT2(64), 16, roles={"lm_head.weight": "output"})
    assert by_alias.evidence["wte.weight"].role == "output"


def test_overrides_win_over_the_rule():
    groups = param_groups(zoo.Llama(64, 1), 16, overrides={"*.wq.weight": {"lr": 1e-5, "width_lr_mult": 1.0}})
    optimizer = AdamW(groups, lr=1e-2)
    (group,) = [g for g in optimizer.param_groups if g["param_names"] == ["layers.0.wq.weight"]]
    assert (group["lr"], group["width_lr_mult"], group["width_wd_mult"]) == (1e-5, 1.0, 2.0)


def test_each_segment_has_norms_of_its_own():
    model = zoo.MoE(16)
    roles = {"experts.*": Matrix(fan_in=-1)}
    groups = param_groups(model, 16, width=16, roles=roles, segments={"experts.*": 4, "gate.weight": (1, 3)})
    optimizer = AdamW(groups, backend="triton")
    set_grads(list(model.parameters()))
    optimizer.step()
    norms = dict(zip(*[(n := optimizer.norms()).names, n.weight], strict=True))
    for i in range(4):
        assert norms[f"experts.down[{i}]"] == pytest.approx(model.experts.down[i].detach().norm().item(), rel=1e-5)
    assert norms["gate.weight[1]"] == pytest.approx(model.gate.weight[1:].detach().norm().item(), rel=1e-5)
    assert "experts.down" not in norms
    with pytest.raises(ValueError, match="'gate.weight' .* does not split into 3 equal parts"):
        param_groups(model, 16, width=16, roles=roles, segments={"gate.weight": 3})
    with pytest.raises(ValueError, match="do not add up to its 4 rows"):
        param_groups(model, 16, width=16, roles=roles, segments={"gate.weight": (1, 1)})


def test_folded_groups_train_the_same_with_another_optimizer():
    model = zoo.Llama(64, 1)
    twin = copy.deepcopy(model)
    ours = AdamW(param_groups(model, 16), lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(param_groups(twin, 16, fold=True, lr=1e-2, weight_decay=0.1))
    assert not any("width_lr_mult" in g for g in theirs.param_groups)
    for _ in range(3):
        set_grads(list(model.parameters()), list(twin.parameters()))
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="fold=True multiplies base values, so it needs lr"):
        param_groups(model, 16, fold=True)


def test_a_model_of_the_base_width_is_logged_as_the_proxy(caplog):
    with caplog.at_level(logging.INFO, logger="lwadamw"):
        param_groups(zoo.Llama(32), 32)
    assert "width == base_width == 32" in caplog.text


def test_a_width_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="width=0 is not a positive width. Give the width of this model"):
        param_groups(zoo.Llama(32), 32, width=0)


def test_a_shallower_base_model_whose_layers_differ_is_refused():
    def build(*widths):
        return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(d, 32) for d in widths)})

    with pytest.raises(
        ValueError,
        match=r"have different fan_ins: 'layers.0.weight of this model' 64, 'layers.1.weight of this model' 128",
    ):
        param_groups(build(64, 128, 256), build(16, 32))
    groups = param_groups(build(64, 128, 256), build(16, 32, 32))
    assert [_multipliers(groups)[f"layers.{i}.weight"][0] for i in range(3)] == [0.25, 0.25, 0.125]


def test_a_single_number_cannot_be_a_matrix():
    with pytest.raises(
        ValueError, match="'temperature' matrix, but it is a single number without a fan_in. Give \"vector\""
    ):
        param_groups(zoo.ViT(64), 16, width=64, roles={"temperature": "matrix"})
