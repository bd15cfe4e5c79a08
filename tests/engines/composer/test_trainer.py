"""Under Composer's Trainer, lwadamw takes the steps of torch's AdamW, follows a rule, logs norms, and resumes exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.engines.killed import STEPS, check, run_twice

pytestmark = pytest.mark.engines

if not Path(sys.prefix, "composer").is_dir():
    pytest.skip("Composer is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    return run_twice("tests.engines.composer.script", tmp_path_factory.mktemp("trainer"))


def test_losses_are_those_of_torch_of_a_plain_loop_and_after_a_kill_of_the_straight_run(noted):
    check(noted)
    assert min(noted["multipliers"]) == 0.25


def test_norms_go_to_the_loggers_of_the_trainer_at_the_batch_of_their_step(noted):
    assert [batch for batch, _ in noted["logged"]] == [1, 5, 10, 15, 20]
    assert all(value > 0 for _, value in noted["logged"])


def test_the_monitor_resumes_with_what_it_knew(noted):
    for name in ("weight_rms", "relative_update", "taus", "expected_rms"):
        assert noted["resumed last"][name] == pytest.approx(noted["last"][name], rel=1e-12, nan_ok=True)


def test_the_optimizer_monitor_of_composer_logs_the_norms_of_the_step(noted):
    found = noted["by composer"]
    assert found["logged"] == {"param": [[STEPS, found["weight"]]], "update": [[STEPS, found["update"]]]}
    assert found["clipped"][0][1] == pytest.approx(0.2, rel=1e-5)


def test_with_roles_only_totals_and_medians_of_roles_are_logged_and_no_single_parameter(noted):
    assert {name.split("/")[1] for name in noted["by role"]} == {"role"}
    assert {f"norms/role/matrix/{kind}_norm" for kind in ("weight", "update", "grad")} <= set(noted["by role"])
    assert noted["last of a role"] == pytest.approx(sum(x**2 for x in noted["norms"]) ** 0.5, rel=1e-12)
