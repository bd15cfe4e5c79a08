"""Tables of trackers and of other people are read as they are, or with the names of a few columns."""

import itertools
import json
import math
from pathlib import Path

import pytest

from lwadamw.commands import main
from lwadamw.lab import outcomes
from lwadamw.lab.outcomes import Outcome
from lwadamw.lab.transfer_decay import exponents, to_base

ROOT = Path(__file__).parents[2]
KOSSON = ROOT / "docs" / "data" / "kosson2025_fig1.csv"
PUBLISHED = ROOT / "tests" / "fixtures" / "published"


def write(path, text):
    path.write_text(text)
    return path


def numbers(tmp_path, *arguments):
    """Return what the command writes with --json."""
    out = tmp_path / "out.json"
    assert main(["transfer", *map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize(("delimiter", "comma"), [(",", False), (";", False), (";", True), ("\t", False), ("\t", True)])
def test_cells_are_separated_by_commas_semicolons_or_tabs(delimiter, comma, tmp_path):
    lines = [["arm", "width", "lr", "loss"], ["a", "64", "0.25", "1.5"], ["a", "64", "5e-1", "1.25"]]
    text = "\n".join(delimiter.join(cell.replace(".", "," if comma else ".") for cell in line) for line in lines)
    found = outcomes.read(write(tmp_path / "runs.csv", text))
    assert found.rows == (Outcome("a", 64, 0.25, None, None, 1.5), Outcome("a", 64, 0.5, None, None, 1.25))


WANDB = """Name,State,Runtime,config.model.d_model,config.optimizer.lr,config.weight_decay,config.seed,train/loss,eval/loss
wise-lake-1,finished,61,64,0.01,0.1,0,9,2.5
calm-sun-2,finished,61,64,0.02,0.1,0,9,2.4
calm-sun-2,finished,61,64,0.02,0.1,0,9,2.4
odd-moon-3,crashed,3,64,0.04,0.1,0,9,5.0
new-tree-4,running,3,64,0.08,0.1,0,9,6.0
"""


def test_an_export_of_wandb_is_read_without_naming_columns(tmp_path, capsys):
    path = write(tmp_path / "wandb.csv", WANDB)
    found = outcomes.read(path)
    assert found.rows == (
        Outcome("all runs", 64, 0.01, 0.1, "0", 2.5),
        Outcome("all runs", 64, 0.02, 0.1, "0", 2.4),
    )
    assert found.loss == "eval/loss"
    assert main(["transfer", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "left out: 2 runs that did not end (1 crashed, 1 running)" in printed
    assert "left out: 1 line that repeat" in printed


def test_a_table_of_tensorboards_hparams_is_read_and_a_scalar_curve_is_refused_by_name(tmp_path):
    table = "trial_id,show_metrics,learning rate,hidden-size,hp/weight_decay,loss/val\na,0,0.1,64,1.0,2.0\n"
    (row,) = outcomes.read(write(tmp_path / "hparams.csv", table)).rows
    assert row == Outcome("all runs", 64, 0.1, 1.0, None, 2.0)
    curve = write(tmp_path / "curve.csv", "Wall time,Step,Value\n1.0,1,9.5\n")
    with pytest.raises(ValueError, match=r"curve\.csv is the curve of one run.*Give a table with one run per line"):
        outcomes.read(curve)


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        ("a.lr,b.lr,width,loss", {}, "columns 'a.lr' and 'b.lr' could both be the lr. Name one, like --column lr=a.lr"),
        ("eta,x,width,loss", {"lr": "etha"}, "no column 'etha', which is to hold the lr; .* Closest: 'eta'"),
        ("lr,x,size,loss", {}, "Name the column that holds the width with --column width=NAME.*--column width=256"),
        ("lr,x,width,train/loss", {}, "Name the column that holds the loss with --loss NAME"),
    ],
)
def test_a_column_that_is_not_found_or_not_certain_is_named(header, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        outcomes.read(write(tmp_path / "x.csv", f"{header}\n1,1,1,1\n"), columns=columns)


def test_columns_of_one_name_are_refused_if_their_values_differ(tmp_path):
    path = tmp_path / "x.csv"
    lines = "width,lr,Loss,loss\n64,1,{},2\n64,2,3,3\n"
    for columns in ({}, {"loss": "loss"}):
        with pytest.raises(
            ValueError, match="columns 3 and 4, 'Loss' and 'loss', have the same name and hold different"
        ):
            outcomes.read(write(path, lines.format(1)), columns=columns)
    assert [row.loss for row in outcomes.read(write(path, lines.format(2))).rows] == [2, 3]


def test_values_that_were_rounded_differently_are_the_same(tmp_path):
    """One seed has the digits of float64, the other those of float32."""
    lrs = [0.001, 0.0010000000474974513, 0.002, 0.0020000000949949026, 0.004, 0.004000000189989805]
    decays = ["0.1", "0.10000000149011612"]
    lines = [f"64,{lr},{decays[i % 2]},{abs(i // 2 - 1) + 0.01 * (i % 2)},{i % 2}" for i, lr in enumerate(lrs)]
    path = write(tmp_path / "x.csv", "\n".join(["width,lr,wd,loss,seed", *lines]))
    assert {(row.lr, row.weight_decay) for row in outcomes.read(path).rows} == {(lr, 0.1) for lr in lrs[::2]}
    (arm,) = numbers(tmp_path, path)["arms"]
    assert arm["noise_from"] == "seeds"
    assert arm["optima"][0]["lr"] == pytest.approx(0.002)


def test_columns_are_mapped_to_kinds_and_the_width_may_be_a_number(tmp_path, capsys):
    path = write(tmp_path / "x.csv", "eta,kind,batch,bpb\n0.1,x,8,2\n0.2,x,8,1\n0.4,x,8,2\n0.1,x,16,3\n0.2,x,16,2.5\n")
    arguments = ["--column", "lr=eta", "--column", "arm=kind,batch", "--column", "width=256", "--loss", "bpb"]
    found = numbers(tmp_path, path, *arguments)
    assert [(arm["name"], arm["optima"][0]["width"]) for arm in found["arms"]] == [
        ("kind x, batch 8", 256),
        ("kind x, batch 16", 256),
    ]
    with pytest.raises(SystemExit):
        main(["transfer", str(path), "--column", "rate=eta"])
    assert "'rate=eta' is not KIND=NAME with a kind among arm, width, lr" in capsys.readouterr().err


def steplaw(path):
    """Write runs in the columns of the Step Law project: the best lr is 2^-8 (tokens / 1e9)^0.3 where the batch is best."""
    lines = ["width,layers,lr,batch_sequences,steps,loss,smooth_loss,tokens,parameters"]
    for octave, tokens, batch in itertools.product(range(-10, -4), (1e9, 4e9, 16e9), (32, 64, 128)):
        off = octave + 8 - 0.3 * math.log2(tokens / 1e9) - 0.5 * (math.log2(batch) - 6)
        loss = 3 + 0.02 * off**2 + 0.01 * (math.log2(batch) - 6) ** 2
        lines.append(f"960,7,{2.0**octave},{batch},{tokens / batch / 2048:.0f},9,{loss},{tokens:.0f},214663680")
    return write(path, "\n".join(lines))


def test_runs_that_differ_in_more_than_the_settings_are_refused_with_the_columns_to_map(tmp_path, capsys):
    path = steplaw(tmp_path / "steplaw.csv")
    with pytest.raises(SystemExit):
        main(["transfer", str(path), "--column", "width=tokens"])
    message = capsys.readouterr().err
    assert "differ in 'batch_sequences'. Make them different arms: --column arm=batch_sequences" in message
    found = numbers(
        tmp_path, path, "--column", "width=tokens", "--column", "arm=batch_sequences", "--loss", "smooth_loss"
    )
    assert [arm["drift"]["slope"] for arm in found["arms"]] == pytest.approx([0.3] * 3)
    assert "octaves of lr per octave of tokens" in capsys.readouterr().out
    found = numbers(
        *(
            tmp_path,
            path,
            "--column",
            "width=tokens",
            "--over",
            "batch_sequences",
            "--loss",
            "smooth_loss",
            "--noise",
            "1e-3",
        )
    )
    (arm,) = found["arms"]
    assert arm["drift"]["slope"] == pytest.approx(0.3, abs=0.1)
    assert "the lowest over 3 values of batch_sequences" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["transfer", str(path), "--column", "width=tokens", "--over", "batch"])
    assert "--over: no column 'batch'" in capsys.readouterr().err


def test_runs_with_base_values_of_several_proxies_are_told_apart(tmp_path, capsys):
    """A sweep with another --base-width appends to the same file."""
    runs = [("mup", width, base, lr) for width, base in ((128, 64), (64, 64), (32, 32)) for lr in (1, 2, 4)]
    runs += [("fan2025", width, 64, lr) for width in (64, 128) for lr in (1, 2, 4)]
    lines = [f"{arm},{width},{base},{lr},{abs(lr - 2)}" for arm, width, base, lr in runs]
    path = write(tmp_path / "x.csv", "\n".join(["arm,width,base_width,lr,loss", *lines]))
    (note,) = outcomes.read(path).notes
    assert note.startswith("the runs of mup have several values of base_width")
    assert note.endswith("--column arm=arm,base_width.")
    apart = outcomes.read(path, columns={"arm": "arm,base_width"})
    assert apart.notes == ()
    assert len({row.arm for row in apart.rows}) == 3


def effective(power, decays=(0.1, 0.4)):
    """Runs whose weight decays are effective values."""
    return [
        Outcome("a", width, lr, round(wd * (width / 64) ** power, 6), None, 1 + abs(math.log2(lr) + 5))
        for width in (64, 128, 256)
        for wd in decays
        for lr in (2.0**-6, 2.0**-5, 2.0**-4)
    ]


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0, -0.5])
def test_effective_weight_decays_are_detected_and_turned_into_base_values(power, tmp_path, capsys):
    decays = (0.1, 0.13)  # so near that no width has a decay of another one
    rows = effective(power, decays)
    assert exponents(rows) == {"a": pytest.approx(power, abs=1e-3)}
    assert {row.weight_decay for row in to_base(rows, 64)} == set(decays)
    lines = [f"{r.arm},{r.width},{r.lr},{r.weight_decay},{r.loss}" for r in rows]
    path = write(tmp_path / "x.csv", "\n".join(["arm,width,lr,wd,loss", *lines]))
    assert all(arm["drift"] is None for arm in numbers(tmp_path, path)["arms"])
    assert f"the weight decays of a (∝ width^{power:.2g}) change with the width" in capsys.readouterr().out
    assert [arm["drift"]["slope"] for arm in numbers(tmp_path, path, "--effective-decay")["arms"]] == [0, 0]


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_base_weight_decays_and_a_grid_that_only_moves_are_not_taken_for_effective_values(power, capsys):
    rows = effective(power, decays=(0.1, 0.2, 0.4))  # at power 1, widths have decays in common
    assert exponents(rows) == {}
    with pytest.raises(ValueError, match="--effective-decay: in no arm"):
        to_base(rows, 64)


