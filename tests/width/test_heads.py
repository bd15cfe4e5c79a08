"""Heads and routers are found by names and classes at every width, and hidden layers with the name of a head stay matrices."""

import itertools

import pytest
import torch
from torch import nn

from lwadamw import param_groups
from lwadamw.width.roles import decide


def _roles(model):
    return {d.name.removesuffix(".weight"): d.decision.role for d in decide(model, {}) if d.name.endswith("weight")}


def _class(name, base=nn.Module, **children):
    """A module of a class of this name, with these children."""

    def build(self):
        nn.Module.__init__(self)
        for child, module in children.items():
            self.add_module(child, module)

    return type(name, (base,), {"__init__": build})()


def linear(out=8, d=8):
    return nn.Linear(d, out, bias=False)


def model(**outside):
    return _class("Model", layers=nn.ModuleList([nn.ModuleDict({"q_proj": linear()})]), **outside)


HEADS = {
    "fc of a ResNet": (lambda d: model(fc=linear(10, d)), {"fc": "output"}),
    "head.fc of timm": (lambda d: model(head=_class("ClassifierHead", fc=linear(10, d))), {"head.fc": "output"}),
    "head.pre_logits of timm": (
        lambda d: model(head=_class("NormMlpClassifierHead", pre_logits=nn.Sequential(linear(d, d)), fc=linear(10, d))),
        {"head.pre_logits.0": "matrix", "head.fc": "output"},
    ),
    "classifier.1 of EfficientNet": (
        lambda d: model(classifier=nn.Sequential(nn.Dropout(), linear(10, d))),
        {"classifier.1": "output"},
    ),
    "classifier of VGG": (
        lambda d: model(classifier=nn.Sequential(linear(d, d), nn.ReLU(), linear(d, d), nn.ReLU(), linear(10, d))),
        {"classifier.0": "matrix", "classifier.2": "matrix", "classifier.4": "output"},
    ),
    "proj_out of a diffusion transformer": (lambda d: model(proj_out=linear(16, d)), {"proj_out": "output"}),
    "final_layer of DiT": (
        lambda d: model(
            final_layer=_class(
                "LastLayer", linear=linear(16, d), adaLN_modulation=nn.Sequential(nn.SiLU(), linear(2 * d, d))
            )
        ),
        {"final_layer.linear": "output", "final_layer.adaLN_modulation.1": "matrix"},
    ),
    "1x1 convolution": (
        lambda d: model(
            decode_head=_class("DecodeHead", linear_fuse=nn.Conv2d(4 * d, d, 1), classifier=nn.Conv2d(d, 19, 1))
        ),
        {"decode_head.linear_fuse": "matrix", "decode_head.classifier": "output"},
    ),
    "readout class": (lambda d: model(last=_class("TokenReadout", up=linear(96, d))), {"last.up": "output"}),
    "classification head of RoBERTa": (
        lambda d: model(classifier=_class("RobertaClassificationHead", dense=linear(d, d), out_proj=linear(2, d))),
        {"classifier.dense": "matrix", "classifier.out_proj": "output"},
    ),
    "lm_head of RoBERTa": (
        lambda d: model(lm_head=_class("RobertaLMHead", dense=linear(d, d), decoder=linear(96, d))),
        {"lm_head.dense": "matrix", "lm_head.decoder": "output"},
    ),
    "modules_to_save of PEFT": (
        lambda d: model(
            classifier=_class(
                "ModulesToSaveWrapper",
                original_module=linear(3, d),
                modules_to_save=nn.ModuleDict({"default": linear(3, d)}),
            )
        ),
        {"classifier.original_module": "output", "classifier.modules_to_save.default": "output"},
    ),
    "output_layer of Megatron": (
        lambda d: model(output_layer=_parallel("ColumnParallelLinear", 96, d)),
        {"output_layer": "output"},
    ),
    "several heads": (
        lambda d: model(lm_heads=nn.ModuleList([linear(5, d), linear(7, d)])),
        {"lm_heads.0": "output", "lm_heads.1": "output"},
    ),
    "bounding boxes": (
        lambda d: model(bbox_predictor=_class("MLP", layers=nn.ModuleList([linear(d, d), linear(4, d)]))),
        {"bbox_predictor.layers.0": "matrix", "bbox_predictor.layers.1": "output"},
    ),
    "attention pooling called head": (
        lambda d: model(head=_class("MultiheadAttentionPoolingHead", out=linear(d, d), fc1=linear(4 * d, d))),
        {"head.out": "matrix", "head.fc1": "matrix"},
    ),
    "output of a BERT layer": (
        lambda d: _class(
            "Model", layer=nn.ModuleList([_class("BertLayer", output=_class("BertOutput", dense=linear(d, 4 * d)))])
        ),
        {"layer.0.output.dense": "matrix"},
    ),
    "head and classifier inside layers": (
        lambda d: _class("Model", layers=nn.ModuleList([_class("Layer", head=linear(d, d), classifier=linear(d, d))])),
        {"layers.0.head": "matrix", "layers.0.classifier": "matrix"},
    ),
    "fc and proj_out inside blocks": (
        lambda d: model(mid=_class("Attention", fc=linear(d, d), proj_out=linear(d, d))),
        {"mid.fc": "matrix", "mid.proj_out": "matrix"},
    ),
    "shared head of an extra layer of DeepSeek-V3": (
        lambda d: _class(
            "Model", layers=nn.ModuleList([_class("MTP", shared_head=_class("Shared", head=linear(96, d)))])
        ),
        {"layers.0.shared_head.head": "output"},
    ),
}


