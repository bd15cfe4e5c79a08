"""The registry: roles by the class of a module or by its name, of users before those of the package, inner before outer."""

import pytest
import torch
from torch import nn

from lwadamw import Matrix, Output, param_groups, register_role
from lwadamw.width import registry
from lwadamw.width.roles import decide
from tests import zoo


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})


def _decided(model):
    return {d.name: (d.decision.role, d.fan_in) for d in decide(model, {})}


def _class(name, base=nn.Module, module=None, **parameters):
    """An instance of a class of this name, in a module of this name, with parameters of these shapes."""
    made = type(name, (base,), {"__module__": module or __name__})()
    for attribute, shape in parameters.items():
        made.register_parameter(attribute, nn.Parameter(torch.zeros(shape)))
    return made


@pytest.mark.parametrize("key", [zoo.Experts, "Experts"])
def test_a_class_and_its_name_are_the_same_key(key):
    register_role(key, {"*": Matrix(fan_in=-1)})
    assert _decided(zoo.MoE(64))["experts.down"] == ("matrix", 128)


def test_subclasses_count():
    register_role("Experts", {"*": Matrix(fan_in=-1)})
    assert _decided(type("MyExperts", (zoo.Experts,), {})(4, 8))["down"] == ("matrix", 16)


def test_names_reach_into_inner_modules_and_inner_modules_come_first():
    inner = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    outer = _class("Outer")
    outer.inner = _class("Inner")
    outer.inner.net = inner
    register_role("Outer", {"inner.net.*.weight": "output"})
    register_role("Inner", {"net.b.weight": "vector"})
    assert _decided(outer) == {"inner.net.a.weight": ("output", 8), "inner.net.b.weight": ("vector", None)}


def test_minus_one_is_the_last_of_a_list():
    decoder = _class("Decoder")
    decoder.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
    register_role("Decoder", {"layers.-1.weight": "output"})
    assert [role for role, _ in _decided(decoder).values()] == ["matrix", "matrix", "output"]


def test_a_user_wins_over_what_the_package_knows_and_a_pattern_over_both():
    model = nn.ModuleDict({"experts": _class("Llama4TextExperts", gate_up_proj=(4, 8, 32), down_proj=(4, 16, 8))})
    assert _decided(model) == {"experts.gate_up_proj": ("matrix", 8), "experts.down_proj": ("matrix", 16)}
    register_role("Llama4TextExperts", {"gate_up_proj": Matrix(fan_in=-1)})
    assert _decided(model)["experts.gate_up_proj"] == ("matrix", 32)
    evidence = param_groups(
        model, 8, width=8, roles={"experts.gate_up_proj": Output(fan_in=0)}, output="vector"
    ).evidence
    assert (evidence["experts.gate_up_proj"].role, evidence["experts.gate_up_proj"].fan_in) == ("output", 4)


@pytest.mark.parametrize(("transposed", "fan_in"), [(True, 8), (False, 32)])
def test_what_the_module_says_of_its_layout_wins_over_what_the_package_knows(transposed, fan_in):
    """One class of transformers has both layouts in different versions, and says so since 5.0."""
    experts = _class("GptOssExperts", gate_up_proj=(4, 8, 32), gate_up_proj_bias=(4, 32))
    assert _decided(experts)["gate_up_proj"] == ("matrix", 8)
    experts.is_transposed = transposed
    assert _decided(experts) == {"gate_up_proj": ("matrix", fan_in), "gate_up_proj_bias": ("vector", None)}
    unknown = _class("MyExperts", w=(4, 8, 32))
    assert _decided(unknown) == {"w": (None, None)}
    unknown.is_transposed = transposed
    assert _decided(unknown) == {"w": ("matrix", fan_in)}


def test_a_class_is_known_only_in_its_package():
    """torchtitan's experts have the shape (experts, out, in). Another class of this name may have another one."""
    parameters = {"w1": (4, 32, 8), "w2": (4, 8, 32)}
    known = _class("GroupedExperts", module="torchtitan.models.moe", **parameters)
    assert _decided(known) == {"w1": ("matrix", 8), "w2": ("matrix", 32)}
    assert _decided(_class("GroupedExperts", module="mine", **parameters)) == {"w1": (None, None), "w2": (None, None)}


def test_inputs_of_all_experts_in_one_dimension_are_counted_for_one_expert():
    experts = _class("Packed", w2=(4 * 32, 8))
    register_role("Packed", {"w2": Matrix(fan_in=0, per="num_experts")})
    with pytest.raises(
        ValueError, match=r"'w2' \(128, 8\) is to be divided by the attribute 'num_experts' of Packed, which is None"
    ):
        param_groups(experts, 8, width=8)
    experts.num_experts = 4
    assert param_groups(experts, 8, width=8).evidence["w2"].fan_in == 32


@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
def test_a_parallel_layer_of_megatron_has_the_fan_in_of_the_whole(kind):
    layer = _class(kind, weight=(16, 8) if kind[0] == "C" else (32, 4))
    layer.input_size = 8
    assert _decided(layer) == {"weight": ("matrix", 8)}


@pytest.mark.parametrize(("dimension", "fan_in"), [(0, 8), (1, 16)])
def test_a_parallel_layer_of_transformer_engine_has_the_fan_in_of_the_whole(dimension, fan_in):
    layer = _class("GroupedLinear", weight0=(32, 8), weight1=(32, 8))
    layer.tp_size = 2
    for p in layer.parameters():
        p.tensor_model_parallel, p.partition_dim = True, dimension
    assert _decided(layer) == {"weight0": ("matrix", fan_in), "weight1": ("matrix", fan_in)}


@pytest.mark.parametrize(
    ("module", "roles", "error", "message"),
    [
        (3, {}, TypeError, "3 is not a subclass of torch.nn.Module"),
        (int, {}, TypeError, "is not a subclass"),
        ("Experts", {"w": "tensor"}, ValueError, "'tensor' is not a role"),
        ("Experts", {"w": Matrix(fan_in=())}, ValueError, "fan_in is the number of a dimension"),
        ("Experts", {"w": Output(fan_in="out")}, ValueError, "fan_in is the number of a dimension"),
        ("Experts", {"re:(": "vector"}, ValueError, r"pattern 're:\(' is not a regular expression"),
    ],
)
def test_a_bad_registration_is_refused(module, roles, error, message):
    with pytest.raises(error, match=message):
        register_role(module, roles)
    assert registry._REGISTERED == {}
