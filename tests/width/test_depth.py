"""Depth: the exponents of CompleteP, which parameters are inside the blocks, and what the model has to do."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from lwadamw import DEPTHS, RECIPES, RULES, AdamW, Depth, Matrix, Rule, Scale, param_groups, summary
from lwadamw.width.depth import completep
from tests import zoo

DEEP = dataclasses.replace(RULES["kosson2025"], depth=DEPTHS["completep"])
HALF = dataclasses.replace(RULES["kosson2025"], depth=DEPTHS["completep_half"])


def multipliers(groups):
    """Return {name: (lr, wd, eps)} for every parameter."""
    keys = ("width_lr_mult", "width_wd_mult", "width_eps_mult")
    return {name: tuple(g[k] for k in keys) for g in groups for name, _ in g["params"]}


def table_of_completep(name, m_width, m_depth, alpha):
    """lr, weight decay and eps of Table 1 of Dey et al. 2505.01618, for a name of `zoo.Llama`."""
    if not name.startswith("layers."):
        return (1.0, 0.0, 1.0)  # embedding, final norm, and unembedding with logits times 1/m_width
    deep, eps = m_depth ** (alpha - 1), 1 / m_width * m_depth**-alpha
    return (deep, 0.0, eps) if "norm" in name else (deep / m_width, m_width, eps)


@pytest.mark.parametrize(("depth", "base_depth"), [(4, 2), (1, 8), (3, 3)])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.75])
def test_every_multiplier_is_that_of_the_table_of_completep(depth, base_depth, alpha):
    rule = dataclasses.replace(RECIPES["completep"], depth=completep(alpha))
    found = multipliers(param_groups(zoo.Llama(128, depth), 32, rule, base_depth=base_depth))
    assert len(found) == len(dict(zoo.Llama(128, depth).named_parameters()))
    for name, values in found.items():
        # The norms of queries and keys have the inputs of a head, which follows the width of this model.
        assert values == pytest.approx(table_of_completep(name, 4.0, depth / base_depth, alpha)), name


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_factor_on_residual_branches_is_m_depth_to_the_power_minus_alpha(alpha):
    assert completep(alpha).factor(8.0) == pytest.approx(8.0**-alpha)
    groups = param_groups(zoo.Llama(64, 8), 64, HALF if alpha == 0.5 else DEEP, base_depth=2)
    for name, evidence in groups.evidence.items():
        assert evidence.branch == (pytest.approx(4.0**-alpha) if name.startswith("layers.") else None)
    assert f"every residual branch multiplied by {4.0**-alpha:g}" in summary(groups)


def test_a_model_as_deep_as_its_proxy_has_the_values_of_the_width_rule():
    plain = multipliers(param_groups(zoo.Llama(128, 3), 32, "kosson2025"))
    assert multipliers(param_groups(zoo.Llama(128, 3), 32, DEEP, base_depth=3)) == plain
    assert multipliers(param_groups(zoo.Llama(128, 3), 32, HALF, base_depth=3)) == plain


def test_the_optimizer_uses_width_and_depth():
    model = zoo.Llama(64, 4)
    optimizer = AdamW(param_groups(model, 32, HALF, base_depth=1), lr=1e-2, weight_decay=0.1, eps=1e-6)
    seen = {g["role"]: e for g, e in zip(optimizer.param_groups, optimizer.effective(), strict=True)}
    assert seen["matrix"]["lr"] == pytest.approx(1e-2 / 2 * 4**-0.5)
    assert seen["matrix"]["weight_decay"] == pytest.approx(0.1 * 2)
    assert seen["matrix"]["eps"] == pytest.approx(1e-6 * 4**-0.5)


def test_folded_groups_have_the_depth_in_them():
    groups = param_groups(zoo.Llama(64, 4), 32, HALF, base_depth=1, fold=True, lr=1e-2, weight_decay=0.1)
    matrix = next(g for g in groups if g["role"] == "matrix")
    assert (matrix["lr"], matrix["eps"]) == pytest.approx((1e-2 / 2 / 2, 1e-8 / 2))


class Pair(nn.Module):
    """An encoder and a decoder of different depths."""

    def __init__(self, d, encoder=2, decoder=4):
        super().__init__()
        self.encoder = nn.ModuleList(zoo.LlamaLayer(d) for _ in range(encoder))
        self.decoder = nn.ModuleList(zoo.LlamaLayer(d) for _ in range(decoder))


def test_several_lists_of_blocks_each_have_their_own_depth():
    with pytest.raises(ValueError, match="several lists of blocks") as error:
        param_groups(Pair(64), 64, HALF, base_depth=2, width=64)
    assert str(error.value).endswith('base_depth={"encoder.*": 2, "decoder.*": 2}.')
    pasted = eval(re.search(r"base_depth=(\{.*\})\.$", str(error.value))[1])  # what the error says to give
    found = multipliers(param_groups(Pair(64), 64, HALF, base_depth=pasted, width=64))
    assert found["encoder.1.wq.weight"][0] == 1.0
    assert found["decoder.3.wq.weight"][0] == pytest.approx(2**-0.5)


def test_a_pattern_that_leaves_a_list_out_leaves_it_as_the_width_rule_has_it():
    groups = param_groups(Pair(64), 64, HALF, base_depth={"decoder.*": 1}, width=64)
    found = multipliers(groups)
    assert found["encoder.1.wq.weight"] == (1.0, 1.0, 1.0)
    assert found["decoder.1.wq.weight"][0] == pytest.approx(0.5)
    assert groups.evidence["encoder.1.wq.weight"].branch is None


def test_a_process_with_a_part_of_the_blocks_gives_the_depth():
    stage = zoo.Llama(64, 2)
    stage.config = type("Config", (), {"num_layers": 8, "hidden_size": 64})()
    with pytest.raises(ValueError, match=r"'layers' has 2 blocks here, but the config says 8. Pass depth=8"):
        param_groups(stage, 64, HALF, base_depth=2)
    found = multipliers(param_groups(stage, 64, HALF, base_depth=2, depth=8))
    assert found["layers.0.wq.weight"][0] == pytest.approx(0.5)


def test_a_router_inside_a_block_does_not_follow_the_depth_and_says_so():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"mlp": zoo.MoE(64)}) for _ in range(4))
    packed = Matrix(fan_in=-1)
    groups = param_groups(model, 64, HALF, roles={"*.gate_up": packed, "*.down": packed}, width=64, base_depth=1)
    assert multipliers(groups)["layers.0.mlp.gate.weight"] == (1.0, 0.0, 1.0)
    assert "no source says how a router follows the depth" in groups.evidence["layers.0.mlp.gate.weight"].why


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "kosson2025", "base_depth": 2}, "'kosson2025' says nothing of the depth"),
        ({"rule": "completep"}, "'completep' scales residual blocks, so it has to know the blocks"),
        ({"rule": "kosson2025", "depth": 2}, "depth=2 needs base_depth"),
        ({"base_depth": 0}, "base_depth=0 is not a number of blocks"),
        ({"base_depth": 2, "depth": 0}, "depth=0 is not a number of blocks"),
        ({"base_depth": {"layers.*": 0}}, r"base_depth\['layers.\*'\]=0 is not a number of blocks"),
        ({"base_depth": {"norm.*": 2}}, "matches no parameter inside a numbered layer"),
        ({"base_depth": {"layers.0.*": 2, "layers.1.*": 2}, "depth": 4}, "cannot be the depth of 2 patterns"),
    ],
)
def test_arguments_that_give_no_depth_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        param_groups(zoo.Llama(64, 2), 64, **{"rule": DEEP, **arguments})


def test_a_depth_of_another_type_is_refused():
    with pytest.raises(TypeError, match="base_depth is float"):
        param_groups(zoo.Llama(64, 2), 64, DEEP, base_depth=2.0)


def test_a_sequence_that_is_a_whole_model_is_no_list_of_blocks():
    model = nn.Sequential(nn.Embedding(16, 64), zoo.LlamaLayer(64), zoo.LlamaLayer(64))
    with pytest.raises(ValueError, match="no list of numbered layers"):
        param_groups(model, 64, DEEP, base_depth=1)
    found = multipliers(param_groups(model, 64, HALF, base_depth={"re:^[12]\\.": 1}))
    assert found["1.wq.weight"][0] == pytest.approx(2**-0.5)
    assert found["0.weight"] == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Depth("mine", branch=float("nan")), "branch=nan is not finite"),
        (lambda: Depth("mine", branch=-1.0, matrix=Scale(wd=None)), "matrix has the exponent wd=None"),
        (lambda: completep(2.0), "alpha=2.0 is outside of 0.5 to 1"),
        (lambda: completep().factor(0.0), "depth ratio 0.0 is not a positive number"),
    ],
)
def test_exponents_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_depth_says_where_it_is_from_how_firmly_it_is_known_and_what_is_unknown():
    for name, depth in DEPTHS.items():
        assert name == depth.name
        assert depth.source
        assert depth.known
        assert depth.unknown


def test_a_residual_stack_of_branches_with_the_factor_has_outputs_that_do_not_grow_with_depth():
    """x = x + m^-1 f(x): the sum of `depth` equal branches is the same at every depth. Without the factor it grows."""
    rule, torch_sum = DEPTHS["completep"], {}
    for depth in (2, 8, 32):
        torch_sum[depth] = float(torch.ones(depth, dtype=torch.float64).mul(rule.factor(depth / 2)).sum())
    assert set(torch_sum.values()) == {2.0}


def test_a_rule_is_hashable_and_equal_by_value():
    assert hash(DEEP) == hash(dataclasses.replace(DEEP))
    assert Rule("a", Scale()) != DEEP


def test_a_pattern_of_base_width_does_not_give_one_ratio_to_vectors_of_different_sizes():
    """The norms of queries and keys are as long as a head. Their eps would get another width ratio than that of the norms."""
    with pytest.raises(
        ValueError, match=r"'\*' gives the fan_in 32 at the proxy to .* whose fan_in here is 16 and 128"
    ):
        param_groups(zoo.Llama(128, 2), {"*down_proj*": 96, "*": 32}, RECIPES["completep"], base_depth=2)
    base = {"*down_proj*": 96, "*.?_norm.weight": 4, "*": 32}
    by_map = multipliers(param_groups(zoo.Llama(128, 2), base, RECIPES["completep"], base_depth=2))
    assert by_map == multipliers(param_groups(zoo.Llama(128, 2), zoo.Llama(32, 2), RECIPES["completep"], base_depth=2))