def _parallel(kind, out, into):
    module = _class(kind)
    module.weight, module.input_size = nn.Parameter(torch.zeros(out, into)), into
    return module


@pytest.mark.parametrize("d", [8, 16, 40, 96])
@pytest.mark.parametrize("case", HEADS)
def test_a_head_is_found_whatever_its_size(case, d):
    build, expected = HEADS[case]
    roles = _roles(build(d))
    assert {name: roles[name] for name in expected} == expected


@pytest.mark.parametrize("case", ["output_layer of Megatron", "fc of a ResNet"])
def test_output_as_vector_reaches_every_head(case):
    build, (name, *_) = HEADS[case][0], HEADS[case][1]
    groups = param_groups(build(8), 2, width=8, output="vector")
    (group,) = [g for g in groups if f"{name}.weight" in [n for n, _ in g["params"]]]
    assert (group["width_lr_mult"], group["width_wd_mult"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("d", "positions", "words"), [*itertools.product([16, 64], [16, 64], [16, 64]), (512, 512, 96)]
)
def test_sizes_that_agree_by_accident_are_no_evidence(d, positions, words):
    """BERT with as many hidden features as positions: its pooler is no head."""

    class Bert(nn.Module):
        def __init__(self):
            super().__init__()
            self.word_embeddings, self.position_embeddings = nn.Embedding(words, d), nn.Embedding(positions, d)
            self.layer = nn.ModuleList([nn.ModuleDict({"dense": linear(d, d)})])
            self.pooler, self.classifier = nn.ModuleDict({"dense": linear(d, d)}), linear(d, d)

    assert _roles(Bert()) == {
        "word_embeddings": "vector",
        "position_embeddings": "vector",
        "layer.0.dense": "matrix",
        "pooler.dense": "matrix",
        "classifier": "output",
    }


def test_a_head_of_several_matrices_whose_last_one_is_unclear_is_refused():
    unclear = model(head=_class("TwoTowers", left=linear(8), right=linear(8)))
    with pytest.raises(ValueError, match="perhaps a head 'head': does it give the outputs") as error:
        param_groups(unclear, 16, width=8)
    assert '"head.left.weight": <role>' in str(error.value)
    assert '"head.right.weight": <role>' in str(error.value)


def router(**children):
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(children)])})


class TopKRouter(nn.Module):
    """Holds its weight itself, as the routers of DeepSeek-V3 and Megatron do."""

    def __init__(self, experts, d):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, d))


ROUTERS = {
    "gate beside experts": (
        lambda d, n: router(gate=linear(n, d), experts=linear(d, d)),
        {"gate": "output", "experts": "matrix"},
    ),
    "gate of a shared expert": (
        lambda d, n: router(shared_expert=linear(d, d), shared_expert_gate=linear(1, d)),
        {"shared_expert": "matrix", "shared_expert_gate": "output"},
    ),
    "router.gate": (lambda d, n: router(router=_class("TokenChoice", gate=linear(n, d))), {"router.gate": "output"}),
    "router.layer": (
        lambda d, n: router(router=_class("LearnedRouter", layer=linear(n, d))),
        {"router.layer": "output"},
    ),
    "router.classifier": (
        lambda d, n: router(router=nn.ModuleDict({"classifier": linear(n, d)})),
        {"router.classifier": "output"},
    ),
    "router itself": (lambda d, n: router(router=linear(n, d)), {"router": "output"}),
    "class of its own": (lambda d, n: router(mixer=TopKRouter(n, d)), {"mixer": "output"}),
    "TopKGate of DeepSpeed": (lambda d, n: router(gate=_class("TopKGate", wg=linear(n, d))), {"gate.wg": "output"}),
    "two layers": (
        lambda d, n: router(router=nn.Sequential(linear(2 * d, d), nn.GELU(), linear(n, 2 * d))),
        {"router.0": "matrix", "router.2": "output"},
    ),
    "gated MLP": (
        lambda d, n: router(gate=linear(d, d), gate_proj=linear(d, d)),
        {"gate": "matrix", "gate_proj": "matrix"},
    ),
}


