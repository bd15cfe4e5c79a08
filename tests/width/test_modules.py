"""Modules of a recipe: factors and exponents for embeddings, heads, routers, norms, biases and experts."""

import dataclasses

import pytest
import torch
from torch import nn

from lwadamw import RULES, AdamW, Matrix, Module, Rule, Scale, param_groups, summary
from lwadamw.width.kinds import kind_of
from lwadamw.width.roles import decide
from tests import zoo

EXPERTS = {"*.gate_up": Matrix(fan_in=-1), "*.down": Matrix(fan_in=-1)}


def multipliers(groups):
    """Return {name: (lr, wd, eps)} for every parameter."""
    keys = ("width_lr_mult", "width_wd_mult", "width_eps_mult")
    return {name: tuple(g[k] for k in keys) for g in groups for name, _ in g["params"]}


class Mixture(nn.Module):
    """An embedding, a block with biases, experts and a router, shared experts, a norm, and a head."""

    def __init__(self, d):
        super().__init__()
        self.embed_tokens = nn.Embedding(96, d)
        self.layers = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(d), "mlp": zoo.MoE(d)})])
        self.layers[0]["shared_experts"] = nn.Linear(d, d)
        self.lm_head = nn.Linear(d, 96, bias=False)


KINDS = {
    "embed_tokens.weight": "embedding",
    "layers.0.norm.weight": "norm",
    "layers.0.norm.bias": "bias",
    "layers.0.mlp.gate.weight": "router",
    "layers.0.mlp.experts.gate_up": "expert",
    "layers.0.mlp.experts.down": "expert",
    "layers.0.shared_experts.weight": None,
    "layers.0.shared_experts.bias": "bias",
    "lm_head.weight": "head",
}


def test_every_parameter_has_its_kind():
    assert {d.name: kind_of(d) for d in decide(Mixture(64), EXPERTS)} == KINDS


def test_a_tied_head_is_an_embedding():
    kinds = {d.name: kind_of(d) for d in decide(zoo.GPT2(64), {})}
    assert kinds["wte.weight"] == "embedding"
    assert "head" not in kinds.values()


@pytest.mark.parametrize("kind", sorted({k for k in KINDS.values() if k}))
def test_factors_reach_the_parameters_of_their_kind_and_no_other(kind):
    plain = multipliers(param_groups(Mixture(128), 32, "kosson2025", EXPERTS, width=128))
    modules = {kind: Module(lr=3.0, eps=0.5)}
    found = multipliers(param_groups(Mixture(128), 32, "kosson2025", EXPERTS, width=128, modules=modules))
    for name, (lr, wd, eps) in plain.items():
        assert found[name] == ((3 * lr, wd, 0.5 * eps) if KINDS[name] == kind else (lr, wd, eps))


def test_exponents_of_a_kind_take_the_place_of_those_of_the_role():
    """Routers: lr constant (muP-MoE, 2508.09752) or 1/m (Megatron). Both can be written down."""
    for a in (0.0, -1.0):
        modules = {"router": Module(scale=Scale(lr=a, wd=None))}
        found = multipliers(param_groups(Mixture(128), 32, "kosson2025", EXPERTS, width=128, modules=modules))
        assert found["layers.0.mlp.gate.weight"] == (4.0**a, 0.0, 1.0)
        assert found["lm_head.weight"] == (0.25, 0.0, 1.0)


def test_exponents_of_vectors_follow_the_width():
    """Complete(d)P, 2512.22382, Table 1: eps of the embedding is proportional to 1/m."""
    modules = {"embedding": Module(scale=Scale(wd=None, eps=-1.0))}
    found = multipliers(param_groups(Mixture(128), 32, "kosson2025", EXPERTS, width=128, modules=modules))
    assert found["embed_tokens.weight"] == (1.0, 0.0, 0.25)
    assert found["layers.0.norm.weight"] == (1.0, 0.0, 1.0)


def test_norm_gains_can_have_weight_decay_and_the_step_applies_it():
    model = zoo.Llama(64, 1)
    groups = param_groups(model, 16, modules={"norm": Module(wd=0.5, scale=Scale())})
    optimizer = AdamW(groups, lr=0.1, weight_decay=0.2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.norm.weight.detach(), torch.full((64,), 1 - 0.1 * 0.2 * 0.5))


def test_a_recipe_is_a_rule_with_its_modules_and_is_printed_whole():
    recipe = dataclasses.replace(RULES["mup"], name="mine", modules={"embedding": Module(lr=10.0)})
    groups = param_groups(zoo.Llama(64, 1), 16, recipe)
    assert multipliers(groups)["embed_tokens.weight"][0] == 10.0
    line = next(line for line in summary(groups).splitlines() if line.startswith("embed_tokens"))
    assert line.endswith("; embedding of the rule")
    assert "Module(lr=10.0" in repr(recipe)
    assert eval(repr(recipe)) == recipe


def test_modules_given_with_the_call_replace_those_of_the_rule():
    recipe = dataclasses.replace(RULES["mup"], modules={"embedding": Module(lr=10.0), "norm": Module(lr=2.0)})
    found = multipliers(param_groups(zoo.Llama(64, 1), 16, recipe, modules={"embedding": Module(lr=5.0)}))
    assert (found["embed_tokens.weight"][0], found["norm.weight"][0]) == (5.0, 2.0)


def test_overrides_win_over_modules():
    groups = param_groups(
        zoo.Llama(64, 1), 16, modules={"embedding": Module(lr=5.0)}, overrides={"embed_tokens.weight": {"lr": 1e-3}}
    )
    group = next(g for g in groups for name, _ in g["params"] if name == "embed_tokens.weight")
    assert (group["lr"], group["width_lr_mult"]) == (1e-3, 1.0)


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ({"embeddings": Module()}, ValueError, "unknown kind of module 'embeddings'. Kinds are embedding, head"),
        ({"embedding": 10.0}, TypeError, r"modules\['embedding'\] is float. Give a lwadamw.Module"),
        ({"norm": Module(wd=0.1)}, ValueError, "the rule gives this kind no weight decay"),
        ({"expert": Module(lr=2.0)}, ValueError, "the model has no parameter of this kind"),
    ],
)
def test_modules_that_make_no_sense_are_refused(modules, error, message):
    with pytest.raises(error, match=message):
        param_groups(zoo.Llama(64, 1), 16, modules=modules)


@pytest.mark.parametrize("values", [{"lr": 0.0}, {"lr": -1.0}, {"wd": float("nan")}, {"eps": float("inf")}])
def test_factors_that_make_no_sense_are_refused(values):
    with pytest.raises(ValueError, match="Module: "):
        Module(**values)


def test_a_rule_checks_its_modules():
    with pytest.raises(ValueError, match="Rule 'mine': modules: unknown kind"):
        Rule("mine", Scale(), modules={"router ": Module()})
