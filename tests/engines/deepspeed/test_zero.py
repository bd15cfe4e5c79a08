"""Under DeepSpeed's ZeRO, lwadamw takes the steps of torch's AdamW, counts a step once, has norms, and resumes exactly."""

from __future__ import annotations

import pytest

from tests.engines.killed import STEPS, TOLERANCE, check, run_twice

pytestmark = pytest.mark.engines

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def noted(folder):
    return run_twice("tests.engines.deepspeed.script", folder)


def test_losses_are_those_of_torch_of_a_plain_loop_and_after_a_kill_of_the_straight_run(noted):
    check(noted)


def test_stage_2_takes_the_steps_of_stage_1(noted):
    assert noted["torch, stage 2"] == pytest.approx(noted["torch"], abs=TOLERANCE, rel=0)
    assert noted["rule, stage 2"] == pytest.approx(noted["rule"], abs=TOLERANCE, rel=0)


def test_norms_are_in_the_logs_of_deepspeed(noted, folder):
    rows = (folder / "logs" / "run" / "norms_weight_rms_flat.0.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == [1, 5, 10, 15, 20]
    assert all(float(row.split(",")[1]) > 0 for row in rows[1:])


def test_a_step_over_all_groups_counts_once_and_sorts_parameters_once(noted):
    assert noted["counted"] == STEPS
    assert noted["backends kept"] == [True] * 3
    assert noted["names"] == ["flat.0", "flat.1", "flat.2"]
    assert noted["weights"] == pytest.approx(noted["expected"], rel=1e-6)
