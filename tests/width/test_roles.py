"""Promise 4: a role is certain, or given by the user, or an error that names the parameter and the remedy."""

import pytest
import torch
from torch import nn

from lwadamw import Matrix, Output, param_groups, register_role
from lwadamw.width import registry, roles
from tests import zoo


def _decided(model, given=None):
    """Return {name: (role, fan_in)} for every distinct parameter. Both are None where nothing decided the role."""
    return {d.name: (d.decision.role, d.fan_in) for d in roles.decide(model, given or {})}


V = ("vector", None)
GOLDEN = {
    "Llama": {
        "embed_tokens.weight": V,
        "layers.0.attention_norm.weight": V,
        "layers.0.ffn_norm.weight": V,
        "layers.0.wq.weight": ("matrix", 64),
        "layers.0.wk.weight": ("matrix", 64),
        "layers.0.wv.weight": ("matrix", 64),
        "layers.0.wo.weight": ("matrix", 64),
        "layers.0.q_norm.weight": V,
        "layers.0.k_norm.weight": V,
        "layers.0.gate_proj.weight": ("matrix", 64),
        "layers.0.up_proj.weight": ("matrix", 64),
        "layers.0.down_proj.weight": ("matrix", 192),
        "norm.weight": V,
        "lm_head.weight": ("output", 64),
    },
    "GPT2": {
        "wte.weight": V,
        "wpe.weight": V,
        "h.0.ln_1.weight": V,
        "h.0.ln_1.bias": V,
        "h.0.c_attn.weight": ("matrix", 64),
        "h.0.c_attn.bias": V,
        "h.0.c_fc.weight": ("matrix", 64),
        "h.0.c_fc.bias": V,
        "h.0.c_proj.weight": ("matrix", 256),
        "h.0.c_proj.bias": V,
    },
    "MoE": {"gate.weight": ("output", 64), "experts.gate_up": (None, None), "experts.down": (None, None)},
    "Mamba": {
        "in_proj.weight": ("matrix", 64),
        "conv1d.weight": V,
        "conv1d.bias": V,
        "A_log": V,
        "D": V,
        "dt_proj.weight": ("matrix", 4),
        "dt_proj.bias": V,
        "mixture": (None, None),
    },
    "ViT": {
        "cls_token": V,
        "pos_embed": V,
        "patch_embed.weight": V,
        "patch_embed.bias": V,
        "attention.in_proj_weight": ("matrix", 64),
        "attention.in_proj_bias": V,
        "attention.out_proj.weight": ("matrix", 64),
        "attention.out_proj.bias": V,
        "mixer.weight": ("matrix", 576),
        "mixer.bias": V,
        "mixing": (None, None),
        "temperature": V,
        "head.weight": ("output", 64),
        "head.bias": V,
    },
    "LoRALinear": {
        "base.weight": ("matrix", 64),
        "base.bias": V,
        "lora_A.weight": (None, None),
        "lora_B.weight": (None, None),
    },
    "Recurrent": {
        "lstm.weight_ih_l0": ("matrix", 64),
        "lstm.weight_hh_l0": ("matrix", 64),
        "lstm.bias_ih_l0": V,
        "lstm.bias_hh_l0": V,
        "bilinear.weight": (None, None),
        "bilinear.bias": V,
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_role_of_every_parameter_in_the_zoo(name):
    kwargs = {"layers": 1} if name == "Llama" else {}
    assert _decided(getattr(zoo, name)(64, **kwargs)) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("width", [16, 32, 128])
def test_a_role_does_not_depend_on_the_width(name, width):
    kwargs = {"layers": 1} if name == "Llama" else {}
    decided = _decided(getattr(zoo, name)(width, **kwargs))
    assert {k: v[0] for k, v in decided.items()} == {k: v[0] for k, v in GOLDEN[name].items()}


def test_a_fused_projection_has_the_role_and_the_fan_in_of_its_parts():
    fused, split = nn.Linear(64, 192), nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
    assert set(_decided(fused).values()) == set(_decided(split).values())


def test_patterns_win_over_evidence_and_the_first_match_counts():
    given = {"*.wq.weight": "vector", "re:w[qk]\\.weight$": Output(fan_in=0), "lm_head.weight": "vector"}
    decided = _decided(zoo.Llama(64, 1), given)
    assert decided["layers.0.wq.weight"] == V
    assert decided["layers.0.wk.weight"] == ("output", 16)
    assert decided["lm_head.weight"] == V


def test_packed_experts_have_the_fan_in_of_the_declared_dimension():
    given = {"experts.gate_up": Matrix(fan_in=-1), "experts.down": Matrix(fan_in=2)}
    decided = _decided(zoo.MoE(64), given)
    assert decided["experts.gate_up"] == ("matrix", 64)
    assert decided["experts.down"] == ("matrix", 128)


def test_the_role_matrix_without_a_dimension_needs_two_dimensions():
    with pytest.raises(ValueError, match=r"calls 'experts.gate_up' \(4, 256, 64\) 'matrix'.*Matrix\(fan_in=-1\)"):
        _decided(zoo.MoE(64), {"experts.*": "matrix"})
    with pytest.raises(ValueError, match="gives dimension 3 of 'experts.gate_up'"):
        _decided(zoo.MoE(64), {"experts.*": Matrix(fan_in=3)})


def test_registered_modules_decide_their_parameters(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    register_role(zoo.Experts, {"gate_up": Matrix(fan_in=-1), "down": Matrix(fan_in=-1)})
    assert _decided(zoo.MoE(64))["experts.down"] == ("matrix", 128)
    with pytest.raises(TypeError, match="is not a subclass"):
        register_role(3, {})
    with pytest.raises(ValueError, match="'tensor' is not a role"):
        register_role(zoo.Experts, {"down": "tensor"})


class Words(nn.Module):
    """A model with layers, and a last matrix whose name says nothing."""

    def __init__(self, d=8, vocabulary=50):
        super().__init__()
        self.tokens, self.body = nn.Embedding(vocabulary, d), nn.Linear(d, d)
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(d, d)})])
        self.to_words = nn.Linear(d, vocabulary)