@pytest.mark.parametrize(("d", "experts"), [(8, 8), (8, 4), (32, 8), (1, 1)])
@pytest.mark.parametrize("case", ROUTERS)
def test_a_router_is_found_whatever_its_size(case, d, experts):
    build, expected = ROUTERS[case]
    roles = _roles(build(d, experts))
    assert {name: roles[f"layers.0.{name}"] for name in expected} == expected


def test_the_fan_in_of_a_convolution_as_head_is_that_of_the_convolution():
    """A remedy may say Output(fan_in=-1), which is the size of the kernel."""
    unclear = model(head=_class("Two", a=nn.Conv2d(8, 4, 3), b=nn.Conv2d(8, 4, 3)))
    given = {"head.?.weight": "output"}
    evidence = param_groups(unclear, 8, width=8, roles=given).evidence
    assert evidence["head.a.weight"].fan_in == 72
    from lwadamw import Output

    for fan_in in (-1, 2, (2, 3)):
        with pytest.raises(
            ValueError, match=r'this is the size of a kernel. Give "output", .* the dimensions \(1, 2, 3\)'
        ):
            param_groups(unclear, 8, width=8, roles={"head.?.weight": Output(fan_in=fan_in)})
    given = {"head.?.weight": Output(fan_in=(1, 2, 3))}
    assert param_groups(unclear, 8, width=8, roles=given).evidence["head.a.weight"].fan_in == 72


@pytest.mark.parametrize("name", ["output", "score", "head", "final_layer", "predict_next", "value_head"])
def test_a_generic_name_deep_in_a_model_is_not_guessed(name):
    """A block without a number has hidden layers with such names. At the top of the model they are heads."""
    deep = model(block=_class("Attention", **{name: linear(8), "q": linear(8)}))
    assert _roles(deep)[f"block.{name}"] is None
    assert _roles(model(**{name: linear(8)}))[name] == "output"
    assert _roles(model(q_head=linear(8), out_proj=linear(8)))["q_head"] is None


@pytest.mark.parametrize("names", [("actor", "critic"), ("mu", "logvar"), ("reward", "q1", "q2")])
@pytest.mark.parametrize("holder", [None, "policy", "net"])
def test_every_matrix_after_the_layers_is_asked_about(names, holder):
    core = model(**{name: linear(6) for name in names})
    prefix = f"{holder}." if holder else ""
    roles = _roles(_class("Agent", **{holder: core}) if holder else core)
    assert {name: roles[prefix + name] for name in names} == dict.fromkeys(names)
    assert roles[f"{prefix}layers.0.q_proj"] == "matrix"


def test_heads_in_a_dict_are_each_a_head():
    heads = nn.ModuleDict({"value": nn.Sequential(linear(8), nn.ReLU(), linear(1)), "policy": linear(6)})
    assert _roles(model(heads=heads)) | {"layers.0.q_proj": "matrix"} == {
        "layers.0.q_proj": "matrix",
        "heads.value.0": "matrix",
        "heads.value.2": "output",
        "heads.policy": "output",
    }


def test_a_gate_beside_experts_that_are_parameters_is_a_router():
    block = _class("Block", gate=linear(4))
    block.expert_w1 = nn.Parameter(torch.zeros(4, 8, 16))
    assert {d.name: d.decision.role for d in decide(block, {})} == {"expert_w1": None, "gate.weight": "output"}


def test_a_head_that_the_user_names_is_among_the_assumptions_of_the_summary():
    from lwadamw import summary

    groups = param_groups(model(generator=linear(96)), 2, width=8, roles={"generator.weight": "output"})
    assert "logits of generator.weight as they are" in summary(groups).splitlines()[-1]


@pytest.mark.parametrize("shell", [False, True])
def test_a_last_linear_with_an_output_for_each_row_of_the_embedding_is_in_doubt(shell):
    def stack(out, *after):
        layers = nn.Sequential(nn.Embedding(100, 8), linear(), nn.GELU(), linear(out), *after)
        return _class("Wrapper", module=layers) if shell else layers

    start = "module." if shell else ""
    assert _roles(stack(100))[f"{start}3"] is None
    assert _roles(stack(100))[f"{start}1"] == "matrix"
    assert _roles(stack(96))[f"{start}3"] == "matrix"
    assert _roles(stack(100, linear(8, 100)))[f"{start}3"] == "matrix"
    with pytest.raises(ValueError, match="with an output for each row of the embedding: is it a head"):
        param_groups(stack(100), base_width=4)
    groups = param_groups(stack(100), base_width=4, roles={f"{start}3.weight": "output"})
    assert "output" in {group["role"] for group in groups}
