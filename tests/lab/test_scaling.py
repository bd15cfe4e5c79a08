"""The laboratory scales depth, batch size and horizon, and its tables say what the runs say."""

import csv
import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from lwadamw.commands import main
from lwadamw.lab import scaling_findings
from lwadamw.lab.arms import arm_rule
from lwadamw.lab.data import standard_library
from lwadamw.lab.findings import refresh
from lwadamw.lab.model import ModelConfig, Transformer, rope
from lwadamw.lab.paired import differences
from lwadamw.lab.scaling import deep_runs, deeper, horizon_runs, horizons
from lwadamw.lab.scaling_findings import TABLES, by_depth, by_horizon
from lwadamw.lab.training import Run, Settings
from lwadamw.lab.transfer import analyse, curves_of

DOCS = Path(__file__).parents[2] / "docs"


def write(path, rows):
    base = {"weight_decay": 0.1, "batch": 8, "steps": 100, "context": 64, "status": "done", "arm": "a", "width": 32}
    rows = [base | {"depth": 2} | row for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def column(table, name):
    header, _, *rows = cells(table)
    return {row[0]: row[header.index(name)] for row in rows}


def test_a_run_under_depth_exponents_has_the_factor_in_its_model_and_in_its_groups():
    rule = arm_rule("kosson2025+completep_half")
    settings = Settings(rule, base_width=32, depth=4, base_depth=1, context=16, lr=1e-2)
    run = Run(settings, 64, standard_library(), torch.device("cpu"))
    assert run.model.config.branch == pytest.approx(4**-0.5)
    assert run.steady.lr == pytest.approx(1e-2 / 2 * 4**-0.5)
    plain = Run(dataclasses.replace(settings, rule="kosson2025"), 64, standard_library(), torch.device("cpu"))
    assert (plain.model.config.branch, plain.steady.lr) == (1.0, pytest.approx(1e-2 / 2))


def test_the_factor_of_the_model_multiplies_both_branches_of_every_block():
    tokens = torch.randint(256, (2, 8))
    plain, halved = (Transformer(ModelConfig(32, depth=1, branch=branch)) for branch in (1.0, 0.5))
    for layer in halved.layers:
        layer.attention.out.weight.data *= 2
        layer.ffn.down.weight.data *= 2
    x = plain.embedding(tokens)

    cos, sin = rope(8, plain.config, x.device)
    torch.testing.assert_close(plain.layers[0](x, cos, sin), halved.layers[0](x, cos, sin))


def test_an_arm_with_unknown_depth_exponents_is_refused():
    with pytest.raises(ValueError, match="unknown depth exponents 'deep'. There are completep"):
        arm_rule("kosson2025+deep")


def test_arms_share_the_runs_at_the_depth_of_the_proxy_and_no_others():
    runs = deeper(["mup", "mup+completep"], [32, 64], [2, 4], [0.01], 1)
    groups = {}
    for run in runs:
        groups.setdefault(run.shared(), set()).add((run.arm, run.width, run.depth))
    assert {frozenset(group) for group in groups.values() if len(group) > 1} == {
        frozenset({("mup", width, 2), ("mup+completep", width, 2)}) for width in (32, 64)
    }


def test_a_run_has_the_settings_of_its_line():
    (run,) = deeper(["mup+completep"], [32], [2], [0.01], 1, steps=7, batch=3, context=16)
    assert run.settings == Settings(
        arm_rule("mup+completep"), base_width=32, depth=2, base_depth=2, lr=0.01, steps=7, batch=3, context=16, seed=0
    )
    (run,) = horizons([(4, 9)], [0.5], 1, width=32, lr=0.02, depth=2, context=16)
    settings = run.settings
    assert (settings.batch, settings.steps, settings.weight_decay, settings.lr) == (4, 9, 0.5, 0.02)


def test_the_report_has_widths_depths_horizons_and_batches_with_four_seeds_each():
    deep, long = deep_runs(), horizon_runs()
    assert {run.depth for run in deep} == {2, 4, 8}
    assert len({run.width for run in deep}) == 2
    for runs in (deep, long):
        assert {run.seed for run in runs} == {0, 1, 2, 3}
        assert len(set(runs)) == len(runs)
    assert {(run.batch, run.steps) for run in long} == set(itertools.product((4, 8, 16, 32), (75, 150, 300)))


def test_the_table_of_depth_has_the_power_of_the_depth_and_the_regret(tmp_path):
    rows = [
        {"arm": arm, "depth": depth, "lr": lr, "seed": seed}
        | {"loss": 2 + (math.log2(lr / 0.01) - slope * math.log2(depth / 2)) ** 2 / 20 + seed / 1000}
        for (arm, slope), depth, lr, seed in itertools.product(
            [("with", 0.0), ("without", -0.5)], (2, 4, 8), (0.0025, 0.005, 0.01, 0.02), (0, 1)
        )
    ]
    path = write(tmp_path / "depth.csv", rows)
    source, table = TABLES["depth"]
    assert source == "depth.csv"
    power = column(table(path), "power of the depth")
    assert float(power["with, width 32"].split()[0]) == pytest.approx(0.0, abs=0.01)
    assert float(power["without, width 32"].split()[0]) == pytest.approx(-0.5, abs=0.01)
    regret = column(table(path), "regret, 8")
    assert float(regret["without, width 32"].split()[0]) == pytest.approx(1 / 20, abs=0.001)
    paired = cells(TABLES["depth_paired"][1](path))[2]
    assert paired[:3] == ["without", "with", "32"]
    assert float(paired[3].split()[0]) == pytest.approx(-0.5, abs=0.01)


def test_the_tables_of_horizon_and_batch_have_the_powers_of_the_best_weight_decay(tmp_path):
    """Best decay: 0.72 at 8 windows and 150 steps, and it follows batch over tokens, as the law of constant tau says."""
    rows = [
        {"batch": batch, "steps": steps, "weight_decay": decay, "lr": 0.01, "seed": seed}
        | {"loss": 2 + math.log2(decay / (0.72 * 150 / steps)) ** 2 / 50 + seed / 1000}
        for (batch, steps), decay, seed in itertools.product(
            [(8, 75), (8, 150), (8, 300), (16, 75)], (0.12, 0.24, 0.48, 0.96, 1.92, 3.84), (0, 1)
        )
    ]
    path = write(tmp_path / "horizon.csv", rows)
    steps, batch = (
        column(TABLES["horizon"][1](path), "power of the steps"),
        column(TABLES["batch"][1](path), "power of the batch"),
    )
    assert list(steps) == ["8 windows per step"]
    assert float(steps["8 windows per step"].split()[0]) == pytest.approx(-1.0, abs=0.05)
    assert list(batch) == [f"{8 * 150 * 64} tokens"]
    assert float(next(iter(batch.values())).split()[0]) == pytest.approx(1.0, abs=0.05)


def test_losses_are_compared_at_the_same_lr_and_seed(tmp_path):
    rows = [
        {"arm": arm, "base_depth": 2, "depth": depth, "lr": lr, "seed": 0, "loss": loss}
        for arm, depth, lr, loss in [
            ("a", 2, 0.01, 2.0), ("a+b", 2, 0.01, 2.0), ("a", 4, 0.01, 2.5), ("a+b", 4, 0.01, 2.25),
            ("a", 4, 0.02, 3.0), ("a+b", 4, 0.02, 3.25), ("a", 4, 0.04, ""), ("a+b", 4, 0.04, 3.0), ("a", 8, 0.01, 1.0),
        ]
    ]  # fmt: skip
    path = write(tmp_path / "depth.csv", rows)
    assert scaling_findings.loss_differences(path) == {(32, 4): [-0.25, 0.25]}
    assert cells(TABLES["depth_losses"][1](path))[2] == ["32", "4", "1 of 2", "+0.000", "-0.250 to +0.250"]


def test_runs_that_diverged_have_no_loss(tmp_path):
    rows = [{"depth": 2, "lr": 0.01, "seed": 0, "loss": ""}, {"depth": 2, "lr": 0.02, "seed": 0, "loss": 2.0}]
    path = write(tmp_path / "depth.csv", rows)
    assert [row.loss for row in by_depth(path).rows] == [math.inf, 2.0]


def test_the_command_scaling_refuses_a_folder_that_cannot_be_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["scaling", "--out", str(tmp_path / "missing" / "folder")])
    assert ended.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_the_tables_of_the_report_follow_from_its_data():
    report = (DOCS / "scaling.md").read_text()
    assert refresh(report, DOCS / "data", TABLES) == report
    for name in TABLES:
        assert f"<!-- {name}:begin -->\n|" in report


