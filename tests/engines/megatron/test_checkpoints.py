"""A killed run goes on from Megatron's checkpoint to the last bit, and checkpoints go to Transformer Engine and back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.sharded.processes import run

from . import checkpoints, training
from .training import Case

pytestmark = pytest.mark.engines

BEFORE, AFTER = range(4), range(4, 8)
# Case, how DistributedOptimizer lays out its state, who saves, who loads.
EXCHANGES = (
    (Case("fp32", tp=2), "", "ours", "ours"),
    (Case("bf16"), "", "ours", "ours"),
    (Case("distributed fp32"), "dp_reshardable", "ours", "ours"),
    (Case("distributed fp32", ep=2), "dp_reshardable", "ours", "ours"),
    (Case("distributed bf16", tp=2), "fully_reshardable", "ours", "ours"),
    (Case("aware"), "fully_reshardable", "ours", "ours"),
    (Case("aware"), "dp_reshardable", "stand-in", "ours"),
    (Case("aware"), "dp_reshardable", "ours", "stand-in"),
    (Case("aware remainder"), "dp_reshardable", "ours", "ours"),
    (Case("aware remainder"), "fully_reshardable", "ours", "ours"),
    (Case("aware remainder"), "dp_reshardable", "stand-in", "ours"),
    (Case("aware remainder"), "dp_reshardable", "ours", "stand-in"),
    (Case("bf16"), "", "torch", "ours"),
    (Case("bf16"), "", "ours", "stand-in"),
)


def save_all(folder: str) -> None:
    """Train, save, train on and write the losses to a file, for every exchange. Then end as a machine that fails does."""
    import torch.distributed as dist

    out = [_save(*exchange[:3], f"{folder}/{i}") for i, exchange in enumerate(EXCHANGES)]
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps(out))
    dist.barrier()
    for child in multiprocessing.active_children():  # those in which Megatron writes
        child.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _save(case: Case, sharding: str, how: str, folder: str) -> list[float]:
    with training.layout(case), training.optimizer_of(how, case):
        made = training.build(case, layers=1)
        training.train(made, BEFORE)
        checkpoints.save(made, case, folder, sharding)
        return training.train(made, AFTER)


def load_all(folder: str) -> list[tuple[list[float], list[Any]]]:
    """Build another model, load, and train on, for every exchange. Return losses, and the step counts in the groups."""
    return [_load(case, sharding, how, f"{folder}/{i}") for i, (case, sharding, _, how) in enumerate(EXCHANGES)]


def _load(case: Case, sharding: str, how: str, folder: str) -> tuple[list[float], list[Any]]:
    with training.layout(case), training.optimizer_of(how, case):
        made = training.build(case, seed=7, layers=1)
        checkpoints.load(made, case, folder, sharding)
        losses = training.train(made, AFTER)
    return losses, [group["step"] for inner in made.inner() for group in inner.param_groups]


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[list[float]], list[list[tuple[list[float], list[Any]]]]]:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    with pytest.raises(RuntimeError, match="have not ended in time"):
        run(2, save_all, folder, seconds=400)
    return json.loads(Path(folder, "losses.json").read_text()), run(2, load_all, folder, seconds=400)


@pytest.mark.parametrize("index", range(len(EXCHANGES)), ids=[" ".join(map(str, exchange)) for exchange in EXCHANGES])
def test_a_killed_run_goes_on_to_the_last_bit(resumed, index):
    before, after = resumed
    for result in after:
        losses, steps = result[index]
        assert losses == before[index]
        assert set(steps) == {AFTER.stop}