def test_kosson_et_al_say_that_independent_decay_transfers_and_standard_decay_does_not(tmp_path):
    found = numbers(tmp_path, KOSSON)
    arms = {arm["name"]: arm for arm in found["arms"]}
    independent, standard = arms["independent"], arms["standard"]
    assert independent["drift"]["slope_low"] < 0 < independent["drift"]["slope_high"]
    assert standard["drift"]["slope_low"] > 0
    assert independent["regrets"][-1]["high"] < 0.02 < 0.035 <= standard["regrets"][-1]["low"]
    (pair,) = (d for d in found["differences"] if (d["arm"], d["other"]) == ("standard", "independent"))
    assert pair["slope"] == pytest.approx(0.72, abs=0.02)


def test_nanochats_grid_ends_below_its_optimum_and_the_next_run_is_above(tmp_path):
    found = numbers(tmp_path, PUBLISHED / "nanochat_644.csv", "--next")
    assert {arm["optima"][0]["edge"] for arm in found["arms"]} == {"highest lr"}
    best = min(found["arms"], key=lambda arm: arm["optima"][0]["best_loss"])
    assert (best["weight_decay"], best["optima"][0]["best_lr"]) == (0.2, 0.05)
    assert {round(n["lr"][0], 4) for n in found["next"]} == {0.0833}


