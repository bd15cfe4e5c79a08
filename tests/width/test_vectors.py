"""Parameters that are vectors by their shape, by their name, or because the model takes them out of the weight decay."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from lwadamw.width.roles import decide


def _roles(model):
    return {d.name: d.decision.role for d in decide(model, {})}


def _raw(name, *shape):
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


VECTORS = [
    ("cls_token", (1, 1, 8)),
    ("distillation_token", (1, 3, 8)),
    ("mask_token", (8, 4)),
    ("register_tokens", (1, 4, 8)),
    ("query_tokens", (1, 32, 8)),
    ("class_embedding", (2, 8)),
    ("pos_embed", (1, 17, 8)),
    ("position_embeddings", (1, 17, 8)),
    ("latents", (16, 8)),
    ("relative_position_bias_table", (49, 4)),
    ("rel_pos_h", (13, 8)),
    ("gate_up_proj_bias", (4, 32)),
    ("bias_k", (1, 1, 8)),
    ("pos_bias_u", (4, 2)),
    ("A_log", (8, 16)),
    ("dt_bias", (4, 2)),
    ("time_mix_key", (1, 1, 8)),
    ("time_decay", (4, 2)),
    ("logit_scale", (4, 1, 1)),
    ("scale_shift_table", (6, 8)),
    ("anything", (1, 1, 8)),
    ("anything", (8, 1, 1)),
    ("anything", (1, 1)),
    ("anything", ()),
]


@pytest.mark.parametrize(("name", "shape"), VECTORS)
def test_a_parameter_of_this_name_or_shape_is_a_vector(name, shape):
    assert _roles(_raw(name, *shape)) == {name: "vector"}


@pytest.mark.parametrize(
    "name", ["w", "weight", "kernel", "proj", "text_projection", "A", "B", "time_maa_w1", "time_decay_w2", "query"]
)
@pytest.mark.parametrize("shape", [(8, 4), (4, 8, 2)])
def test_a_parameter_whose_name_may_be_that_of_a_matrix_is_not_guessed(name, shape):
    assert _roles(_raw(name, *shape)) == {name: None}


@pytest.mark.parametrize(
    "kind", [nn.Linear(8, 1, bias=False), nn.Linear(1, 8, bias=False), nn.Conv2d(8, 1, 1, bias=False)]
)
def test_a_linear_layer_with_one_output_or_one_input_is_still_a_matrix(kind):
    assert _roles(kind) == {"weight": "matrix"}


def test_the_model_takes_parameters_out_of_the_weight_decay():
    class Timm(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.free = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(8, 4))
            self.meta = nn.Linear(2, 8, bias=False)

        def no_weight_decay(self):
            return {"table", "meta.*"}

    class Composed(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.kept = Timm(), nn.Parameter(torch.zeros(8, 4))
            self.kept._no_weight_decay = True

    # A linear layer without weight decay may still have a learning rate that follows the width.
    expected = {"trunk.table": "vector", "trunk.free": None, "trunk.meta.weight": None, "kept": "vector"}
    assert _roles(Composed()) == expected
    assert (
        next(d for d in decide(Composed(), {}) if d.name == "kept").decision.why
        == "the model takes it out of the weight decay"
    )


@pytest.mark.parametrize("patches", [(3, 16), (16, 2), (192, 1)])
@pytest.mark.parametrize("name", ["patch_embed", "patch_embedding", "x_embedder"])
def test_patch_projections_of_any_number_of_channels_have_one_role(name, patches):
    channels, size = patches
    projection = nn.Conv2d(channels, 32, size, size, bias=False)
    assert _roles(nn.ModuleDict({name: projection})) == {f"{name}.weight": "vector"}
    assert _roles(nn.ModuleDict({name: nn.ModuleDict({"proj": projection})})) == {f"{name}.proj.weight": "vector"}
    flat = nn.Linear(channels * size**2, 32, bias=False)
    assert _roles(nn.ModuleDict({name: flat})) == {f"{name}.weight": "vector"}


def test_the_same_class_between_the_stages_of_a_hierarchy_is_hidden():
    class OverlapPatchEmbeddings(nn.Module):
        def __init__(self, into, out):
            super().__init__()
            self.proj = nn.Conv2d(into, out, 3, bias=False)

    stages = nn.ModuleDict(
        {"patch_embeddings": nn.ModuleList([OverlapPatchEmbeddings(3, 8), OverlapPatchEmbeddings(8, 16)])}
    )
    assert _roles(stages) == {"patch_embeddings.0.proj.weight": "vector", "patch_embeddings.1.proj.weight": "matrix"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "build", [lambda: nn.Conv1d(8, 16, 7), lambda: nn.Linear(8, 16), lambda: nn.ConvTranspose1d(8, 16, 4)]
)
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
def test_weight_norm_has_a_vector_of_magnitudes_and_a_matrix_of_directions(build, norm):
    """Merged into one pattern, they would be one role: a codec without weight decay, or gains with one."""
    plain = next(d for d in decide(build(), {}) if d.name == "weight")
    decided = {d.name: d for d in decide(nn.ModuleDict({"conv": norm(build())}), {})}
    older = "conv.weight_g" in decided
    magnitude, direction = (
        ("conv.weight_g", "conv.weight_v")
        if older
        else ("conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1")
    )
    assert decided[magnitude].decision.role == "vector"
    assert (decided[direction].decision.role, decided[direction].fan_in) == ("matrix", plain.fan_in)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.orthogonal, nn.utils.spectral_norm])
def test_other_parametrizations_leave_the_role_of_the_weight(norm):
    (decided,) = [d for d in decide(nn.ModuleDict({"up": norm(nn.Linear(8, 16, bias=False))}), {})]
    assert (decided.decision.role, decided.fan_in) == ("matrix", 8)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("output_embed", (96, 8)),
        ("out_embedding", (8, 96)),
        ("unembed", (96, 8)),
        ("w_upscale", (8, 32)),
        ("w_downscale", (32, 8)),
        ("D", (8, 8)),
        ("x_k", (8, 8)),
        ("w_q", (8, 1)),
        ("wg", (8, 1)),
    ],
)
def test_a_raw_matrix_is_not_taken_for_a_table_or_a_gain(name, shape):
    assert _roles(_raw(name, *shape)) == {name: None}


@pytest.mark.parametrize(
    ("kind", "name"), [("AdaNorm", "w"), ("OutEmbedding", "weight"), ("UnembeddingEmbedding", "weight")]
)
def test_a_matrix_in_a_class_with_the_name_of_a_norm_or_an_embedding_is_not_guessed(kind, name):
    module = type(kind, (nn.Module,), {})()
    module.register_parameter(name, nn.Parameter(torch.zeros(8, 16)))
    assert _roles(module) == {name: None}


def test_d_is_a_vector_beside_a_log():
    module = _raw("D", 8, 2)
    module.A_log = nn.Parameter(torch.zeros(8, 2))
    assert _roles(module) == {"D": "vector", "A_log": "vector"}


def test_an_input_convolution_is_one_wherever_it_is_declared():
    for order in (1, -1):
        parts = [("time_mlp", nn.Linear(16, 32)), ("init_conv", nn.Conv2d(3, 32, 3)), ("mid", nn.Conv2d(32, 32, 3))]
        parts[:2] = parts[:2][::order]
        assert _roles(nn.ModuleDict(dict(parts)))["init_conv.weight"] == "vector"
    assert _roles(nn.ModuleDict({"talking": nn.Conv2d(4, 4, 1)}))["talking.weight"] == "matrix"


@pytest.mark.parametrize("cell", [nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)])
def test_recurrent_cells_are_matrices(cell):
    assert _roles(cell) == {"weight_ih": "matrix", "weight_hh": "matrix", "bias_ih": "vector", "bias_hh": "vector"}
