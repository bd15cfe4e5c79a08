"""A remedy that param_groups prints is complete and right: pasted and filled in, it gives every parameter its true m."""

import ast
import json
import re

import pytest
import torch
from torch import nn

from lwadamw import Matrix, Output, Rule, Scale, param_groups
from lwadamw.width.patterns import matches, separating
from tests import zoo

TO_FILL = "<its fan_in at the proxy>"


class Layer(nn.Module):
    """A layer of linear modules, each given by its name, its fan_in and its fan_out."""

    def __init__(self, **linear):
        super().__init__()
        for name, (fan_in, fan_out) in linear.items():
            self.add_module(name, nn.Linear(fan_in, fan_out, bias=False))


def _model(d, layers, **more):
    return nn.ModuleDict(
        {"embed": nn.Embedding(90, d), "layers": nn.ModuleList(layers), "norm": nn.LayerNorm(d), **more}
    )


def llama(d):
    hidden = int(8 / 3 * d)
    layers = [Layer(wq=(d, d), w1=(d, hidden), w2=(hidden, d), w3=(d, hidden)) for _ in range(3)]
    return _model(d, layers, lm_head=nn.Linear(d, 90, bias=False))


def fc(d):
    odd = 10 + d // 2
    return _model(d, [Layer(fc1=(d, 4 * d), fc2=(4 * d, d), fc3=(odd, d), proj=(d, odd)) for _ in range(2)])


def conv(d):
    """The stem of Whisper: a spectrogram of 80 bands, the same at every width."""
    convs = {"conv1": nn.Conv1d(80, d, 3), "conv2": nn.Conv1d(d, d, 3)}
    return _model(d, [Layer(fc1=(d, 4 * d), fc2=(4 * d, d)) for _ in range(2)], **convs)


