"""The width that an int base_width is compared with: of the text config, never of a part that comes first by accident."""

import logging
import re
from types import SimpleNamespace

import pytest
from torch import nn

from lwadamw import Matrix, param_groups


class Tower(nn.Module):
    """A vision tower of width d, with a patch projection and learned positions. Its MLP has 4d hidden features."""

    def __init__(self, d, config=True):
        super().__init__()
        if config:
            self.config = SimpleNamespace(hidden_size=d)
        self.patch_embedding, self.position_embedding = nn.Conv2d(3, d, 14, 14, bias=False), nn.Embedding(577, d)
        self.layers = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})])


class Language(nn.Module):
    def __init__(self, d, config=True):
        super().__init__()
        if config:
            self.config = SimpleNamespace(hidden_size=d)
        self.embed_tokens = nn.Embedding(96, d)
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(d, d), "down_proj": nn.Linear(2 * d, d)})])
        self.lm_head = nn.Linear(d, 96, bias=False)


class Llava(nn.Module):
    """The vision tower comes first, as in LLaVA. `text_config` has the width of the language model."""

    def __init__(self, vision, text, config=True):
        super().__init__()
        if config:
            sizes = {
                "vision_config": SimpleNamespace(hidden_size=vision),
                "text_config": SimpleNamespace(hidden_size=text),
            }
            self.config = SimpleNamespace(**sizes)
        self.vision_tower = Tower(vision, config)
        self.projector = nn.Linear(vision, text)
        self.language_model = Language(text, config)


def _ratios(groups):
    return {name: found.m for name, found in groups.evidence.items() if found.m is not None}


def test_llava_has_the_width_of_its_text_config():
    """LLaVA-Next-Mistral-7B: the tower has width 1024, the language model 4096. At base_width=1024 it is no proxy."""
    model = Llava(1024, 4096)
    model.vision_tower.requires_grad_(False)
    model.projector.requires_grad_(False)
    ratios = _ratios(param_groups(model, 1024))
    assert set(ratios.values()) == {4.0}
    assert "language_model.layers.0.down_proj.weight" in ratios


def test_a_part_with_a_width_of_its_own_is_not_scaled_by_the_width_of_another_part():
    """fc2 of the tower has 4096 inputs, as many as the language model is wide. Nothing says that they grow with it."""
    model = Llava(1024, 4096)
    with pytest.raises(ValueError, match="does not determine its width ratio") as error:
        param_groups(model, 1024)
    text = str(error.value)
    assert '"vision_tower.layers.*.fc2.weight": <its fan_in at the proxy>,  # 4096 here in a part of width 1024' in text
    assert '"vision_tower.layers.*.fc1.weight": <its fan_in at the proxy>' in text
    assert '"projector.weight": <its fan_in at the proxy>,  # 1024 here; 256 if it follows the width' in text
    same = {
        "vision_tower.layers.*.fc2.weight": 4096,
        "vision_tower.layers.*.fc1.weight": 1024,
        "projector.weight": 1024,
    }
    ratios = _ratios(param_groups(model, same | {"*.down_proj.weight": 2048, "*": 1024}))
    truth = _ratios(param_groups(model, Llava(1024, 1024)))
    assert ratios == truth
    assert {name for name, m in truth.items() if m == 1} == {
        "vision_tower.layers.0.fc1.weight",
        "vision_tower.layers.0.fc2.weight",
        "projector.weight",
    }


@pytest.mark.parametrize(
    "build", [lambda: Llava(64, 128, config=False), lambda: nn.Sequential(Tower(64, False), Language(96, False))]
)
def test_several_plausible_widths_are_refused_by_name(build):
    with pytest.raises(
        ValueError, match=r"there are 64 of the embedding '.*position_embedding', \d+ of the embedding '.*embed_tok"
    ):
        param_groups(build(), 16)


def test_a_config_that_contradicts_itself_is_refused():
    model = Language(64)
    model.config = SimpleNamespace(hidden_size=64, embed_dim=32)
    with pytest.raises(ValueError, match=r"there are 64 of config.hidden_size, 32 of config.embed_dim. Pass width=64"):
        param_groups(model, 16)
    assert set(_ratios(param_groups(model, 16, width=64)).values()) == {4.0}


