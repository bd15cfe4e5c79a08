"""Runs against the relative update: each run has the one that its rule gives a matrix, and the optimum's drift follows."""

import math

import pytest

from lwadamw.commands import main
from lwadamw.lab import outcomes, transfer
from lwadamw.lab.arms import arm_rule
from lwadamw.lab.transfer_relative import against_relative_update
from lwadamw.width.rules import RULES

LRS = [2**-k for k in range(5, 12)]


def _table(path, arm, best, decay="0.5"):
    """Write runs whose best base learning rate at each width is `best(m)`. The loss is a parabola in log2 lr."""
    lines = ["arm,width,lr,weight_decay,loss"]
    for width in (64, 128, 256):
        for lr in LRS:
            lines.append(f"{arm},{width},{lr},{decay},{2 + 0.1 * math.log2(lr / best(width / 64)) ** 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("arm", [*RULES, "completep", "kosson2025+completep"])
def test_each_run_has_the_relative_update_of_its_effective_values(tmp_path, arm):
    found = outcomes.read(_table(tmp_path / "runs.csv", arm, lambda m: 2**-8))
    seen = against_relative_update(found, 64, 0.8)
    for before, after in zip(found.rows, seen.rows, strict=True):
        scale = arm_rule(arm).matrix.at(before.width / 64)
        expected = math.sqrt(2 * before.lr * scale.lr * 0.5 * scale.wd * 0.2 / 1.8)
        assert after.lr == pytest.approx(expected, rel=1e-5)
        assert (after.loss, after.width, after.weight_decay) == (before.loss, before.width, 0.5)


@pytest.mark.parametrize(
    ("arm", "best", "drift"),
    [
        ("kosson2025", lambda m: 2**-8, 0.0),  # lr wd is equal at every width, and so is the best base lr
        ("mup", lambda m: 2**-8, -0.5),  # lr wd falls as 1/m
        ("mup", lambda m: 2**-8 * m, 0.0),  # the best base lr rises as m, and makes up for it
    ],
)
def test_the_drift_is_that_of_the_relative_update(tmp_path, arm, best, drift):
    found = outcomes.read(_table(tmp_path / "runs.csv", arm, best))
    (seen,) = transfer.analyse(against_relative_update(found, 64, 0.9).rows, proxy=64).arms
    assert seen.drift.slope == pytest.approx(drift, abs=0.01)


def test_the_command_reads_runs_against_the_relative_update(tmp_path, capsys):
    runs = str(_table(tmp_path / "runs.csv", "mup", lambda m: 2**-8))
    assert main(["transfer", runs, "--against", "relative-update", "--beta1", "0.9"]) == 0
    text = capsys.readouterr().out
    assert "octaves of relative update per octave of width" in text
    assert "best relative update" in text
    assert "-0.50 (" in text
    assert main(["transfer", runs]) == 0
    assert "octaves of lr per octave of width" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arm", "decay", "options", "message"),
    [
        ("mine", "0.5", [], "the arm 'mine' is no rule"),
        ("mup", "0", [], "a run of 'mup' at width 64 has no weight decay"),
        ("mup", "0.5", ["--beta1", "1.0"], "beta1=1.0 is not in"),
        ("mup", "0.5", ["--next"], "--against relative-update has none"),
    ],
)
def test_what_has_no_relative_update_is_refused(tmp_path, capsys, arm, decay, options, message):
    runs = str(_table(tmp_path / "runs.csv", arm, lambda m: 2**-8, decay))
    with pytest.raises(SystemExit) as ended:
        main(["transfer", runs, "--against", "relative-update", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
