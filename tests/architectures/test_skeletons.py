"""Skeletons of real architectures get the recorded roles, fan_ins and width ratios."""

from __future__ import annotations

import pytest
from torch import nn

from lwadamw import param_groups
from lwadamw.width.roles import decide

from .sizes import widths_of
from .skeleton import build
from .table import ROOT, Table, names, parse, read, render, stretched

# Numbers of heads, experts and classes are small, and some are equal.
A_FEW = 8
# BERT has 512 positions, and a patch of SigLIP2 768 inputs. Only the inner layers of a ResNet's blocks grow.
EQUAL_ON_PURPOSE = {
    "bert": {512},
    "bert_classifier": {512},
    "siglip2": {768},
    "resnet50": {64, 256, 512, 1024},
}

each_architecture = pytest.mark.parametrize("table", [pytest.param(read(name), id=name) for name in names()])
at_both_widths = pytest.mark.parametrize("which", [0, 1], ids=["narrow", "wide"])


def roles(model: nn.Module) -> dict[str, tuple[str, int | None]]:
    """Return the role and the fan_in of every parameter, by its first name, without a word from the user."""
    return {d.name: (d.decision.role or "undecided", d.fan_in) for d in decide(model, {})}


def recorded(table: Table, which: int) -> dict[str, tuple[str, int | None]]:
    """Return what the table says about every distinct parameter."""
    rows = (p for p in table.parameters if p.tied is None)
    return {p.name: (p.role, None if p.fan_in is None else p.fan_in[which]) for p in rows}


def differences(found: dict[str, tuple[str, int | None]], right: dict[str, tuple[str, int | None]]) -> list[str]:
    """Return a line for each parameter whose role or fan_in is wrong."""
    return [f"{name}: {found.get(name)}, right is {right[name]}" for name in right if found.get(name) != right[name]]


@each_architecture
@at_both_widths
def test_a_skeleton_has_the_recorded_names_shapes_and_classes(table: Table, which: int) -> None:
    model = build(table, which)
    found = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    assert found == {p.name: p.shapes[which] for p in table.parameters}
    assert list(dict(model.named_parameters())) == [p.name for p in table.parameters if p.tied is None]
    assert [(path or ROOT, type(module).__name__) for path, module in model.named_modules()] == [
        (row.path, row.bases[0]) for row in table.modules
    ]


@each_architecture
@at_both_widths
def test_roles_and_fan_ins_are_the_recorded_ones(table: Table, which: int) -> None:
    assert differences(roles(build(table, which)), recorded(table, which)) == []


@each_architecture
def test_roles_are_the_same_at_other_widths(table: Table, request: pytest.FixtureRequest) -> None:
    for width in widths_of(request.node.callspec.id):
        other = stretched(table, width)
        assert differences(roles(build(other, 1)), recorded(other, 1)) == []


@each_architecture
def test_width_ratios_from_a_proxy_are_the_recorded_ones(table: Table) -> None:
    undecided = {p.name: "vector" for p in table.parameters if p.role == "undecided"}
    groups = param_groups(build(table, 1), base_width=build(table, 0), roles=undecided)
    ratios = {p.name: p.m for p in table.parameters if p.fan_in and p.tied is None and not p.frozen}
    assert {name: groups.evidence[name].m for name in ratios} == ratios


# fmt: off
MOST_TRAINED = [
    "llama", "llama_tied", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "gemma2", "gemma3", "deepseek_v3", "gpt_oss", "llama4", "olmo2", "phi3", "gpt2",
    "gpt_neox", "granite", "granite_moe", "glm4", "glm4_moe", "mamba", "mamba2", "jamba",
    "bert", "modernbert", "t5", "whisper", "vit", "dinov2", "siglip", "dit",
    "megatron_gpt", "megatron_moe", "megatron_grouped",
]
# fmt: on


@pytest.mark.parametrize("name", MOST_TRAINED)
def test_the_most_trained_architectures_need_no_line_of_the_user(name: str) -> None:
    assert [d.name for d in decide(build(read(name), 1), {}) if d.decision.role is None] == []


@pytest.mark.parametrize("name", names())
def test_a_table_is_read_as_it_was_written(name: str) -> None:
    table = read(name)
    assert parse(render(table)) == table


@each_architecture
def test_no_size_that_stays_is_equal_to_one_that_grows_by_accident(
    table: Table, request: pytest.FixtureRequest
) -> None:
    sizes = [pair for p in table.parameters for pair in zip(*p.shapes, strict=True)]
    fixed = {low for low, high in sizes if low == high}
    grown = {size for low, high in sizes if low != high for size in (low, high)}
    equal = {size for size in fixed & grown if size > A_FEW}
    assert equal == EQUAL_ON_PURPOSE.get(request.node.callspec.id, set())


def test_at_least_45_architectures_are_recorded() -> None:
    assert len(names()) >= 45