@pytest.mark.parametrize("vocabulary", [50, 8])
def test_a_last_matrix_is_a_head_only_if_the_model_or_the_user_says_so(vocabulary):
    """Its shape is no evidence: a hidden layer can have the shape of the embedding."""

    class Telling(Words):
        def get_output_embeddings(self):
            return self.to_words

    assert _decided(Words(8, vocabulary))["to_words.weight"] == (None, None)
    assert _decided(Words(8, vocabulary), {"to_words.weight": "output"})["to_words.weight"] == ("output", 8)
    inside = nn.ModuleDict({"policy": Telling(8, vocabulary)})
    for decided in (
        _decided(Telling(8, vocabulary)),
        {k.removeprefix("policy."): v for k, v in _decided(inside).items()},
    ):
        assert decided["to_words.weight"] == ("output", 8)
        assert decided["body.weight"] == ("matrix", 8)


def test_a_module_named_output_inside_numbered_layers_is_no_head():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"output": nn.Linear(8, 8)})])})
    assert _decided(model)["layers.0.output.weight"] == ("matrix", 8)


def test_wrappers_do_not_change_names():
    model = zoo.Llama(64, 1)
    names = set(_decided(model))
    assert set(_decided(torch.nn.DataParallel(model))) == names
    assert set(_decided(torch.compile(model, backend="eager"))) == names
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.layers[0] = checkpoint_wrapper(model.layers[0])
    assert set(_decided(model)) == names


def test_a_module_called_module_keeps_its_name():
    assert set(_decided(nn.ModuleDict({"module": nn.Linear(4, 4)}))) == {"module.weight", "module.bias"}


def test_flattened_shards_are_refused():
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.zeros(64))
    with pytest.raises(RuntimeError, match=r"'weight' of Linear has shape \(64,\).*before the model is wrapped"):
        param_groups(linear, 8, width=8)
