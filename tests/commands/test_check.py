"""The coordinate check: it fails without scaling, passes under muP, and its second table says what decay adds over tau."""

import json
import math
import re

import pytest
import torch
from torch import nn

from lwadamw import RULES
from lwadamw.commands import main
from lwadamw.commands.coordinates import slope, verdict
from lwadamw.lab.model import ModelConfig, Transformer

HERE = "tests.commands.test_check"
WIDTHS = ["--widths", "32", "64", "128"]


def build(width, depth=1):
    """The laboratory's language model."""
    return Transformer(ModelConfig(width=width, depth=depth, head_dim=16, vocab=64))


def without_tokens(width):
    """A model whose input is no token, with matrices that are uniquely hidden."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def square(model):
    """A loss of `without_tokens` on a fixed batch."""
    return model(torch.linspace(-1, 1, 80).view(10, 8)).square().mean()


def no_model(width):
    """Not a model."""
    return width


def infinite(model):
    """A loss that is not finite."""
    return square(model) * math.inf


def test_without_scaling_changes_grow_and_under_mup_they_do_not(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert (
        main(
            [
                "check",
                f"{HERE}:build",
                *WIDTHS,
                "--rule",
                "standard",
                "--json",
                str(out),
                "--seeds",
                "1",
                "--args",
                "depth=2",
            ]
        )
        == 1
    )
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("not flat: ")
    assert "the change of layers.*.ffn.down grows as width^+" in first
    found = {layer["name"]: layer for layer in json.loads(out.read_text())["layers"]}
    assert found["layers.*.ffn.down"]["update_slope"] > 0.35
    assert any(line.split()[-2:] == ["+0.75", "+0.00"] for line in lines)
    assert main(["check", f"{HERE}:build", *WIDTHS, "--rule", "mup", "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flat: no output grows, and no change of an output depends on the width"
    assert {line.split()[-1] for line in lines if line.startswith("matrix")} == {"flat"}


@pytest.mark.parametrize("name", ["mup", "fan2025", "kosson2025", "balanced"])
def test_over_tau_the_slopes_are_those_of_the_rule_which_the_first_steps_do_not_show(name, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--rule", name, "--json", str(out), "--steps", "1", "--seeds", "1", "--weight-decay", "0.4"]
    main(["check", f"{HERE}:build", *WIDTHS, *arguments])
    scale = RULES[name].matrix
    layers = [layer for layer in json.loads(out.read_text())["layers"] if layer["role"] == "matrix"]
    assert len(layers) == 5
    for layer in layers:
        assert layer["tau"][0] == pytest.approx(1 / (0.01 * 0.4))
        assert layer["tau_slope"] == pytest.approx(-scale.lr - scale.wd, abs=1e-9)
        assert layer["gain_slope"] == pytest.approx((scale.lr - scale.wd) / 2 + 0.75, abs=1e-9)
        assert layer["relative_slope"] == pytest.approx((scale.lr + scale.wd) / 2, abs=1e-9)


def test_a_loss_of_the_user_makes_any_model_checkable(capsys):
    arguments = [f"{HERE}:without_tokens", *WIDTHS, "--rule", "mup", "--steps", "2"]
    assert main(["check", *arguments, "--loss", f"{HERE}:square", "--base-width", "64"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "base width 64, 2 steps, 2 seeds" in printed
    with pytest.raises(SystemExit):
        main(["check", *arguments])
    assert "the model has no nn.Embedding, so its input is not known. Give --loss" in capsys.readouterr().err


class Tied(nn.Module):
    """A language model whose head is the embedding, and whose first embedding is no embedding of tokens."""

    def __init__(self, width, std):
        super().__init__()
        self.positions = nn.Embedding(1024, width)
        self.tokens = nn.Embedding(16, width)
        self.hidden = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.hidden.weight, std=std)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.tokens.weight

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, tokens):
        return self.head(self.hidden(self.tokens(tokens)) + self.positions.weight[: tokens.shape[1]])


def tied(width):
    """`Tied`, with a standard deviation that does not follow the width."""
    return Tied(width, 0.02)


def tied_well(width):
    """`Tied`, with a standard deviation that follows the width."""
    return Tied(width, 0.16 * width**-0.5)


def test_a_tied_head_is_measured_and_outputs_that_grow_before_the_first_step_are_named(capsys):
    arguments = [*WIDTHS, "--rule", "mup", "--steps", "1", "--seeds", "1", "--lr", "1e-4"]
    assert main(["check", f"{HERE}:tied", *arguments]) == 1
    _, initial, *lines = capsys.readouterr().out.splitlines()
    assert re.match(
        r"before the first step, outputs grow already: hidden as width\^\+0\.[456]\d\. No learning rate", initial
    )
    assert "initializer_range=0.02 * (32 / width) ** 0.5." in initial
    assert {line.split()[1] for line in lines if line.startswith("vector")} >= {"head", "tokens"}
    main(["check", f"{HERE}:tied_well", *arguments])
    assert "before the first step" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{HERE}:build", "--widths", "64"], "argument --widths: 64 is only one width"),
        ([f"{HERE}:built", *WIDTHS], f"module {HERE!r} has no 'built'. Closest: 'build'"),
        (["nowhere:build", *WIDTHS], "no module 'nowhere'"),
        ([f"{HERE}:no_model", *WIDTHS], "returned int, not a torch.nn.Module"),
        ([f"{HERE}:build", *WIDTHS, "--args", "deep=2"], "unexpected keyword argument 'deep'"),
        ([f"{HERE}:build", "--widths", "24", "48"], "ModelConfig: width=24 is not a whole number of heads"),
        ([f"{HERE}:without_tokens", *WIDTHS, "--loss", f"{HERE}:infinite"], "the loss of step 1 is inf, not a finite"),
        ([f"{HERE}:build", *WIDTHS, "--json", "no/folder.json"], "argument --json: 'no/folder.json' is in a folder"),
    ],
)
def test_what_is_wrong_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_slopes_are_exact_for_powers_and_verdicts_follow_them():
    for power, said in ((0.5, "grows"), (0.3, "flat"), (-0.3, "flat"), (-1.0, "shrinks")):
        values = [3 * width**power for width in (64, 128, 512)]
        assert slope((64, 128, 512), values) == pytest.approx(power)
        assert verdict(slope((64, 128, 512), values)) == said
    assert verdict(slope((64, 128), (0.0, 1.0))) == "no value"