@pytest.mark.parametrize("holder", ["config", "cfg", "model_args", "hparams"])
@pytest.mark.parametrize("field", ["hidden_size", "d_model", "n_embd", "dim"])
@pytest.mark.parametrize("make", [lambda **k: SimpleNamespace(**k), dict], ids=["object", "dict"])
def test_the_width_is_read_from_configs_of_every_kind(holder, field, make):
    model = Language(64, config=False)
    model.position_embedding = nn.Embedding(7, 32)
    setattr(model, holder, make(**{field: 64, "vocab_size": 96}))
    assert set(_ratios(param_groups(model, 16)).values()) == {4.0}
    assert set(_ratios(param_groups(nn.DataParallel(model), 16)).values()) == {4.0}


class Siglip2(nn.Module):
    """Its patches come flattened, so that their projection is a linear layer of 16 * 16 * 3 = 768 inputs at every width."""

    def __init__(self, d, name="patch_embedding"):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=d)
        self.embeddings = nn.ModuleDict({name: nn.Linear(768, d), "position_embedding": nn.Embedding(256, d)})
        self.layers = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(d, 4 * d), "fc2": nn.Linear(4 * d, d)})])


def test_a_patch_projection_is_a_vector_even_if_its_inputs_are_as_many_as_the_width():
    for width in (384, 768, 1152):
        evidence = param_groups(Siglip2(width), 192).evidence
        assert evidence["embeddings.patch_embedding.weight"].role == "vector"
        assert evidence["layers.0.fc2.weight"].m == width / 192


def test_int_mode_says_which_inputs_it_assumed_to_follow_the_width(caplog):
    model = Siglip2(768, name="read_in")
    with caplog.at_level(logging.WARNING, logger="lwadamw"):
        evidence = param_groups(model, 192).evidence
    assert "assumes that the inputs of these matrices follow the width: embeddings.read_in.weight. If" in caplog.text
    assert evidence["embeddings.read_in.weight"].why.endswith("base fan_in 192 assumed")
    assert "fc2" not in caplog.text
    caplog.clear()
    with pytest.raises(ValueError, match=re.escape("fan_in 768 of 'embeddings.read_in.weight' (1152, 768)")):
        param_groups(Siglip2(1152, name="read_in"), 192)
    param_groups(model, 192, roles={"embeddings.read_in.weight": "vector"})
    assert not caplog.text


def test_a_raw_parameter_is_multiplied_as_the_user_says():
    class Adapter(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.config = SimpleNamespace(hidden_size=d)
            self.layers = nn.ModuleList([nn.ParameterDict({"w": nn.Parameter(nn.Linear(d, 3 * d).weight.T.clone())})])

    evidence = param_groups(Adapter(64), 16, roles={"*.w": Matrix(fan_in=0)}).evidence
    assert (evidence["layers.0.w"].fan_in, evidence["layers.0.w"].m) == (64, 4.0)


def _mlp(d, **more):
    layers = nn.ModuleList(
        [nn.ModuleDict({"up": nn.Linear(d, 4 * d), "down": nn.Linear(4 * d, d), "mix": nn.Linear(d, d)})]
    )
    return nn.ModuleDict({**more, "layers": layers})


@pytest.mark.parametrize(
    ("embedding", "config"),
    [(64, None), (2048, None), (None, {"dim": 64}), (None, {"width": 256})],
    ids=["narrow embedding", "embedding of 4d", "size of a head", "width of an image"],
)
def test_a_width_that_is_not_that_of_the_matrices_is_refused(embedding, config):
    model = _mlp(512, **({} if embedding is None else {"embed": nn.Embedding(10, embedding)}))
    if config is not None:
        model.config = config
    with pytest.raises(ValueError, match="most of its matrices have the fan_in 512. Pass width=512"):
        param_groups(model, 128)
    assert set(_ratios(param_groups(model, 128, width=512)).values()) == {4.0}


def test_the_first_matrix_of_a_sequential_is_named_as_assumed(caplog):
    """Its number is no layer. It reads 1024 features at every width."""
    model = _mlp(512, body=nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 512)))
    with caplog.at_level(logging.WARNING, logger="lwadamw"):
        param_groups(model, 128, width=512)
    assert "follow the width: body.*.weight." in caplog.text


def test_a_size_below_one_is_no_width():
    model = _mlp(64, embed=nn.Embedding(10, 64))
    model.dim = -1
    assert set(_ratios(param_groups(model, 16)).values()) == {4.0}


def test_parameters_instead_of_a_model_are_refused():
    with pytest.raises(TypeError, match="the model is generator. Give the torch.nn.Module itself"):
        param_groups(_mlp(8).parameters(), 8)
