"""Effective learning rates and weight decays in a table: detected, turned into base values, and said where it is not known."""

import math
import re
from pathlib import Path

import pytest

from lwadamw.lab import outcomes, transfer_lr
from lwadamw.lab.outcomes import Outcome
from lwadamw.lab.transfer_decay import products
from tests.lab.test_transfer_read import KOSSON, numbers, write

DATA = Path(__file__).parents[2] / "docs" / "data"


def scaled(power, arm="a", widths=(64, 128, 256), lrs=(0.01, 0.017, 0.029, 0.05)):
    """Runs whose learning rates are effective values. Their best base lr is 0.02 at every width."""
    return [
        Outcome(arm, width, float(f"{lr * (width / 64) ** power:.4g}"), None, None, math.log2(lr / 0.02) ** 2)
        for width in widths
        for lr in lrs
    ]


def file_of(rows, path, lr="lr"):
    return write(path, "\n".join([f"arm,width,{lr},loss", *(f"{r.arm},{r.width},{r.lr},{r.loss}" for r in rows)]))


@pytest.mark.parametrize("power", [-1.0, -0.75, -0.5])
def test_effective_learning_rates_are_detected_and_turned_into_base_values(power, tmp_path, capsys):
    path = file_of(scaled(power), tmp_path / "x.csv")
    (arm,) = numbers(tmp_path, path)["arms"]
    assert arm["drift"]["slope"] == pytest.approx(power, abs=0.01)
    said = f"the learning rates of a (∝ width^{power:.2g}) change with the width, as effective values do"
    assert said in capsys.readouterr().out
    (arm,) = numbers(tmp_path, path, "--effective-lr")["arms"]
    assert arm["drift"]["slope"] == pytest.approx(0, abs=0.01)
    assert "learning rates of" not in capsys.readouterr().out
    numbers(tmp_path, file_of(scaled(power), tmp_path / "y.csv", lr="base_lr"))
    assert "learning rates of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            scaled(-1.0, lrs=(0.01, 0.02, 0.04)),
            "the table does not tell. They are taken as base",
        ),  # in common: 0.01, 0.02
        (scaled(-1.0, widths=(64, 256)), "the table does not tell. They are taken as base"),
        (scaled(-1.0, "mup", widths=(64, 128)), "as effective values do"),
        (scaled(-1.0, "standard", widths=(64, 128)), "the table does not tell. They are taken as base"),
        (scaled(-1.0)[:8] + scaled(-0.5)[8:], "and they follow no power of the width"),
        (scaled(0.0), ""),
        ([*scaled(0.0), Outcome("a", 256, 0.1, None, None, 4.0)], ""),
        (scaled(-1.0, lrs=(0.01,)), ""),
    ],
    ids=["in common", "two widths", "the rule's", "another rule's", "no power", "base", "a larger grid", "one lr"],
)
def test_what_a_table_does_not_tell_of_its_learning_rates_is_said_and_not_guessed(rows, said, tmp_path, capsys):
    path = file_of(rows, tmp_path / "x.csv")
    numbers(tmp_path, path)
    printed = " ".join(capsys.readouterr().out.split())
    assert said in printed
    assert said or not re.search("learning rates of|no width of", printed)


def test_no_published_table_is_taken_for_one_of_effective_learning_rates():
    for path in (KOSSON, *sorted(DATA.glob("transfer*.csv")), DATA / "heatmap.csv"):
        found = outcomes.read(path)
        assert transfer_lr.exponents(found.rows, found.lr) == {}, path.name
        assert products(found.rows) == [], path.name
    with pytest.raises(ValueError, match="--effective-lr: in no arm"):
        transfer_lr.to_base(found.rows, 64)


def test_decays_that_are_products_with_the_lr_are_said_to_be_and_divided_on_demand(tmp_path, capsys):
    rows = [
        Outcome("a", width, lr, float(f"{lr * wd:.6g}"), None, math.log2(lr / 0.02) ** 2)
        for width in (64, 128)
        for wd in (0.1, 0.4)
        for lr in (0.01, 0.02, 0.04)
    ]
    lines = [f"{r.arm},{r.width},{r.lr},{r.weight_decay},{r.loss}" for r in rows]
    path = write(tmp_path / "x.csv", "\n".join(["arm,width,lr,wd,loss", *lines]))
    numbers(tmp_path, path)
    assert (
        "the weight decays of a are proportional to the lr at every width. They may be products"
        in capsys.readouterr().out
    )
    arms = numbers(tmp_path, path, "--effective-decay")["arms"]
    assert [(arm["weight_decay"], arm["drift"]["slope"]) for arm in arms] == [(0.1, 0), (0.4, 0)]
