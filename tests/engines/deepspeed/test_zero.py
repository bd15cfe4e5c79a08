"""Under DeepSpeed's ZeRO, lwadamw takes the steps of torch's AdamW, counts a step once, has norms, and resumes exactly."""

from __future__ import annotations

import pytest

from tests.engines.killed import STEPS, check, run_twice

pytestmark = pytest.mark.engines

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    return run_twice("tests.engines.deepspeed.script", tmp_path_factory.mktemp("zero"))


def test_losses_are_those_of_torch_and_after_a_kill_of_the_straight_run(noted):
    check(noted)


def test_a_step_over_all_groups_counts_once_and_sorts_parameters_once(noted):
    assert noted["counted"] == STEPS
    assert noted["backends kept"] == [True] * 3
    assert noted["names"] == ["flat.0", "flat.1", "flat.2"]
    assert noted["weights"] == pytest.approx(noted["expected"], rel=1e-6)
