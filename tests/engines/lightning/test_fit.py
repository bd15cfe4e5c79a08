"""Under Lightning and Fabric, lwadamw takes the steps of torch's AdamW, clips, follows a rule, logs norms, resumes exactly."""

from __future__ import annotations

import csv

import pytest

from tests.engines.killed import STEPS, check, run_twice

pytestmark = pytest.mark.engines

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def noted(folder):
    return run_twice("tests.engines.lightning.script", folder)


def test_losses_are_those_of_torch_of_a_plain_loop_and_after_a_kill_of_the_straight_run(noted):
    check(noted)
    assert min(noted["multipliers"]) == 0.25


def test_under_fabric_losses_are_those_of_torch_of_a_plain_loop_and_after_a_kill_of_the_straight_run(noted):
    check(noted["fabric"])


def test_the_optimizer_that_fabric_returns_has_norms_and_is_watched(noted):
    assert noted["norms of the wrapper"] > 0
    assert noted["fabric logged"]["weight_rms/1.weight"] > 0


def test_the_wrapped_optimizer_of_the_module_has_norms_and_state(noted):
    assert len(noted["inside"]) == STEPS
    for name, grad, states in noted["inside"]:
        assert name == "LightningAdamW"
        assert 0 < grad <= 0.2 * (1 + 1e-6)
        assert states == 4


def test_the_callback_moves_clipping_into_the_step_in_mixed_precision_too(noted):
    assert noted["clips"] == 0.2
    without, (losses, grad) = noted["bf16"]
    assert "does not allow for gradient clipping" in without
    assert len(losses) == 3
    assert 0 < grad <= 0.2 * (1 + 1e-6)


def test_norms_go_to_the_loggers_of_the_trainer(noted, folder):
    rows = list(csv.DictReader((folder / "logs" / "metrics.csv").read_text().splitlines()))
    steps = [int(row["step"]) for row in rows if float(row["norms/weight_rms/1.weight"] or 0) > 0]
    assert steps == [1, 5, 10, 15, 20]


def test_with_roles_only_totals_and_medians_of_roles_are_logged_and_no_single_parameter(folder):
    header = (folder / "roles" / "metrics.csv").read_text().splitlines()[0].split(",")
    logged = {name for name in header if name.startswith("norms/")}
    assert {name.split("/")[1] for name in logged} == {"role"}
    assert {f"norms/role/matrix/{kind}_norm" for kind in ("weight", "update", "grad")} <= logged


def test_the_monitor_resumes_with_what_it_knew(noted):
    for name in ("weight_rms", "relative_update", "taus", "expected_rms"):
        assert noted["resumed last"][name] == pytest.approx(noted["last"][name], rel=1e-12, nan_ok=True)
