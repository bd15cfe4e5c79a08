"""Under transformers.Trainer and accelerate, lwadamw steps as torch's AdamW, follows a rule, logs norms, resumes exactly."""

from __future__ import annotations

import pytest

from tests.engines.killed import HALF, TOLERANCE, check, run_twice

pytestmark = pytest.mark.engines

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    return run_twice("tests.engines.huggingface.script", tmp_path_factory.mktemp("trainer"))


def test_losses_are_those_of_torch_of_a_plain_loop_and_after_a_kill_of_the_straight_run(noted):
    check(noted)
    assert min(noted["multipliers"]) == 0.5


def test_norms_are_in_the_logs_of_the_trainer(noted):
    assert [entry["step"] for entry in noted["logged"]] == [1, 5, 10, 15, 20]
    for entry in noted["logged"]:
        assert entry["norms/weight_rms/model.layers.0.mlp.up_proj.weight"] > 0


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs", "mixin"])
def test_each_way_of_passing_the_optimizer_trains_alike_and_resumes(noted, way, fold):
    losses = noted["ways"][f"{way} {fold}"]
    assert losses == (noted["ways"]["mixin True"] if fold else noted["rule"])
    assert losses == pytest.approx(noted["plain"], abs=TOLERANCE, rel=0)
    assert noted["ways resumed"][f"{way} {fold}"] == losses[HALF:]


def test_with_roles_only_totals_and_medians_of_roles_are_logged_and_no_single_parameter(noted):
    assert {name.split("/")[1] for name in noted["by role"]} == {"role"}
    assert {f"norms/role/matrix/{kind}_norm" for kind in ("weight", "update", "grad")} <= set(noted["by role"])


def test_the_monitor_resumes_with_what_it_knew(noted):
    for name in ("weight_rms", "relative_update", "taus", "expected_rms"):
        assert noted["resumed last"][name] == pytest.approx(noted["last"][name], rel=1e-12, nan_ok=True)


def test_under_accelerate_losses_are_those_of_torch_of_a_plain_loop_and_after_a_kill_of_the_straight_run(noted):
    check(noted["accelerate"])


def test_the_optimizer_that_accelerate_returns_is_watched_and_the_one_inside_has_norms(noted):
    assert noted["norms inside"] > 0
    assert noted["accelerate logged"]["weight_rms/model.layers.0.mlp.up_proj.weight"] > 0