def test_marins_learning_rate_is_at_its_optimum(tmp_path):
    found = numbers(tmp_path, PUBLISHED / "marin_5178.csv", "--next")
    (optimum,) = found["arms"][0]["optima"]
    assert optimum["low"] < 1 < optimum["high"]
    assert optimum["lr"] == pytest.approx(1.04, abs=0.01)
    assert found["next"][0]["lr"] == []


def test_a_loss_with_two_valleys_or_with_a_steep_side_is_no_parabola(tmp_path, capsys):
    octaves = range(-8, -1)
    curves = {
        "parabola": [(x + 5.2) ** 2 * 0.02 for x in octaves],
        "valleys": [0.0, 0.02, 0.1, 0.2, 0.1, 0.01, 0.1],
        "steep": [0.05, 0.03, 0.012, 0.0, 0.3, 1.5, 3.0],
    }
    lines = [
        f"{arm},64,{2.0**x},{2 + y}" for arm, losses in curves.items() for x, y in zip(octaves, losses, strict=True)
    ]
    path = write(tmp_path / "x.csv", "\n".join(["arm,width,lr,loss", *lines]))
    found = numbers(tmp_path, path, "--noise", "0.002")
    shapes = {arm["name"]: arm["optima"][0]["shape"] for arm in found["arms"]}
    assert shapes["parabola"] == ""
    assert shapes["valleys"] == "no parabola: two valleys, at lr 0.00390625 and 0.125"
    assert "no parabola: a cubic through 5 runs is lowest at lr" in shapes["steep"]
    assert "two valleys, at lr 0.00390625 and 0.125" in capsys.readouterr().out