def shadowing(d):
    """The glob of the first layer type would match parameters of the second one."""
    layers = [nn.ModuleDict({"fc": nn.Linear(4 * d, d), "expert": Layer(fc=(2 * d, d))}) for _ in range(2)]
    return _model(d, layers, odd_proj=nn.Linear(10 + d // 2, d))


def numbered(d):
    """Matrices of one layer type with different fan_ins."""
    odd = 10 + d // 2
    return nn.Sequential(
        nn.Embedding(90, d), nn.Linear(d, odd), nn.Linear(odd, d), nn.Linear(d, d), nn.Linear(3 * d, d)
    )


def brackets(d):
    """A name with characters that mean something in a glob."""
    return _model(d, [nn.ModuleDict({"a[0]": nn.Linear(2 * d, d), "b*": nn.Linear(10 + d // 2, d)})])


CASES = {
    llama: {"layers.*.w2.weight": TO_FILL, "*": 16},
    fc: {"layers.*.fc2.weight": 64, "layers.*.fc3.weight": TO_FILL, "*": 16},
    conv: {"layers.*.fc2.weight": 64, "conv1.weight": TO_FILL, "conv2.weight": TO_FILL, "*": 16},
    shadowing: {
        r"re:^layers\.\d+\.fc\.weight$": 64,
        "layers.*.expert.fc.weight": 32,
        "odd_proj.weight": TO_FILL,
        "*": 16,
    },
    numbered: {"1.weight": TO_FILL, "2.weight": TO_FILL, "3.weight": TO_FILL, "4.weight": TO_FILL, "*": 16},
    brackets: {r"re:^layers\.\d+\.a\[0\]\.weight$": 32, "layers.*.b*.weight": TO_FILL, "*": 16},
}


def _fan_ins(model, vectors=False):
    """{name: fan_in} by the definition of each module; for vectors, if asked for, the last dimension."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{path}.weight"] = module.in_features
        elif isinstance(module, nn.Conv1d):
            found[f"{path}.weight"] = module.in_channels * module.kernel_size[0]
    if vectors:
        found = {name: p.shape[-1] for name, p in model.named_parameters()} | found
    return found


def _fill(text, at_proxy):
    """The mapping in an error's text, each open place filled with the fan_in of the parameters that its pattern matches."""

    def fill(entry):
        pattern = json.loads(entry.group(1))
        (value,) = {fan_in for name, fan_in in at_proxy.items() if matches(pattern, name)}
        return f"{entry.group(1)}: {value}"

    if TO_FILL in text:
        with pytest.raises(SyntaxError):
            ast.parse(text)
    return ast.literal_eval(re.sub(rf'("(?:[^"\\]|\\.)*"): {TO_FILL}', fill, text))


def _printed(text):
    """{pattern: number or the open place} of a mapping in an error's text."""
    return ast.literal_eval(text.replace(TO_FILL, repr(TO_FILL)))


def _remedy(model, base_width, *args, **kwargs):
    with pytest.raises(ValueError, match="is not a multiple of the width") as error:
        param_groups(model, base_width, *args, **kwargs)
    return re.search(r"base_width=(\{.*\})$", str(error.value), re.DOTALL).group(1)


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_the_mapping_in_the_error_gives_every_parameter_its_true_ratio(build):
    model, proxy = build(64), build(16)
    remedy = _remedy(model, 16, width=64)
    assert _printed(remedy) == CASES[build]
    assert [*_printed(remedy)][-1] == "*"
    there = _fan_ins(proxy)
    truth = {name: fan_in / there[name] for name, fan_in in _fan_ins(model).items()}
    assert len(set(truth.values())) > 1
    evidence = param_groups(model, _fill(remedy, there), width=64).evidence
    assert {name: found.m for name, found in evidence.items() if found.role != "vector"} == truth
    assert {name: found.m for name, found in param_groups(model, proxy).evidence.items() if found.m} == truth


def _llama_8b(d, hidden):
    with torch.device("meta"):
        return _model(d, [Layer(wq=(d, d), w1=(d, hidden), w2=(hidden, d), w3=(d, hidden)) for _ in range(2)])


def _whisper_small(d):
    with torch.device("meta"):
        return _model(
            d, [Layer(q_proj=(d, d), fc1=(d, 4 * d), fc2=(4 * d, d)) for _ in range(2)], conv1=nn.Conv1d(80, d, 3)
        )


def test_the_remedy_for_llama_8b_gives_every_matrix_a_ratio_of_16():
    """Obeyed as one pattern for w1, w2 and w3, it would give w1 and w3 a ratio of 4096 / 896 = 4.57."""
    model, there = _llama_8b(4096, 14336), _fan_ins(_llama_8b(256, 896))
    remedy = _fill(_remedy(model, 256), there)
    assert remedy == {"layers.*.w2.weight": 896, "*": 256}
    assert {e.m for e in param_groups(model, remedy).evidence.values() if e.m} == {16.0}
    with pytest.raises(
        ValueError,
        match=r"'\*.w\*.weight' gives the fan_in 896 at the proxy to matrices whose fan_in here is 4096 and 14336",
    ):
        param_groups(model, {"*.w*.weight": 896, "*": 256})


def test_the_remedy_for_whisper_small_gives_every_fc2_a_ratio_of_4():
    """One number for all patterns would give fc2 a ratio of 3072 / 192 = 16."""
    model, there = _whisper_small(768), _fan_ins(_whisper_small(192))
    remedy = _fill(_remedy(model, 192), there)
    assert remedy == {"layers.*.fc2.weight": 768, "conv1.weight": 240, "*": 192}
    ratios = {name: e.m for name, e in param_groups(model, remedy).evidence.items() if e.m}
    assert ratios == {name: 1.0 if name == "conv1.weight" else 4.0 for name in ratios}
    with pytest.raises(
        ValueError, match=r"pattern '\*' gives the fan_in 192 .* whose fan_in here is 240 and 768 and 3072"
    ) as error:
        param_groups(model, {"*": 192})
    assert '"layers.*.fc2.weight": <its fan_in at the proxy>,  # 3072 here' in str(error.value)
    assert 'write "all:*"' in str(error.value)
    assert param_groups(model, {"all:*": 192}).evidence["layers.0.fc2.weight"].m == 16.0


def test_a_pattern_that_takes_the_decay_from_matrices_beside_what_is_undecided_is_refused():
    """Two pasted lines that turn all convolutions of a codec into vectors."""

    class Codec(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList([nn.Conv1d(1, 8, 7), nn.Conv1d(8, 8, 7)])
            self.encoder[0].scales = nn.Parameter(torch.zeros(8, 4))
            self.encoder[0].mix = nn.Parameter(torch.zeros(8, 4))

    for pattern in ("encoder.*", "*", "re:^encoder"):
        with pytest.raises(ValueError, match="gives the role 'vector' to parameters that are not alike") as error:
            param_groups(Codec(), 8, width=8, roles={pattern: "vector"})
        assert "matrix: 'encoder.1.weight' (8, 8, 7), Conv1d; 1 in all" in str(error.value)
        assert "undecided: 'encoder.0.scales' (8, 4)" in str(error.value)
        groups = param_groups(Codec(), 8, width=8, roles={f"all:{pattern}": "vector"})
        assert {e.role for e in groups.evidence.values()} == {"vector"}
    with pytest.raises(ValueError, match="gives the role 'matrix' to parameters that are not alike"):
        param_groups(zoo.MoE(64), 16, width=64, roles={"*": Matrix(fan_in=-1)})
    param_groups(Codec(), 8, width=8, roles={"encoder.0.[sm]*": "vector"})


def test_the_mapping_also_covers_vectors_where_the_rule_scales_them():
    class Biased(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.embed, self.odd = nn.Embedding(90, d), nn.Linear(10 + d // 2, d)
            self.fc1, self.fc2, self.head = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Linear(d, 90)

    rule = Rule("mine", matrix=Scale(lr=-1.0), vector=Scale(lr=-0.5, wd=None))
    model, there = Biased(64), _fan_ins(Biased(16), vectors=True)
    remedy = _remedy(model, 16, rule)
    assert _printed(remedy) == {
        "odd.weight": TO_FILL,
        "fc1.weight": TO_FILL,
        "fc1.bias": 64,
        "fc2.weight": TO_FILL,
        "head.bias": TO_FILL,
        "*": 16,
    }
    truth = {name: fan_in / there[name] for name, fan_in in _fan_ins(model, vectors=True).items()}
    evidence = param_groups(model, _fill(remedy, there), rule).evidence
    assert {name: found.m for name, found in evidence.items()} == truth


def test_parameters_whose_ratio_the_rule_does_not_use_need_no_pattern():
    model = nn.ModuleDict({"embed": nn.Embedding(90, 64), "fc": nn.Linear(74, 64), "head": nn.Linear(74, 90)})
    assert set(_printed(_remedy(model, 16, width=64))) == {"fc.weight", "head.weight", "*"}
    assert set(_printed(_remedy(model, 16, output="vector", width=64))) == {"fc.weight", "*"}
    model.fc.requires_grad_(False)
    assert set(_printed(_remedy(model, 16, width=64))) == {"head.weight", "*"}
    assert "head.weight" in {
        name for g in param_groups(model, 16, output="vector", width=64) for name, _ in g["params"]
    }


def test_a_pattern_for_all_parameters_is_not_overwritten_by_the_base_width():
    model = nn.ParameterList([nn.Parameter(torch.zeros(8, 42)) for _ in range(2)])
    remedy = _remedy(model, 16, width=16, roles={"*": "matrix"})
    assert _printed(remedy) == {"*": TO_FILL}


def test_the_error_of_an_incomplete_mapping_completes_it():
    model, there = llama(64), _fan_ins(llama(16))
    base = {"*.wq.weight": 16}
    with pytest.raises(ValueError, match="no base_width pattern matches 'layers.0.w1.weight'") as error:
        param_groups(model, base)
    added = _fill(re.search(r"proxy filled in:\n(\{.*\})$", str(error.value), re.DOTALL).group(1), there)
    assert set(added) == {"layers.*.w1.weight", "layers.*.w2.weight", "layers.*.w3.weight", "lm_head.weight"}
    evidence = param_groups(model, base | added).evidence
    assert {n: e.m for n, e in evidence.items() if e.m} == {n: f / there[n] for n, f in _fan_ins(model).items()}


def _undecided(model, width):
    """The mapping of roles in the error, each open place still in it."""
    with pytest.raises(ValueError, match="cannot decide a role for") as error:
        param_groups(model, 16, width=width)
    return re.search(r"roles=(\{.*?\n\})\n", str(error.value), re.DOTALL).group(1)


@pytest.mark.parametrize("role", ['"vector"', "lwadamw.Matrix(fan_in=-1)", "lwadamw.Output(fan_in=-1)"])
@pytest.mark.parametrize("model", [zoo.ViT(64), zoo.MoE(64), zoo.Mamba(64)], ids=lambda model: type(model).__name__)
def test_the_roles_in_the_error_decide_everything(model, role):
    remedy = _undecided(model, 64)
    with pytest.raises(SyntaxError):
        ast.parse(remedy)
    given = eval(remedy.replace("<role>", role.removeprefix("lwadamw.")), {"Matrix": Matrix, "Output": Output})
    evidence = param_groups(model, model, roles=given).evidence
    (expected,) = {"vector", "matrix", "output"} & set(re.findall(r"\w+", role.lower()))
    assert {found.role for found in evidence.values() if found.why.startswith("roles[")} == {expected}


def test_a_remedy_for_one_parameter_changes_no_decided_one():
    """Both have the layer type `*.weight`. As a pattern it would take the decay from the decided one."""
    model = nn.Sequential(nn.Bilinear(64, 64, 64, bias=False), nn.Linear(64, 64, bias=False))
    remedy = _undecided(model, 64)
    assert remedy == '{\n    "0.weight": <role>,  # (64, 64, 64): Parameter on Bilinear, not a known module\n}'
    evidence = param_groups(model, 16, width=64, roles={"0.weight": "vector"}).evidence
    assert {name: e.role for name, e in evidence.items()} == {"0.weight": "vector", "1.weight": "matrix"}


@pytest.mark.parametrize(
    ("typo", "closest"),
    [
        ("0.wieght", "0.weight"),  # The layer type `*.weight` would also match the other matrices.
        ("*.2.expert.fc.wait", "layers.2.expert.fc.weight"),
        ("layers.*.fc.wieght", r"re:^layers\.\d+\.fc\.weight$"),  # `layers.*.fc.weight` would also match the experts.
    ],
)
def test_the_closest_pattern_matches_no_other_parameters(typo, closest):
    layers = [nn.ModuleDict({"fc": nn.Linear(8, 8), "expert": Layer(fc=(8, 8))}) for _ in range(3)]
    model = (
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        if typo[0] == "0"
        else nn.ModuleDict({"layers": nn.ModuleList(layers)})
    )
    with pytest.raises(ValueError, match=re.escape(f"Closest: {closest!r}")):
        param_groups(model, 8, width=8, roles={typo: "vector"})


@pytest.mark.filterwarnings("default")
def test_warnings_point_to_the_line_that_calls_param_groups():
    with pytest.warns(UserWarning, match="param_groups") as caught:
        param_groups(zoo.MoE(64), 16, width=64, strict=False, roles={"nope": "vector"})
    assert [w.filename for w in caught] == [__file__, __file__]


def test_patterns_separate_labels_in_any_order():
    labels = {
        ("layers.0.w1",): 1,
        ("layers.1.w1",): 1,
        ("layers.0.w2", "tied"): 2,
        ("layers.1.w2",): 3,
        ("a.0.b",): 4,
        ("a.0.c.b",): 5,
    }
    found = separating(labels)
    assert found == {
        "layers.*.w1": 1,
        "layers.0.w2": 2,
        "layers.1.w2": 3,
        r"re:^a\.\d+\.b$": 4,
        "a.*.c.b": 5,
    }
    for names, label in labels.items():
        assert {value for pattern, value in found.items() if any(matches(pattern, n) for n in names)} == {label}


def test_parameters_that_are_not_alike_are_told_before_a_missing_dimension():
    """The missing dimension is that of a norm, which nobody meant."""
    for pattern in ("layers.*", "*", "layers.*.weight"):
        with pytest.raises(ValueError, match="to parameters that are not alike"):
            param_groups(zoo.Llama(64, 1), 16, width=64, roles={pattern: "matrix"})


def test_a_head_that_multiplies_from_the_left_is_offered():
    """Its fan_in is the last dimension but one. The last one is the number of classes, which is the same at the proxy."""

    class Hand(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.embed, self.w_out = nn.Embedding(9, d), nn.Parameter(torch.zeros(d, 10))

    with pytest.raises(ValueError, match="-1 or -2 as for matrices"):
        param_groups(Hand(64), Hand(16))
    given = {"w_out": Output(fan_in=-2)}
    assert param_groups(Hand(64), Hand(16), roles=given).evidence["w_out"].m == 4.0
