"""The report docs/width_transfer.md: its tables and claims follow from the committed runs."""

import csv
import math
from pathlib import Path

import pytest

from lwadamw.lab.findings import TABLES, fit, markdown, refresh

DOCS = Path(__file__).parents[2] / "docs"
DATA = DOCS / "data"

# Width exponent of the gain of the ReLU network under noise. The gain is (lr/wd) d^1.5 with the rule's lr and wd, to +-0.15.
GAIN = {"standard": 1.57, "mup": 0.57, "fan2025": 0.06, "kosson2025": -0.46, "balanced": 0.06}


@pytest.fixture(scope="module")
def synthetic():
    with (DATA / "synthetic.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_tables_of_the_report_follow_from_its_data():
    report = (DOCS / "width_transfer.md").read_text()
    assert refresh(report, DATA) == report
    for name in TABLES:
        assert f"<!-- {name}:begin -->\n|" in report


@pytest.mark.parametrize("arm", GAIN)
def test_noise_gives_the_gain_its_exponent_under_every_rule(synthetic, arm):
    rows = [row for row in synthetic if row["arm"] == arm and row["variant"] == "relu"]
    assert {int(row["width"]) for row in rows} == {64, 128, 256, 512}
    assert len({row["seed"] for row in rows}) >= 3
    assert fit(rows, "gain_network").slope == pytest.approx(GAIN[arm], abs=0.15)


def test_noise_takes_every_weight_to_its_steady_state(synthetic):
    for row in synthetic:
        assert float(row["taus"]) == pytest.approx(6, rel=0.01)
        for name in ("in", "out", "gate"):
            if row[f"rms_{name}"]:
                assert float(row[f"rms_{name}"]) == pytest.approx(float(row["steady_rms"]), rel=0.1)
    for variant, name in (("relu", "in"), ("relu", "out"), ("swiglu", "in"), ("swiglu", "out"), ("swiglu", "gate")):
        rows = [row for row in synthetic if row["arm"] == "standard" and row["variant"] == variant]
        assert fit(rows, f"rms_{name}").slope == pytest.approx(0, abs=0.05)


def test_the_top_and_the_bulk_of_a_spectrum_have_different_exponents(synthetic):
    rows = [row for row in synthetic if row["arm"] == "standard" and row["variant"] == "relu"]
    for name in ("in", "out"):
        assert fit(rows, f"top_{name}").slope == pytest.approx(1.0, abs=0.1)
        assert fit(rows, f"bulk_{name}").slope == pytest.approx(0.5, abs=0.1)


def test_an_exponent_uses_only_the_seeds_that_have_every_width():
    rows = [
        {"seed": seed, "width": str(width), "x": repr(3 * width**slope)}
        for seed, slope in (("0", 0.5), ("1", 0.7), ("2", 9.0))
        for width in (64, 128, 256)
        if (seed, width) != ("2", 256)
    ]
    found = fit(rows, "x")
    assert found.slope == pytest.approx(0.6)
    assert found.spread == pytest.approx(math.sqrt(0.02))


def test_a_refresh_changes_only_the_tables_of_a_report():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    text = "before\n<!-- steady:begin -->\nold\n<!-- steady:end -->\nafter\n<!-- other:begin -->\nkept\n<!-- other:end -->\n"
    fresh = refresh(text, DATA)
    assert fresh.startswith("before\n<!-- steady:begin -->\n| weight RMS")
    assert fresh.endswith("\n<!-- steady:end -->\nafter\n<!-- other:begin -->\nkept\n<!-- other:end -->\n")
    assert "old" not in fresh
