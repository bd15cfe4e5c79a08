"""Figures show the numbers of their files, and the same file gives the same bytes."""

import csv
import math
import sys

import numpy as np
import pytest

from lwadamw.commands import main
from lwadamw.lab import figures, outcomes, plots, plots_norms, plots_runs, scaling_findings, synthetic
from lwadamw.lab.outcomes import Outcome, Outcomes
from lwadamw.lab.transfer import analyse

matplotlib = pytest.importorskip("matplotlib")

ARMS = ("mup", "fan2025")
WIDTHS = (64, 128, 256)
LRS = (0.005, 0.01, 0.02, 0.04)


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def random():
    return np.random.default_rng()


@pytest.fixture
def runs(random):
    """Runs with three seeds. At the largest width and the highest lr, one seed of mup and all seeds of fan2025 diverged."""

    def loss(arm, width, lr, seed):
        diverged = width == 256 and lr == LRS[-1] and (arm == "fan2025" or seed == "1")
        return (
            math.inf if diverged else 3 - math.log2(width) / 8 + math.log2(lr / 0.012) ** 2 / 20 + random.normal() / 99
        )

    rows = [
        Outcome(arm, width, lr, 0.1, seed, loss(arm, width, lr, seed))
        for arm in ARMS
        for width in WIDTHS
        for lr in LRS
        for seed in "012"
    ]
    return Outcomes("runs.csv", "val_loss", tuple(rows), "600 steps")


@pytest.fixture
def few(runs):
    """The runs of one arm at two widths, for tests that do not look at the numbers: they are drawn faster."""
    rows = tuple(row for row in runs.rows if row.arm == "mup" and row.width < 256)
    return Outcomes("runs.csv", "val_loss", rows, "600 steps")


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def visible(figure):
    return [axes for axes in figure.axes if axes.axison and axes.get_title()]


def test_transfer_shows_means_best_runs_seeds_and_divergence(runs):
    figure = plots_runs.transfer(runs)
    shown = {axes.get_title(): axes for axes in visible(figure)}
    assert list(shown) == list(ARMS)
    for arm, axes in shown.items():
        drawn = lines(axes)
        for width in WIDTHS:
            by_lr = {lr: [r.loss for r in runs.rows if (r.arm, r.width, r.lr) == (arm, width, lr)] for lr in LRS}
            means = {lr: np.mean(losses) for lr, losses in by_lr.items() if np.isfinite(losses).all()}
            np.testing.assert_allclose(drawn[f"width {width}"].get_xydata(), list(means.items()))
            best = min(means, key=means.get)
            np.testing.assert_allclose(drawn[f"_best {width}"].get_xydata(), [(best, means[best])])
            seeds = [tuple(line.get_ydata()) for line in axes.get_lines() if line.get_linewidth() < 0.7]
            assert tuple(losses[0] for losses in by_lr.values() if math.isfinite(losses[0])) in seeds
        assert list(drawn["_diverged 256"].get_xdata()) == [LRS[-1]]
        assert 0.9 < drawn["_diverged 256"].get_ydata()[0] < 1
        assert "_diverged 64" not in drawn
        assert axes.get_xscale() == "log"
        assert axes.get_ylabel() == ("val loss" if arm == ARMS[0] else "")
    assert "600 steps" in figure.get_supxlabel()


def test_transfer_shows_the_fitted_optimum_with_its_interval_and_open_ends_reach_the_edge(runs):
    rows = [r for r in runs.rows if r.arm == "mup" and math.isfinite(r.loss)]
    best = analyse(rows).arms[0].optima[0]
    # At width 32, the lowest lr of the grid is the best.
    rows += [Outcome("mup", 32, lr, 0.1, "0", 3.0 + i) for i, lr in enumerate(LRS)]
    (axes,) = visible(plots_runs.transfer(Outcomes("runs.csv", "loss", tuple(rows))))
    bars = [line for line in axes.get_lines() if line.get_linewidth() == 2.2]
    assert len(bars) == 4
    low, high = axes.get_xlim()
    assert LRS[0] / 2 < low < LRS[0] < LRS[-1] < high < 2 * LRS[-1]
    assert bars[0].get_xdata()[0] < low < bars[0].get_xdata()[1] < high
    assert list(np.log2(bars[1].get_xdata())) == pytest.approx(np.log2([best.low, best.high]), abs=0.3)
    assert lines(axes)[f"_optimum {best.width}"].get_xdata()[0] == pytest.approx(best.lr)
    heights = [float(bar.get_ydata()[0]) for bar in bars]
    assert len(set(heights)) == len(bars)
    bottom, top = axes.get_ylim()
    lowest = min(line.get_ydata().min() for line in axes.get_lines() if line.get_linewidth() == 1.8)
    assert max(heights) < (lowest - bottom) / (top - bottom), "a bar covers a curve"