def test_every_law_of_the_report_has_the_exponents_of_the_code():
    from lwadamw.width.laws import LAWS

    page = (DOCS / "scaling.md").read_text()
    for name, law in LAWS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        lr, decay, eps, beta = (cell.strip() for cell in row.strip("|").split("|")[1:5])
        for text, powers in ((lr, law.lr), (decay, law.wd), (eps, law.eps), (beta, law.beta)):
            assert _powers(text) == pytest.approx(tuple(powers)), (name, text)


def _powers(text):
    """Return the exponents of m_B, m_D and m_P in a cell such as `(m_B/m_D)^½` or `m_B m_D^-0.48`."""
    text = text.replace("½", "0.5")
    root = re.fullmatch(r"\((m_\w)/(m_\w)\)\^([\d.]+)", text)
    found = {root[1]: float(root[3]), root[2]: -float(root[3])} if root else {}
    if not root:
        top, _, bottom = text.partition("/")
        for part, sign in ((top, 1.0), (bottom, -1.0)):
            for name, power in re.findall(r"(m_\w)(?:\^(-?[\d.]+))?", part):
                found[name] = sign * float(power or 1)
    return tuple(found.get(name, 0.0) for name in ("m_B", "m_D", "m_P"))


def test_figures_of_depth_and_horizon_name_what_is_scaled(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"depth": d, "lr": lr, "seed": 0, "loss": 2 + d * lr} for d in (2, 8) for lr in (0.01, 0.02, 0.04)]
    figure = scaling_findings.draw_depth(write(tmp_path / "depth.csv", rows))
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert {"depth 2", "depth 8"} <= set(texts)
    assert not any("width 2" in text for text in texts if not text.startswith("a, "))


