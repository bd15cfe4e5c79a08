"""Under torchtitan's Trainer, lwadamw takes the steps of torch's AdamW, follows a rule, logs norms, and resumes exactly."""

from __future__ import annotations

import pytest

from tests.engines.killed import check, run_twice

pytestmark = pytest.mark.engines

pytest.importorskip("torchtitan")


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    return run_twice("tests.engines.torchtitan.trainer", tmp_path_factory.mktemp("trainer"))


def test_losses_are_those_of_torch_of_a_plain_loop_and_after_a_kill_of_the_straight_run(noted):
    check(noted)


def test_norms_go_to_the_logger_of_torchtitan(noted):
    assert noted["class"].startswith("lwadamw.")
    assert list(noted["logged"]) == ["1", "5", "10", "15", "20"]
    assert all(values["norms/weight_rms/lm_head.weight"] > 0 for values in noted["logged"].values())


def test_the_monitor_of_a_resumed_run_is_that_of_the_straight_run(noted):
    assert noted["resumed steps"] == [15, 20]
    assert noted["resumed monitor"] == noted["monitor"]


def test_roles_only_logs_nothing_of_single_parameters(noted):
    assert noted["resumed keys"] == []


def test_the_config_of_the_example_has_a_watched_trainer(noted):
    assert noted["config"] == ["watched.<locals>.WatchedTrainer.Config", 64]