@pytest.mark.parametrize(("given", "expected"), [({"lr": 0.0123}, 0.0123), ({"proxy": 256}, None), ({}, None)], ids=str)
def test_the_dotted_line_of_transfer_is_at_the_lr_of_the_regret(runs, given, expected):
    for axes in visible(plots_runs.transfer(runs, **given)):
        drawn = lines(axes)
        at = drawn[f"_best {given.get('proxy', min(WIDTHS))}"].get_xdata()[0] if expected is None else expected
        assert drawn["_lr of the regret"].get_xdata()[0] == at


def test_a_run_with_a_huge_loss_does_not_stretch_the_loss_axis(runs):
    rows = [*runs.rows, Outcome("mup", 64, 0.08, 0.1, "0", 50.0)]
    axes = visible(plots_runs.transfer(Outcomes("runs.csv", "loss", tuple(rows))))[0]
    low, high = axes.get_ylim()
    assert low < min(row.loss for row in rows)
    assert high < 5


def test_the_heat_map_shows_every_loss_and_the_ridge_and_the_lines_of_constant_products(random):
    decays, lrs = (0.5, 1.0, 2.0), [0.0025 * 2**i for i in range(6)]

    def loss(lr, wd):
        return math.inf if lr * wd > 0.1 else (math.log2(lr / 0.014) + math.log2(wd)) ** 2 + 2

    rows = [Outcome("mup", 64, lr, wd, None, loss(lr, wd)) for wd in decays for lr in lrs]
    random.shuffle(rows)
    figure = plots_runs.heatmap(Outcomes("map.csv", "loss", tuple(rows)))
    (axes,) = visible(figure)
    table = np.array([[loss(lr, wd) for lr in lrs] for wd in decays])
    drawn = np.ma.filled(axes.collections[0].get_array(), math.nan).reshape(table.shape)
    np.testing.assert_array_equal(drawn, np.where(np.isfinite(table), table, math.nan))
    numbers = {text.get_text() for text in axes.texts}
    assert numbers == {f"{loss:.3f}" for loss in table.flat if math.isfinite(loss)}
    assert len(axes.patches) == np.isinf(table).sum() == 1
    drawn = lines(axes)
    np.testing.assert_allclose(drawn["best lr of a decay"].get_xydata(), [(0.028, 0.5), (0.014, 1), (0.007, 2)])
    for name, slope in (("ridge", -1), ("lr·wd constant", -1), ("lr/wd constant", 1)):
        x, y = np.log2(drawn[name].get_xydata()).T
        assert np.diff(x) / np.diff(y) == pytest.approx(slope)
    with pytest.raises(ValueError, match=r"map\.csv: no arm has runs at three weight decays above 0 and one width"):
        plots_runs.heatmap(Outcomes("map.csv", "loss", tuple(row for row in rows if row.weight_decay != 2)))


def test_power_laws_are_drawn_with_their_exponents(random):
    rows = [
        {"arm": arm, "width": str(width), "seed": str(seed), "gain": str(random.lognormal(0, 0.05) * width**power)}
        for arm, power in (("mup", 0.5), ("fan2025", -0.25))
        for width in WIDTHS
        for seed in range(3)
    ]
    (axes,) = visible(plots_norms.against_width(rows, [["", "gain"]], "title"))
    drawn = lines(axes)
    for arm in ARMS:
        here = [row for row in rows if row["arm"] == arm]
        np.testing.assert_allclose(
            drawn[f"_runs {arm}"].get_xydata(), [(float(r["width"]), float(r["gain"])) for r in here]
        )
        x, y = np.log(drawn[f"_runs {arm}"].get_xydata()).T
        slope, intercept = np.polyfit(x, y, 1)
        (fit,) = [line for name, line in drawn.items() if name.startswith(f"{arm} {slope:+.2f} ± ")]
        np.testing.assert_allclose(fit.get_ydata(), np.exp(intercept) * fit.get_xdata() ** slope)


