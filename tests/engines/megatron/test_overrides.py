"""config_overrides: a width rule in Megatron's groups, with the same roles and multipliers however the model is split."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from tests.sharded.processes import run

from . import checkpoints, training
from .training import Case

pytestmark = pytest.mark.engines

RULE, BASE = "kosson2025", 8
DENSE = (Case("fp32"), Case("fp32", tp=2), Case("distributed bf16", tp=2))


def ours(config: Any, chunks: list[Any]) -> Any:
    from lwadamw.engines.megatron import config_overrides

    return config_overrides(config, chunks, base_width=BASE, rule=RULE)


def folded(config: Any, chunks: list[Any]) -> Any:
    """The same rule in Megatron's own words, for torch's AdamW."""
    out = {}
    for key, group in ours(config, chunks).items():
        lr = group["width_lr_mult"]
        out[key] = {
            "max_lr": config.lr * lr,
            "min_lr": config.min_lr * lr,
            "wd_mult": group["width_wd_mult"] * group.get("wd_mult", 1.0),
            "lr_mult": group["lr_mult"],
        }
    return out


def work(folder: str) -> dict[Any, Any]:
    """In each of two processes: groups, losses and errors."""
    out: dict[Any, Any] = {}
    for case in (*DENSE, Case("distributed fp32", ep=2)):
        with training.layout(case), training.optimizer_of("ours", case, backend="torch"):
            out[case, "groups"] = _groups(case)
    for case in DENSE[:2]:
        with training.layout(case):
            with training.optimizer_of("torch", case):
                out[case, "folded"] = training.train(training.build(case, layers=1, overrides=folded), range(20))
            with training.optimizer_of("ours", case):
                out[case, "ours"] = training.train(training.build(case, layers=1, overrides=ours), range(20))
            with training.optimizer_of("ours", case):
                out[case, "without"] = training.train(training.build(case, layers=1), range(20))
    for case, sharding in ((DENSE[1], ""), (DENSE[2], "dp_reshardable"), (Case("distributed bf16"), "dp_reshardable")):
        with training.layout(case), training.optimizer_of("ours", case):
            made = training.build(case, layers=1, overrides=ours)
            training.train(made, range(3))
            checkpoints.save(made, case, f"{folder}/{len(out)}", sharding)
            went_on = training.train(made, range(3, 6))
            again = training.build(case, seed=5, layers=1, overrides=ours)
            checkpoints.load(again, case, f"{folder}/{len(out)}", sharding)
            out[case, "resumed"] = (
                went_on,
                training.train(again, range(3, 6)),
                _multipliers(made) == _multipliers(again),
            )
    out["errors"] = _errors()
    return out


def _multipliers(made: Any) -> list[Any]:
    return [
        (g["role"], g["width_lr_mult"], g["width_wd_mult"], g["lr_mult"]) for o in made.inner() for g in o.param_groups
    ]


def _groups(case: Case) -> dict[str, tuple[Any, ...]]:
    """Role and multipliers of each parameter by name. Megatron's groups have them too."""
    from lwadamw.engines.megatron.overrides import unwrapped

    found: dict[str, tuple[Any, ...]] = {}
    overrides: dict[Any, Any] = {}

    def kept(config: Any, chunks: list[Any]) -> Any:
        overrides.update(ours(config, chunks))
        return overrides

    made = training.build(case, layers=1, overrides=kept)
    for (name, p), bare in zip(
        made.model.named_parameters(), dict(unwrapped(made.model).named_parameters()), strict=True
    ):
        (group,) = [own for key, own in overrides.items() if key.matches(p, name)]
        found[bare] = (group["role"], group["width_lr_mult"], group["width_wd_mult"], group["lr_mult"])
    assert set(found.values()) <= set(_multipliers(made))
    return found


def _config(made: Any) -> Any:
    return getattr(made.optimizer, "chained_optimizers", [made.optimizer])[0].config


def _errors() -> dict[str, str]:
    import torch.distributed as dist

    from lwadamw.engines.megatron import config_overrides

    case, out = DENSE[0], {}
    with training.layout(case), training.optimizer_of("ours", case):
        made = training.build(case, layers=1)
        config = _config(made)
        try:
            config_overrides(config, [made.model], base_width=8)
        except ValueError as error:
            out["too late"] = str(error)
        made.optimizer = made.scheduler = None
        gc.collect()
        inner = made.model.module
        wrong: dict[str, dict[str, Any]] = {
            "lr_mult": {"standard": {"*": {"lr_mult": 0.5}}},
            # Only one process sees the mistake.
            "unknown pattern": {"roles": {"nothing.*": "matrix"}},
            "width": {"width": 12 if dist.get_rank() else None},
            "depth": {"rule": "completep"},
        }
        for name, arguments in wrong.items():
            try:
                config_overrides(config, [made.model], base_width=8, **arguments)
            except ValueError as error:
                out[name] = str(error)
        try:
            config_overrides(config, made.model, base_width=8)
        except TypeError as error:
            out["no list"] = str(error)
        inner.config.use_mup = True
        try:
            config_overrides(config, [made.model], base_width=8)
        except ValueError as error:
            out["mup"] = str(error)
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run(2, work, str(tmp_path_factory.mktemp("overrides")), seconds=400)


def test_roles_and_multipliers_are_the_same_whole_and_split(results):
    for result in results:
        whole = result[DENSE[0], "groups"]
        assert whole == results[0][DENSE[0], "groups"]
        for case in DENSE[1:]:
            assert result[case, "groups"] == whole
    m = training.HIDDEN / BASE
    assert whole["output_layer.weight"][:3] == ("output", 1 / m, 0.0)
    assert whole["embedding.word_embeddings.weight"][:3] == ("vector", 1.0, 0.0)
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        assert whole[f"decoder.layers.0.{name}.weight"][:3] == ("matrix", 1 / m, m)
        assert whole[f"decoder.layers.0.{name}.bias"][0] == "vector"


def test_routers_are_outputs_and_experts_are_matrices(results):
    groups = results[0][Case("distributed fp32", ep=2), "groups"]
    assert groups["decoder.layers.0.mlp.router.weight"][0] == "output"
    assert groups["decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"][:3] == ("matrix", 0.5, 2.0)


@pytest.mark.parametrize("case", DENSE[:2], ids=str)
def test_a_rule_takes_the_steps_of_torch_with_folded_learning_rates(results, case):
    for result in results:
        reference = result[case, "folded"]
        assert max(abs(a - b) for a, b in zip(result[case, "ours"], reference, strict=True)) <= 1e-6
        assert max(abs(a - b) for a, b in zip(result[case, "without"], reference, strict=True)) > 1e-3


@pytest.mark.parametrize("case", [*DENSE[1:], Case("distributed bf16")], ids=str)
def test_width_groups_are_found_again_in_a_checkpoint(results, case):
    for result in results:
        went_on, again, same = result[case, "resumed"]
        assert went_on == again
        assert same


def test_wrong_uses_have_the_same_error_on_every_process(results):
    first, second = (result["errors"] for result in results)
    assert first == second
    assert "lr_mult=0.5" in first["lr_mult"]
    assert "'nothing.*' matches no parameter on any process" in first["unknown pattern"]
    assert "12" in first["width"]
    assert "'completep' scales residual blocks" in first["depth"]
    assert "[model]" in first["no list"]
    assert "use_mup=False" in first["mup"]
    assert "Call config_overrides before get_megatron_optimizer" in first["too late"]
