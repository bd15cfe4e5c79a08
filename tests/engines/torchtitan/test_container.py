"""In torchtitan's containers, lwadamw takes the steps of torch's AdamW, follows a rule, has norms, and resumes exactly."""

from __future__ import annotations

import pytest

from tests.engines.killed import check, run_twice

pytestmark = pytest.mark.engines

pytest.importorskip("torchtitan")


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    return run_twice("tests.engines.torchtitan.script", tmp_path_factory.mktemp("container"))


def test_losses_are_those_of_torch_of_a_plain_loop_and_after_a_kill_of_the_straight_run(noted):
    check(noted)


def test_norms_have_the_names_of_torchtitan(noted):
    assert set(noted["names"]) == {
        "embed.weight",
        "layers.0.weight",
        "layers.0.bias",
        "norm.weight",
        "norm.bias",
        "out.weight",
    }
    assert "norms/weight_rms/layers.0.weight" in noted["logged"]
