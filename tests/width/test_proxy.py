"""A proxy model answers with the same dimension of the same parameter, and its role is not decided a second time."""

import itertools
import re

import pytest
import torch
from torch import nn

from lwadamw import Matrix, param_groups


def _ratios(model, proxy, **kwargs):
    return {
        name: found.m for name, found in param_groups(model, proxy, **kwargs).evidence.items() if found.m is not None
    }


class Convolutional(nn.Module):
    """A U-Net-like stack. At a narrow proxy its hidden convolutions have four input channels or fewer."""

    def __init__(self, d, transposed=False):
        super().__init__()
        self.conv_in = nn.Conv2d(3, d, 3)
        up = nn.ConvTranspose2d(d, d, 4, 2) if transposed else nn.Conv2d(d, d, 5, groups=1)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"conv1": nn.Conv2d(d, 2 * d, 3), "conv2": nn.Conv2d(2 * d, d, 3), "up": up})]
        )
        self.conv_out = nn.Conv2d(d, 3, 3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("proxy", [2, 4, 8])
def test_a_narrow_proxy_does_not_change_a_role(proxy, transposed):
    model, base = Convolutional(16, transposed), Convolutional(proxy, transposed)
    ratios = _ratios(model, base)
    assert ratios == {name: 16 / proxy for name in ratios}
    assert set(ratios) == {f"blocks.0.{conv}.weight" for conv in ("conv1", "conv2", "up")} | {"conv_out.weight"}


def test_the_input_convolution_keeps_its_role_at_every_proxy():
    assert "conv_in.weight" not in _ratios(Convolutional(16), Convolutional(2))


def test_roles_that_differ_for_another_reason_are_refused_with_both_named():
    class Tied(nn.Module):
        def __init__(self, d, tied):
            super().__init__()
            self.embed, self.layers = nn.Embedding(96, d), nn.ModuleList([nn.Linear(d, d)])
            self.lm_head = nn.Linear(d, 96, bias=False)
            if tied:
                self.lm_head.weight = self.embed.weight

    with pytest.raises(
        ValueError,
        match=r"'lm_head.weight' \(96, 64\) is 'output' \(head: named 'lm_head'\), but 'embed.weight' \(96, 16\) of the base "
        r"model is 'vector' \(Embedding; tied with lm_head.weight\)",
    ):
        param_groups(Tied(64, False), Tied(16, True))
    assert set(_ratios(Tied(64, True), Tied(16, True)).values()) == {4.0}


def test_a_parameter_of_another_number_of_dimensions_is_refused():
    def build(*shape):
        return nn.ModuleDict({"layers": nn.ModuleList([nn.ParameterDict({"w": nn.Parameter(torch.zeros(shape))})])})

    with pytest.raises(ValueError, match=re.escape("'layers.0.w' (4, 8, 8) has the shape (8, 8) at the base model")):
        param_groups(build(4, 8, 8), build(8, 8), roles={"*.w": Matrix(fan_in=-1)})


def _deep(d, layers, mlp):
    """Layers of a Sequential: its numbers 0 and 2 are two matrices of different fan_ins, and not two layers."""
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(96, d),
            "layers": nn.ModuleList(
                nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(d, mlp * d), nn.ReLU(), nn.Linear(mlp * d, d))})
                for _ in range(layers)
            ),
        }
    )


def _hierarchical(widths, depths):
    return nn.ModuleDict(
        {
            "stages": nn.ModuleList(
                nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(d, d) for _ in range(depth))})
                for d, depth in zip(widths, depths, strict=True)
            )
        }
    )


def test_a_shallower_proxy_answers_for_nested_sequentials():
    model, proxy = _deep(64, 6, 4), _deep(16, 2, 4)
    assert set(_ratios(model, proxy).values()) == {4.0}
    assert len(_ratios(model, proxy)) == 12


def test_a_shallower_proxy_answers_within_the_same_stage():
    ratios = _ratios(_hierarchical((64, 96), (3, 5)), _hierarchical((16, 48), (1, 2)))
    assert ratios["stages.0.blocks.2.weight"] == 4.0
    assert ratios["stages.1.blocks.4.weight"] == 2.0


def test_a_proxy_that_is_shallower_in_two_ways_answers_if_all_agree():
    model, proxy = _hierarchical((64, 64, 64), (2, 2, 2)), _hierarchical((16, 16), (1, 1))
    assert set(_ratios(model, proxy).values()) == {4.0}
    with pytest.raises(
        ValueError, match=r"have different fan_ins: 'stages.0.blocks.0.weight' 8, 'stages.1.blocks.0.weight' 16"
    ):
        param_groups(model, _hierarchical((8, 16), (1, 1)))


def _unet(d, stages):
    widths = [d, d, 2 * d, 4 * d]
    downs = [nn.ModuleDict({"c1": nn.Linear(a, b), "c2": nn.Linear(b, b)}) for a, b in itertools.pairwise(widths)]
    return nn.ModuleDict({"downs": nn.ModuleList(downs[:stages])})


def _reader(d, layers):
    """An MLP that reads 17 numbers."""
    return nn.ModuleDict({"net": nn.Sequential(*[nn.Linear(17, d), nn.Linear(d, d), nn.Linear(d, d)][:layers])})


@pytest.mark.parametrize("build", [_unet, _reader], ids=["stages that grow", "an MLP that reads data"])
def test_a_single_layer_of_the_proxy_does_not_answer_for_layers_of_another_size(build):
    with pytest.raises(
        ValueError, match="have different fan_ins: .* of this model.* Build the base model with as many layers"
    ):
        param_groups(build(64, 3), build(16, 1))
    ratios = _ratios(build(64, 3), build(16, 3))
    assert set(ratios.values()) <= {1.0, 4.0}