@pytest.mark.parametrize(("variant", "matrices"), [("relu", ("in", "out")), ("swiglu", ("in", "gate", "out"))])
def test_the_synthetic_figure_has_the_panels_of_its_variant(variant, matrices, tmp_path):
    columns = {"gain_network": "", **{f"{s}_{m}": "" for m in ("in", "out", "gate") for s in synthetic.PER_MATRIX}}
    assert {*columns, "spectrum_gate"} <= {*synthetic.RESULT}
    rows = [
        {"arm": "mup", "variant": v, "width": w, "seed": 0} | dict.fromkeys(columns, w if v == variant else 1)
        for v in synthetic.VARIANTS
        for w in WIDTHS
    ]
    write(tmp_path / "synthetic.csv", rows)
    (entry,) = [entry for entry in figures.FIGURES if entry.out == f"synthetic_{variant}.svg"]
    shown = visible(entry.draw(tmp_path / "synthetic.csv"))
    rows = (("gain network", "gain"), ("rms in", "top"), ("rms out", "bulk"))
    titles = [title for first, s in rows for title in (first, *(f"{s} {m}" for m in matrices))]
    assert [axes.get_title() for axes in shown] == titles
    assert all("mup +1.00 ± 0.00" in lines(axes) for axes in shown)


def test_spectra_are_drawn_from_long_lines_and_from_pairs(random):
    values = {width: np.sort(random.uniform(1, 9, 3))[::-1] for width in WIDTHS}
    pairs = [
        {
            "arm": "mup",
            "variant": "relu",
            "width": str(w),
            "seed": "0",
            "spectrum_in": f"1:{v[0]} 2:{v[1]} 4:{v[2]}",
            "spectrum_gate": "",
        }
        for w, v in values.items()
    ]
    rows = figures.long_spectra(pairs)
    assert figures.long_spectra(rows) == rows
    (axes,) = visible(plots_norms.spectra(rows, "title"))
    assert axes.get_title() == "mup, relu in"
    for width in WIDTHS:
        np.testing.assert_allclose(
            lines(axes)[f"width {width}"].get_xydata(), [*zip((1, 2, 4), values[width], strict=True)]
        )


def test_series_show_the_mean_over_seeds_of_the_median_over_matrices(random):
    values = random.lognormal(size=(2, 5, 3))  # seeds, steps, matrices
    rows = [
        {"arm": "mup", "width": "64", "lr": lr, "weight_decay": "1", "seed": str(seed), "step": str(10 * step),
         "name": str(name), "statistic": statistic, "value": str(values[seed, step, name])}
        for lr in ("0.01", "0.02")
        for statistic in ("gain", "other")
        for seed, step, name in np.ndindex(2, 5, 3)
    ]  # fmt: skip
    first, second = visible(plots_norms.series(rows, "gain", "title"))
    assert (first.get_title(), second.get_title()) == ("mup, lr 0.01, wd 1", "mup, lr 0.02, wd 1")
    medians = np.median(values, axis=2)
    drawn = first.get_lines()
    np.testing.assert_allclose(
        lines(first)["width 64"].get_xydata(), [*zip(range(0, 50, 10), medians.mean(axis=0), strict=True)]
    )
    assert len(drawn) == 3
    np.testing.assert_allclose(drawn[0].get_ydata(), medians[0])
    with pytest.raises(ValueError, match="no row has statistic 'angle'; there are gain, other"):
        plots_norms.series(rows, "angle", "title")


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_the_same_runs_give_the_same_bytes(suffix, few, tmp_path, monkeypatch):
    for name, epoch in (("first", "0"), ("second", "99999999")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        plots.save(plots_runs.transfer(few), tmp_path / (name + suffix))
    assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()


def test_the_matplotlib_settings_of_this_machine_do_not_change_a_figure(few, tmp_path):
    plots.save(plots_runs.transfer(few), tmp_path / "plain.svg")
    with matplotlib.rc_context({"font.size": 20, "axes.linewidth": 9, "svg.hashsalt": "other"}):
        plots.save(plots_runs.transfer(few), tmp_path / "rc.svg")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "plain.svg").read_bytes() == (tmp_path / "rc.svg").read_bytes()


