"""Outcomes are read from CSV files of any program, and a bad file is refused with the place of the problem."""

import math

import pytest

from lwadamw.lab import outcomes
from lwadamw.lab.outcomes import Outcome
from lwadamw.lab.transfer import curves_of

INF = math.inf


def write(path, text):
    path.write_text(text)
    return path


def test_a_column_may_have_several_names_and_further_columns_are_ignored(tmp_path):
    path = write(
        tmp_path / "runs.csv",
        "\ufeffRule,Width,Learning_Rate,wd,seed,loss,val_loss,note\nmup,64,1e-3,0.1,0,9,2.5,hello\n\nmup,64,2e-3,0.1,0,9,2.4,\n",
    )
    found = outcomes.read(path)
    assert found.rows == (Outcome("mup", 64, 1e-3, 0.1, "0", 2.5), Outcome("mup", 64, 2e-3, 0.1, "0", 2.4))
    assert found.loss == "val_loss"
    assert [row.loss for row in outcomes.read(path, "loss").rows] == [9, 9]


@pytest.mark.parametrize("loss", ["nan", "inf", "", "div", "Diverged", "-inf"])
def test_a_diverged_run_is_kept_as_infinite(loss, tmp_path):
    path = write(tmp_path / "runs.csv", f"arm,width,lr,loss\na,64,0.1,{loss}\na,64,0.2,1\n")
    assert [row.loss for row in outcomes.read(path).rows] == [INF, 1]
    path = write(tmp_path / "runs.csv", "arm,width,lr,status,loss\na,64,0.1,diverged,1.5\na,64,0.2,done,1\n")
    assert [row.loss for row in outcomes.read(path).rows] == [INF, 1]


def test_equal_runs_without_seeds_are_averaged(tmp_path):
    path = write(tmp_path / "runs.csv", "arm,width,lr,loss\na,64,0.1,1\na,64,0.1,2\na,64,0.2,3\n")
    (curve,) = curves_of(outcomes.read(path).rows)
    assert list(curve.mean) == [1.5, 3]
    assert list(curve.runs) == [2, 1]


def test_the_caption_names_the_conditions_of_the_runs_that_did_not_diverge(tmp_path):
    lines = ["a,64,0.1,0,600,1000,1", "a,64,0.1,1,600,1000,1", "a,64,0.2,0,600,30,nan"]
    path = write(tmp_path / "runs.csv", "\n".join(["arm,width,lr,seed,steps,tokens,loss", *lines]))
    assert outcomes.read(path).caption == "600 steps, 1000 tokens, 2 seeds"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no runs. Give a CSV file with a header"),
        ("arm,width,lr,loss\n", "no runs"),
        (
            "arm,width,loss\na,64,1\n",
            "no column 'base_lr' or 'lr' or 'learning_rate' or .*; there are 'arm', 'width', 'loss'",
        ),
        ("arm,width,lr,score\na,64,1,1\n", "no column 'validation_loss' or 'val_loss' or .* or 'loss'; .*--loss"),
        ("arm,width,lr,loss\na,64,0.1,1\na,6x,0.1,1\n", "line 3, column 'width': '6x' is not a number"),
        ("arm,width,lr,loss\na,64.5,0.1,1\n", "line 2, column 'width': '64.5' is not a whole number"),
        ("arm,width,lr,loss\na,64,-0.1,1\n", "line 2, column 'lr': '-0.1' is not a number that"),
        ("arm,width,lr,loss\na,64,0,1\n", "line 2, column 'lr': '0' has no logarithm"),
        ("arm,width,lr,loss\n,64,0.1,1\n", "line 2, column 'arm': '' names no arm"),
        ("arm,width,lr,loss\n\na,64,0.1,low\n", "line 3, column 'loss': 'low' is no number. Give a loss"),
        ("arm,width,lr,loss,status\na,64,0.1,1,odd\n", "line 2, column 'status': 'odd' says neither"),
        ("arm,width,lr,loss\na,64,0.1\n", "line 2: 3 cells, the header has 4"),
        ("arm,width,lr,seed,loss\na,64,0.1,0,1\na,64,0.1,0,2\n", "lines 2 and 3: the same arm, width, lr"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_the_message_about_a_bad_file_names_the_line_and_the_column(text, message, tmp_path):
    path = write(tmp_path / "runs.csv", text)
    with pytest.raises(ValueError, match=rf"(?s)runs\.csv.*{message}"):
        outcomes.read(path)
