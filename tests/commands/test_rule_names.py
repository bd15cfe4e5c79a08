"""Every command takes the names of rules and of recipes, and says the same of a name that neither has."""

import json

import pytest
import torch

import lwadamw
from lwadamw.commands import main
from lwadamw.lab.data import standard_library
from lwadamw.lab.synthetic import Noise
from lwadamw.lab.training import Run, Settings
from lwadamw.width.blocks import blocks_of
from tests import zoo
from tests.commands.hf_cases import PLAIN, json_table, pasted, refusal
from tests.commands.test_check import build

HERE = "tests.commands.test_check:build"
PLACES = {
    "rule": [
        "rule",
        "NAME",
        "--base-depth",
        "2",
        "--depth",
        "2",
        "--from",
        "64",
        "--to",
        "128",
        "--lr",
        "0.01",
        "--wd",
        "0.1",
    ],
    "table": ["table", HERE, "--args", "width=32", "--rule", "NAME"],
    "check": ["check", HERE, "--widths", "32", "64", "--steps", "1", "--seeds", "1", "--rule", "NAME"],
    "demo": ["demo", "--quick", "--rule", "NAME"],
    "sweep": ["sweep", "--arms", "NAME"],
    "synthetic": ["synthetic", "--arms", "NAME"],
}


@pytest.mark.parametrize("command", PLACES)
def test_every_command_says_the_same_of_an_unknown_name(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([text.replace("NAME", "completp") for text in PLACES[command]])
    assert stopped.value.code == 2
    names = ", ".join((*lwadamw.RULES, *lwadamw.RECIPES))
    with pytest.raises(ValueError, match="unknown rule 'completp'") as refused:
        lwadamw.param_groups(zoo.Llama(64, 2), 64, "completp")
    said = f"unknown rule 'completp'. Closest: 'completep'. Rules are {names}."
    assert said in capsys.readouterr().err
    assert said in str(refused.value)


@pytest.mark.parametrize("command", ["rule", "table", "check"])
def test_commands_take_a_recipe(command, capsys):
    assert main([text.replace("NAME", "completep") for text in PLACES[command]]) in (0, 1)
    seen = "one of 1 blocks, 1 at the proxy" if command == "table" else "completep"
    assert seen in capsys.readouterr().out


def test_every_command_lists_recipes_in_its_help(capsys):
    for command in PLACES:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "completep" in capsys.readouterr().out, command


def test_the_laboratory_trains_under_a_recipe_and_divides_the_logits_as_it_demands():
    settings = Settings(rule="completep", base_width=32, depth=2, context=16, batch=2, steps=2)
    run = Run(settings, 64, standard_library(), torch.device("cpu"))
    run.model.head.weight.data.normal_()
    tokens = torch.arange(8)[None]
    logits = run.model(tokens)
    hidden = []
    run.model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
    run.model(tokens)
    torch.testing.assert_close(logits, run.model.head(hidden[0]) / 2)
    assert [record.step for record in run.train()] == [1, 2]
    assert Noise.of("completep", "relu", 64, 0, lr=0.01, weight_decay=1.0, base_width=32, batch=2, run_taus=1.0)


def test_the_blocks_of_a_model_are_what_param_groups_is_given():
    assert blocks_of(zoo.Llama(64, 3)) == 3
    assert blocks_of(torch.nn.Sequential(torch.nn.Linear(2, 2))) == {}
    pair = torch.nn.ModuleDict({"left": zoo.Llama(64, 3).layers, "right": zoo.Llama(64, 2).layers})
    assert blocks_of(pair) == {"left.*": 3, "right.*": 2}


def test_the_pasted_code_of_a_recipe_gives_the_multipliers_of_the_table(config, transformers, capsys):
    arguments = [config(**PLAIN), "--base-width", "48", "--depth", "1", "--rule", "completep"]
    found = json_table(capsys, *arguments)
    model = transformers.PlainLMHeadModel(transformers.PlainConfig())
    groups = pasted(found["code"], model)
    shown = {row["name"]: (row["lr"], row["weight_decay"]) for row in found["parameters"]}
    given = {n: (g["width_lr_mult"], g["width_wd_mult"]) for g in groups for n, _ in g["params"]}
    assert given == shown
    assert "base_depth=1," in found["code"]
    assert len(set(shown.values())) > 1


def test_the_depth_of_the_proxy_is_counted_given_or_asked_for(capsys):
    table = ["table", HERE, "--args", "width=64", "depth=4", "--rule", "completep"]
    assert main([*table, "--base-width", "32", "--base-depth", "2", "--json"]) == 0
    by_number = json.loads(capsys.readouterr().out)
    assert main([*table, "--base-width", "32", "--base-depth", "layers.*=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_number
    assert main([*table, "--base", "tests.commands.test_rule_names:proxy", "--json"]) == 0
    values = [{k: v for k, v in row.items() if k != "why"} for row in by_number]
    assert [{k: v for k, v in row.items() if k != "why"} for row in json.loads(capsys.readouterr().out)] == values
    assert {row["lr"] for row in values if row["role"] == "matrix"} == {0.5}
    for arguments, said in [
        (["--base-width", "32"], "Give --base-depth N, the number of its blocks"),
        (["--base-depth", "2", "--rule", "mup"], "the rule 'mup' says nothing of the depth. Leave it out"),
        (["--base-depth", "some"], "argument --base-depth: 'some' is not a positive whole number"),
        (["--base-depth", "2", "layers.*=2"], "argument --base-depth: '2' is not pattern=blocks, like 'layers.*=4'"),
    ]:
        with pytest.raises(SystemExit):
            main([*table, *arguments])
        assert said in capsys.readouterr().err


def test_a_model_without_blocks_is_refused_where_a_rule_scales_them(config, capsys):
    here = "tests.commands.test_check"
    with pytest.raises(SystemExit):
        main(["check", f"{here}:without_tokens", "--widths", "8", "16", "--loss", f"{here}:square", "--rule=completep"])
    assert "has no list of numbered layers that could be its blocks. Give a rule without" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["table", f"{here}:without_tokens", "--args", "width=8", "--rule=completep"])
    assert "--base-depth '<pattern>=<number>'" in capsys.readouterr().err
    assert "unknown rule" in refusal(capsys, config(**PLAIN), "--rule", "fan")


def proxy():
    """The laboratory's model at half the width and half the depth of the test."""
    return build(32, depth=2)