def test_another_suffix_is_refused(few, tmp_path):
    with pytest.raises(ValueError, match=r"x\.gif' ends in none of \.svg, \.png, \.pdf"):
        plots.save(plots_runs.transfer(few), tmp_path / "x.gif")


def test_the_command_makes_every_figure_that_has_a_file_and_names_the_others(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "figures"
    data.mkdir()
    write(data / "transfer.csv", [{"arm": "a", "width": w, "lr": lr, "loss": lr + w} for w in WIDTHS for lr in LRS])
    write(data / "synthetic_spectra.csv", [{"arm": "a", "width": 64, "seed": 0, "spectrum_in": "1:2 2:1"}])
    assert main(["figures", "--data", str(data), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    made = {line.partition(": from ")[0] for line in printed if ": from " in line}
    assert made == {str(path) for path in out.iterdir()}
    assert {path.name for path in out.iterdir()} == {"transfer.svg", "synthetic_spectra.svg"}
    assert f"heatmap.svg: skipped, there is no {data / 'heatmap.csv'}" in printed
    assert len(printed) == len(figures.FIGURES) + len(scaling_findings.FIGURES)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("transfer.csv", {"arm": "a"}, "transfer.csv: no column 'width'"),
        ("series.csv", {"arm": "a", "width": "64"}, "series.csv: no column 'lr', 'weight_decay'"),
        ("synthetic_spectra.csv", {"arm": "a", "width": "64", "seed": "0"}, "neither a column 'singular_value'"),
    ],
)
def test_a_file_without_a_needed_column_gives_exit_code_2(name, row, message, tmp_path, capsys):
    write(tmp_path / name, [row])
    with pytest.raises(SystemExit) as stopped:
        main(["figures", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_folder_gives_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["figures", "--data", str(tmp_path / "no")])
    assert stopped.value.code == 2
    assert "is no folder" in capsys.readouterr().err


def test_the_transfer_command_draws(tmp_path, capsys):
    write(tmp_path / "runs.csv", [{"arm": "a", "width": w, "lr": lr, "loss": lr + w} for w in WIDTHS for lr in LRS])
    assert main(["transfer", str(tmp_path / "runs.csv"), "--plot", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert f"figure: {tmp_path / 'x.png'}" in capsys.readouterr().out


def test_without_matplotlib_the_command_prints_the_table_and_how_to_install_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path / "runs.csv", [{"arm": "a", "width": 64, "lr": lr, "loss": lr} for lr in LRS])
    with pytest.raises(RuntimeError, match="no figure without matplotlib"):
        plots_runs.transfer(outcomes.read(tmp_path / "runs.csv"))
    assert main(["transfer", str(tmp_path / "runs.csv"), "--plot", str(tmp_path / "x.png")]) == 0
    printed = capsys.readouterr().out
    assert "width  best lr" in printed
    assert 'pip install "lwadamw[lab]"' in printed
    assert not (tmp_path / "x.png").exists()


def test_nothing_of_the_heat_map_is_cut_or_covered():
    """The caption is inside the figure, and no number lies on a circle."""
    rows = [Outcome("mup", 64, lr, wd, None, (math.log2(lr / 0.014)) ** 2) for wd in (0.5, 1.0, 2.0) for lr in LRS]
    caption = (
        "600 steps, 307200 tokens, 2 seeds, batch 8, context 64, depth 2, data standard library, version "
        + "0.1.0, " * 9
    )
    figure = plots_runs.heatmap(Outcomes("map.csv", "loss", tuple(rows), caption))
    figure.draw_without_rendering()
    (below,) = (text for text in figure.texts if "600 steps" in text.get_text())
    assert figure.bbox.x0 <= below.get_window_extent().x0 < below.get_window_extent().x1 <= figure.bbox.x1
    (axes,) = visible(figure)
    circles = axes.transData.transform(lines(axes)["best lr of a decay"].get_xydata())
    radius = 2.5 * figure.dpi / 72
    for text in axes.texts:
        box = text.get_window_extent()
        for x, y in circles:
            apart = max(box.x0 - x, x - box.x1, box.y0 - y, y - box.y1)
            assert apart > radius, text.get_text()