def test_horizons_of_one_batch_and_batches_of_one_number_of_tokens_are_told_apart(tmp_path):
    cells = [(8, 75), (8, 150), (16, 75), (4, 75)]
    rows = [
        {"batch": b, "steps": s, "lr": 0.01, "weight_decay": w, "seed": 0, "loss": w} for b, s in cells for w in (1, 2)
    ]
    path = write(tmp_path / "horizon.csv", rows)
    assert {(row.arm, row.width) for row in by_horizon(path, "steps").rows} == {
        ("8 windows per step", 75),
        ("8 windows per step", 150),
    }
    assert {row.arm for row in by_horizon(path, "batch").rows} == {f"{8 * 150 * 64} tokens"}


def test_the_claims_of_the_report_on_depth():
    path = DOCS / "data" / "depth.csv"
    found = scaling_findings.loss_differences(path)
    assert (sum(d < 0 for d in found[32, 8]), len(found[32, 8])) == (24, 24)
    assert (sum(d < 0 for d in found[64, 8]), len(found[64, 8])) == (18, 20)
    assert min(map(min, found.values())) == pytest.approx(-0.48, abs=0.005)
    best = {arm.name: {o.width: o.best_loss for o in arm.optima} for arm in analyse(by_depth(path).rows).arms}
    for width, losses in ((32, (2.43, 2.47, 2.40)), (64, (2.38, 2.42, 2.36))):
        without, by_rule = best[f"kosson2025, width {width}"], best[f"kosson2025+completep, width {width}"]
        assert (without[2], without[8], by_rule[8]) == pytest.approx(losses, abs=0.005)
    for arm in analyse(by_depth(path).rows).arms:
        assert arm.drift.slope_low < 0 < arm.drift.slope_high
    paired = [d for d in differences(curves_of(by_depth(path).rows)) if d.arm[-2:] == d.other[-2:]]
    assert len(paired) == 2
    assert all(d.slope_low < 0 < d.slope_high for d in paired)


def test_the_claims_of_the_report_on_horizon_and_batch():
    path = DOCS / "data" / "horizon.csv"
    by_steps = analyse(by_horizon(path, "steps").rows).arms
    assert [arm.name.split()[0] for arm in by_steps] == ["4", "8", "16", "32"]
    for arm in by_steps:
        assert arm.drift.slope_low < -1 < arm.drift.slope_high < -0.48
        best = {optimum.width: optimum.lr for optimum in arm.optima}
        assert 2.1 < best[75] < 4.3
        assert 0.37 < best[300] < 0.5
        assert 0.07 <= round(next(r.regret for r in arm.regrets if r.width == 300), 2) <= 0.11
    by_batch = analyse(by_horizon(path, "batch").rows).arms
    assert len(by_batch) == 4
    for arm in by_batch:
        assert 0 < arm.drift.slope_low < 1 < arm.drift.slope_high
        assert 0.855 < arm.drift.slope < 1.715
